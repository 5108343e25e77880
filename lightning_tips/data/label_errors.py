"""Labels that are probably wrong: confident learning (Northcutt et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_tips.core import as_labels

__all__ = ["LabelError", "class_thresholds", "find_label_errors"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LabelError:
    """A label that is probably wrong.

    Attributes:
        place: Of the sample.
        given: Its label.
        suggested: The class that it seems to be.
        given_confidence: Probability of the label.
        suggested_confidence: Probability of the class that it seems to be.
    """

    place: int
    given: int
    suggested: int
    given_confidence: float
    suggested_confidence: float

    @property
    def score(self) -> float:
        """The normalised margin, from 0 to 1: how much likelier the suggested class is, halved and moved by a half."""
        return (1 + self.suggested_confidence - self.given_confidence) / 2

    def at(self, place: int) -> LabelError:
        """The same, of a sample at another place: where only some of a data set were judged."""
        return replace(self, place=place)


def class_thresholds(probabilities: Any, labels: Any) -> Array:
    """How sure the network is of a class on average, over the samples that carry its label.

    Args:
        probabilities: (N, C), as in :func:`find_label_errors`.
        labels: (N,), likewise.

    Returns:
        (C,); infinite for a class that no sample carries.
    """
    found, given = _checked(probabilities, labels)
    counts = np.bincount(given, minlength=found.shape[1])
    sums = np.bincount(given, found[np.arange(len(given)), given], minlength=found.shape[1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)


def find_label_errors(probabilities: Any, labels: Any) -> list[LabelError]:
    """Samples whose label is probably wrong, by what a network says of them that has not been trained on them.

    A sample counts for a class when the network is at least as sure of that class as it is on average on samples that
    carry its label: a class that is hard to tell has a low bar. If a sample counts for another class than its own, and
    that one is likelier than its own, the label is suspicious. Where it counts for several, the likeliest one is
    suggested. Networks that are too sure of all things move the bars up with them, so that the probabilities need not
    be calibrated. A class that no sample carries is never suggested.

    The probabilities must be out of sample: a network knows the wrong labels that it was trained on by heart.

    Args:
        probabilities: (N, C) of any float dtype; each row sums to 1.
        labels: (N,) class ids, less than C.

    Returns:
        The most suspicious first, by :attr:`LabelError.score`. Empty if there are none.

    Raises:
        ValueError: If shapes do not fit, numbers are not finite, rows do not sum to 1, or a label is C or more.
        TypeError: If labels are no class ids.

    Example:
        >>> find_label_errors([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.2, 0.8]], [0, 0, 1, 1])
        [LabelError(place=2, given=1, suggested=0, given_confidence=0.1, suggested_confidence=0.9)]
    """
    found, given = _checked(probabilities, labels)
    own = found[np.arange(len(given)), given]
    counting = np.where(found >= class_thresholds(found, given), found, -1.0)
    counting[np.arange(len(given)), given] = -1.0
    suggested = counting.argmax(1)
    # One that counts for its own class too may still be likelier another: the larger of both wins, as in the paper.
    likelier = counting[np.arange(len(given)), suggested]
    places = np.flatnonzero(likelier > own)
    order = places[np.argsort(own[places] - likelier[places], kind="stable")]
    return [
        LabelError(int(i), int(given[i]), int(suggested[i]), float(own[i]), float(likelier[i])) for i in order.tolist()
    ]


def _checked(probabilities: Any, labels: Any) -> tuple[Array, NDArray[np.int64]]:
    if isinstance(probabilities, Tensor):
        probabilities = probabilities.detach().cpu().double().numpy()
    found = np.asarray(probabilities, np.float64)
    if found.ndim != 2 or not found.size or found.shape[1] < 2:
        raise ValueError(
            f"Probabilities of the shape {found.shape}: one row a sample and one column a class are needed, (N, C) with"
            " two classes or more. For a binary network give both columns, [1 - p, p]."
        )
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        raise ValueError(f"{len(bad)} rows of the probabilities are not finite, the first of sample {bad[0]}.")
    sums = found.sum(1)
    wrong = np.flatnonzero((np.abs(sums - 1) > 1e-2) | (found < -1e-6).any(1))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} rows are no probabilities: that of sample {wrong[0]} sums to {sums[wrong[0]]:.4g}, with a"
            f" smallest value of {found[wrong[0]].min():.4g}. Are these logits? Pass logits.softmax(1)."
        )
    given = as_labels(labels)
    if given.ndim != 1:
        raise ValueError(f"Labels of the shape {given.shape}: one class a sample is needed, (N,).")
    if len(given) != len(found):
        raise ValueError(f"There are {len(found)} rows of probabilities but {len(given)} labels.")
    if (highest := int(given.max())) >= found.shape[1]:
        raise ValueError(f"There is a label {highest}, but the probabilities are of {found.shape[1]} classes.")
    return found, given.astype(np.int64)
