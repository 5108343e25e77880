"""What several tips need. Imports no tip."""

from lightning_tips.core.batch import inputs_of, replace_inputs, replace_targets, split_batch, targets_of
from lightning_tips.core.confusion import as_classes, confusion_matrix, recalls
from lightning_tips.core.dataset_labels import find_labels, stored_labels
from lightning_tips.core.distributed import (
    agree,
    check_ranks_agree,
    do_ranks_agree,
    gather_objects,
    gather_rows,
    parameter_hash,
    raise_together,
    sampler_ranks,
)
from lightning_tips.core.epoch_sampler import EpochSampler, OrderedSampler
from lightning_tips.core.events import Event, EventValue
from lightning_tips.core.fit_record import FitRecord
from lightning_tips.core.fits import Fit, devices, loggers_of_fit, run_fits
from lightning_tips.core.labels import as_labels, bin_targets, class_counts
from lightning_tips.core.lightning_private_scores import OldScores
from lightning_tips.core.loader_tip import LoaderTip
from lightning_tips.core.loaders import (
    SeekableSampler,
    replace_train_loaders,
    resumable,
    sampler_of,
    split_train_loader,
)
from lightning_tips.core.loggers import leaves_files, log_numbers, log_picture, log_rows, report_folder
from lightning_tips.core.logit_watcher import LogitWatcher
from lightning_tips.core.messages import did_you_mean, reason_of, say
from lightning_tips.core.mixin import TipMixin
from lightning_tips.core.moments import Outputs, ReplacedStep, changed_outputs
from lightning_tips.core.monitor import Monitor
from lightning_tips.core.optimizers import WeightDecay, group_rates, install, rebuild_optimizer
from lightning_tips.core.rank_zero import on_rank_zero
from lightning_tips.core.report import RunReportCallback
from lightning_tips.core.resize import Kept, RemovedBlock, accept_other_shapes, keep_indices, resize_to
from lightning_tips.core.sample_indices import next_indices, record_indices, record_train_indices, unknown_indices
from lightning_tips.core.schedulers import move_schedulers, note_full_rates
from lightning_tips.core.strategies import before_checkpoint_load, require_strategy, wrap_again
from lightning_tips.core.tables import render_table
from lightning_tips.core.tip import ActsOn, TipCallback, callbacks_of, find_tips
from lightning_tips.core.untouched import keep_values, same_random_numbers, unchanged
from lightning_tips.core.validation import CaughtLog
from lightning_tips.core.warmup import ScaledSteps, carry_shares, scale_again, scale_steps, warm_up

__all__ = [
    "ActsOn",
    "CaughtLog",
    "EpochSampler",
    "Event",
    "EventValue",
    "Fit",
    "FitRecord",
    "Kept",
    "LoaderTip",
    "LogitWatcher",
    "Monitor",
    "OldScores",
    "OrderedSampler",
    "Outputs",
    "RemovedBlock",
    "ReplacedStep",
    "RunReportCallback",
    "ScaledSteps",
    "SeekableSampler",
    "TipCallback",
    "TipMixin",
    "WeightDecay",
    "accept_other_shapes",
    "agree",
    "as_classes",
    "as_labels",
    "before_checkpoint_load",
    "bin_targets",
    "callbacks_of",
    "carry_shares",
    "changed_outputs",
    "check_ranks_agree",
    "class_counts",
    "confusion_matrix",
    "devices",
    "did_you_mean",
    "do_ranks_agree",
    "find_labels",
    "find_tips",
    "gather_objects",
    "gather_rows",
    "group_rates",
    "inputs_of",
    "install",
    "keep_indices",
    "keep_values",
    "leaves_files",
    "log_numbers",
    "log_picture",
    "log_rows",
    "loggers_of_fit",
    "move_schedulers",
    "next_indices",
    "note_full_rates",
    "on_rank_zero",
    "parameter_hash",
    "raise_together",
    "reason_of",
    "rebuild_optimizer",
    "recalls",
    "record_indices",
    "record_train_indices",
    "render_table",
    "replace_inputs",
    "replace_targets",
    "replace_train_loaders",
    "report_folder",
    "require_strategy",
    "resize_to",
    "resumable",
    "run_fits",
    "same_random_numbers",
    "sampler_of",
    "sampler_ranks",
    "say",
    "scale_again",
    "scale_steps",
    "split_batch",
    "split_train_loader",
    "stored_labels",
    "targets_of",
    "unchanged",
    "unknown_indices",
    "warm_up",
    "wrap_again",
]
