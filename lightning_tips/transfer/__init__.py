"""Tip 4: transfer learning. A pretrained network, its early layers frozen, its last ones retrained."""

from lightning_tips.transfer.cache import FeatureCache
from lightning_tips.transfer.callback import TransferLearningCallback
from lightning_tips.transfer.freeze import changed_since, frozen_state, set_trainable
from lightning_tips.transfer.heads import find_head, find_network, where_to_cache
from lightning_tips.transfer.inputs import InputExpectation, check_images, expected_inputs
from lightning_tips.transfer.layers import LayerGroup, layer_groups, match_parameters
from lightning_tips.transfer.new_classes import load_with_new_classes
from lightning_tips.transfer.schedule import Phase, preset_phases, read_plan, write_plan

__all__ = [
    "FeatureCache",
    "InputExpectation",
    "LayerGroup",
    "Phase",
    "TransferLearningCallback",
    "changed_since",
    "check_images",
    "expected_inputs",
    "find_head",
    "find_network",
    "frozen_state",
    "layer_groups",
    "load_with_new_classes",
    "match_parameters",
    "preset_phases",
    "read_plan",
    "set_trainable",
    "where_to_cache",
    "write_plan",
]
