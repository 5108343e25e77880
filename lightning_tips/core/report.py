"""What remains of a run for people to look at."""

from __future__ import annotations

import csv
import json
from typing import Any

import lightning.pytorch as pl

from lightning_tips.core.history import note_metrics
from lightning_tips.core.loggers import leaves_files, log_picture, log_rows, report_folder
from lightning_tips.core.messages import say
from lightning_tips.core.plot import plot_run
from lightning_tips.core.tip import find_tips


class RunReportCallback(pl.Callback):
    """Keeps the run's metrics and leaves a plot with the tips' events marked on it, for any module and logger.

    At the end of fit, also of one that was interrupted, the folder ``tips`` in the logger's folder holds ``run.png``,
    ``metrics.csv`` (one row for each validation or epoch) and ``events.json``; W&B and TensorBoard get the plot, W&B
    the events as a table. Without a logger it is the first free one of ``tips``, ``tips-v1``, ``tips-v2`` ... in
    ``default_root_dir``. The history is kept in checkpoints, so that a resumed run's plot shows all of it.

    Args:
        metrics: Names of the metrics to draw. By default every epoch-level loss in one panel, every other metric with
            values from 0 to 1 in another, and the learning rates in a third.
        plot: Whether to draw at all.
    """

    def __init__(self, metrics: list[str] | None = None, plot: bool = True) -> None:
        self.metrics = metrics
        self.plot = plot
        self._rows: list[dict[str, float]] = []
        self._stage = "fit"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts a new history when a new run starts."""
        self._stage = stage
        if stage == "fit" and trainer.global_step == 0:
            self._rows = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metrics."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._note(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metrics, those of the training epoch now among them."""
        self._note(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        rates = {f"lr/{i}": max(float(g["lr"]) for g in o.param_groups) for i, o in enumerate(trainer.optimizers)}
        note_metrics(self._rows, trainer, **rates)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the report."""
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Writes the report of an interrupted run."""
        if self._rows and isinstance(exception, KeyboardInterrupt):
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not leaves_files(trainer):
            return
        target = report_folder(trainer)
        events = sorted((e for tip in find_tips(trainer) for e in tip.events), key=lambda e: e.step)
        (target / "events.json").write_text(json.dumps([e.to_dict() for e in events], indent=2) + "\n")
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        with (target / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows)
        log_rows(
            trainer,
            "tips/events",
            ["tip", "epoch", "step", "event", "details"],
            [[e.tip, e.epoch, e.step, e.what, json.dumps(e.details)] for e in events],
        )
        written = "metrics.csv, events.json"
        if self.plot and self._rows:
            plot_run(self._rows, events, target / "run.png", self.metrics)
            log_picture(trainer, "tips/run", target / "run.png")
            written = "run.png, " + written
        say(trainer, f"The run's report is in {target}: {written}")

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the history, in fit; Lightning calls this for test and validate too."""
        if self._stage != "fit":
            return
        self._rows = [dict(row) for row in state_dict["rows"]]
