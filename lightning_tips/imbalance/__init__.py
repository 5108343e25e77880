"""Tip 3: imbalanced classes. Weights in the loss, logit adjustment, and probabilities afterwards."""

from lightning_tips.imbalance.find_losses import corrected_losses, find_losses
from lightning_tips.imbalance.logit_adjustment import adjust_logits, changed_outputs, logit_adjustment
from lightning_tips.imbalance.losses import (
    LossCorrection,
    weighted_binary_cross_entropy_with_logits,
    weighted_cross_entropy,
    weighted_nll_loss,
)
from lightning_tips.imbalance.prior import (
    PriorCorrection,
    Threshold,
    best_threshold,
    correct_prior,
    fit_prior_correction,
    weighted_prior,
)
from lightning_tips.imbalance.weight_callback import ClassWeightCallback
from lightning_tips.imbalance.weights import class_weights

__all__ = [
    "ClassWeightCallback",
    "LossCorrection",
    "PriorCorrection",
    "Threshold",
    "adjust_logits",
    "best_threshold",
    "changed_outputs",
    "class_weights",
    "correct_prior",
    "corrected_losses",
    "find_losses",
    "fit_prior_correction",
    "logit_adjustment",
    "weighted_binary_cross_entropy_with_logits",
    "weighted_cross_entropy",
    "weighted_nll_loss",
    "weighted_prior",
]
