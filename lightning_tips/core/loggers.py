"""Numbers, tables and pictures to whatever loggers the Trainer has."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_tips.core.lightning_private import logging_step


def log_numbers(trainer: pl.Trainer, numbers: dict[str, float]) -> None:
    """Logs numbers to every logger at the current step, from rank 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=logging_step(trainer))


def log_picture(trainer: pl.Trainer, key: str, path: Path) -> None:
    """Shows a PNG in every logger that can show pictures (W&B, TensorBoard), from rank 0.

    Other loggers are left alone: the file itself lies in the run's folder.

    Args:
        trainer: The trainer of the run.
        key: Name of the picture, for example ``"tips/run"``.
        path: A PNG file.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            import matplotlib.image

            # (H, W, 4) floats in [0, 1]; TensorBoard wants to be told the order of axes
            image = matplotlib.image.imread(path)[..., :3]
            logger.experiment.add_image(key, image, global_step=logging_step(trainer), dataformats="HWC")


def log_rows(trainer: pl.Trainer, key: str, columns: list[str], rows: list[list[object]]) -> None:
    """Shows a table in every logger that can show tables (W&B), from rank 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(key, columns=columns, data=rows)
