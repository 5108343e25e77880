"""Reads a data set once, sample by sample, for what its quality is judged by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from lightning_tips.core import as_labels, inputs_of, reason_of, targets_of
from lightning_tips.data.fingerprints import Fingerprints, hash_sample, image_thumbnails

__all__ = ["Reading", "class_names", "file_of", "read_dataset", "without_randomness"]

LOOKED_AT = 8
"""Samples that are read twice, to see whether they change."""


@dataclass
class Reading:
    """What was read.

    Attributes:
        name: Of the data set: ``train``, ``val``, ``test``.
        dataset: It, as it was read.
        prints: Fingerprints of all samples; without thumbnails where they are no images.
        labels: (N,) class ids, or None.
        notes: What to know about it: sentences.
        is_random: Whether the same sample comes out differently each time.
        input_key: Where samples are dicts: the key of the inputs.
    """

    name: str
    dataset: Any
    prints: Fingerprints
    labels: NDArray[np.int64] | None
    notes: list[str] = field(default_factory=list)
    is_random: bool = False
    input_key: str | None = None

    @property
    def has_images(self) -> bool:
        """Whether the samples are images."""
        return self.prints.thumbnails is not None

    def __len__(self) -> int:
        return len(self.prints)


def read_dataset(
    name: str,
    loader: DataLoader[Any],
    input_key: str | None = None,
    target_key: str | None = None,
    like: Any = None,
    progress: bool = True,
) -> Reading:
    """Reads every sample of a loader's dataset, before anything is collated.

    Where samples change at random each time that they are read, as those of a training set with augmentation do, the
    transform of ``like`` takes the place of theirs if that ends it.

    Args:
        name: Of the data set.
        loader: Its dataset is read in its own order, with the loader's workers.
        input_key: Where samples are dicts: the key of the inputs, if it is none of the usual ones.
        target_key: Likewise of the targets.
        like: A dataset that does not change at random, such as that of the validation loader.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the dataset has no order, or samples cannot be compared.
        ValueError: If it is empty.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"The {name} data is {type(dataset).__name__}, which has no samples by number. Its quality can be looked at"
            " with a dataset that has __getitem__ and __len__."
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise TypeError(f"The {name} data comes in batches that {type(dataset).__name__} makes itself, not in samples.")
    if not len(dataset):
        raise ValueError(f"The {name} data is empty.")
    notes = []
    is_random = _is_random(dataset, input_key)
    if is_random and (still := without_randomness(dataset, like)) is not None and not _is_random(still, input_key):
        dataset, is_random = still, False
        notes.append(
            f"The {name} data is changed at random each time that it is read; it was read with the transform of the"
            " validation data."
        )
    if is_random:
        notes.append(
            f"The {name} data is changed at random each time that it is read. Only one draw of it was looked at, and so"
            " it is in the pictures: copies are missed where their draws differ."
        )
    prints, labels, problem = _read(name, dataset, loader, input_key, target_key, progress)
    if problem:
        notes.append(f"The {name} data has no labels to judge: {problem}")
    if prints.thumbnails is None:
        notes.append(f"The samples of the {name} data are no images (C, H, W): only identical ones are found.")
    return Reading(name, dataset, prints, labels, notes, is_random, input_key)


