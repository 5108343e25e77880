"""Seven practical tips of deep learning as drop-in callbacks and mixins for PyTorch Lightning."""

from lightning_tips.augmentation import BatchAugmentationCallback
from lightning_tips.core import RunReportCallback
from lightning_tips.data import (
    PseudoLabelCallback,
    PseudoLabelMixin,
    ReplayCallback,
    ReplayMixin,
    SubsetCallback,
    SubsetMixin,
    fit_learning_curve,
)
from lightning_tips.ensemble import EnsembleModule
from lightning_tips.imbalance import (
    ClassReportCallback,
    ClassWeightCallback,
    ImbalancedSampler,
    ImbalancedSamplerCallback,
    ImbalancedSamplerMixin,
    class_weights,
)
from lightning_tips.optimizer import OptimizerSwitchCallback
from lightning_tips.pruning import FilterPruningCallback, LayerPruningCallback, load_pruned, prune_filters
from lightning_tips.transfer import TransferLearningCallback

__all__ = [
    "BatchAugmentationCallback",
    "ClassReportCallback",
    "ClassWeightCallback",
    "EnsembleModule",
    "FilterPruningCallback",
    "ImbalancedSampler",
    "ImbalancedSamplerCallback",
    "ImbalancedSamplerMixin",
    "LayerPruningCallback",
    "OptimizerSwitchCallback",
    "PseudoLabelCallback",
    "PseudoLabelMixin",
    "ReplayCallback",
    "ReplayMixin",
    "RunReportCallback",
    "SubsetCallback",
    "SubsetMixin",
    "TransferLearningCallback",
    "class_weights",
    "fit_learning_curve",
    "load_pruned",
    "prune_filters",
]
