"""Tip 3: imbalanced classes. Sampled as often as they deserve, weighted in the loss, corrected in what comes out."""

from lightning_tips.core import bin_targets, class_counts, find_labels
from lightning_tips.imbalance.batches import ImbalancedBatchSampler
from lightning_tips.imbalance.class_report import ClassReportCallback
from lightning_tips.imbalance.find_losses import corrected_losses, find_losses
from lightning_tips.imbalance.logit_adjustment import adjust_logits, logit_adjustment
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
from lightning_tips.imbalance.sampler import ImbalancedSampler
from lightning_tips.imbalance.sampler_callback import ImbalancedSamplerCallback, ImbalancedSamplerMixin
from lightning_tips.imbalance.strategies import default_num_samples, target_mix
from lightning_tips.imbalance.weight_callback import ClassWeightCallback
from lightning_tips.imbalance.weights import class_weights

__all__ = [
    "ClassReportCallback",
    "ClassWeightCallback",
    "ImbalancedBatchSampler",
    "ImbalancedSampler",
    "ImbalancedSamplerCallback",
    "ImbalancedSamplerMixin",
    "LossCorrection",
    "PriorCorrection",
    "Threshold",
    "adjust_logits",
    "best_threshold",
    "bin_targets",
    "class_counts",
    "class_weights",
    "correct_prior",
    "corrected_losses",
    "default_num_samples",
    "find_labels",
    "find_losses",
    "fit_prior_correction",
    "logit_adjustment",
    "target_mix",
    "weighted_binary_cross_entropy_with_logits",
    "weighted_cross_entropy",
    "weighted_nll_loss",
    "weighted_prior",
]
