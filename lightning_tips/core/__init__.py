"""What several tips need. Imports no tip."""

from lightning_tips.core.batch import inputs_of, replace_inputs, replace_targets, split_batch, targets_of
from lightning_tips.core.distributed import agree, check_ranks_agree, parameter_hash
from lightning_tips.core.events import Event, EventValue
from lightning_tips.core.labels import as_labels, bin_targets, class_counts, find_labels, stored_labels
from lightning_tips.core.loaders import SeekableSampler, replace_train_loaders, resumable
from lightning_tips.core.loggers import log_numbers, log_picture, log_rows, report_folder
from lightning_tips.core.messages import did_you_mean, say
from lightning_tips.core.mixin import TipMixin
from lightning_tips.core.moments import Outputs, ReplacedStep, changed_outputs
from lightning_tips.core.monitor import Monitor
from lightning_tips.core.optimizers import WeightDecay, group_rates, install, rebuild_optimizer
from lightning_tips.core.report import RunReportCallback
from lightning_tips.core.schedulers import move_schedulers, note_full_rates
from lightning_tips.core.strategies import before_checkpoint_load, require_strategy, wrap_again
from lightning_tips.core.tables import render_table
from lightning_tips.core.tip import ActsOn, TipCallback, callbacks_of, find_tips
from lightning_tips.core.warmup import ScaledSteps, scale_steps, warm_up

__all__ = [
    "ActsOn",
    "Event",
    "EventValue",
    "Monitor",
    "Outputs",
    "ReplacedStep",
    "RunReportCallback",
    "ScaledSteps",
    "SeekableSampler",
    "TipCallback",
    "TipMixin",
    "WeightDecay",
    "agree",
    "as_labels",
    "before_checkpoint_load",
    "bin_targets",
    "callbacks_of",
    "changed_outputs",
    "check_ranks_agree",
    "class_counts",
    "did_you_mean",
    "find_labels",
    "find_tips",
    "group_rates",
    "inputs_of",
    "install",
    "log_numbers",
    "log_picture",
    "log_rows",
    "move_schedulers",
    "note_full_rates",
    "parameter_hash",
    "rebuild_optimizer",
    "render_table",
    "replace_inputs",
    "replace_targets",
    "replace_train_loaders",
    "report_folder",
    "require_strategy",
    "resumable",
    "say",
    "scale_steps",
    "split_batch",
    "stored_labels",
    "targets_of",
    "warm_up",
    "wrap_again",
]
