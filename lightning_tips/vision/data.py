"""What the image data modules share: the dataset, the fixed stratified split and the reproducible train order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate


class SampleBatch(Sequence[tuple[Tensor, Tensor]]):
    """Samples that were fetched together and are stored together.

    To everybody it is a sequence of (image, label) samples; `collate` takes the two tensors as they are.

    Args:
        images: (B, C, H, W).
        labels: (B,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels, strict=True)


def collate(samples: Sequence[Any]) -> Any:
    """Collate like torch's default, without a copy for a `SampleBatch`."""
    return (samples.images, samples.labels) if isinstance(samples, SampleBatch) else default_collate(list(samples))


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images with labels; a whole batch is fetched in one indexing operation.

    Args:
        images: All images, (N, C, H, W) uint8; or a function from positions (int64 array) to such a tensor, for images
            that do not fit into memory.
        labels: (N,) int64.
        indices: Which of them belong to this dataset; None: all. They are not copied, so subsets are free.
        scale: The uint8 value that means 1.0.
        image_size: Height and width to resize to (bilinear, antialiased); None: as stored. Resizing happens when a
            batch is fetched: it costs a little each epoch, and no memory.

    Attributes:
        targets: (len(self),) int64, the labels in the order of this dataset, as torchvision's datasets call them.
        classes: Names of the classes, likewise; empty where nobody gave them.
    """

    def __init__(
        self,
        images: Tensor | Callable[[np.ndarray], Tensor],
        labels: Tensor,
        indices: Tensor | None = None,
        scale: float = 255.0,
        image_size: int | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = torch.arange(len(labels)) if indices is None else indices
        self.scale = scale
        self.image_size = image_size
        self.targets = labels[self.indices]
        self.classes: tuple[str, ...] = ()

    def subset(self, indices: Tensor) -> ImageDataset:
        """Return the dataset of the samples at these positions (int64) of this one."""
        return ImageDataset(self.images, self.labels, self.indices[indices], self.scale, self.image_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} of a dataset of {len(self)}.")
        sample: tuple[Tensor, Tensor] = self.__getitems__([index])[0]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        """Return the samples at `indices`: images (B, C, H, W) float32 in [0, 1], labels (B,) int64."""
        # NumPy, not torch: a batch is too small to share out between threads, and where cores are busy torch's
        # attempt at it takes 20 times as long.
        positions = self.indices.numpy()[np.asarray(indices, dtype=np.int64)]
        stored = self.images(positions).numpy() if callable(self.images) else self.images.numpy()[positions]
        images = torch.from_numpy(np.divide(stored, np.float32(self.scale), dtype=np.float32))
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False).clamp_(0, 1)
        return SampleBatch(images, torch.from_numpy(self.labels.numpy()[positions]))


class LateLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for the order when the first batch is asked for, not before.

    Workers get their first indices when the iterator is made. In a resumed run Lightning makes it before it tells the
    sampler the epoch (Lightning-AI/pytorch-lightning#21938), and the first resumed epoch would repeat the order of
    another one.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches."""
        yield from super().__iter__()


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Order samples so that every beginning of the order is stratified.

    For every n the first n samples hold each class in proportion to its size, up to a sample or two (more only where
    the next rule forces it); the subsets for growing n are nested. Every class has its first sample among the first C
    samples of C classes, and its last sample among the last C, so that a cut leaves no class out on either side.
    Depends on nothing but its arguments.

    Args:
        labels: (N,) int64.
        seed: Of the random order within each class.

    Returns:
        A permutation of range(N), (N,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        # The k-th of n samples stands at (k + 1/2) / n of the order: classes interleave in proportion to their sizes.
        positions = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        positions[-1] = 1.0
        positions[0] = 0.0
        keys[members[torch.randperm(len(members), generator=generator)]] = positions
    return torch.argsort(keys, stable=True)


class ImageDataModule(LightningDataModule):
    """Base class of the image data modules: split, subset, order and batches.

    Items are (image, label): (C, H, W) float32 in [0, 1], not normalised (that is the model's business), and int64.

    The validation part is stratified and depends on `seed` alone, never on rank, epoch or torch's global generator.
    The order of training is a pure function of (`seed`, epoch), whatever the number of ranks, so a run resumed at the
    end of an epoch sees the batches of the uninterrupted run. The last training batch may be smaller than the others;
    only one of a single image is dropped, because BatchNorm cannot train on it. Loaders draw nothing from torch's
    global generator.

    A subclass sets `class_names` and `in_channels`, and implements `load_train` and `load_test`.

    Args:
        batch_size: Samples per batch and rank, at least 1.
        num_workers: Worker processes per loader; they persist over epochs. In-memory data is quickest with 0.
        val_fraction: Share of the training part that becomes the validation part, in (0, 1).
        seed: Of the validation split, of the choice of `train_size` samples, and of the order of training.
        image_size: Height and width that images are resized to; None: as they are.
        train_size: Train on this many samples, chosen stratified; a greater number contains the smaller one's samples,
            and the validation part stays. None: all.
        class_counts: Train on at most so many images of each class, by its number in a dict (those it does not name
            are left out) or in a list; the validation part keeps these shares. Makes data imbalanced, for examples.
            None: all.
        positive_class: Tell this class (number or name) from all others: labels become 1 for it, 0 for the others.
            None: all classes by themselves.
        unlabelled_size: Of the training images that `train_size` and `class_counts` leave out, how many
            `unlabelled_dataset` holds. None: all.

    Attributes:
        train_set: Set by `setup`; so are `val_set` and `test_set`.

    Raises:
        ValueError: An argument out of its range; on `setup`: a class too small to split, or a `train_size` that is
            smaller than the number of classes or greater than the training part.
    """

    class_names: tuple[str, ...]
    in_channels: int = 3

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        image_size: int | None = None,
        train_size: int | None = None,
        class_counts: dict[int, int] | list[int] | None = None,
        positive_class: int | str | None = None,
        unlabelled_size: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 (load in the main process) or more, not {num_workers}.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is a share between 0 and 1, such as 0.1, not {val_fraction}.")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1, or None to leave images as they are, not {image_size}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self.image_size = image_size
        self.train_size = train_size
        self.class_counts = class_counts
        self.positive_class = positive_class
        self.unlabelled_size = unlabelled_size
        self.train_set: ImageDataset | None = None
        self.val_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None
        self._left_out: ImageDataset | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, known before `setup`."""
        return len(self.class_names) if self.positive_class is None else 2

    @property
    def label_names(self) -> tuple[str, ...]:
        """What each label stands for: `class_names`, or with `positive_class` the others and it."""
        positive = self.positive_class
        if positive is None:
            return self.class_names
        return "others", positive if isinstance(positive, str) else self.class_names[positive]

    @abstractmethod
    def load_train(self) -> tuple[ImageDataset, ImageDataset | None]:
        """Return the training part, and the validation part if it is given (None: it is split off)."""

    @abstractmethod
    def load_test(self) -> ImageDataset:
        """Return the test part."""

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs ("fit", "validate", "test", "predict"; None: everything), once."""
        if stage in (None, "fit", "validate") and self.train_set is None:
            train, val = self.load_train()
            if val is None:
                train, val = self._split_validation(train)
            every = train
            if self.class_counts is not None:
                share = len(val) / len(train)
                train, val = self._imbalanced(train, 1.0), self._imbalanced(val, share)
            self.train_set, self.val_set = self._relabel(self._choose_train(train)), self._relabel(val)
            self.train_set.classes = self.label_names
            left_out = ~torch.isin(every.indices, self.train_set.indices)
            self._left_out = self._relabel(every.subset(torch.nonzero(left_out).flatten()))
        if stage in (None, "test", "predict") and self.test_set is None:
            test = self.load_test()
            self.test_set = self._relabel(test if self.class_counts is None else self._imbalanced(test, None))

    def _imbalanced(self, data: ImageDataset, share: float | None) -> ImageDataset:
        """At most `share` of `class_counts` of each class, at least one; None: all of the classes that it names."""
        assert self.class_counts is not None
        given = self.class_counts
        counts = given if isinstance(given, dict) else dict(enumerate(given))
        if wrong := {c: n for c, n in counts.items() if not 0 <= c < len(self.class_names) or n < 1}:
            raise ValueError(
                f"class_counts={wrong}: the classes are 0 to {len(self.class_names) - 1}, each with 1 image or more."
            )
        chosen = []
        for label, count in counts.items():
            members = torch.nonzero(data.targets == label).flatten()
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(self.seed))
            chosen.append(members[order[: None if share is None else max(round(share * count), 1)]])
        return data.subset(torch.cat(chosen).sort().values)

    def _relabel(self, data: ImageDataset) -> ImageDataset:
        if self.positive_class is None:
            return data
        positive = self.positive_class
        if isinstance(positive, str):
            if positive not in self.class_names:
                raise ValueError(f"positive_class={positive!r} is none of {', '.join(self.class_names)}.")
            positive = self.class_names.index(positive)
        labels = (data.labels == positive).long()
        return ImageDataset(data.images, labels, data.indices, data.scale, data.image_size)

    def _split_validation(self, data: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
        val, rest = self._cut(data, self.val_fraction, self.seed)
        return rest, val

    def _cut(self, data: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
        """Cut a stratified `fraction` off; both parts keep the order of `data` and at least one sample per class."""
        classes = len(self.class_names)
        counts = torch.bincount(data.targets, minlength=classes).tolist()
        small = [f"{name} ({count})" for name, count in zip(self.class_names, counts, strict=True) if count < 2]
        if small:
            raise ValueError(
                f"A class needs at least 2 samples to have some on both sides of a split; too few in: "
                f"{', '.join(small)}. Add samples, or leave the class out."
            )
        size = round(fraction * len(data))
        size = min(max(size, classes), len(data) - classes)
        order = stratified_order(data.targets, seed)
        return data.subset(order[:size].sort().values), data.subset(order[size:].sort().values)

    def _choose_train(self, data: ImageDataset) -> ImageDataset:
        if self.train_size is None:
            return data
        if self.train_size < self.num_classes:
            raise ValueError(
                f"train_size={self.train_size} is too small for one sample of each class: pass at least "
                f"{self.num_classes}."
            )
        if self.train_size > len(data):
            raise ValueError(
                f"train_size={self.train_size}, but the training part has {len(data)} samples: pass at most that, or "
                "None for all."
            )
        return data.subset(stratified_order(data.targets, self.seed)[: self.train_size].sort().values)

    def unlabelled_dataset(self) -> ImageDataset:
        """Return the training images that `train_size` and `class_counts` leave out, or `unlabelled_size` of them.

        Nothing is kept back of their labels: it is for those who try out what unlabelled images bring not to look.
        """
        if self._left_out is None:
            self.setup("fit")
        assert self._left_out is not None
        if self.unlabelled_size is None:
            return self._left_out
        if self.unlabelled_size > len(self._left_out):
            raise ValueError(
                f"unlabelled_size={self.unlabelled_size}, but train_size and class_counts leave only "
                f"{len(self._left_out)} training images out."
            )
        order = torch.randperm(len(self._left_out), generator=torch.Generator().manual_seed(self.seed))
        return self._left_out.subset(order[: self.unlabelled_size].sort().values)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled loader of the training part; (images, labels) batches."""
        if self.train_set is None:
            self.setup("fit")
        assert self.train_set is not None
        trainer = self.trainer
        # Lightning leaves a DistributedSampler alone, also on one device, and tells it the epoch (set_epoch).
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            shuffle=True,
            seed=self.seed,
        )
        samples = len(sampler)
        single = samples > self.batch_size and samples % self.batch_size == 1
        return self._loader(self.train_set, sampler=sampler, drop_last=single and self.batch_size > 1)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the validation part, in fixed order."""
        if self.val_set is None:
            self.setup("validate")
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test part, in fixed order."""
        if self.test_set is None:
            self.setup("test")
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test part, in fixed order."""
        return self.test_dataloader()

    def _loader(self, dataset: ImageDataset | None, **kwargs: Any) -> DataLoader[Any]:
        assert dataset is not None
        return LateLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            collate_fn=collate,
            # A loader draws the seed of its workers, even when it has none; not from the generator of the training.
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )
