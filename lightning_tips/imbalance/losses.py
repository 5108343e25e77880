"""Class weights that keep their ratio, as functions of logits and targets.

``F.cross_entropy(weight=w)`` divides by the weights of the batch (pytorch#61309). A batch that happens to hold a rare
sample is divided by more, so the rare class loses: an intended 20:1 at a prevalence of 1:20 becomes 6.6:1 in batches of
8, and every rank of a distributed run has a divisor of its own. Here the weighted losses are summed and divided by the
number of samples. With weights of mean 1 over the data that is the unbiased mean, at every batch size and number of
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tips.imbalance.logit_adjustment import along, logit_adjustment
from lightning_tips.imbalance.weights import Scheme, check_counts, class_weights, scale_to_mean_one

__all__ = [
    "LossCorrection",
    "Reduction",
    "weighted_binary_cross_entropy_with_logits",
    "weighted_cross_entropy",
    "weighted_nll_loss",
]

Reduction = Literal["mean", "sum", "none"]


def weighted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` with class weights that keep their ratio at every batch size.

    Args:
        logits: ``(N, C, ...)`` or ``(C,)``.
        targets: Class indices ``(N, ...)``; no probabilities.
        weights: ``(C,)``, mean 1 over the samples, see :func:`~lightning_tips.imbalance.class_weights`.
        ignore_index: Targets that count neither in the sum nor in the number it is divided by.
        reduction: ``"mean"`` divides by the number of targets that are not ignored, not by their weights.
        label_smoothing: As in torch, but a sample's whole loss takes the weight of its own class. In torch the
            smoothed share takes the weights of the other classes, which pushes all samples towards the rare ones.

    Raises:
        ValueError: If targets are probabilities, or the number of classes is another.
    """
    refuse_soft_targets(logits, targets)
    _check_classes(logits, len(weights))
    losses = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    return _reduce_indexed(losses, targets, weights, ignore_index, reduction)


