"""What a fit came to and cost, as a file that other programs read."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.core.history import json_numbers, note_metrics

if sys.platform != "win32":  # which has no such lock, and does not tell the peak memory
    import fcntl
    import resource


class FitRecord(pl.Callback):
    """Writes a JSON file at the end of fit, for commands that compare fits.

    It holds ``rows`` (one for each validation or training epoch: epoch, step, and all metrics that are logged by
    epoch), ``metrics`` (those of the last epoch), ``epochs``, ``steps``, ``stopped_early`` (before ``max_epochs`` or
    ``max_steps``), ``parameters``, ``trainable``, ``seconds`` and ``cpu_seconds`` of training with its validation
    (summed over resumes), ``step_seconds`` (the median of a training step, data included), ``peak_megabytes`` (of the
    device on CUDA, else of the process) and ``world_size``. Numbers that JSON has no word for are null.

    While it fits, a process holds a lock on the file ``<path>.lock``: two at once would write over each other's
    checkpoints.

    Args:
        path: The file.

    Raises:
        MisconfigurationException: Before the first step, if another process holds the lock.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._reset()

    def _reset(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._spent = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._steps: list[float] = []
        self._began: tuple[float, float] | None = None
        self._step_began = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the last run, and takes the lock."""
        if stage == "fit" and trainer.global_step == 0:
            self._reset()
        if stage == "fit" and trainer.is_global_zero:
            self._take_lock()

    def _take_lock(self) -> None:
        if sys.platform == "win32":
            return
        self._give_back()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(self.path.name + ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system takes it back when the process ends
        except OSError:
            lock.seek(0)
            who = lock.read().strip() or "?"
            lock.close()
            raise MisconfigurationException(
                f"Another process ({who}) trains in {self.path.parent} already: wait for it or end it, then call again."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def _give_back(self) -> None:
        if sys.platform != "win32" and self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for workers that were forked meanwhile
            self._lock.close()
            self._lock = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the lock back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the lock back."""
        self._give_back()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clocks."""
        self._began = (time.perf_counter(), time.process_time())
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step of an epoch is not measured: its loader starts."""
        self._step_began = math.nan

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the time of a step; on CUDA that of its launch, which follows the device once its queue is full."""
        now = time.perf_counter()
        if not math.isnan(self._step_began):
            self._steps.append(now - self._step_began)
            del self._steps[:-1000]
        self._step_began = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metrics."""
        self._step_began = math.nan  # validation is no part of a step
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._note(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metrics, those of the training epoch now among them."""
        self._note(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        note_metrics(self._rows, trainer)

    def _now(self) -> dict[str, float]:
        if self._began is None:
            return dict(self._spent)
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        return {"seconds": self._spent["seconds"] + wall, "cpu_seconds": self._spent["cpu_seconds"] + cpu}

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and the time they took."""
        return {"rows": [dict(row) for row in self._rows], "spent": self._now()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self._rows = [dict(row) for row in state_dict["rows"]]
        self._spent = dict(state_dict["spent"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file."""
        self._spent, self._began = self._now(), None  # a checkpoint may still be saved
        if not trainer.is_global_zero:
            return
        epochs, steps = trainer.max_epochs, trainer.max_steps
        ended = (epochs is not None and 0 <= epochs <= trainer.current_epoch) or 0 <= steps <= trainer.global_step
        written = {
            "rows": self._rows,
            "metrics": self._rows[-1] if self._rows else {},
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "stopped_early": not ended,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "trainable": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "step_seconds": sorted(self._steps)[len(self._steps) // 2] if self._steps else None,
            "peak_megabytes": _peak_megabytes(pl_module.device),
            "world_size": trainer.world_size,
            **self._spent,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(json_numbers(written), indent=1) + "\n")


def _peak_megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
