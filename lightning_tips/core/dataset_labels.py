"""The labels of a dataset, one integer a sample, from wherever it keeps them."""

from __future__ import annotations

import dis
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from tqdm.auto import tqdm

from lightning_tips.core.apart import look_apart
from lightning_tips.core.batch import targets_of
from lightning_tips.core.labels import Array, as_labels, as_values
from lightning_tips.core.messages import reason_of
from lightning_tips.core.untouched import same_random_numbers

__all__ = ["find_labels", "forget_labels", "stored_labels"]

Convert: TypeAlias = Callable[[Any], Array]

_LOOKED_AT = 8  # samples, to see whether a dataset gives out the labels that it keeps
_ROUNDS = 4  # in which they must come with the same labels, if those are to count for more than the kept ones
_SECONDS = 120.0  # for that
_LONGEST = 100_000  # numbers in an element that could be a row of labels

_seen: weakref.WeakKeyDictionary[Any, dict[tuple[str | None, str], Array]] = weakref.WeakKeyDictionary()


def find_labels(dataset: Any, target_key: str | None = None, progress: bool = True, raw: bool = False) -> Array:
    """The class of each sample, in the order of the dataset.

    Looked for in this order: the attributes ``targets`` and ``labels`` (through ``target_transform``, if there is one),
    the pairs in ``samples`` (torchvision's folders), the tensors of a ``TensorDataset``; in a ``Subset`` and a
    ``ConcatDataset`` for each part, to any depth; see :func:`stored_labels`. Otherwise, or where samples give other
    labels, every sample is fetched once, with a progress bar, and what was found is kept until a fit with tips begins
    or samples no longer agree. That leaves the global random generators as they were. It is done on each rank; all find
    the same, unless the dataset draws its labels at random.

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
    labels, keeps_others = _stored(dataset, convert, target_key)
    if labels is None:
        labels = _one_pass(dataset, target_key, progress, convert, apart=keeps_others)
    if len(labels) != len(dataset):
        raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {len(labels)} labels.")
    return labels


def stored_labels(dataset: Any, convert: Convert = as_labels, target_key: str | None = None) -> Array | None:
    """The labels as the dataset keeps them; None if it does not, or if its samples come with others.

    What a class keeps and gives out itself is believed. Where there is a doubt a few samples tell: in a wrapper that
    passes on the attributes of what it wraps (``__getattr__``), in a subclass with a ``__getitem__`` of its own beside
    labels that it inherits, and where what is kept is no class ids (``labels`` may be names). What is kept holds if any
    part of the samples agrees with it, if they do not tell which part is the label (three or more parts and no
    ``target_key`` that leads to it), or if they come with other labels each time. They are read apart, see
    :func:`look_apart`.

    Args:
        dataset: With a length and integer indices.
        convert: Makes an array of labels in any form.
        target_key: Key of the label where samples are dicts.

    Raises:
        TypeError: If the labels are no classes, and samples have no others.
        ValueError: If they are not one for each sample, and samples have no others.
    """
    return _stored(dataset, convert, target_key)[0]


def _stored(dataset: Any, convert: Convert, target_key: str | None) -> tuple[Array | None, bool]:
    """:func:`stored_labels`, and whether any are kept, be they those of the samples or not."""
    problem = None
    try:
        found = _kept(dataset, convert)
        if found is None:
            return None, False
        kept = convert(found)
        if len(kept) != len(dataset):
            raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {len(kept)} labels.")
    except (TypeError, ValueError) as error:
        problem = error
    if problem is None:
        if not _is_doubtful(dataset) or not _samples_have_others(dataset, kept, target_key, convert):
            return kept, True
    else:
        places = _spread(None, len(dataset))
        given = _looks(dataset, places, target_key, convert)[0].told_labels
        if given is None or _agree_as_numbers(dataset, places, given):
            raise problem
    _tell_of_others(dataset)
    return None, True


def _samples_have_others(dataset: Any, kept: Array, target_key: str | None, convert: Convert) -> bool:
    """Whether samples come with labels that are not the kept ones, and time and again with the same."""
    places = _spread(kept, len(dataset))
    kept = kept[places]
    looks: list[_Look] = []
    for rounds in (1, _ROUNDS):  # most need no more than one
        looks = _looks(dataset, places, target_key, convert, rounds)
        given = looks[0].told_labels
        if given is None or any(_agree(kept, part) for part in (given, *looks[0].parts)):
            return False
    first, *others = [look.told_labels for look in looks]
    return first is not None and all(other is not None and _agree(first, other) for other in others)


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
    for name, found in _attributes(dataset):
        if len(found) == len(dataset):
            return _transformed(found, getattr(dataset, "target_transform", None), convert)
        if len(found) and not isinstance(next(iter(found)), str):  # names of the classes are often called labels
            wrong.append(f"{len(found)} {name}")
    if wrong:
        raise ValueError(f"{type(dataset).__name__} has {len(dataset)} samples but {' and '.join(wrong)}.")
    return None


def _attributes(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Those that may be labels, the likeliest first."""
    for name in ("targets", "labels", "samples"):
        found = getattr(dataset, name, None)
        if found is None or callable(found) or not hasattr(found, "__len__"):
            continue
        if name == "samples":
            if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in found[:1]):
                continue
            found = [pair[1] for pair in found]
        yield name, found


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


