"""`ClassReportCallback`: what a network does with each class, and its probabilities brought back to the real world."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_tips.core import (
    LogitWatcher,
    as_classes,
    confusion_matrix,
    find_tips,
    gather_rows,
    leaves_files,
    log_picture,
    raise_together,
    recalls,
    render_table,
    report_folder,
    say,
)
from lightning_tips.imbalance.counting import class_names, count_together
from lightning_tips.imbalance.plots import plot_confusion
from lightning_tips.imbalance.prior import best_threshold, correct_prior, fit_prior_correction

MOST_CLASSES = 20
"""Up to so many classes the recall of each is logged by itself."""


@dataclass
class Correction:
    """What brings the probabilities back, found on validation data; plain numbers, as they go into a checkpoint.

    Attributes:
        trained_prior: Share of each class in what the network was trained on.
        true_prior: Share of each class in the training data.
        strength: Fitted factor of the shift between the two.
        threshold: With two classes: the corrected probability of the second from which on it is best to decide for
            it, by balanced accuracy.
    """

    trained_prior: list[float]
    true_prior: list[float]
    strength: float = 1.0
    threshold: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The corrected logits."""
        return correct_prior(logits, self.trained_prior, self.true_prior, strength=self.strength)


class ClassReportCallback(LogitWatcher):
    """Shows what the network does with each class, and corrects its probabilities where they are used.

    Works for every module whose ``forward`` returns logits and whose ``validation_step`` calls it: they are looked at
    as they pass. Each validation of a fit logs ``classes/balanced_accuracy`` and ``classes/recall_<class>``, which can
    be monitored; the end of fit leaves a table and the confusion matrix. ``trainer.validate`` and ``trainer.test`` are
    left alone.

    Where a tip beside it balances the classes, it also fits how to bring the probabilities back to the share that the
    classes have in the training data: a shift of the logits (Saerens et al. 2002) with one fitted strength, and with
    two classes the best threshold. Both are in the table and in the checkpoint.

    Args:
        correct: Whether ``trainer.predict`` works with corrected logits. From a checkpoint everything needed is in it.
        target_key: Key of the targets in batches that are dicts, if it is none of the usual ones.
    """

    tolerant = False

    def __init__(self, correct: bool = False, target_key: str | None = None) -> None:
        super().__init__(target_key)
        self.correct = correct
        self.correction: Correction | None = None
        """Found in the last validation, or in the checkpoint that was loaded."""
        self.confusion: Tensor | None = None
        """(C, C) counts of the last validation over all ranks: true classes in rows, predicted ones in columns."""
        self._table = ""
        self._names: list[str] = []
        self._true: Tensor | None = None  # share of each class in the training data
        self._warned = False

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The correction, as plain data."""
        return {"correction": None if self.correction is None else asdict(self.correction)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the correction, for predictions too."""
        found = state_dict["correction"]
        self.correction = None if found is None else Correction(**found)

    # ---- validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts afresh with a new run."""
        self._true = None
        if stage == "fit":
            self._warned = False
        if stage == "fit" and trainer.global_step == 0:
            self.correction, self.confusion, self._table = None, None, ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says so where there is nothing to report on."""
        if not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__} reports on validation data, and this run has none: nothing will be reported or"
                " corrected. Add a val_dataloader and a validation_step."
            )

    def watches(self, trainer: pl.Trainer) -> bool:
        """In fit; in the sanity check, too: what cannot work is to be told at once."""
        return trainer.state.fn == TrainerFn.FITTING

    def watched(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: tuple[Tensor, Tensor] | None) -> None:
        """Counts, fits and logs."""
        raise_together(trainer, self._problem(trainer, pl_module, seen))
        if trainer.sanity_checking:
            return
        assert seen is not None
        logits, targets = as_classes(
            gather_rows(trainer, seen[0]), gather_rows(trainer, seen[1]), asker=type(self).__name__
        )
        confusion = confusion_matrix(logits, targets)
        self.confusion = confusion
        names = class_names(trainer)
        self._names = [names[c] if c < len(names) else str(c) for c in range(len(confusion))]
        recall = recalls(confusion)
        # Numbers, not tensors: these are on the CPU, where the process group of GPUs cannot add them up.
        pl_module.log("classes/balanced_accuracy", float(recall[~recall.isnan()].mean()), sync_dist=True)
        if len(recall) <= MOST_CLASSES:
            known = {f"classes/recall_{self._names[c]}": float(r) for c, r in enumerate(recall) if not r.isnan()}
            pl_module.log_dict(known, sync_dist=True)
        self._fit_correction(trainer, logits, targets)
        self._table = self._make_table(logits, targets)

    def _problem(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: tuple[Tensor, Tensor] | None
    ) -> MisconfigurationException | None:
        """What is wrong with what this rank saw, if anything is."""
        if seen is None:
            ranks = f" on rank {trainer.global_rank}, and every rank needs some" if trainer.world_size > 1 else ""
            return MisconfigurationException(
                f"{type(self).__name__} saw no logits in validation{ranks}. Either there was no batch, or"
                f" validation_step of {type(pl_module).__name__} does not call self(...). Let it, or leave the callback"
                " out."
            )
        try:
            as_classes(*seen, asker=type(self).__name__)
        except MisconfigurationException as error:
            return error
        return None

    def _fit_correction(self, trainer: pl.Trainer, logits: Tensor, targets: Tensor) -> None:
        trained = [t for tip in find_tips(trainer) if (t := getattr(tip, "trained_prior", None)) is not None]
        if not trained:
            return
        if self._true is None:
            counts = count_together(trainer, type(self).__name__, self.target_key).counts.double()
            self._true = counts / counts.sum()
        true = self._true
        prior = true.clone()
        if any(len(one) != len(true) for one in trained):
            return
        for one in trained:  # a sampler and weights beside it teach the product of what each teaches
            prior *= one.double() / true
        prior /= prior.sum()
        if len(true) != logits.shape[1] or not bool((prior * true > 0).all()):
            self._give_up(
                f"of {logits.shape[1]} outputs some are of classes that are not in the training data, or that are drawn"
                " or weighted with 0."
            )
            return
        if not len(targets):
            return
        correction = Correction(prior.tolist(), true.tolist())
        try:
            correction.strength = fit_prior_correction(logits, targets, prior, true, "shift").strength
            if len(true) == 2 and len(targets.unique()) == 2:
                corrected = correction(logits).softmax(1)[:, 1]
                correction.threshold = best_threshold(corrected, targets).value
        except ValueError as error:
            self._give_up(f"{error} If training has diverged, lower the learning rate or clip gradients.")
            return
        self.correction = correction

    def _give_up(self, why: str) -> None:
        """Goes on without a correction, and says why, once a run."""
        if not self._warned:
            rank_zero_warn(f"{type(self).__name__} cannot correct the probabilities: {why}")
        self._warned = True
        self.correction = None

    # ---- what the user sees

    def _make_table(self, logits: Tensor, targets: Tensor) -> str:
        assert self.confusion is not None
        recall, predicted = recalls(self.confusion), self.confusion.sum(0)
        precision = self.confusion.diag() / predicted
        columns = ["class", "samples", "recall", "precision", "mean prob."]
        raw = logits.softmax(1).mean(0)
        corrected = None if self.correction is None else self.correction(logits).softmax(1).mean(0)
        if corrected is not None:
            columns += ["corrected", "prevalence"]
        rows = []
        for c in range(len(recall)):
            row = [self._names[c], f"{int(self.confusion[c].sum()):,}", _share(recall[c]), _share(precision[c])]
            row.append(f"{raw[c]:.2%}")
            if corrected is not None and self.correction is not None:
                row += [f"{corrected[c]:.2%}", f"{self.correction.true_prior[c]:.2%}"]
            rows.append(row)
        mean = recall[~recall.isnan()].mean()
        text = f"Classes in the last validation: balanced accuracy {mean:.1%}\n{render_table(columns, rows)}"
        if self.correction is not None and self.correction.threshold is not None:
            text += (
                f"\nBest threshold of the corrected probability of {self._names[1]}: {self.correction.threshold:.3f}"
                " by balanced accuracy, on these data."
            )
        if self.correction is not None and self.correction.strength < 0.5:
            text += (
                f"\nThe fitted strength of the correction is {self.correction.strength:.2f}: new samples hardly follow"
                " the balance that the network was trained on. It has probably learnt the rare samples by heart:"
                " augment all classes, or train for less."
            )
        return text

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the table, leaves the confusion matrix."""
        if not self._table:
            return
        say(trainer, self._table)
        if leaves_files(trainer) and self.confusion is not None:
            path = report_folder(trainer) / "confusion.png"
            plot_confusion(self.confusion, self._names, path)
            log_picture(trainer, "tips/confusion", path)

    # ---- prediction

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Corrects what ``forward`` returns."""
        if not self.correct:
            return
        if self.correction is None:
            rank_zero_warn(
                f"{type(self).__name__} has no correction to apply: fit with a tip that balances the classes beside it,"
                " or pass the ckpt_path of such a run. Predictions stay as they are."
            )
            return
        self._outputs.change(pl_module, self.correction)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the outputs alone again."""
        if self.correct and self.correction is not None and not self._outputs.calls:
            rank_zero_warn(
                f"predict_step of {type(pl_module).__name__} does not call self(...), so {type(self).__name__} could"
                " not correct its predictions. Let it, or call the callback's `correction` on the logits."
            )
        self._outputs.close()


def _share(value: Tensor) -> str:
    """A dash for a class that has no samples, or was never predicted."""
    return "-" if bool(value.isnan()) else f"{value:.1%}"
