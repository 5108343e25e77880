"""Blocks ranked by the module's own validation, on batches that were kept from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_tips.core import CaughtLog, did_you_mean
from lightning_tips.pruning.blocks.find import set_module
from lightning_tips.pruning.fit.base import PruningCallback
from lightning_tips.pruning.fit.capture import is_validation_of_fit, mapped
from lightning_tips.pruning.networks.copies import logs_nothing, plain_copy
from lightning_tips.pruning.networks.runs import device_of, moved


def validation_metric(
    module: pl.LightningModule,
    network: str,
    batches: Sequence[Any],
    metric: str,
    context: Callable[[], AbstractContextManager[Any]],
) -> Callable[[nn.Module], float]:
    """A function that says what ``validation_step`` logs as ``metric`` with another network in the module.

    ``validation_step`` and the hooks around a validation epoch run on a copy of the module, see :class:`CaughtLog`, on
    one rank by itself: nothing is gathered from others.

    Args:
        module: The module; it stays as it is.
        network: Name of the network in it, "" for itself.
        batches: Batches as ``validation_step`` takes them.
        metric: The name under which it is logged.
        context: What a validation step runs in, as the precision plugin says.

    Returns:
        Takes a network, in eval mode, and returns the metric; it raises ValueError where that is not logged.
    """
    frame = plain_copy(module) if network else None

    def evaluate(candidate: nn.Module) -> float:
        whole: Any = candidate
        if frame is not None:
            whole = frame
            set_module(frame, network, candidate)
            frame.eval()
        caught = CaughtLog()
        moved_batches = (moved(batch, device_of(whole)) for batch in batches)
        try:
            with _apart(whole, caught, module.trainer), context(), caught.validation(whole, moved_batches):
                if metric not in caught.names:
                    raise ValueError(
                        f"criterion='metric' looks at {metric!r}, which validation_step does not log as a number."
                        f" {did_you_mean(metric, caught.names)}"
                    )
                return caught.value(metric)
        except RuntimeError as error:
            raise ValueError(f"criterion='metric' runs validation_step on a copy of the module: {error}") from error

    return evaluate


@contextmanager
def _apart(module: pl.LightningModule, log: CaughtLog, trainer: pl.Trainer) -> Iterator[None]:
    """While it is open, a copy of a module can ask its trainer, logs to ``log``, and waits for no other rank."""

    def all_gather(data: Any, *_: Any, **__: Any) -> Any:  # in the form that it has with several ranks
        return mapped(data, lambda tensor: tensor[None]) if trainer.world_size > 1 else data

    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    with ExitStack() as stack:
        module.trainer = trainer
        stack.callback(setattr, module, "trainer", None)
        stack.enter_context(logs_nothing(module))
        module.__dict__.update({"log": log, "all_gather": all_gather})
        stack.callback(module.__dict__.pop, "all_gather")
        for part in metrics:
            stack.callback(setattr, part, "distributed_available_fn", part.distributed_available_fn)
            part.distributed_available_fn = lambda: False
        yield


def kept_batch(batch: Any) -> Any:
    """A batch to keep: on the CPU, apart from what the step does to it.

    Raises:
        MisconfigurationException: If something in it cannot be kept in a checkpoint.
    """

    def copy(tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return tensor.detach().to("cpu", copy=True)

    return mapped(batch, copy)


class RanksByMetric(PruningCallback):
    """Keeps validation batches for ``criterion="metric"``. The attributes are those of `LayerPruningCallback`."""

    criterion: str | Callable[[nn.Module], float]

    # ---- state

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._evaluation: Callable[[], Callable[[nn.Module], float]] | None = None

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a criterion that looks at validation before there is any."""
        super().prepare(trainer, pl_module)
        if not self._by_metric:
            return
        if not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__}: criterion='metric' runs validation_step, and {type(pl_module).__name__} has"
                " none. Give it one, or rank by 'outputs' or 'branch_norm'."
            )
        if self.schedule.start_epoch == 0 and not self._waits_for_validation and not trainer.num_sanity_val_steps:
            raise MisconfigurationException(
                f"{type(self).__name__}: criterion='metric' looks at validation batches, and there are none before the"
                " first epoch. Set start_epoch to 1 or more, or num_sanity_val_steps of the Trainer."
            )

    # ---- validation

    @property
    def _by_metric(self) -> bool:
        return self.criterion == "metric"

    @property
    def _looks_at_metric(self) -> bool:
        return self._by_metric or super()._looks_at_metric

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew where the last validation did not fill the sample: it brings the same batches again."""
        super().on_validation_start(trainer, pl_module)
        if self._keeps_batches(trainer):
            self._validation.clear()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the batch, of the first loader."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if dataloader_idx == 0 and self._keeps_batches(trainer):
            self._validation.note(trainer, kept_batch(batch))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes together what the ranks have kept."""
        super().on_validation_epoch_end(trainer, pl_module)
        if self._keeps_batches(trainer):
            self._validation.add_noted(trainer)

    def _keeps_batches(self, trainer: pl.Trainer) -> bool:
        return is_validation_of_fit(trainer) and self._by_metric and not self._finished and not self._validation.full

    @contextmanager
    def _ranking(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """While it is open, blocks can be ranked by the module's own metric."""
        batches, name = self._validation.batches, self._network or ""

        def evaluation() -> Callable[[nn.Module], float]:
            context = trainer.precision_plugin.val_step_context
            return validation_metric(pl_module, name, batches, self.monitor, context)

        self._evaluation = evaluation if self._by_metric and batches else None
        try:
            yield
        finally:
            self._evaluation = None
