"""Tip 7: a network that is really smaller, by filters and by residual blocks."""

from lightning_tips.pruning.blocks.find import Block, find_blocks
from lightning_tips.pruning.blocks.rank import rank_blocks
from lightning_tips.pruning.blocks.remove import BlockReport, plan_blocks, remove_blocks
from lightning_tips.pruning.checkpoints import load_pruned
from lightning_tips.pruning.command.comparison import compare_networks
from lightning_tips.pruning.command.export import export_network
from lightning_tips.pruning.command.prune import prune_checkpoint
from lightning_tips.pruning.filters.plan import PruningPlan
from lightning_tips.pruning.filters.prune import PruningReport, plan_filters, prune_filters
from lightning_tips.pruning.fit.distillation import distillation_loss
from lightning_tips.pruning.fit.filter_callback import FilterPruningCallback
from lightning_tips.pruning.fit.layer_callback import LayerPruningCallback
from lightning_tips.pruning.networks.measure import (
    Cost,
    Latency,
    count_cost,
    measure_latencies,
    measure_latency,
    model_size,
    peak_memory,
)
from lightning_tips.pruning.networks.recalibrate import reestimate_batch_norm
from lightning_tips.pruning.ranking.criteria import NEEDS_BATCHES, channel_scores, following_norms
from lightning_tips.pruning.ranking.sensitivity import SensitivityTable, sensitivity

__all__ = [
    "NEEDS_BATCHES",
    "Block",
    "BlockReport",
    "Cost",
    "FilterPruningCallback",
    "Latency",
    "LayerPruningCallback",
    "PruningPlan",
    "PruningReport",
    "SensitivityTable",
    "channel_scores",
    "compare_networks",
    "count_cost",
    "distillation_loss",
    "export_network",
    "find_blocks",
    "following_norms",
    "load_pruned",
    "measure_latencies",
    "measure_latency",
    "model_size",
    "peak_memory",
    "plan_blocks",
    "plan_filters",
    "prune_checkpoint",
    "prune_filters",
    "rank_blocks",
    "reestimate_batch_norm",
    "remove_blocks",
    "sensitivity",
]
