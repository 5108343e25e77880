"""Tip 2: which optimizer. Adam first, then SGD."""

from lightning_tips.optimizer.callback import OptimizerSwitchCallback
from lightning_tips.optimizer.swats import SwatsProjection
from lightning_tips.optimizer.switch import Switch, switch_optimizer
from lightning_tips.optimizer.triggers import FluctuationTrigger, PlateauTrigger

__all__ = [
    "FluctuationTrigger",
    "OptimizerSwitchCallback",
    "PlateauTrigger",
    "SwatsProjection",
    "Switch",
    "switch_optimizer",
]
