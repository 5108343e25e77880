"""The callback that weights the training loss by class, or adjusts its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips.core import ActsOn, Outputs, ReplacedStep, TipCallback, agree, did_you_mean
from lightning_tips.imbalance.counting import (
    ClassCounts,
    balancing_part,
    class_names,
    count_classes,
    count_together,
)
from lightning_tips.imbalance.find_losses import KNOWN, corrected_losses, find_losses
from lightning_tips.imbalance.logit_adjustment import adjust_logits, logit_adjustment
from lightning_tips.imbalance.losses import LossCorrection
from lightning_tips.imbalance.plots import show_balance
from lightning_tips.imbalance.weights import Scheme, class_weights, dict_to_list


class ClassWeightCallback(TipCallback):
    """Weights the training loss by class so that a rare class counts, without an edit to the module.

    The losses are found in the module (``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.BCEWithLogitsLoss``, timm's
    ``LabelSmoothingCrossEntropy``) and weighted during ``training_step`` alone: validation and test losses stay what
    they were, and the module itself is never changed. Unlike torch's ``weight=`` the intended ratio of the classes is
    kept at every batch size and number of ranks; see :mod:`lightning_tips.imbalance.losses`.

    Args:
        weights: ``"auto"`` counts the training labels. A list has one weight for each class, a dict weights by class
            index or name, 1 for the classes it leaves out; both are scaled to mean 1 over the samples if the labels
            can be found, and used as they are if not. ``None`` leaves the loss unweighted.
        scheme: For ``"auto"``, see :func:`~lightning_tips.imbalance.class_weights`.
        beta: As there.
        start_epoch: First epoch with weights, counted from 0: deferred re-weighting (Cao et al. 2019) lets the network
            learn its features on the data as they are.
        functional: Set it if ``training_step`` calls ``F.cross_entropy``, ``F.nll_loss`` or
            ``F.binary_cross_entropy_with_logits`` itself, under whatever name.
        losses: Names of the modules to weight, as in ``named_modules()``; by default all that are found.
        logit_adjustment: The tau of logit adjustment (Menon et al. 2021) in place of weights, usually 1;
            ``weights="auto"`` then stands back, and others are refused.
        adjust: ``"loss"`` adds the logarithm of the prior to the logits in the training loss. ``"outputs"`` trains
            plainly and subtracts it from what ``forward`` returns in validation, test and prediction.
        target_key: Key of the targets where samples and batches are dicts, if it is none of the usual ones.
        show: Whether to show what each class weighs, as a table and a plot.
    """

    tip = "imbalance"
    acts_on = ActsOn.LOSS

    def __init__(
        self,
        weights: Literal["auto"] | dict[int | str, float] | list[float] | None = "auto",
        scheme: Scheme = "inverse",
        beta: float = 0.999,
        start_epoch: int = 0,
        functional: bool = False,
        losses: list[str] | None = None,
        logit_adjustment: float | None = None,
        adjust: Literal["loss", "outputs"] = "loss",
        target_key: str | None = None,
        show: bool = True,
    ) -> None:
        self.weights = weights
        self.scheme: Scheme = scheme
        self.beta = beta
        self.start = start_epoch
        self.functional = functional
        self.losses = losses
        self.tau = logit_adjustment
        self.adjust = adjust
        self.target_key = target_key
        self.show = show
        self._check_arguments()
        self._found: list[nn.Module] = []
        self._step: ReplacedStep | None = None
        self._outputs = Outputs()
        self._counts: ClassCounts | None = None
        self._correction = LossCorrection()
        self._started = False

    def _check_arguments(self) -> None:
        class_weights([1, 1], self.scheme, self.beta)
        if isinstance(self.weights, str) and self.weights != "auto":
            raise ValueError(f"weights must be 'auto', a dict, a list or None, not {self.weights!r}.")
        if self.weights is not None and not isinstance(self.weights, str):
            values = list(self.weights.values() if isinstance(self.weights, Mapping) else self.weights)
            LossCorrection.from_weights(values if len(values) > 1 or isinstance(self.weights, list) else [*values, 1.0])
        if self.start < 0:
            raise ValueError(f"start_epoch counts from 0, not {self.start}.")
        if self.tau is None:
            if self.adjust != "loss":
                raise ValueError("adjust='outputs' needs the strength of the adjustment: pass logit_adjustment=1.0.")
        elif self.weights == "auto":
            self.weights = None  # what automatic correction there is, is this one
            logit_adjustment([1, 1], self.tau)
        elif self.weights is not None:
            raise ValueError(
                "logit_adjustment and weights both correct for the classes: twice is too much. Pass weights=None with"
                " logit_adjustment."
            )
        else:
            logit_adjustment([1, 1], self.tau)
        if self.adjust not in ("loss", "outputs"):
            raise ValueError(f"There is no adjust={self.adjust!r}. {did_you_mean(self.adjust, ('loss', 'outputs'))}")

    @property
    def _acts_on_loss(self) -> bool:
        return self.weights is not None or (self.tau is not None and self.adjust == "loss")

    # ---- what the user sees

    def describe(self) -> str:
        """For the table at fit start."""
        if self.tau is not None:
            return f"logit adjustment of the {self.adjust}, tau {self.tau:g}{self._when}"
        if self.weights is None:
            return "nothing: weights=None"
        how = f"{self.scheme} class weights" if self.weights == "auto" else "given class weights"
        return f"{how}{self._ratio}{self._when}"

    def outlook(self) -> str:
        """For the table at fit end, when the loss was never changed."""
        return f"not begun: {self.describe()}" if self._acts_on_loss else self.describe()

    @property
    def _when(self) -> str:
        return f" from epoch {self.start}" if self.start else ""

    @property
    def _ratio(self) -> str:
        weights = self._correction.classes
        return "" if weights is None else f" of {float(weights.min()):.3g} to {float(weights.max()):.3g}"

    # ---- state

    @property
    def state_key(self) -> str:
        """Tells several apart in a checkpoint."""
        told = {"scheme": self.scheme, "start_epoch": self.start, "losses": self.losses, "logit_adjustment": self.tau}
        return f"{type(self).__qualname__}{told}"

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._started = False
        self._counts = None
        self._correction = LossCorrection()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint, with the prior that the training teaches."""
        prior = self.trained_prior
        return super().state_dict() | {
            "started": self._started,
            "counts": None if self._counts is None else self._counts.counts.tolist(),
            "total": None if self._counts is None else self._counts.total,
            "weights": None if self._correction.classes is None else self._correction.classes.tolist(),
            "trained_prior": None if prior is None else prior.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`. Weights are made anew from the data, which must be the same."""
        self._started = bool(state["started"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes up the prior from a checkpoint that is only predicted from."""
        super().load_state_dict(state_dict)
        if self._stage != "fit" and state_dict.get("counts") is not None:
            self._counts = ClassCounts(torch.tensor(state_dict["counts"]), state_dict["total"])
            weights = state_dict["weights"]
            self._correction = LossCorrection(classes=None if weights is None else torch.tensor(weights))
            self.restore(state_dict)

    @property
    def trained_prior(self) -> Tensor | None:
        """The prior that the loss teaches at present, or ``None`` if it is not known or there are several labels."""
        if self._counts is None or self._counts.total is not None:
            return None
        counts = self._counts.counts.double()
        if not self._started:
            return (counts / counts.sum()).float()
        if self.tau is not None:
            balanced = counts ** (1.0 - self.tau)
            return (balanced / balanced.sum()).float()
        weights = self._correction.classes
        mass = counts if weights is None else counts * weights.double().cpu()  # with given weights some may be 0
        return (mass / mass.sum()).float()

    # ---- before the first step

    def conflict_with(self, other: object) -> str | None:
        """Two of them on the same loss."""
        if isinstance(other, ClassWeightCallback) and (
            not self.losses or not other.losses or set(self.losses) & set(other.losses)
        ):
            return "both would weight the same loss. Keep one, or give each other losses=[...]."
        return None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks for the losses."""
        self._found = []
        if not self._acts_on_loss:
            return
        if self.functional and hasattr(vars(pl_module).get("training_step"), "_torchdynamo_orig_callable"):
            # The graph has the weights in it from tracing, and running it passes through the mode once more.
            raise MisconfigurationException(
                f"{type(self).__name__} cannot weight functions inside a compiled training_step. Compile the network in"
                " the module instead (self.net = torch.compile(net)), or make the loss an attribute of the module"
                " (self.criterion = nn.CrossEntropyLoss()) and leave functional=False."
            )
        try:
            self._found = list(find_losses(pl_module, self.losses).values())
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        if not self._found and not self.functional:
            raise MisconfigurationException(
                f"{type(self).__name__} finds no loss in {type(pl_module).__name__} that it can weight ({KNOWN}). If"
                " training_step calls F.cross_entropy, F.nll_loss or F.binary_cross_entropy_with_logits, pass"
                " functional=True; otherwise keep the loss as an attribute of the module."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the classes and stands ready at the training step."""
        if self.weights is not None or self.tau is not None:
            try:
                self._prepare_numbers(trainer)
            except (ValueError, TypeError) as error:
                raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
            if (other := balancing_part(trainer)) is not None:
                rank_zero_warn(
                    f"{type(self).__name__} and {other} both balance the classes: the rare ones are corrected twice."
                    " Keep one, or take a milder scheme for each, such as 'sqrt'."
                )
        if self._acts_on_loss:
            self._correction.to(pl_module.device)
            self._step = ReplacedStep(trainer.strategy, self._weighted_step(pl_module))
        super().on_train_start(trainer, pl_module)
        weights = self._correction.classes
        if self.show and self._counts is not None and self._counts.total is None and weights is not None:
            counts = self._counts.counts
            seen = counts * weights.cpu()
            show_balance(trainer, counts, seen, "weigh as much as", class_names(trainer), "class_weights")

    def _prepare_numbers(self, trainer: pl.Trainer) -> None:
        known = self._counts = self._count(trainer)
        if self.tau is not None:
            assert known is not None
            self._correction = LossCorrection.adjustment(known.counts, known.total, self.tau)
        elif self.weights == "auto":
            assert known is not None
            self._correction = LossCorrection.from_counts(known.counts, known.total, self.scheme, self.beta)
        else:
            assert self.weights is not None
            names = class_names(trainer)
            given = self.weights
            classes = len(known.counts) if known else 0
            values = dict_to_list(given, classes, names) if isinstance(given, Mapping) else given
            if names and len(values) != len(names):
                raise ValueError(f"There are {len(values)} weights, but {len(names)} classes: {', '.join(names)}.")
            if known is not None and (missing := len(values) - len(known.counts)) > 0:
                # The last classes may be missing from the data like any others. The loss knows how many there are.
                padded = torch.cat([known.counts, known.counts.new_zeros(missing)])
                known = self._counts = ClassCounts(padded, known.total)
            counts_of = (None, None) if known is None else (known.counts, known.total)
            self._correction = LossCorrection.from_weights(values, *counts_of)

    def _count(self, trainer: pl.Trainer) -> ClassCounts | None:
        """The same on all ranks."""
        if self.weights == "auto" or self.tau is not None:
            return count_together(trainer, type(self).__name__, self.target_key)
        # For weights that are given, the counts only set the scale: not worth reading all samples for, and rank 0's
        # do for all ranks, also where only it found none.
        counts = None
        with contextlib.suppress(ValueError, TypeError):
            counts = count_classes(trainer, self.target_key, read=False)
        found = agree(trainer, None if counts is None else (counts.counts, counts.total))
        return None if found is None else ClassCounts(*found)

    def _weighted_step(self, pl_module: pl.LightningModule) -> Callable[..., Any]:
        untried = True
        waiting = LossCorrection()
        waiting.expected = self._correction.size

        def training_step(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal untried
            if not (self._started or untried):
                return step(*args, **kwargs)
            correction = self._correction if self._started else waiting
            with corrected_losses(self._found, correction, self.functional):
                output = step(*args, **kwargs)
            if untried and not correction.calls:
                raise MisconfigurationException(self._not_called(pl_module))
            untried = False  # a loss that cannot be weighted is refused at the first step, not at a deferred start
            return output

        return training_step

    def _not_called(self, pl_module: pl.LightningModule) -> str:
        found = ", ".join(sorted({type(loss).__name__ for loss in self._found})) or "torch's loss functions"
        advice = (
            "Compute the loss with one of the functions that are known (F.cross_entropy, F.nll_loss,"
            " F.binary_cross_entropy_with_logits), or weight it in the module with class_weights"
            if self.functional
            else "If it calls F.cross_entropy or another function of torch, pass functional=True"
        )
        return (
            f"The first training_step of {type(pl_module).__name__} did not call {found}, so {type(self).__name__} has"
            f" nothing to act on. {advice}."
        )

    # ---- when

    def start_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins, when it is time."""
        if self._started or not self._acts_on_loss or trainer.current_epoch < self.start:
            return
        self._started = True
        if self.tau is not None:
            self.record(trainer, "logit adjustment begins", tau=self.tau)
            return
        weights = self._correction.classes if self._correction.classes is not None else self._correction.labels
        assert weights is not None
        least, most = float(weights.min()), float(weights.max())
        self.record(trainer, "class weights begin", least=least, most=most, ratio=most / least if least else most)

    # ---- outputs

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adjusts the outputs."""
        if self.adjust == "outputs" and not trainer.sanity_checking:
            self._balance_outputs(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the outputs alone again."""
        if not trainer.sanity_checking:
            self._check_used(pl_module)
        self._outputs.close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adjusts the outputs."""
        if self.adjust == "outputs":
            self._balance_outputs(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the outputs alone again."""
        self._check_used(pl_module)
        self._outputs.close()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adjusts the outputs."""
        if self.adjust == "outputs":
            self._balance_outputs(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the outputs alone again."""
        self._check_used(pl_module)
        self._outputs.close()

    def _balance_outputs(self, pl_module: pl.LightningModule) -> None:
        if self._counts is None and self._stage != "fit":
            rank_zero_warn(
                f"{type(self).__name__} knows no class counts to change the outputs by: fit first, or pass the"
                " ckpt_path of a run that had it. Outputs stay as they are."
            )
            return
        offsets = logit_adjustment(self._known_counts(), self.tau or 1.0)
        self._outputs.change(pl_module, lambda logits: adjust_logits(logits, offsets))

    def _check_used(self, pl_module: pl.LightningModule) -> None:
        if self.adjust == "outputs" and self._counts is not None and not self._outputs.calls:
            rank_zero_warn(
                f"{type(pl_module).__name__} does not call self(...) there, so {type(self).__name__} could not adjust"
                " its outputs. Let it, or use adjust='loss'."
            )

    def _known_counts(self) -> Tensor:
        if self._counts is None or self._counts.total is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} knows no class counts to change the outputs by: fit first, or pass the"
                " ckpt_path of a run that had it. With several labels a sample use the functions of this package."
            )
        return self._counts.counts

    # ---- the end

    def release(self) -> None:
        """Leaves training step and outputs as they were."""
        super().release()
        self._outputs.close()
        if self._step is not None:
            self._step.remove()
            self._step = None
        self._found = []
