"""The recall of each class in each validation of a run, as a file that `lightning-tips curve` reads."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.core import LogitWatcher, as_classes, confusion_matrix, gather_rows, recalls

__all__ = ["ClassRecallRecord"]

MOST_CLASSES = 1000


class ClassRecallRecord(LogitWatcher):
    """Writes a JSON file at the end of fit: which share of each class every validation found.

    Works for every module whose ``forward`` returns logits and whose ``validation_step`` calls it: they are looked at
    as they pass. Where that is not so it says in the file why, and leaves the run alone.

    The file holds ``rows`` (``step`` and ``recalls``, null for a class without samples), ``names`` of the classes where
    the training data has them, ``samples`` of each in the validation data, ``validation`` (a hash of its targets, to
    tell whether two runs had the same) and ``problem``.

    Args:
        target_key: Key of the targets in batches that are dicts, if it is none of the usual ones.
        path: The file; by default ``recalls.json`` in the Trainer's ``default_root_dir``.
    """

    def __init__(self, target_key: str | None = None, path: str | None = None) -> None:
        super().__init__(target_key)
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._problem: str | None = None
        self._samples: list[int] = []
        self._validation = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the last run."""
        if stage == "fit" and trainer.global_step == 0:
            self._reset()

    def watches(self, trainer: pl.Trainer) -> bool:
        """In fit, until there is a problem."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking and self._problem is None

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keeps logits and targets, where there are some."""
        try:
            super().on_validation_batch_end(*args, **kwargs)
        except MisconfigurationException as error:
            self._problem = f"no targets were found in the validation batches: {error}"
            self._outputs.close()

    def watched(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: tuple[Tensor, Tensor] | None) -> None:
        """Counts. All ranks find the same problem, because it is one of types and shapes."""
        if seen is None:
            self._problem = (
                f"no logits were seen: validation_step of {type(pl_module).__name__} does not call self(...), or that"
                " returns no tensor"
            )
            return
        try:
            logits, targets = as_classes(*seen, asker="The recall of each class")
        except (MisconfigurationException, RuntimeError) as error:
            self._problem = str(error)
            return
        if logits.shape[1] > MOST_CLASSES:
            self._problem = f"there are {logits.shape[1]} classes, more than {MOST_CLASSES}"
            return
        self._count(gather_rows(trainer, logits), gather_rows(trainer, targets), trainer.global_step)

    def _count(self, logits: Tensor, targets: Tensor, step: int) -> None:
        confusion = confusion_matrix(logits, targets)
        self._samples = confusion.sum(1).tolist()
        self._validation = hashlib.blake2b(targets.numpy().tobytes(), digest_size=16).hexdigest()
        found = [None if math.isnan(r) else round(r, 6) for r in recalls(confusion).tolist()]
        self._rows.append({"step": step, "recalls": found})

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, as plain data."""
        return {
            "rows": [dict(row) for row in self._rows],
            "problem": self._problem,
            "samples": list(self._samples),
            "validation": self._validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._problem, self._samples = state_dict["problem"], list(state_dict["samples"])
        self._validation = state_dict["validation"]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file."""
        if not trainer.is_global_zero:
            return
        problem = self._problem if self._rows or self._problem else "no validation ran"
        path = Path(self.path or Path(trainer.default_root_dir, "recalls.json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.state_dict() | {"problem": problem, "names": _names(trainer)}) + "\n")


def _names(trainer: pl.Trainer) -> list[str]:
    """Of the classes, where the training data has them in ``classes``, as torchvision's datasets do."""
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset  # a Subset
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []
