"""`BatchAugmentationCallback`: augments the training batches of any module, on the device, each sample by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.augmentation.batch import augment_batch, check_images
from lightning_tips.augmentation.geometry import Padding
from lightning_tips.augmentation.mix import mix_batch
from lightning_tips.augmentation.policies import Policy, Step, describe_policy, read_policy
from lightning_tips.augmentation.preview import contact_sheet
from lightning_tips.augmentation.random_numbers import hashed
from lightning_tips.augmentation.surroundings import (
    TAKES_MIXED,
    UNKNOWN_SIZE,
    batch_size_of,
    belong_to,
    label_names,
    own_numbers,
    refuse_hard_losses,
)
from lightning_tips.core import (
    ActsOn,
    ReplacedStep,
    TipCallback,
    class_counts,
    find_labels,
    inputs_of,
    log_picture,
    replace_inputs,
    replace_targets,
    report_folder,
    say,
    targets_of,
)

PREVIEWED = 8  # images in the contact sheet
FORMS = 3  # of each


class BatchAugmentationCallback(TipCallback):
    """Augments training batches on the device, each sample with parameters of its own, without an edit to the module.

    What becomes of a sample depends on ``seed``, the epoch and the sample's place in the epoch's order: the same after
    a resume, with any number of workers, and, where ranks take turns in one order as DistributedSampler lets them, with
    any number of ranks and any batch size. ``sample_key`` makes it depend on the sample itself instead.

    Validation, test and prediction never see it.

    Args:
        policy: ``"light"``, ``"standard"``, ``"strong"``, or a list of operations and transforms, in yaml for example
            ``[HorizontalFlip, {Rotate: {degrees: 15}}]``; see :func:`~lightning_tips.augmentation.read_policy`.
        mixup: Alpha of mixup, 0.2 for example; 0 for none. The training step then gets targets (B, C) of probabilities.
        cutmix: Alpha of CutMix, 1.0 for example; with both, each sample gets one of them by chance.
        only_classes: Augment only these classes, or ``"minority"``: those with fewer samples than classes have on
            average. It can teach a shortcut (what looks augmented is rare): prefer an ``ImbalancedSamplerCallback``
            beside the augmentation of all, or ``ClassAugmentationCallback``, which probes for it.
        preview: Whether to leave a contact sheet before the first step, ``augmentation.png`` in the run's folder.
        last_epochs_off: How many epochs at the end to train without augmentation and mixing.
        num_classes: C, for mixing; by default the module's ``num_classes``, else that of the training labels.
        value_range: Darkest and brightest value of float images; by default (0, 1).
        padding: What comes in from beyond the edge: ``"zeros"``, ``"border"`` or ``"reflection"``.
        seed: Of the random numbers.
        input_key: Key of the images in batches that are dicts, if it is none of the usual ones.
        target_key: Key of the targets, likewise.
        sample_key: Key of the samples' own numbers (B,) in batches that are dicts, or their place in tuples. Not beside
            over-sampling: the repeats of a sample in one epoch would look alike.

    Raises:
        ValueError: For a policy or numbers out of their domain.
        MisconfigurationException: Before the first step, for batches, targets or losses that it cannot work with.
    """

    tip = "augmentation"
    acts_on = ActsOn.DATA

    def __init__(
        self,
        policy: list[Any] | str = "standard",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        only_classes: list[int] | str | None = None,
        preview: bool = True,
        last_epochs_off: int = 0,
        num_classes: int | None = None,
        value_range: tuple[float, float] | None = None,
        padding: Padding = "zeros",
        seed: int = 0,
        input_key: str | None = None,
        target_key: str | None = None,
        sample_key: int | str | None = None,
    ) -> None:
        steps = read_policy(policy)
        if not steps and not mixup and not cutmix:
            raise ValueError("The policy is empty and nothing is mixed: there is nothing to do. Leave the tip out.")
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"mixup={mixup} and cutmix={cutmix} must not be negative; 0 switches one off.")
        if isinstance(only_classes, str) and only_classes != "minority":
            raise ValueError(f"only_classes={only_classes!r} must be 'minority', a list of class indices or None.")
        if only_classes is not None and (mixup or cutmix):
            raise ValueError("Mixing is of all classes: leave mixup and cutmix at 0 with only_classes.")
        if last_epochs_off < 0:
            raise ValueError(f"last_epochs_off={last_epochs_off} must not be negative.")
        if padding not in ("zeros", "border", "reflection"):
            raise ValueError(f"padding={padding!r} must be 'zeros', 'border' or 'reflection'.")
        # A name stays one: a named policy adapts itself to images that are not RGB.
        self.policy: Policy = policy if isinstance(policy, str) else steps
        self.mixup = mixup
        self.cutmix = cutmix
        self.only_classes = only_classes
        self.preview = preview
        self.last_epochs_off = last_epochs_off
        self.num_classes = num_classes
        self.value_range = value_range
        self.padding: Padding = padding
        self.seed = seed
        self.input_key = input_key
        self.target_key = target_key
        self.sample_key = sample_key
        self._steps: list[Step] = steps
        self._chosen: list[int] | None = None  # None: all
        self._classes: int | None = None
        self._step: ReplacedStep | None = None
        self._batch_idx = 0
        self._batch_size = UNKNOWN_SIZE
        self._tried = False  # whether a batch of this fit went through

    def describe(self) -> str:
        """For the table at fit start."""
        parts = [describe_policy(self.policy)] if self._steps else []
        parts += [f"{name} {alpha:g}" for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)) if alpha]
        if self._chosen is not None:
            parts.append(f"classes {', '.join(map(str, self._chosen))} only")
        if last := self.last_epochs_off:
            parts.append("not in the last epoch" if last == 1 else f"not in the last {last} epochs")
        return ", ".join(parts)

    def conflict_with(self, other: object) -> str | None:
        """Weights of classes have no class to go by in mixed targets."""
        if (self.mixup or self.cutmix) and any(c.__name__ == "ClassWeightCallback" for c in type(other).__mro__):
            return "mixed targets have no class to take a weight from. Leave mixup and cutmix at 0, or sample instead."
        return None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before there are batches."""
        if self.last_epochs_off and (trainer.max_epochs is None or trainer.max_epochs < 0):
            raise MisconfigurationException(
                "last_epochs_off needs to know which epochs are the last: give the Trainer max_epochs."
            )
        if not (self.mixup or self.cutmix):
            return
        refuse_hard_losses(pl_module)

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stands before the training step."""
        self._release()
        self._tried = False
        self.look_at(trainer.train_dataloader, pl_module)
        self._step = ReplacedStep(trainer.strategy, lambda *args, **kwargs: self._train(trainer, *args, **kwargs))
        super().on_train_start(trainer, pl_module)
        if not self.events:
            self.record(trainer, self.describe())

    def look_at(self, loader: Any, pl_module: pl.LightningModule) -> None:
        """Learns what it must know of the training data: the batch size and, where it needs them, the classes."""
        self._batch_size = batch_size_of(loader)
        if self.only_classes is not None:
            self._chosen = self._choose(loader)
        self._classes = self._count_classes(loader, pl_module) if self.mixup or self.cutmix else None

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says when it goes off."""
        if self.last_epochs_off and self._is_off(trainer) and not any(event.what == "off" for event in self.events):
            self.record(trainer, "off")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes which batch it is: not every training step is told."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._batch_idx = batch_idx

    def _is_off(self, trainer: pl.Trainer) -> bool:
        return bool(self.last_epochs_off) and trainer.current_epoch >= (trainer.max_epochs or 0) - self.last_epochs_off

    def _train(self, trainer: pl.Trainer, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_off(trainer):
            return step(batch, *args, **kwargs)
        try:
            images = inputs_of(batch, self.input_key)
            if not self._tried:
                check_images(images, self.value_range)
                if trainer.global_step == 0:
                    self._show(trainer, batch)
            changed = replace_inputs(batch, self._augment(trainer, batch, images), self.input_key)
            if self.mixup or self.cutmix:
                changed = self._mix(trainer, changed)
        except (KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"{type(self).__name__}: {error.args[0] if error.args else error!r}"
            ) from error
        if self._tried or not (self.mixup or self.cutmix):
            self._tried = True
            return step(changed, *args, **kwargs)
        try:
            result = step(changed, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            raise MisconfigurationException(
                f"The training step does not take mixed targets: {error}. Mixup and cutmix need {TAKES_MIXED}; or leave"
                " them at 0."
            ) from error
        self._tried = True
        return result

    def _augment(
        self, trainer: pl.Trainer, batch: Any, images: Tensor, later: int = 0, first: int | None = None
    ) -> Any:
        """The images in the form that they have in this epoch, or in one ``later``; on request the ``first`` few."""
        seeds = self._seeds(trainer, batch, len(images), later)[:first]
        images = images[:first]
        if self._chosen is None:
            return self._apply(images, seeds)
        belong = belong_to(targets_of(batch, self.target_key)[:first], self._chosen)
        result = images.clone()
        if bool(belong.any()):
            result[belong] = self._apply(images[belong], seeds[belong.cpu()])
        return result

    def _apply(self, images: Tensor, seeds: Tensor) -> Tensor:
        # Values are looked at in the first batch only: that needs a pass over them, and on a GPU waits for it.
        return augment_batch(
            images, self.policy, seeds, value_range=self.value_range, padding=self.padding, check=False
        )

    def _seeds(self, trainer: pl.Trainer, batch: Any, count: int, later: int = 0) -> Tensor:
        """(B,) int64, by seed, epoch and sample."""
        epoch = hashed(hashed(np.array([self.seed]).astype(np.uint64)), trainer.current_epoch + later)
        if self.sample_key is not None:
            identity = own_numbers(batch, self.sample_key)
        else:  # its place in the order of all ranks together, which take turns
            identity = (self._batch_idx * self._batch_size + np.arange(count)) * trainer.world_size
            identity += trainer.global_rank
        return torch.from_numpy(hashed(epoch, identity).view(np.int64))

    def _mix(self, trainer: pl.Trainer, batch: Any) -> Any:
        images, targets = inputs_of(batch, self.input_key), targets_of(batch, self.target_key)
        if not isinstance(targets, Tensor):
            raise TypeError(f"mixup and cutmix need targets that are a tensor, not {type(targets).__name__}.")
        address = (self.seed, trainer.current_epoch, self._batch_idx, trainer.global_rank)
        word = np.zeros(1, np.uint64)
        for part in address:
            word = hashed(word, part)
        images, targets = mix_batch(images, targets, self._classes, self.mixup, self.cutmix, int(word[0]))
        return replace_targets(replace_inputs(batch, images, self.input_key), targets, self.target_key)

    # ---- what it needs to know

    def _counts(self, loader: Any) -> Any:
        try:
            return class_counts(find_labels(getattr(loader, "dataset", loader), self.target_key))
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def _choose(self, loader: Any) -> list[int]:
        counts = self._counts(loader)
        if self.only_classes == "minority":
            chosen = [c for c, number in enumerate(counts.tolist()) if number < counts.mean()]
            if not chosen:
                raise MisconfigurationException(
                    "only_classes='minority', but all classes have equally many training samples: leave it out."
                )
            return chosen
        chosen = [int(c) for c in self.only_classes or ()]
        if unknown := [c for c in chosen if not 0 <= c < len(counts)]:
            raise MisconfigurationException(
                f"only_classes names the classes {unknown}, but there are only 0 to {len(counts) - 1}."
            )
        return chosen

    def _count_classes(self, loader: Any, pl_module: pl.LightningModule) -> int | None:
        if self.num_classes is not None:
            return self.num_classes
        for owner in (pl_module, getattr(pl_module, "hparams", {})):
            found = owner.get("num_classes") if isinstance(owner, Mapping) else getattr(owner, "num_classes", None)
            if isinstance(found, int):
                return found
        try:
            return len(self._counts(loader))
        except MisconfigurationException:
            return None  # wanted for class indices only; mix_batch then says to pass num_classes

    # ---- the contact sheet

    def _show(self, trainer: pl.Trainer, batch: Any) -> None:
        if self.preview and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            path = report_folder(trainer) / "augmentation.png"
            self.draw(trainer, batch, getattr(trainer.train_dataloader, "dataset", None), path)
            log_picture(trainer, "tips/augmentation/preview", path)
            say(trainer, f"What the augmentation shows: {path}")

    def draw(self, trainer: pl.Trainer, batch: Any, dataset: Any, path: Path) -> None:
        """Leaves the contact sheet of a batch: images as they are, in this epoch, in the next ones, and mixed.

        Args:
            trainer: Tells the epoch.
            batch: Of the training data.
            dataset: Where it is from; its ``classes`` name the labels.
            path: The PNG to write.
        """
        images = inputs_of(batch, self.input_key)
        forms = [self._augment(trainer, batch, images, later, PREVIEWED) for later in range(FORMS)]
        titles = [f"epoch {trainer.current_epoch + later}" for later in range(FORMS)]
        if self.mixup or self.cutmix:
            augmented = replace_inputs(batch, self._augment(trainer, batch, images), self.input_key)
            forms.append(inputs_of(self._mix(trainer, augmented), self.input_key)[:PREVIEWED])
            titles.append("mixed")
        clean = images[:PREVIEWED]
        labels = label_names(dataset, batch, len(clean), self.target_key)
        contact_sheet(clean, forms, labels, path, self.value_range or (0, 1), titles)

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
