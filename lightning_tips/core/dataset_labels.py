"""The labels of a dataset, one integer a sample, from wherever it keeps them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from tqdm.auto import tqdm

from lightning_tips.core.batch import targets_of
from lightning_tips.core.labels import Array, as_labels, as_values
from lightning_tips.core.untouched import same_random_numbers

__all__ = ["find_labels", "forget_labels", "stored_labels"]

Convert: TypeAlias = Callable[[Any], Array]

_LOOKED_AT = 8  # samples, to see whether a dataset gives out the labels that it keeps

_seen: weakref.WeakKeyDictionary[Any, dict[tuple[str | None, str], Array]] = weakref.WeakKeyDictionary()


def find_labels(dataset: Any, target_key: str | None = None, progress: bool = True, raw: bool = False) -> Array:
    """The class of each sample, in the order of the dataset.

    Looked for in this order: the attributes ``targets`` and ``labels`` (through ``target_transform``, if there is one),
    the pairs in ``samples`` (torchvision's folders), the tensors of a ``TensorDataset``; in a ``Subset`` and a
    ``ConcatDataset`` for each part, to any depth. They are compared with those of a few samples. Otherwise, or where
    samples give other labels, every sample is fetched once, with a progress bar, and what was found is kept until a fit
    with tips begins or samples no longer agree. That leaves the global random generators as they were. It is done on
    each rank; all find the same, unless the dataset draws its labels at random.

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
    convert = as_values if raw else as_labels
    labels = stored_labels(dataset, convert, target_key)
    if labels is None:
        labels = _one_pass(dataset, target_key, progress, convert)
    if len(labels) != len(dataset):
        raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {len(labels)} labels.")
    return labels


def stored_labels(dataset: Any, convert: Convert = as_labels, target_key: str | None = None) -> Array | None:
    """The labels as the dataset keeps them; None if it does not, or if its samples come with others.

    A subclass may change what it inherits, a wrapper pass on an attribute of what it wraps, and ``labels`` may be the
    names of the classes. A few samples tell: what a module sees are theirs.

    Args:
        dataset: With a length and integer indices.
        convert: Makes an array of labels in any form.
        target_key: Key of the label where samples are dicts.

    Raises:
        TypeError: If the labels are no classes, and samples have no others.
        ValueError: If they are not one for each sample, and samples have no others.
    """
    kept, problem = None, None
    try:
        found = _kept(dataset, convert)
        if found is None:
            return None
        kept = convert(found)
        if len(kept) != len(dataset):
            raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {len(kept)} labels.")
    except (TypeError, ValueError) as error:
        problem = error
    if problem is None and type(dataset) is TensorDataset:
        return kept
    places = _spread(kept if problem is None else None, len(dataset))
    given = _given(dataset, places, target_key, convert)
    if problem is not None:
        if given is None or _agree_as_numbers(dataset, places, given):
            raise problem
    elif given is None or (kept is not None and _agree(kept[places], given)):
        return kept
    _tell_of_others(dataset)
    return None


def _agree_as_numbers(dataset: Any, places: NDArray[np.int64], given: Array) -> bool:
    """Whether labels that are no classes are those of the samples: a few numbers may look like class ids."""
    try:
        return _agree(as_values(_kept(dataset, as_values))[places], given)
    except (TypeError, ValueError, IndexError):
        return False


def _tell_of_others(dataset: Any) -> None:
    try:
        known = dataset in _seen
    except TypeError:
        known = False
    if not known:
        rank_zero_info(
            f"{type(dataset).__name__} keeps labels that its samples do not come with. The samples' own are used, for"
            " which all are read once."
        )


def forget_labels() -> None:
    """Forgets what was read from samples: a dataset may have other labels by the next fit."""
    _seen.clear()


def _kept(dataset: Any, convert: Convert) -> Any:
    """The labels as the dataset keeps them, or None if it does not."""
    if isinstance(dataset, Subset):
        # Through the whole only where that costs nothing; a pass over it could be far longer than one over the part.
        whole = _kept(dataset.dataset, convert)
        return None if whole is None else convert(whole)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_kept(part, convert) for part in dataset.datasets]
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


