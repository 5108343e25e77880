"""Numbers, tables and pictures to whatever loggers the Trainer has."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from pathlib import Path
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_tips.core.lightning_private import logging_step

_folders: WeakKeyDictionary[pl.Trainer, Path] = WeakKeyDictionary()


def leaves_files(trainer: pl.Trainer) -> bool:
    """Whether tips leave files: on rank 0, and not in a ``fast_dev_run``."""
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)


def report_folder(trainer: pl.Trainer) -> Path:
    """Where tips leave their files: ``tips`` in the folder of the first logger's run.

    Without a logger it is the first free one of ``tips``, ``tips-v1``, ``tips-v2`` ... in ``default_root_dir``: one for
    each Trainer, so that no run overwrites another's. To be called on rank 0; makes the folder.
    """
    if trainer not in _folders:
        _folders[trainer] = _make_folder(trainer)
    return _folders[trainer]


def _make_folder(trainer: pl.Trainer) -> Path:
    if trainer.loggers:
        logger = trainer.loggers[0]
        own = getattr(logger, "log_dir", None)  # CSV, TensorBoard; the others have it as ModelCheckpoint does
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(own or Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version), "tips")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
    for number in count():
        folder = Path(trainer.default_root_dir, f"tips-v{number}" if number else "tips")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError  # count() does not end


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
