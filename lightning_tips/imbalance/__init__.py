"""Tip 3: imbalanced classes. Sample them as often as they deserve."""

from lightning_tips.imbalance.batches import ImbalancedBatchSampler
from lightning_tips.imbalance.labels import bin_targets, class_counts, find_labels
from lightning_tips.imbalance.sampler import ImbalancedSampler
from lightning_tips.imbalance.sampler_callback import ImbalancedSamplerCallback, ImbalancedSamplerMixin
from lightning_tips.imbalance.strategies import default_num_samples, target_mix

__all__ = [
    "ImbalancedBatchSampler",
    "ImbalancedSampler",
    "ImbalancedSamplerCallback",
    "ImbalancedSamplerMixin",
    "bin_targets",
    "class_counts",
    "default_num_samples",
    "find_labels",
    "target_mix",
]
