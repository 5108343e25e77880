"""Every use of a private attribute of Lightning, and nothing else.

`tests/test_lightning_private.py` fails when Lightning changes one of them.
"""

from __future__ import annotations

import lightning.pytorch as pl

SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's folder that holds everything but the tensors (``_METADATA_FILENAME``)."""


def logging_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs at this moment.

    It differs from ``trainer.global_step`` with several optimizers. Loggers such as W&B drop what comes with an
    earlier step, so an event has to use Lightning's own count.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