def _one_pass(dataset: Any, target_key: str | None, progress: bool, convert: Convert, apart: bool) -> Array:
    """Of every sample; ``apart`` where it has labels otherwise, so that nobody expects it to be read here."""

    def read(whole: Any) -> Array:
        numbers = tqdm(
            range(len(whole)),
            desc=f"Reading the labels of {type(whole).__name__}",
            disable=None if progress else True,
            leave=False,
        )
        return convert([_label(whole[i], whole, target_key) for i in numbers])

    try:
        cache = _seen.setdefault(dataset, {})
    except TypeError:  # cannot be hashed or referred to weakly
        cache = {}
    key = (target_key, convert.__name__)
    if key not in cache or not _still(cache[key], dataset, target_key, convert):
        if apart:
            cache[key] = look_apart(read, dataset)
        else:
            with same_random_numbers():
                cache[key] = read(dataset)
    return cache[key]


def _still(labels: Array, dataset: Any, target_key: str | None, convert: Convert) -> bool:
    """Whether a dataset that was read some time ago still seems to have those labels."""
    if len(labels) != len(dataset):
        return False
    places = _spread(labels, len(dataset))
    given = _looks(dataset, places, target_key, convert)[0].labels
    return given is None or _agree(labels[places], given)


def _label(sample: Any, dataset: Any, target_key: str | None) -> Any:
    try:
        if not isinstance(sample, Mapping | Sequence) or isinstance(sample, str):
            raise TypeError(f"a sample is a {type(sample).__name__}, neither a tuple nor a dict")
        label = targets_of(sample, target_key)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"No labels can be found in {type(dataset).__name__}: {reason_of(error)}. Give the dataset an attribute"
            " `targets`, or pass the labels to the sampler."
        ) from error
    return label.tolist() if isinstance(label, torch.Tensor | np.ndarray) else label


# ---- whether to look at samples


def _is_doubtful(dataset: Any) -> bool:
    """Whether what it keeps may be the labels of other samples than those that it gives out."""
    order = type(dataset).__mro__
    getters = [cls for cls in order if "__getitem__" in vars(cls) and cls is not Dataset]
    for known in (Subset, ConcatDataset, TensorDataset):
        if isinstance(dataset, known):
            inside = getattr(dataset, "datasets", [dataset.dataset] if isinstance(dataset, Subset) else [])
            return getters[0] is not known or any(_is_doubtful(part) for part in inside)
    name = next((name for name, found in _attributes(dataset) if len(found) == len(dataset)), None)
    if name is None:
        return False
    if name not in getattr(dataset, "__dict__", {}) and not any(name in vars(cls) for cls in order):
        return True  # of what it wraps
    if len(getters) < 2:
        return False
    keeper = next((at for at, cls in enumerate(order) if _sets(cls, name)), len(order))
    return order.index(getters[0]) < keeper


