"""Inputs and targets in batches of any form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_tips.core.messages import did_you_mean

INPUT_KEYS = ("image", "images", "x", "input", "inputs", "pixel_values", "img", "data", "features")
TARGET_KEYS = ("label", "labels", "y", "target", "targets", "class", "cls")


def find_key(batch: Mapping[str, Any], given: str | None, known: Sequence[str], role: str) -> str:
    """The key under which a dict batch holds its inputs or its targets.

    Args:
        batch: The batch.
        given: The key that the user named, or ``None`` to look for one of ``known``.
        known: Keys in common use, the most common first.
        role: ``"input"`` or ``"target"``, for the message.

    Raises:
        KeyError: If there is none, with the keys that there are.
    """
    if given is not None:
        if given not in batch:
            raise KeyError(f"The batch has no {role} under {given!r}. {did_you_mean(given, map(str, batch))}")
        return given
    for key in known:
        if key in batch:
            return key
    raise KeyError(
        f"Cannot tell which of the batch's keys {sorted(map(str, batch))} holds the {role}; pass {role}_key=..."
    )


def split_batch(batch: Any, input_key: str | None = None, target_key: str | None = None) -> tuple[Any, Any]:
    """Inputs and targets of a batch that is a tuple, a list or a dict.

    Args:
        batch: ``(inputs, targets, ...)`` or a mapping.
        input_key: Key of the inputs in a mapping; by default one of :data:`INPUT_KEYS`.
        target_key: Key of the targets in a mapping; by default one of :data:`TARGET_KEYS`.

    Returns:
        The inputs and the targets, as they are in the batch.

    Raises:
        KeyError: If a mapping holds none under a known key; the message says what to pass.
        TypeError: If the batch is neither a mapping nor a sequence of at least two.
    """
    if isinstance(batch, Mapping):
        inputs = find_key(batch, input_key, INPUT_KEYS, "input")
        return batch[inputs], batch[find_key(batch, target_key, TARGET_KEYS, "target")]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
        return batch[0], batch[1]
    raise TypeError(
        f"Expected a batch of (inputs, targets, ...) or a dict, got {type(batch).__name__}. Let the dataset return"
        " pairs or a dict."
    )
