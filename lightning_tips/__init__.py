"""Seven practical tips of deep learning as drop-in callbacks and mixins for PyTorch Lightning."""

from lightning_tips.core import RunReportCallback
from lightning_tips.imbalance import ImbalancedSampler, ImbalancedSamplerCallback, ImbalancedSamplerMixin
from lightning_tips.optimizer import OptimizerSwitchCallback

__all__ = [
    "ImbalancedSampler",
    "ImbalancedSamplerCallback",
    "ImbalancedSamplerMixin",
    "OptimizerSwitchCallback",
    "RunReportCallback",
]
