"""The labels of a dataset, one integer a sample, from wherever it keeps them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset
from tqdm.auto import tqdm

from lightning_tips.core.batch import targets_of
from lightning_tips.core.untouched import same_random_numbers

__all__ = ["as_labels", "bin_targets", "class_counts", "find_labels"]

Array = NDArray[Any]

_MOST_CLASSES = 10_000_000  # beyond this it is no class id but something else: a hash, a time, a measurement

_seen: weakref.WeakKeyDictionary[Any, dict[tuple[str | None, str], Array]] = weakref.WeakKeyDictionary()


def find_labels(dataset: Any, target_key: str | None = None, progress: bool = True, raw: bool = False) -> Array:
    """The class of each sample, in the order of the dataset.

    Looked for in this order: the attributes ``targets`` and ``labels`` (through ``target_transform``, if there is one),
    the pairs in ``samples`` (torchvision's folders), the tensors of a ``TensorDataset``; in a ``Subset`` and a
    ``ConcatDataset`` for each part, to any depth. Otherwise every sample is fetched once, with a progress bar, and
    what was found is kept as long as the dataset lives. That pass leaves the global random generators as they were.
    It is done on each rank; all find the same, unless the dataset draws its labels at random.

    Args:
        dataset: A dataset with a length and integer indices.
        target_key: Key of the label where samples are dicts; None: one of the usual ones.
        progress: Whether to show the progress bar.
        raw: Whether to leave the targets as they are, for regression: :func:`bin_targets` makes classes of them.

    Returns:
        (N,) integers, with ``raw`` any numbers; or (N, C) of 0 and 1 where a sample has several labels.

    Raises:
        TypeError: If the dataset is an ``IterableDataset`` or its labels are no classes.
        ValueError: If no labels can be found, or not one for each sample.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"{type(dataset).__name__} is an IterableDataset, whose samples cannot be chosen by a sampler. Use a"
            " dataset with __getitem__ and __len__, or balance the stream where it is made; weights in the loss work"
            " with it."
        )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{type(dataset).__name__} is no dataset with __getitem__ and __len__; pass the labels instead."
        )
    convert = _as_values if raw else as_labels
    stored = stored_labels(dataset, convert)
    labels = convert(_one_pass(dataset, target_key, progress, convert) if stored is None else stored)
    if len(labels) != len(dataset):
        raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {len(labels)} labels.")
    return labels


def as_labels(labels: Any) -> Array:
    """Labels in any form as an array of integers; without a copy where they are one already.

    Args:
        labels: A sequence, array or tensor of integers or bools, (N,) or (N, 1); or (N, C) of 0 and 1, where a sample
            may have several labels. Floats are taken if all are 0 or 1, as a binary loss wants them.

    Raises:
        TypeError: If they are no class ids.
        ValueError: If they are of another shape, negative, or none.
    """
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu()
        array = labels.float().numpy() if labels.dtype in (torch.bfloat16, torch.float16) else labels.numpy()
    else:
        try:
            array = np.asarray(labels)
        except ValueError as error:
            raise ValueError(f"The labels are ragged: give (N,) class ids, or (N, C) of 0 and 1. {error}") from None
    if not array.size:
        raise ValueError("There are no labels: the dataset is empty.")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2):
        raise ValueError(f"Labels of the shape {array.shape}: one class id a sample, (N,), or (N, C) of 0 and 1.")
    if array.dtype.kind in "USO":
        raise TypeError(
            f"Labels of type {type(labels[0]).__name__} such as {labels[0]!r} are no class ids; number them:"
            " np.unique(labels, return_inverse=True)[1]."
        )
    if array.dtype.kind == "f":
        if not ((array == 0) | (array == 1)).all():
            raise TypeError(
                "The labels are floats. For regression, sample by bins of them: labels=bin_targets(values, bins=10);"
                " for classes convert them to integers."
            )
        array = array.astype(np.uint8)
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    if array.dtype.kind not in "iu":
        raise TypeError(f"Labels of dtype {array.dtype} are no class ids; give integers.")
    if (lowest := int(array.min())) < 0:
        raise ValueError(
            f"There are negative class ids, {lowest} for one: classes are numbered from 0. If that marks samples to"
            " ignore, leave them out with a Subset."
        )
    if array.ndim == 2 and int(array.max()) > 1:
        raise ValueError(
            f"Labels of the shape {array.shape} must be 0 or 1, whether the sample has the label; found {array.max()}."
        )
    return array


def class_counts(labels: Any) -> NDArray[np.int64]:
    """How many samples each class has: (C,), where C is the highest class id plus one.

    Example:
        >>> class_counts([0, 0, 1, 0])
        array([3, 1])
    """
    array = as_labels(labels)
    if array.ndim == 2:
        return array.sum(0, dtype=np.int64)
    if (highest := int(array.max())) >= _MOST_CLASSES:
        raise ValueError(f"The class id {highest} is too high: number the classes from 0 without gaps.")
    counts = np.zeros(highest + 1, np.int64)
    for at in range(0, len(array), 1 << 20):  # bincount makes a copy of 8 bytes a label
        counts += np.bincount(array[at : at + (1 << 20)].astype(np.int64), minlength=len(counts))
    return counts


