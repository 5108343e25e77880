"""`ClassAugmentationCallback`: augmentation of all classes alike, or of chosen ones with a probe for the shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.core import ActsOn, ReplacedStep, TipCallback, agree, log_numbers, replace_inputs, split_batch
from lightning_tips.imbalance.counting import count_classes
from lightning_tips.imbalance.shortcut import (
    Augment,
    Shortcut,
    augment_samples,
    belong,
    minority_classes,
    shortcut_probe,
)

PROBED_BATCHES = 8


class ClassAugmentationCallback(TipCallback):
    """Augments training images on the device, each by itself, by the class that they are of.

    The safe way, and the default, is the same operations on every class; put an
    :class:`~lightning_tips.ImbalancedSamplerCallback` beside it, so that the rare ones come more often, each time in
    another form. Augmenting only the rare ones, ``classes="rare"``, is what is often advised and teaches a shortcut: a
    network that takes whatever looks processed for the rare class. Then each validation probes for that and warns.

    Args:
        augment: One image (C, H, W) to one of the same shape, or several of them to be applied one after the other: a
            torchvision v2 transform for example; in yaml ``class_path`` and ``init_args``.
        classes: ``"all"``, ``"rare"`` (those with fewer training samples than the average class), or a list.
        seed: Of the random numbers, which depend on it, the epoch, the batch and the place in it.
        input_key: Key of the images in batches that are dicts, if it is none of the usual ones.
        target_key: Key of the targets, likewise.

    Raises:
        MisconfigurationException: At the first step, for batches without images; before it, for unknown classes.
    """

    tip = "augmentation"
    acts_on = ActsOn.DATA

    def __init__(
        self,
        augment: torch.nn.Module | list[torch.nn.Module] | Callable[[Tensor], Tensor],
        classes: Literal["all", "rare"] | list[int] = "all",
        seed: int = 0,
        input_key: str | None = None,
        target_key: str | None = None,
    ) -> None:
        if isinstance(classes, str) and classes not in ("all", "rare"):
            raise ValueError(f"classes={classes!r} must be 'all', 'rare' or a list of class indices.")
        self.augment: Augment = _chain(augment) if isinstance(augment, list) else augment
        self.classes = classes
        self.seed = seed
        self.input_key = input_key
        self.target_key = target_key
        self.shortcut: Shortcut | None = None
        """What the probe found in the last validation."""
        self._chosen: list[int] | None = None  # None: all
        self._step: ReplacedStep | None = None
        self._probed = [0, 0, 0]  # false alarms on clean and augmented samples, samples

    def describe(self) -> str:
        """For the table at fit start."""
        which = "all classes alike" if self._chosen is None else f"classes {', '.join(map(str, self._chosen))} only"
        return f"augments {which}"

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self.shortcut = None

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stands before the training step."""
        self._release()
        self._chosen = self._choose(trainer)
        self._step = ReplacedStep(trainer.strategy, lambda *args, **kwargs: self._augmented(trainer, *args, **kwargs))
        super().on_train_start(trainer, pl_module)
        if not self.events:
            self.record(trainer, self.describe())

    def _choose(self, trainer: pl.Trainer) -> list[int] | None:
        if self.classes == "all":
            return None
        try:
            counts = agree(trainer, count_classes(trainer, self.target_key).counts)
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        chosen = minority_classes(counts) if self.classes == "rare" else [int(c) for c in self.classes]
        if unknown := [c for c in chosen if not 0 <= c < len(counts)]:
            raise MisconfigurationException(
                f"{type(self).__name__} is to augment the classes {unknown}, but there are only 0 to {len(counts) - 1}."
            )
        return chosen

    def _augmented(self, trainer: pl.Trainer, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx  # training_step need not have an argument for it
        images, targets = self._parts(batch)
        # A large odd factor for each part of the address, so that no two samples of a run meet.
        first = (self.seed * 7919 + trainer.current_epoch) * 1_000_003 + batch_idx
        first = (first * 65_537 + trainer.global_rank) * len(images)
        seeds = torch.arange(len(images)) + first % (1 << 62)
        chosen = None if self._chosen is None else belong(targets, self._chosen)
        augmented = augment_samples(images, self.augment, seeds, chosen)
        return step(replace_inputs(batch, augmented, self.input_key), *args, **kwargs)

    def _parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        try:
            images, targets = split_batch(batch, self.input_key, self.target_key)
        except (KeyError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error.args[0]}") from error
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise MisconfigurationException(
                f"{type(self).__name__} augments images (B, C, H, W), but the inputs are {found}. Pass input_key=...,"
                " or augment in the dataset."
            )
        return images, targets

    # ---- the probe

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count."""
        self._probed = [0, 0, 0]

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Probes the first batches, before the step: whoever watches the outputs must see those of the step last."""
        probing = self._chosen is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not probing or dataloader_idx or batch_idx >= PROBED_BATCHES:
            return
        images, targets = self._parts(batch)
        found = shortcut_probe(pl_module, images, targets, self.augment, self._chosen or [], self.seed)
        self._probed = [a + b for a, b in zip(self._probed, (found.clean, found.augmented, found.total), strict=True)]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns, once, of what the probe found."""
        if self._chosen is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        counts = torch.tensor(self._probed, dtype=torch.float32, device=trainer.strategy.root_device)
        counts = counts if trainer.world_size == 1 else trainer.strategy.reduce(counts, reduce_op="sum")
        clean, augmented, total = (int(n) for n in counts.tolist())
        self.shortcut = Shortcut(clean, augmented, total)
        log_numbers(trainer, {"tips/augmentation/shortcut_gap": self.shortcut.gap})
        if self.shortcut.suspicious and not any(event.what == "shortcut suspected" for event in self.events):
            self.record(trainer, "shortcut suspected", clean=clean / total, augmented=augmented / total)
            rank_zero_warn(
                f"The network takes {augmented / total:.0%} of other samples for the classes {self._chosen} once they"
                f" are augmented, {clean / total:.0%} as they are: it has learnt that what looks augmented is of these"
                " classes. Use classes='all' with an ImbalancedSamplerCallback beside it."
            )

    # ---- the end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the training step as it was."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the training step as it was."""
        self._release()

    def _release(self) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None


def _chain(parts: list[Any]) -> Augment:
    def augment(image: Tensor) -> Tensor:
        for part in parts:
            image = part(image)
        return image

    return augment
