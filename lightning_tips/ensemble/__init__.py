"""Tip 6: several networks vote, each with a weight."""

from lightning_tips.ensemble.calibration import (
    Reliability,
    apply_temperature,
    calibration_error,
    fit_temperature,
    reliability,
)
from lightning_tips.ensemble.checks import Task, as_weights, check_outputs, check_targets
from lightning_tips.ensemble.module import EnsembleModule
from lightning_tips.ensemble.plots import plot_reliability, plot_weights
from lightning_tips.ensemble.soup import Barrier, average_weights, greedy_soup, weight_barrier, weight_cosine
from lightning_tips.ensemble.vote import (
    RegressionResult,
    RegressionVote,
    Vote,
    VoteResult,
    Voting,
    vote,
    vote_regression,
)
from lightning_tips.ensemble.weights import CrossFit, Method, cross_fit, ensemble_weights

__all__ = [
    "Barrier",
    "CrossFit",
    "EnsembleModule",
    "Method",
    "RegressionResult",
    "RegressionVote",
    "Reliability",
    "Task",
    "Vote",
    "VoteResult",
    "Voting",
    "apply_temperature",
    "as_weights",
    "average_weights",
    "calibration_error",
    "check_outputs",
    "check_targets",
    "cross_fit",
    "ensemble_weights",
    "fit_temperature",
    "greedy_soup",
    "plot_reliability",
    "plot_weights",
    "reliability",
    "vote",
    "vote_regression",
    "weight_barrier",
    "weight_cosine",
]
