"""What a user reads in the terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm.auto import tqdm


def say(trainer: pl.Trainer, text: str) -> None:
    """Prints ``text`` on rank 0 without breaking the progress bar."""
    if not trainer.is_global_zero:
        return
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar):
        tqdm.write(text)
    else:
        print(text, flush=True)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest right names, or all when none is near.

    Args:
        wrong: What the user wrote.
        known: What would have been right.
    """
    known = sorted(set(known))
    if not known:
        return "There are none."
    folded = {name.lower(): name for name in known}
    near = [folded[name] for name in difflib.get_close_matches(wrong.lower(), folded, n=3, cutoff=0.6)]
    return f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"Known: {', '.join(known)}."


def reason_of(error: BaseException) -> str:
    """The message of an error. ``str()`` of a ``KeyError`` would be in quotes, and some errors have no message."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or repr(error)