def bin_targets(values: Any, bins: int | Sequence[float] = 10, method: str = "quantile") -> NDArray[np.int64]:
    """Classes for regression targets: the number of the bin that each value lies in.

    Bins of equal width are what there is to balance: their counts differ. Quantiles are balanced already, but for ties
    and with an explicit mix. Bins without a value are left out, so that the ids have no gaps.

    Args:
        values: (N,) or (N, 1) finite numbers.
        bins: How many bins, at least 2; or the inner edges, in ascending order.
        method: ``"quantile"`` or ``"width"``, where ``bins`` is a number.

    Raises:
        ValueError: If an argument is out of its domain or all values fall into one bin.

    Example:
        >>> bin_targets([0.1, 0.2, 0.3, 9.0], bins=2, method="width")
        array([0, 0, 0, 1])
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"values of the shape {array.shape} must be one row of finite numbers, and at least one.")
    if method not in ("quantile", "width"):
        raise ValueError(f'method={method!r}: use "quantile" or "width".')
    if isinstance(bins, int):
        if bins < 2:
            raise ValueError(f"bins={bins} must be at least 2.")
        inner = np.linspace(0.0, 1.0, bins + 1)[1:-1]
        low, high = array.min(), array.max()
        edges = np.quantile(array, inner) if method == "quantile" else low + (high - low) * inner
    else:
        edges = np.asarray(bins, dtype=np.float64)
        if edges.ndim != 1 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise ValueError(f"bins={bins} must be a number or edges in ascending order.")
    found, classes = np.unique(np.searchsorted(edges, array, side="right"), return_inverse=True)
    if len(found) < 2:
        raise ValueError("All values fall into one bin: give other bins.")
    return classes.astype(np.int64)


def _as_values(targets: Any) -> Array:
    if isinstance(targets, torch.Tensor):
        targets = targets.detach().cpu().double()
    return np.asarray(targets, np.float64)


def stored_labels(dataset: Any, convert: Callable[[Any], Array] = as_labels) -> Any:
    """The labels as the dataset keeps them, or None if it does not."""
    if isinstance(dataset, Subset):
        # Through the whole only where that costs nothing; a pass over it could be far longer than one over the part.
        whole = stored_labels(dataset.dataset, convert)
        return None if whole is None else convert(whole)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [stored_labels(part, convert) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([convert(part) for part in parts])
    if isinstance(dataset, TensorDataset):
        if len(dataset.tensors) < 2:
            raise ValueError("The TensorDataset has inputs only, no labels; pass the labels.")
        return dataset.tensors[1]
    wrong = []
    for name in ("targets", "labels", "samples"):
        found = getattr(dataset, name, None)
        if found is None or callable(found) or not hasattr(found, "__len__"):
            continue
        if name == "samples":
            if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in found[:1]):
                continue
            found = [pair[1] for pair in found]
        if len(found) == len(dataset):
            return _transformed(found, getattr(dataset, "target_transform", None), convert)
        if len(found) and not isinstance(next(iter(found)), str):  # names of the classes are often called labels
            wrong.append(f"{len(found)} {name}")
    if wrong:
        raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {' and '.join(wrong)}.")
    return None


def _transformed(labels: Any, transform: Any, convert: Callable[[Any], Array]) -> Any:
    """What the dataset's own ``target_transform`` makes of the labels: that is what the module gets to see."""
    if transform is None:
        return labels
    kept = convert(labels)
    if kept.ndim != 1:
        return convert([np.asarray(transform(row)) for row in kept])
    known, places = np.unique(kept, return_inverse=True)
    with same_random_numbers():  # augmentation in a dataset draws from the global generators
        return convert([transform(label) for label in known.tolist()])[places]


def _one_pass(dataset: Any, target_key: str | None, progress: bool, convert: Callable[[Any], Array]) -> Array:
    try:
        cache = _seen.setdefault(dataset, {})
    except TypeError:  # cannot be hashed or referred to weakly
        cache = {}
    key = (target_key, convert.__name__)
    if key not in cache:
        with same_random_numbers():
            numbers = tqdm(
                range(len(dataset)),
                desc=f"Reading the labels of {type(dataset).__name__}",
                disable=None if progress else True,
                leave=False,
            )
            cache[key] = convert([_label(dataset[i], dataset, target_key) for i in numbers])
    return cache[key]


def _label(sample: Any, dataset: Any, target_key: str | None) -> Any:
    try:
        if not isinstance(sample, Mapping | Sequence) or isinstance(sample, str):
            raise TypeError(f"a sample is a {type(sample).__name__}, neither a tuple nor a dict")
        label = targets_of(sample, target_key)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"No labels can be found in {type(dataset).__name__}: {error.args[0]}. Give the dataset an attribute"
            " `targets`, or pass the labels to the sampler."
        ) from error
    return label.tolist() if isinstance(label, torch.Tensor | np.ndarray) else label
