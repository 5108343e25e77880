"""Seven practical tips of deep learning as drop-in callbacks and mixins for PyTorch Lightning."""

from lightning_tips.augmentation import BatchAugmentationCallback
from lightning_tips.core import RunReportCallback
from lightning_tips.imbalance import (
    ClassAugmentationCallback,
    ClassReportCallback,
    ClassWeightCallback,
    ImbalancedSampler,
    ImbalancedSamplerCallback,
    ImbalancedSamplerMixin,
    class_weights,
)
from lightning_tips.optimizer import OptimizerSwitchCallback
from lightning_tips.transfer import TransferLearningCallback

__all__ = [
    "BatchAugmentationCallback",
    "ClassAugmentationCallback",
    "ClassReportCallback",
    "ClassWeightCallback",
    "ImbalancedSampler",
    "ImbalancedSamplerCallback",
    "ImbalancedSamplerMixin",
    "OptimizerSwitchCallback",
    "RunReportCallback",
    "TransferLearningCallback",
    "class_weights",
]
