"""Does a tip help here? Arms of one configuration, paired differences over seeds, a report."""

from lightning_tips.compare.arms import Arm, Overlay, find_tips_in, parse_overlay, plan_arms
from lightning_tips.compare.page import as_page
from lightning_tips.compare.plots import plot_cost, plot_curves, plot_differences
from lightning_tips.compare.results import collect, hopeless, score_of, summarize
from lightning_tips.compare.statistics import Difference, guess_mode, holm, paired_difference, spread, verdict
from lightning_tips.compare.table import arm_csv, as_terminal, fit_csv

__all__ = [
    "Arm",
    "Difference",
    "Overlay",
    "arm_csv",
    "as_page",
    "as_terminal",
    "collect",
    "find_tips_in",
    "fit_csv",
    "guess_mode",
    "holm",
    "hopeless",
    "paired_difference",
    "parse_overlay",
    "plan_arms",
    "plot_cost",
    "plot_curves",
    "plot_differences",
    "score_of",
    "spread",
    "summarize",
    "verdict",
]