def _read(
    name: str,
    dataset: Any,
    loader: DataLoader[Any],
    input_key: str | None,
    target_key: str | None,
    progress: bool,
) -> tuple[Fingerprints, NDArray[np.int64] | None, str]:
    hashes: list[bytes] = []
    thumbnails: list[Tensor] | None = []
    labels: list[Any] = []
    problem = ""
    samples = DataLoader(
        dataset,
        loader.batch_size or 64,
        num_workers=loader.num_workers,
        collate_fn=_as_they_are,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    bar = tqdm(total=len(dataset), desc=f"Reading the {name} data", disable=None if progress else True, leave=False)
    for batch in samples:
        inputs = [_as_tensor(inputs_of(sample, input_key)) for sample in batch]
        hashes += [hash_sample(one) for one in inputs]
        if thumbnails is not None:
            thumbnails = [*thumbnails, *small] if (small := _thumbnails(inputs)) is not None else None
        if not problem:
            try:
                found = [targets_of(sample, target_key) for sample in batch]
                labels += [one.tolist() if isinstance(one, Tensor | np.ndarray) else one for one in found]
            except (KeyError, TypeError) as error:
                problem = reason_of(error)
        bar.update(len(batch))
    bar.close()
    classes = None
    if not problem:
        try:
            classes = as_labels(labels)
            if classes.ndim != 1:
                classes, problem = None, "a sample may have several labels."
        except (TypeError, ValueError) as error:
            problem = str(error)
    if thumbnails is None:
        return Fingerprints(hashes), classes, problem
    return Fingerprints(hashes, torch.cat(thumbnails)), classes, problem


def _as_they_are(samples: Any) -> list[Any]:
    return list(samples)


def _as_tensor(inputs: Any) -> Any:
    """An image of PIL as (C, H, W); an array as a tensor; all else as it is."""
    if hasattr(inputs, "getbands"):
        array = np.asarray(inputs)
        return torch.from_numpy(array.copy() if array.ndim == 2 else array.transpose(2, 0, 1).copy()).view(
            -1, *array.shape[:2]
        )
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(inputs))
    return inputs


def _thumbnails(inputs: list[Any]) -> list[Tensor] | None:
    """Of a batch; None if it holds anything but images."""
    if not all(isinstance(one, Tensor) and one.ndim == 3 and min(one.shape[1:]) > 1 for one in inputs):
        return None
    if len({one.shape for one in inputs}) == 1:
        return [image_thumbnails(torch.stack(inputs))]
    return [image_thumbnails(one[None]) for one in inputs]


def _is_random(dataset: Any, input_key: str | None) -> bool:
    places = {round(place) for place in np.linspace(0, len(dataset) - 1, LOOKED_AT)}

    def look() -> list[bytes]:
        return [hash_sample(_as_tensor(inputs_of(dataset[place], input_key))) for place in sorted(places)]

    return look() != look()


def without_randomness(dataset: Any, like: Any) -> Any:
    """A dataset with the ``transform`` of another one, by the custom of torchvision; both may lie in a ``Subset``.

    Args:
        dataset: It stays as it is.
        like: Its ``transform`` is taken.

    Returns:
        A shallow copy; None if that cannot be done.
    """
    if isinstance(dataset, Subset):
        inner = without_randomness(dataset.dataset, like)
        return None if inner is None else Subset(inner, dataset.indices)
    while isinstance(like, Subset):
        like = like.dataset
    if type(dataset) is not type(like) or not hasattr(dataset, "transform") or not hasattr(like, "transform"):
        return None
    changed = copy.copy(dataset)
    changed.transform = like.transform
    if hasattr(getattr(changed, "transforms", None), "transform"):  # what some of torchvision's call instead
        changed.transforms = copy.copy(changed.transforms)
        changed.transforms.transform = like.transform
    return changed


def _inside(dataset: Any, place: int) -> Iterator[tuple[Any, int]]:
    """The dataset and the place in it, then those within it."""
    yield dataset, place
    while isinstance(dataset, Subset):
        dataset, place = dataset.dataset, int(dataset.indices[place])
        yield dataset, place


def file_of(dataset: Any, place: int) -> str:
    """The file of a sample, where the dataset keeps them in ``samples`` or ``imgs``; else nothing."""
    for inner, number in _inside(dataset, place):
        for name in ("samples", "imgs"):
            found = getattr(inner, name, None)
            if isinstance(found, Sequence) and len(found) == len(inner):
                one = found[number]
                return str(one[0] if isinstance(one, tuple | list) else one)
    return ""


def class_names(dataset: Any) -> list[str]:
    """Of the classes, where the dataset has them in ``classes``, as torchvision's do; else none."""
    for inner, _ in _inside(dataset, 0):
        names = getattr(inner, "classes", None)
        if isinstance(names, list | tuple) and names and not isinstance(names, Mapping):
            return [str(name) for name in names]
    return []
