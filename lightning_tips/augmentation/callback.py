"""`BatchAugmentationCallback`: augments the training batches of any module, on the device, each sample by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_tips.augmentation.batch import augment_batch, check_images
from lightning_tips.augmentation.checks import check_arguments, check_last_epochs, warn_if_never_off
from lightning_tips.augmentation.geometry import Padding
from lightning_tips.augmentation.metrics import hard_targets_for, index_metrics
from lightning_tips.augmentation.mix import mix_batch
from lightning_tips.augmentation.policies import Policy, Step, describe_policy, read_policy
from lightning_tips.augmentation.preview import changing_first, contact_sheet
from lightning_tips.augmentation.samples import SampleFinder
from lightning_tips.augmentation.shortcut import Shortcut, ShortcutWatch, belong_to
from lightning_tips.augmentation.surroundings import (
    chosen_classes,
    first_mixed_step,
    label_names,
    number_of_classes,
    refuse_hard_losses,
    refuse_what_would_stay,
)
from lightning_tips.core import (
    ActsOn,
    ReplacedStep,
    agree,
    inputs_of,
    log_picture,
    reason_of,
    replace_inputs,
    replace_targets,
    report_folder,
    say,
    targets_of,
)

PREVIEWED = 8  # images in the contact sheet
FORMS = 3  # of each


class BatchAugmentationCallback(SampleFinder):
    """Augments training batches on the device, each sample with parameters of its own, without an edit to the module.

    What becomes of a sample depends on ``seed``, the epoch and the sample, which is known by its place in the dataset:
    the same after a resume, with any number of workers and ranks, any batch size and any order. Where that place is not
    known, or a sample may come more than once in an epoch, its place in the epoch's order decides, which is said once:
    the same after a resume and with any number of workers; of ranks too where these take turns in one order, as those
    of ``ImbalancedSamplerCallback`` do. ``sample_key`` names the samples instead.

    Validation, test and prediction never see it.

    Args:
        policy: ``"light"``, ``"standard"``, ``"strong"``, or a list of operations and transforms, in yaml for example
            ``[HorizontalFlip, {Rotate: {degrees: 15}}]``; see :func:`~lightning_tips.augmentation.read_policy`.
        mixup: Alpha of mixup, 0.2 for example; 0 for none. The training step then gets targets (B, C) of probabilities.
        cutmix: Alpha of CutMix, 1.0 for example; with both, each sample gets one of them by chance.
        only_classes: Augment only these classes, or ``"minority"``: those with fewer samples than classes have on
            average. It can teach a shortcut, that what looks augmented is of these classes; each validation probes for
            that, on its first batches, and warns. Better is an ``ImbalancedSamplerCallback`` beside the augmentation
            of all: rare samples come more often, each time in another form.
        preview: Whether to leave a contact sheet before the first step, ``augmentation.png`` in the run's folder.
        last_epochs_off: How many epochs at the end to train without augmentation and mixing.
        num_classes: C, for mixing; by default the module's ``num_classes``, else that of the training labels.
        value_range: Darkest and brightest value of float images; by default (0, 1).
        padding: What comes in from beyond the edge: ``"zeros"``, ``"border"`` or ``"reflection"``.
        seed: Of the random numbers.
        input_key: Key of the images in batches that are dicts, if it is none of the usual ones.
        target_key: Key of the targets, likewise.
        sample_key: Key of the samples' own numbers (B,) in batches that are dicts, or their place in tuples; wanted
            only where the loader does not tell. Not beside over-sampling: the repeats of a sample in one epoch would
            look alike.

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
        check_arguments(steps, mixup, cutmix, only_classes, last_epochs_off, padding)
        super().__init__(seed, sample_key)
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
        self.input_key = input_key
        self.target_key = target_key
        self.shortcut: Shortcut | None = None
        """What the probe found in the last validation, with ``only_classes``."""
        self._steps: list[Step] = steps
        self._chosen: list[int] | None = None  # None: all
        self._classes: int | None = None
        self._metrics: list[Metric] = []  # of the module, that cannot take mixed targets
        self._step: ReplacedStep | None = None
        self._watch: ShortcutWatch | None = None
        self._tried = False  # whether a batch of this fit went through
        self._to_show = False  # whether the contact sheet waits for its batch

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

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self.shortcut = None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be known before there are batches."""
        super().prepare(trainer, pl_module)
        check_last_epochs(trainer, self.last_epochs_off)
        if self.mixup or self.cutmix:
            refuse_hard_losses(pl_module)

    # ---- training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stands before the training step."""
        self._release_step()  # a learning rate finder may have begun before
        self._tried = False
        warn_if_never_off(trainer, self.last_epochs_off)
        self._to_show = trainer.global_step == 0 and self.preview and not getattr(trainer, "fast_dev_run", False)
        self.look_at(trainer.train_dataloader, pl_module, trainer.world_size)
        self._chosen, self._classes = agree(trainer, (self._chosen, self._classes))
        if self._chosen is not None:
            self._watch = ShortcutWatch(
                self.policy, self._chosen, self.seed, value_range=self.value_range, padding=self.padding
            )
        self._metrics = index_metrics(pl_module)
        self._step = ReplacedStep(trainer.strategy, lambda *args, **kwargs: self._train(trainer, *args, **kwargs))
        super().on_train_start(trainer, pl_module)
        if not self.events:
            self.record(trainer, self.describe())

    def look_at(self, loader: Any, pl_module: pl.LightningModule, world_size: int = 1) -> None:
        """Learns how the samples are known and, where they are needed, the classes."""
        super().look_at(loader, pl_module, world_size)
        self._chosen = chosen_classes(self.only_classes, loader, self.target_key)
        if self.mixup or self.cutmix:
            self._classes = self.num_classes or number_of_classes(pl_module, loader, self.target_key)

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says when it goes off."""
        if self.last_epochs_off and self._is_off(trainer) and not any(event.what == "off" for event in self.events):
            self.record(trainer, "off")

    def _is_off(self, trainer: pl.Trainer) -> bool:
        return bool(self.last_epochs_off) and trainer.current_epoch >= (trainer.max_epochs or 0) - self.last_epochs_off

    def _train(self, trainer: pl.Trainer, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_off(trainer):
            return step(batch, *args, **kwargs)
        try:
            images = inputs_of(batch, self.input_key)
            if not self._tried:
                self.check(batch)
            if self._to_show and self.shows_something(batch):
                self._to_show = False
                self._show(trainer, batch)
            changed = replace_inputs(batch, self._augment(trainer, batch, images), self.input_key)
            if self.mixup or self.cutmix:
                changed = self._mix(trainer, changed)
        except (KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {reason_of(error)}") from error
        tried, self._tried = self._tried, True
        if not (self.mixup or self.cutmix):
            return step(changed, *args, **kwargs)
        with hard_targets_for(self._metrics):
            if tried:
                return step(changed, *args, **kwargs)
            return first_mixed_step(lambda: step(changed, *args, **kwargs))

    def check(self, batch: Any) -> None:
        """Raises unless it can augment a batch like this one without doing harm to what else is in it.

        Raises:
            ValueError: For images of another kind; see :func:`~lightning_tips.augmentation.augment_batch`.
            KeyError: If it is not known where they are.
            TypeError: For images or a batch of another type.
            MisconfigurationException: For masks and boxes that would not move with the images.
        """
        images = inputs_of(batch, self.input_key)
        check_images(images, self.value_range)
        refuse_what_would_stay(batch, images, self._steps, self.target_key)

    def _augment(
        self, trainer: pl.Trainer, batch: Any, images: Tensor, later: int = 0, rows: list[int] | None = None
    ) -> Tensor:
        """The images in the form that they have in this epoch, or in one ``later``; on request only some ``rows``."""
        seeds = self._sample_seeds(trainer, batch, len(images), later)
        belong = None if self._chosen is None else belong_to(targets_of(batch, self.target_key), self._chosen)
        if rows is not None:
            images, seeds, belong = images[rows], seeds[rows], None if belong is None else belong[rows]
        if belong is None:
            return self._apply(images, seeds)
        result = images.clone()
        if bool(belong.any()):
            result[belong] = self._apply(images[belong], seeds[belong.cpu()])
        return result

    def _apply(self, images: Tensor, seeds: Tensor) -> Tensor:
        # Values are looked at in the first batch only: that needs a pass over them, and on a GPU waits for it.
        return augment_batch(
            images, self.policy, seeds, value_range=self.value_range, padding=self.padding, check=False
        )

    def _mix(self, trainer: pl.Trainer, batch: Any) -> Any:
        images, targets = inputs_of(batch, self.input_key), targets_of(batch, self.target_key)
        if not isinstance(targets, Tensor):
            raise TypeError(f"mixup and cutmix need targets that are a tensor, not {type(targets).__name__}.")
        seed = self._address(trainer).batch_seed()
        images, targets = mix_batch(images, targets, self._classes, self.mixup, self.cutmix, seed)
        return replace_targets(replace_inputs(batch, images, self.input_key), targets, self.target_key)

    # ---- the probe for the shortcut, with only_classes

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count."""
        if self._watch is not None:
            self._watch.begin()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Probes the first batches, before the step: whoever watches the outputs must see those of the step last."""
        if self._watch is not None and not dataloader_idx:
            self._watch.look(pl_module, batch, batch_idx, self.input_key, self.target_key)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns, once, of what the probe found."""
        if self._watch is None:
            return
        self.shortcut = found = self._watch.finish(trainer)
        if found.suspicious and not any(event.what == "shortcut suspected" for event in self.events):
            clean, augmented = found.shares
            self.record(trainer, "shortcut suspected", clean=clean, augmented=augmented)
            rank_zero_warn(found.warning(self._chosen))

    # ---- the contact sheet

    def _show(self, trainer: pl.Trainer, batch: Any) -> None:
        if trainer.is_global_zero:
            path = report_folder(trainer) / "augmentation.png"
            self.draw(trainer, batch, getattr(trainer.train_dataloader, "dataset", None), path)
            log_picture(trainer, "tips/augmentation/preview", path)
            say(trainer, f"What the augmentation shows: {path}")

    def shows_something(self, batch: Any) -> bool:
        """Whether a contact sheet of the batch would hold an augmented image; with ``only_classes`` not each does."""
        return self._chosen is None or bool(belong_to(targets_of(batch, self.target_key), self._chosen).any())

    def _shown_rows(self, batch: Any, count: int) -> list[int]:
        """Which images of a batch to show: the first; with ``only_classes`` those that change come before others."""
        if self._chosen is None:
            return list(range(count))[:PREVIEWED]
        return changing_first(belong_to(targets_of(batch, self.target_key), self._chosen).tolist(), PREVIEWED)

    def draw(self, trainer: pl.Trainer, batch: Any, dataset: Any, path: Path) -> None:
        """Leaves the contact sheet of a batch: images as they are, in this epoch, in the next ones, and mixed.

        Args:
            trainer: Tells the epoch.
            batch: Of the training data.
            dataset: Where it is from; its ``classes`` name the labels.
            path: The PNG to write.
        """
        images = inputs_of(batch, self.input_key)
        rows = self._shown_rows(batch, len(images))
        forms = [self._augment(trainer, batch, images, later, rows) for later in range(FORMS)]
        titles = [f"epoch {trainer.current_epoch + later}" for later in range(FORMS)]
        if self.mixup or self.cutmix:
            augmented = replace_inputs(batch, self._augment(trainer, batch, images), self.input_key)
            forms.append(inputs_of(self._mix(trainer, augmented), self.input_key)[rows])
            titles.append("mixed")
        labels = label_names(dataset, batch, len(images), self.target_key)
        named = [labels[row] for row in rows]
        contact_sheet(images[rows], forms, named, path, self.value_range or (0, 1), titles)

    # ---- the end

    def release(self) -> None:
        """Leaves training step and loaders as they were."""
        super().release()
        self._release_step()

    def _release_step(self) -> None:
        if self._step is not None:
            self._step.remove()
        self._step = self._watch = None