def weighted_nll_loss(
    log_probabilities: Tensor,
    targets: Tensor,
    weights: Tensor,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """``F.nll_loss`` with class weights; see :func:`weighted_cross_entropy`."""
    _check_classes(log_probabilities, len(weights))
    losses = F.nll_loss(log_probabilities, targets, ignore_index=ignore_index, reduction="none")
    return _reduce_indexed(losses, targets, weights, ignore_index, reduction)


def weighted_binary_cross_entropy_with_logits(
    logits: Tensor, targets: Tensor, weights: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """``F.binary_cross_entropy_with_logits`` with a weight for each class, or for the two sides of each label.

    Args:
        logits: Of any shape with weights ``(2,)``; ``(N, L, ...)`` with weights ``(L, 2)``.
        targets: 0 and 1, of the same shape.
        weights: Of the negatives and the positives. Their quotient is torch's ``pos_weight``, which alone would change
            the scale of the loss as well.
        reduction: As in torch.

    Raises:
        ValueError: If targets lie between 0 and 1, or the number of labels is another.
    """
    if weights.ndim == 2:
        _check_classes(logits, len(weights))
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    refuse_soft_labels(targets)
    weights = weights.to(losses.device)
    if weights.ndim == 2:
        dim = 1 if logits.ndim > 1 else 0
        negative, positive = (along(side, dim, logits.ndim) for side in weights.unbind(1))
    else:
        negative, positive = weights.unbind()
    weighted = losses * torch.where(targets > 0.5, positive, negative)
    return _reduce(weighted, losses, torch.tensor(losses.numel()), reduction)


class LossCorrection:
    """What to do to a loss against imbalance: weights for its classes, or offsets for its logits.

    Whether targets are class indices or a row of 0 and 1 for several labels is only seen when the loss is called, so
    there are numbers for both.

    Args:
        classes: Weights ``(C,)`` or ``None``.
        labels: Weights ``(C, 2)`` of absence and presence for losses with one output a label, or ``None``.
        class_offsets: What is added to the logits ``(C,)``, or ``None``.
        label_offsets: The same for losses with one output a label.
    """

    def __init__(
        self,
        classes: Tensor | None = None,
        labels: Tensor | None = None,
        class_offsets: Tensor | None = None,
        label_offsets: Tensor | None = None,
    ) -> None:
        self.classes = classes
        self.labels = labels
        self.class_offsets = class_offsets
        self.label_offsets = label_offsets
        self.calls = 0  # of the losses below
        self.expected = 0  # classes that they must see, where there are no numbers yet to tell
        self.at_work = False  # inside a loss that calls torch's functions itself, which are not to be corrected again

    @classmethod
    def from_counts(
        cls, counts: Tensor, total: int | None = None, scheme: Scheme = "inverse", beta: float = 0.999
    ) -> LossCorrection:
        """Weights from class counts.

        Args:
            counts: Samples of each class ``(C,)``; with several labels a sample, those that have each label.
            total: Number of samples, where each may have several labels; ``None`` where each has one class.
            scheme: See :func:`~lightning_tips.imbalance.class_weights`.
            beta: As there.

        Raises:
            ValueError: If a class is empty; with several labels also if one is on every sample.
        """
        pairs = torch.stack([class_weights(p, scheme, beta) for p in label_counts(counts, total)])
        return cls(None if total is not None else class_weights(counts, scheme, beta), pairs)

    @classmethod
    def from_weights(
        cls, weights: Sequence[float] | Tensor, counts: Tensor | None = None, total: int | None = None
    ) -> LossCorrection:
        """Weights as they are given, scaled to mean 1 over the samples where the counts are known.

        For losses with one output a label they are the weights of presence against 1 for absence.

        Raises:
            ValueError: If weights are negative or not finite, or their number is not that of the counts.
        """
        given = torch.as_tensor(weights).detach().double().cpu()
        if given.ndim != 1 or len(given) < 2:
            raise ValueError(f"Give one weight for each of two or more classes, not {given.tolist()}.")
        if not torch.isfinite(given).all() or (given < 0).any() or not given.any():
            raise ValueError(f"Weights must be finite, not negative, and not all 0; got {given.tolist()}.")
        pairs = torch.stack([torch.ones_like(given), given], 1)
        if counts is None:
            return cls(given.float(), pairs.float())
        if len(given) != len(counts):
            raise ValueError(f"There are {len(given)} weights, but the training data has {len(counts)} classes.")
        if not (given * counts.cpu()).any():
            raise ValueError(f"None of the classes with a weight above 0 has samples; got {given.tolist()}.")
        sides = _absence_and_presence(counts, total)  # a class without samples is no harm here
        scaled = [scale_to_mean_one(pair, side) for pair, side in zip(pairs, sides, strict=True)]
        return cls(None if total is not None else scale_to_mean_one(given, counts), torch.stack(scaled))

    @classmethod
    def adjustment(cls, counts: Tensor, total: int | None = None, tau: float = 1.0) -> LossCorrection:
        """Logit adjustment in the loss; see :func:`~lightning_tips.imbalance.logit_adjustment`."""
        pairs = torch.stack([logit_adjustment(p, tau) for p in label_counts(counts, total)])
        classes = None if total is not None else logit_adjustment(counts, tau)
        return cls(class_offsets=classes, label_offsets=pairs[:, 1] - pairs[:, 0])

    def cross_entropy(
        self,
        logits: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """In the place of ``F.cross_entropy``."""
        self.calls += 1
        refuse_soft_targets(logits, targets)
        self._check_expected(logits)
        logits = self._adjusted(logits)
        if self.classes is None and self.labels is None:
            return F.cross_entropy(
                logits, targets, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
            )
        return weighted_cross_entropy(logits, targets, self._of_classes, ignore_index, reduction, label_smoothing)

    def nll_loss(
        self, log_probabilities: Tensor, targets: Tensor, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> Tensor:
        """In the place of ``F.nll_loss``."""
        self.calls += 1
        self._check_expected(log_probabilities)
        if self.class_offsets is not None or self.label_offsets is not None:
            # Log-probabilities are logits too; with the offsets they have to be normalised again.
            adjusted = self._adjusted(log_probabilities)
            log_probabilities = adjusted.log_softmax(1 if adjusted.ndim > 1 else 0)
        if self.classes is None and self.labels is None:
            return F.nll_loss(log_probabilities, targets, ignore_index=ignore_index, reduction=reduction)
        return weighted_nll_loss(log_probabilities, targets, self._of_classes, ignore_index, reduction)

    def binary_cross_entropy_with_logits(
        self, logits: Tensor, targets: Tensor, reduction: Reduction = "mean"
    ) -> Tensor:
        """In the place of ``F.binary_cross_entropy_with_logits``."""
        self.calls += 1
        if self.expected != 2:  # two classes may have one output
            self._check_expected(logits)
        weights, offsets = self.labels, self.label_offsets
        if self._is_binary(logits):
            weights = self.classes
            offsets = None if self.class_offsets is None else (self.class_offsets[1] - self.class_offsets[0])
        elif offsets is not None:
            _check_classes(logits, len(offsets))
            offsets = along(offsets, 1 if logits.ndim > 1 else 0, logits.ndim)
        if offsets is not None:
            logits = logits + offsets.to(logits.device, logits.dtype)
        if weights is None:
            return F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        return weighted_binary_cross_entropy_with_logits(logits, targets, weights, reduction)

    @property
    def size(self) -> int:
        """Number of classes; 0 for a correction that does nothing."""
        known = (self.classes, self.labels, self.class_offsets, self.label_offsets)
        return next((len(tensor) for tensor in known if tensor is not None), 0)

    def to(self, device: torch.device) -> LossCorrection:
        """Moves the numbers, in place, so that a step does not have to."""
        for name in ("classes", "labels", "class_offsets", "label_offsets"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))
        return self

    def _check_expected(self, logits: Tensor) -> None:
        if self.expected:
            _check_classes(logits, self.expected)

    def _is_binary(self, logits: Tensor) -> bool:
        single = self.classes if self.classes is not None else self.class_offsets
        if single is None or (logits.ndim > 1 and logits.shape[1] == self.size):
            return False
        if self.size != 2:
            raise ValueError(
                f"A binary loss sees one output of shape {tuple(logits.shape)}, but there are {self.size} classes. Give"
                " two weights, [negative, positive]."
            )
        return True

    @property
    def _of_classes(self) -> Tensor:
        if self.classes is None:
            raise ValueError(
                "The training data has several labels a sample, which a cross-entropy over classes cannot take. Use a"
                " loss with one output a label (BCEWithLogitsLoss), or give the weights as a list."
            )
        return self.classes

    def _adjusted(self, logits: Tensor) -> Tensor:
        if self.class_offsets is None:
            return logits
        _check_classes(logits, len(self.class_offsets))
        dim = 1 if logits.ndim > 1 else 0
        return logits + along(self.class_offsets.to(logits.device, logits.dtype), dim, logits.ndim)


def label_counts(counts: Tensor, total: int | None = None) -> Tensor:
    """Counts of absence and presence of each label ``(C, 2)``; without ``total`` each sample has one class.

    Raises:
        ValueError: If a class or label is empty, or on every sample.
    """
    if total is None:
        return _absence_and_presence(check_counts(counts))
    for label, count in enumerate(torch.as_tensor(counts).tolist()):
        if not 0 < count < total:
            raise ValueError(
                f"Label {label} is on {count:g} of {total} samples: there is nothing to weigh against. Leave it out, or"
                " give the weights yourself as a list."
            )
    return _absence_and_presence(counts, total)


def _absence_and_presence(counts: Tensor, total: int | None = None) -> Tensor:
    counts = torch.as_tensor(counts).double().cpu()
    return torch.stack([(counts.sum() if total is None else total) - counts, counts], 1)


def refuse_soft_targets(logits: Tensor, targets: Tensor) -> None:
    """Raises ValueError if ``targets`` are probabilities of classes instead of indices."""
    if targets.is_floating_point() or (targets.ndim == logits.ndim and logits.ndim > 1):
        raise ValueError(
            "The targets are mixed or soft (probabilities of classes, as mixup, CutMix or distillation make them). A"
            " weight belongs to a class, and the share that smoothing gives to every class would push all samples"
            " towards the rare ones. Give class indices, or balance with ImbalancedSampler instead of weights."
        )


def refuse_soft_labels(targets: Tensor) -> None:
    """Raises ValueError if ``targets`` are not all 0 or 1."""
    # Looking at values makes a GPU wait, so there each hundredth call has to do; soft labels come in every batch.
    refuse_soft_labels.calls += 1  # type: ignore[attr-defined]
    if targets.device.type != "cpu" and refuse_soft_labels.calls % 100 != 1:  # type: ignore[attr-defined]
        return
    if targets.is_floating_point() and bool(((targets != 0) & (targets != 1)).any()):
        raise ValueError(
            "The targets lie between 0 and 1 (mixed, or with smoothed labels). Weights of 20 to 1 would turn a smoothed"
            " 0.05 into a positive. Give targets of 0 and 1, or balance with ImbalancedSampler instead of weights."
        )


refuse_soft_labels.calls = 0  # type: ignore[attr-defined]


def _check_classes(logits: Tensor, expected: int) -> None:
    seen = logits.shape[1 if logits.ndim > 1 else 0] if logits.ndim else 0
    if seen != expected:
        raise ValueError(
            f"A loss sees {seen} classes (logits of shape {tuple(logits.shape)}), but there are weights or counts for"
            f" {expected}. Give the weights as a list of {seen}, or name the right losses with losses=[...]."
        )


def _reduce_indexed(
    losses: Tensor, targets: Tensor, weights: Tensor, ignore_index: int, reduction: Reduction
) -> Tensor:
    counted = targets != ignore_index
    factors = weights.to(losses.device)[torch.where(counted, targets, 0)]
    return _reduce(losses * factors, losses, counted.sum(), reduction)


def _reduce(weighted: Tensor, losses: Tensor, number: Tensor, reduction: Reduction) -> Tensor:
    # `weighted` is in float32 even where the losses are not: a weight of 8 bits would be off by up to 0.4 %.
    if reduction == "sum":
        weighted = weighted.sum()
    elif reduction == "mean":
        weighted = weighted.sum() / number.to(weighted.device)
    return weighted.to(losses.dtype)
