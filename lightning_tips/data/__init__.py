"""Tip 1: more data. How much would it bring, and ways to get it."""

from lightning_tips.data.duplicates import Duplicate, find_duplicates
from lightning_tips.data.folds import FoldCallback, stratified_folds
from lightning_tips.data.label_errors import LabelError, find_label_errors
from lightning_tips.data.learning_curve import LearningCurve, NoCurveError, SamplesNeeded, fit_learning_curve
from lightning_tips.data.mixed_draw import MixedSampler, draw_mixed, draw_weighted
from lightning_tips.data.pseudo_callback import PseudoLabelCallback
from lightning_tips.data.pseudo_guard import SupervisedGuard
from lightning_tips.data.pseudo_labels import PseudoLabels, as_probabilities, choose_pseudo_labels
from lightning_tips.data.pseudo_mixin import PseudoLabelMixin
from lightning_tips.data.recall_record import ClassRecallRecord
from lightning_tips.data.replay import choose_memory, draw_replay
from lightning_tips.data.replay_callback import ReplayCallback, ReplayMixin
from lightning_tips.data.subset import nested_subset
from lightning_tips.data.subset_callback import SubsetCallback, SubsetMixin

__all__ = [
    "ClassRecallRecord",
    "Duplicate",
    "FoldCallback",
    "LabelError",
    "LearningCurve",
    "MixedSampler",
    "NoCurveError",
    "PseudoLabelCallback",
    "PseudoLabelMixin",
    "PseudoLabels",
    "ReplayCallback",
    "ReplayMixin",
    "SamplesNeeded",
    "SubsetCallback",
    "SubsetMixin",
    "SupervisedGuard",
    "as_probabilities",
    "choose_memory",
    "choose_pseudo_labels",
    "draw_mixed",
    "draw_replay",
    "draw_weighted",
    "find_duplicates",
    "find_label_errors",
    "fit_learning_curve",
    "nested_subset",
    "stratified_folds",
]
