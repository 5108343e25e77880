"""`PseudoLabelCallback`: the run labels an unlabelled set and learns from it."""

from __future__ import annotations

import os
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_tips.core import Monitor, agree, class_counts, do_ranks_agree, find_labels, raise_together
from lightning_tips.data.fingerprint import fingerprint_of_sets
from lightning_tips.data.mixed_draw import natural_share
from lightning_tips.data.mixed_loader import RelabelledDataset, find_dataset
from lightning_tips.data.mixing_tip import MixingTip
from lightning_tips.data.pseudo_guard import SupervisedGuard, shared_curve
from lightning_tips.data.pseudo_labels import Outputs, PseudoLabels, choose_pseudo_labels
from lightning_tips.data.pseudo_report import Round, show_rounds, warn_of_odd_labels
from lightning_tips.data.pseudo_teacher import Teacher, teacher_probabilities
from lightning_tips.data.untouched import untouched

__all__ = ["PseudoLabelCallback"]


class PseudoLabelCallback(MixingTip):
    """More training data from unlabelled samples: the network labels those that it is sure of, and learns from them.

    At the start of an epoch a teacher predicts the unlabelled set, in eval mode and shared out over the ranks; samples
    with enough confidence get its answer as their label, and from then on each batch holds a given share of them. So
    the weight of pseudo-labels is exact for any module and any loss that is a mean over the batch, which becomes
    ``(1 - share) * labelled + share * pseudo-labelled``. Batches, epochs and steps stay as many as they were: a run
    with pseudo-labels costs what the supervised one costs, but for the predictions.

    Args:
        unlabelled: The unlabelled set; or the name of an attribute or method of the DataModule, or the module, that is
            or returns it. Labels in it are never used, but by ``audit``.
        start_epoch: The first round of labelling is at the start of this epoch; the epochs before are supervised.
        every_n_epochs: Epochs from one round to the next.
        share: Of each batch, how much is pseudo-labelled, above 0 and below 1. Less, where there are so few
            pseudo-labels that each would come more often than a labelled sample.
        threshold: Lowest confidence of a pseudo-label; see :func:`choose_pseudo_labels`.
        top_share: Of the samples that are taken for a class only this share, the most confident ones.
        per_class: And at most so many of a class.
        balance: Which share of the pseudo-labels, by how often they are drawn, each class is to have: as in the
            ``"labelled"`` data, ``"uniform"``, ``"none"`` for as they come, or a list of shares.
        align: Whether confidences are corrected for the classes that the teacher prefers.
        teacher: ``"current"``, the network as it is at the start of the round; ``"best"``, the best checkpoint of the
            run's ModelCheckpoint until then; the path of a checkpoint of the module, or several, whose probabilities
            are averaged; or another module, whose forward returns logits or probabilities, such as an EnsembleModule.
        teacher_checkpoint: Weights for a teacher that is a module.
        outputs: What the teacher returns, see :func:`as_probabilities`.
        epoch_size: Samples of an epoch over all ranks; by default as many as the training loader draws. Worth raising
            where there are few labelled samples.
        max_drop: The guard: pseudo-labels are given up when ``monitor`` has stayed further than this below that of
            supervised training for ``patience`` validations. None: no guard.
        monitor: Logged metric that the guard watches.
        mode: ``"max"`` or ``"min"``.
        patience: See ``max_drop``.
        reference: What supervised training reaches: a value; or the ``metrics.csv`` of a supervised run, as
            ``CSVLogger`` and ``RunReportCallback`` write it, of which the value at the same step counts, beyond its end
            the last one. (With several optimizers take that of ``RunReportCallback``: ``CSVLogger`` counts batches.) By
            default the best value before the first round, which a supervised run of equal length would go beyond.
        audit: Whether to compare with the labels that the unlabelled set has, and report how many are right.
        input_key: Key of the inputs in samples that are mappings, if it is none of the usual ones.
        target_key: Key of the label, likewise.
        seed: Of the order of samples.

    Raises:
        ValueError: For arguments that make no sense.
        MisconfigurationException: Before the first step: no or an empty unlabelled set, samples that do not fit
            together, several labels a sample, a missing checkpoint, or no metric for the guard.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pseudo = PseudoLabelCallback("unlabelled_dataset", start_epoch=5, every_n_epochs=5, share=0.5)
        >>> trainer = Trainer(callbacks=[pseudo], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        unlabelled: Dataset | str = "unlabelled_dataset",
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        share: float = 0.5,
        threshold: float = 0.9,
        top_share: float = 1.0,
        per_class: int | None = None,
        balance: Literal["labelled", "uniform", "none"] | list[float] = "labelled",
        align: bool = False,
        teacher: Literal["current", "best"] | nn.Module | list[str] | str = "current",
        teacher_checkpoint: str | None = None,
        outputs: Outputs = "auto",
        epoch_size: int | None = None,
        max_drop: float | None = 0.02,
        monitor: str = "val_acc",
        mode: Literal["min", "max"] = "max",
        patience: int = 3,
        reference: float | str | os.PathLike[str] | None = None,
        audit: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
        seed: int = 0,
    ) -> None:
        self.unlabelled = unlabelled
        self.first_epoch = start_epoch
        self.every_n_epochs = every_n_epochs
        self.share = share
        self.threshold = threshold
        self.top_share = top_share
        self.per_class = per_class
        self.balance = balance
        self.align = align
        self._teacher = Teacher(teacher, teacher_checkpoint)
        self.outputs: Outputs = outputs
        self.monitor = monitor
        self.audit = audit
        self.input_key = input_key
        self.target_key = target_key
        super().__init__(epoch_size, seed)
        if not 0 < share < 1:
            raise ValueError(f"share={share} must be above 0 and below 1: some of each batch has to be labelled.")
        if start_epoch < 0 or every_n_epochs < 1:
            raise ValueError(f"start_epoch={start_epoch} must be 0 or more, every_n_epochs={every_n_epochs} 1 or more.")
        if balance == "none" and align:
            raise ValueError('align=True needs something to align to: set balance to "labelled", "uniform" or shares.')
        # What can be known to be wrong without data.
        choose_pseudo_labels(torch.full((1, 2), 0.5), threshold, top_share, per_class)
        self.reference = reference
        self._guard: SupervisedGuard | None = None
        if max_drop is not None:
            # A file is read when a run begins.
            value = None if isinstance(reference, str | os.PathLike) else reference
            self._guard = SupervisedGuard(max_drop, mode, patience, value)
        elif reference is not None:
            raise ValueError(f"reference={reference!r} is for the guard, which max_drop=None leaves out.")
        self._metric = Monitor(monitor, f"{type(self).__name__} (its guard; max_drop=None leaves it out)")
        self._data: RelabelledDataset | None = None
        self._loader: DataLoader[Any] | None = None
        self._size: int | None = None  # of the unlabelled set
        self._labelled_counts: Tensor | None = None
        self._true: Tensor | None = None  # labels of the unlabelled set, for `audit` alone
        self.reset()

    def describe(self) -> str:
        """For the table at fit start."""
        size = "" if self._size is None else f" of {self._size:,}"
        guard = ""
        if self._guard is not None:
            by = f" by {self._guard.max_drop:g}" if self._guard.max_drop else ""
            than = "before" if self.reference is None else str(self.reference)
            than = "in the supervised run" if isinstance(self.reference, str | os.PathLike) else than
            guard = f"; stops if {self.monitor} stays worse{by} than {than}"
        return (
            f"labels{size} by {self._teacher.name} above {self.threshold:g}, {self.share:.0%} of each batch, from epoch"
            f" {self.first_epoch} every {self.every_n_epochs}{guard}"
        )

    def outlook(self) -> str:
        """For the table at fit end, when nothing was labelled."""
        if self._waits_for_reference:
            return f"nothing labelled: no value of {self.monitor} to compare with"
        return f"nothing labelled: the run ended before epoch {self.first_epoch}"

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._chosen: PseudoLabels | None = None
        self._rounds: list[Round] = []
        self._last_epoch: int | None = None  # of a round
        self._stopped = False
        self._looked = -1  # epoch whose start has been seen
        self._unlabelled_size: int | None = None  # when the checkpoint was written
        self._metric.reset()
        if self._guard is not None:
            self._guard.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint: the labels in use, what the guard saw, the rounds."""
        chosen = self._chosen
        return super().state_dict() | {
            "chosen": None if chosen is None else list(chosen),
            "unlabelled": self._size,
            "rounds": [one.to_dict() for one in self._rounds],
            "last_epoch": self._last_epoch,
            "stopped": self._stopped,
            "looked": self._looked,
            "metric": self._metric.state_dict(),
            "guard": None if self._guard is None else self._guard.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        self._chosen = None if state["chosen"] is None else PseudoLabels(*state["chosen"])
        self._unlabelled_size = state["unlabelled"]
        self._rounds = [Round.from_dict(one) for one in state["rounds"]]
        self._last_epoch = state["last_epoch"]
        self._stopped = bool(state["stopped"])
        self._looked = int(state["looked"])
        self._metric.load_state_dict(state["metric"])
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state_dict(state["guard"])

    @property
    def pseudo_labels(self) -> PseudoLabels | None:
        """Places in the unlabelled set, labels and weights of what is mixed in now; None: nothing is."""
        return self._chosen

    # ---- the data

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what cannot work, and stands between the training data and the Trainer."""
        super().prepare(trainer, pl_module)
        self._size, self._looked = None, -1
        if self._guard is not None and isinstance(self.reference, str | os.PathLike):
            try:
                self._guard.follow(shared_curve(trainer, self.reference, self.monitor))
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__}(reference=...): {error}") from error
        if self._waits_for_reference and self.first_epoch == 0:
            raise MisconfigurationException(
                f"{type(self).__name__} is to begin in epoch 0, before there is a {self.monitor} to compare with. Set"
                " start_epoch to 1 or more, pass reference=, or leave the guard out with max_drop=None."
            )
        self._teacher.prepare(trainer, type(self).__name__)

    def release(self) -> None:
        """Lets go of the data, which may be large and can often not be pickled."""
        super().release()
        self._data = self._loader = None

    def mixture(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> Any:
        """Labelled samples, and unlabelled ones with the label that their index brings."""
        problem: Exception | None = None
        fingerprint = ""
        try:
            fingerprint = self._join(trainer, loader)
        except Exception as error:  # of whatever kind: samples are read
            problem = error
        raise_together(trainer, problem)
        if not do_ranks_agree(trainer, fingerprint):  # labels go from rank to rank by the places of samples
            raise MisconfigurationException(
                f"The ranks have different labelled or unlabelled data, so {type(self).__name__} cannot share them out."
                " A split without a seed does that: give random_split a generator with one."
            )
        return self._data

    def _join(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> str:
        """Makes the dataset of both sets; returns what must be the same on all ranks."""
        name = type(self).__name__
        unlabelled = find_dataset(trainer, self.unlabelled, name, "unlabelled set", "unlabelled")
        if self._unlabelled_size not in (None, len(unlabelled)):
            raise MisconfigurationException(
                f"The checkpoint's pseudo-labels are of {self._unlabelled_size} unlabelled samples, and now there are"
                f" {len(unlabelled)}: they would belong to others. Resume with the same set; to go on with another one"
                " load the weights alone and call fit without ckpt_path."
            )
        try:
            self._data = RelabelledDataset(loader.dataset, unlabelled, self.input_key, self.target_key)
            labels = find_labels(loader.dataset, self.target_key, trainer.is_global_zero)
            self._labelled_counts = torch.from_numpy(class_counts(labels))
            if self.audit:
                self._true = torch.from_numpy(find_labels(unlabelled, self.target_key).astype("int64"))
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"{name}: {error}") from error
        self._size = len(unlabelled)
        return fingerprint_of_sets(loader.dataset, labels, unlabelled) if trainer.world_size > 1 else ""

    def mixed(self, loader: DataLoader[Any]) -> None:
        """Goes on with what a checkpoint brought."""
        self._loader = loader
        self._use(self._chosen)

    def _use(self, chosen: PseudoLabels | None) -> None:
        """From the next epoch on these are mixed in."""
        self._chosen = chosen
        if self.sampler is None or self._data is None:
            return
        if chosen is None or not len(chosen.indices):
            self.sampler.set_extra([], 0.0)
            return
        share = natural_share(len(self._data), len(chosen.indices), self.share)
        indices = self._data.index_of(chosen.indices.numpy(), chosen.labels.numpy())
        self.sampler.set_extra(indices, share, chosen.weights.numpy())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the teacher's checkpoints, too."""
        super().on_fit_start(trainer, pl_module)
        self._teacher.check(pl_module)

    # ---- rounds

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges and labels."""
        if self._guard is not None:
            self._metric.on_train_epoch_start(trainer)
        self.begin_epoch(trainer)

    def _is_due(self, epoch: int) -> bool:
        if self._stopped or epoch < self.first_epoch or self._waits_for_reference:
            return False
        return self._last_epoch is None or epoch >= self._last_epoch + self.every_n_epochs

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """Judges and labels, once an epoch, before its first batch is fetched.

        Not only at the start of an epoch that Lightning tells of: after a resume from the last batch of an epoch it
        leaves that out, and fetches first.
        """
        super().begin_epoch(trainer)
        epoch = trainer.current_epoch
        if self._looked == epoch:
            return
        self._looked = epoch
        if self._guard is not None and self._chosen is not None and not self._stopped and self._guard.hurts:
            self._stopped = True
            details = {self.monitor: self._guard.best, "supervised": float(self._guard.reference or 0.0)}
            self._use(None)
            self.record(trainer, "pseudo-labels hurt: given up", **details)
        if self._is_due(epoch):
            self._last_epoch = epoch
            self._label(trainer)

    def _label(self, trainer: pl.Trainer) -> None:
        data, loader, module = self._data, self._loader, trainer.lightning_module
        assert data is not None
        assert loader is not None
        networks, teacher = self._teacher.of(trainer, module)
        everything = data.index_of(range(len(data.unlabelled)), 0)
        with untouched(trainer, *self._teacher.modules(module)):
            probabilities = teacher_probabilities(
                trainer, networks, data, everything, loader, self.seed, self.input_key, self.outputs
            )
        classes = probabilities.shape[1]
        assert self._labelled_counts is not None
        if len(self._labelled_counts) > classes:
            raise MisconfigurationException(
                f"The teacher knows {classes} classes, and the training labels go up to"
                f" {len(self._labelled_counts) - 1}. Give a teacher of the same classes, or the right target_key."
            )
        labelled = torch.zeros(classes, dtype=torch.int64)
        labelled[: len(self._labelled_counts)] = self._labelled_counts
        prior: Any = {"labelled": labelled, "uniform": torch.ones(classes), "none": None}
        prior = prior[self.balance] if isinstance(self.balance, str) else self.balance
        try:
            chosen = choose_pseudo_labels(
                probabilities, self.threshold, self.top_share, self.per_class, prior, self.align
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        chosen = PseudoLabels(*agree(trainer, tuple(chosen)))  # the same everywhere, whatever the devices round to
        self._use(chosen)
        self._tell(trainer, chosen, probabilities, labelled, teacher)

    def _tell(
        self, trainer: pl.Trainer, chosen: PseudoLabels, probabilities: Tensor, labelled: Tensor, teacher: str
    ) -> None:
        assert self._data is not None
        size, classes = probabilities.shape
        counts = torch.bincount(chosen.labels, minlength=classes)
        right: Tensor | None = None
        if self.audit:
            assert self._true is not None
            agrees = self._true[chosen.indices] == chosen.labels
            right = torch.bincount(chosen.labels[agrees], minlength=classes)
        epoch = trainer.current_epoch
        self._rounds.append(
            Round(epoch, counts.tolist(), None if right is None else right.tolist(), labelled.tolist(), size)
        )
        accepted, number = len(chosen.indices), len(self._rounds)
        details: dict[str, Any] = {"accepted": accepted, "of": size, "teacher": teacher}
        if accepted:
            assert self.sampler is not None
            details["share"] = self.sampler.share
            details["largest_class"] = float(counts.max() / accepted)
            if right is not None:
                details["right"] = float(right.sum() / accepted)
        self.record(trainer, f"pseudo-labels, round {number}", **details)
        warn_of_odd_labels(type(self).__name__, counts, labelled, size, self.threshold)

    # ---- Lightning's hooks

    @property
    def _waits_for_reference(self) -> bool:
        return self._guard is not None and self._guard.waits

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The guard needs validation."""
        super().on_train_start(trainer, pl_module)
        if self._guard is not None:
            self._metric.on_train_start(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The metric is looked for before and after validation."""
        if self._guard is not None and trainer.state.fn == TrainerFn.FITTING:
            self._metric.on_validation_start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metric, if validation logs it."""
        if self._guard is not None and trainer.state.fn == TrainerFn.FITTING:
            self._note(trainer, self._metric.on_validation_end(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metric, if it is one of training."""
        if self._guard is not None:
            self._note(trainer, self._metric.on_train_epoch_end(trainer))

    def _note(self, trainer: pl.Trainer, value: float | None) -> None:
        if value is not None and self._guard is not None:
            mixed = self._chosen is not None and len(self._chosen.indices) > 0
            self._guard.update(value, mixed, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the counts of each round, by class."""
        if self._rounds:
            names = getattr(self._data, "classes", None)
            show_rounds(trainer, self._rounds, names if isinstance(names, list | tuple) else [])
        super().on_fit_end(trainer, pl_module)