def _sets(cls: type, name: str) -> bool:
    """Whether labels of that name are the class's own: an attribute of it, or set by one of its methods."""
    if name in vars(cls):
        return True
    for part in vars(cls).values():
        method = inspect.unwrap(part) if isinstance(part, FunctionType) else None
        if isinstance(method, FunctionType) and name in method.__code__.co_names:
            found = dis.get_instructions(method)
            if any(one.opname == "STORE_ATTR" and one.argval == name for one in found):
                return True
    return False


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


@dataclass
class _Look:
    """What a few samples come with.

    Attributes:
        labels: What counts as their labels; None where they come with none that can be read.
        told: Whether they tell that it is the label: by a name, or as the second of two.
        parts: Whatever else in them could be labels, unless the label was named.
    """

    labels: Array | None
    told: bool
    parts: list[Array]

    @property
    def told_labels(self) -> Array | None:
        """The labels if there is no doubt that they are."""
        return self.labels if self.told else None


def _looks(
    dataset: Any,
    places: NDArray[np.int64],
    target_key: str | None,
    convert: Convert,
    rounds: int = 1,
) -> list[_Look]:
    def look(whole: Any) -> list[_Look]:
        return [_look(whole, places, target_key, convert) for _ in range(rounds)]

    try:
        return look_apart(look, dataset, _SECONDS)
    except Exception:  # of whatever kind: what is kept is then all there is, and training will tell
        return [_Look(None, False, [])] * rounds


def _look(dataset: Any, places: NDArray[np.int64], target_key: str | None, convert: Convert) -> _Look:
    samples = [dataset[int(place)] for place in places]
    dicts = all(isinstance(sample, Mapping) for sample in samples)
    named = target_key is not None and (dicts or "." in target_key)  # in tuples a plain key is passed over
    try:
        labels = convert([_label(sample, dataset, target_key) for sample in samples])
    except Exception:  # whatever converting what is no label may raise
        return _Look(None, False, [])
    if labels.ndim > 2:
        return _Look(None, False, [])  # an image: a second view, or a mask
    if len(places) < len(dataset) and np.array_equal(labels, places):
        return _Look(None, False, [])  # the sample's own number
    told = named or dicts or all(len(sample) == 2 for sample in samples)
    return _Look(labels, told, [] if named else list(_parts(samples, convert)))


def _parts(samples: list[Any], convert: Convert) -> Iterator[Array]:
    rows = [sample if isinstance(sample, Mapping) else dict(enumerate(sample)) for sample in samples]
    for name in rows[0]:
        try:
            values = [row[name] for row in rows]
            if all(_may_be_labels(value) for value in values):
                yield convert([v.tolist() if isinstance(v, torch.Tensor | np.ndarray) else v for v in values])
        except Exception:  # no labels, whatever it is
            continue


def _may_be_labels(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim < 2 and len(value.reshape(-1)) <= _LONGEST
    return isinstance(value, int | float | np.generic) or (isinstance(value, list | tuple) and len(value) <= _LONGEST)


def _agree(kept: Array, given: Array) -> bool:
    kept, given = (a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a for a in (kept, given))
    if kept.ndim != given.ndim:  # class ids on one side, rows of 0 and 1 on the other
        ids, rows = (kept, given) if kept.ndim < given.ndim else (given, kept)
        return bool((rows.sum(1) == 1).all() and (rows.argmax(1) == ids).all())
    if kept.dtype.kind != "f" or given.dtype.kind != "f":
        return np.array_equal(kept, given)
    return kept.shape == given.shape and np.allclose(kept, given, rtol=1e-3, equal_nan=True)  # perhaps rounded