def _transformed(labels: Any, transform: Any, convert: Convert) -> Any:
    """What the dataset's own ``target_transform`` makes of the labels: that is what the module gets to see."""
    if transform is None:
        return labels
    kept = convert(labels)
    if kept.ndim != 1:
        return convert([np.asarray(transform(row)) for row in kept])
    known, places = np.unique(kept, return_inverse=True)
    with same_random_numbers():  # augmentation in a dataset draws from the global generators
        return convert([transform(label) for label in known.tolist()])[places]


def _one_pass(dataset: Any, target_key: str | None, progress: bool, convert: Convert) -> Array:
    try:
        cache = _seen.setdefault(dataset, {})
    except TypeError:  # cannot be hashed or referred to weakly
        cache = {}
    key = (target_key, convert.__name__)
    if key not in cache or not _still(cache[key], dataset, target_key, convert):
        with same_random_numbers():
            numbers = tqdm(
                range(len(dataset)),
                desc=f"Reading the labels of {type(dataset).__name__}",
                disable=None if progress else True,
                leave=False,
            )
            cache[key] = convert([_label(dataset[i], dataset, target_key) for i in numbers])
    return cache[key]


def _still(labels: Array, dataset: Any, target_key: str | None, convert: Convert) -> bool:
    """Whether a dataset that was read some time ago still seems to have those labels."""
    if len(labels) != len(dataset):
        return False
    places = _spread(labels, len(dataset))
    given = _given(dataset, places, target_key, convert)
    return given is None or _agree(labels[places], given)


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


# ---- what the samples say


def _spread(labels: Array | None, total: int) -> NDArray[np.int64]:
    """A few places from the first to the last, of as many classes as can be: what is relabelled may be a rare one."""
    parts = np.linspace(0.0, 1.0, _LOOKED_AT)
    if labels is None or labels.dtype.kind == "f":
        return np.unique((parts * (total - 1)).astype(np.int64))
    groups = labels.argmax(1) if labels.ndim == 2 else labels
    classes = np.unique(groups)
    classes = classes[np.linspace(0, len(classes) - 1, min(_LOOKED_AT, len(classes))).astype(np.int64)]
    places = []
    for turn, part in enumerate(parts):
        here = np.flatnonzero(groups == classes[turn % len(classes)])
        places.append(here[int(part * (len(here) - 1))])
    return np.unique(places)


def _given(dataset: Any, places: NDArray[np.int64], target_key: str | None, convert: Convert) -> Array | None:
    """The labels that samples come with; None where they come with none that can be read."""
    try:
        with same_random_numbers():
            twin = _apart(dataset)
            found = convert([_label(twin[int(place)], dataset, target_key) for place in places])
    except Exception:  # of whatever kind: what is kept is then all there is, and training will tell
        return None
    if found.ndim > 2:
        return None  # an image: a second view, or a mask
    if len(places) < len(dataset) and np.array_equal(found, places):
        return None  # the sample's own number
    return found


def _agree(kept: Array, given: Array) -> bool:
    kept, given = (a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a for a in (kept, given))
    if kept.ndim != given.ndim:  # class ids on one side, rows of 0 and 1 on the other
        ids, rows = (kept, given) if kept.ndim < given.ndim else (given, kept)
        return bool((rows.sum(1) == 1).all() and (rows.argmax(1) == ids).all())
    if kept.dtype.kind != "f" or given.dtype.kind != "f":
        return np.array_equal(kept, given)
    return kept.shape == given.shape and np.allclose(kept, given, rtol=1e-3, equal_nan=True)  # perhaps rounded


def _apart(dataset: Any) -> Any:
    """A shallow copy, if one can be had: what a sample makes its dataset open and keep is not left to its workers.

    Files that are opened with the first sample must be opened in each worker anew.
    """
    if hasattr(type(dataset), "__del__"):  # may close what the two share
        return dataset
    try:
        twin = copy.copy(dataset)
        if twin is dataset:
            return dataset
        for name, part in list(vars(twin).items()):
            if isinstance(part, Dataset):
                vars(twin)[name] = _apart(part)
            elif isinstance(part, list) and any(isinstance(p, Dataset) for p in part[:1]):
                vars(twin)[name] = [_apart(p) for p in part]
    except Exception:
        return dataset
    return twin
