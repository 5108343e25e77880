"""Penalties on the weights that act on the gradients, so that no loss has to be edited."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer


def add_pull(parameters: Mapping[str, nn.Parameter], starts: Mapping[str, Tensor], strength: float) -> None:
    """Adds the gradient of ``strength / 2 * |w - start|^2`` to the gradients that are there.

    With the pretrained weights as starts it is L2-SP (Li et al. 2018); where there is no start it is an L2 penalty.
    It acts on the gradient, so no loss has to be edited.

    Args:
        parameters: By name; those without a gradient are passed over.
        starts: By name; a missing one is zero.
        strength: The coefficient.

    Raises:
        ValueError: If a parameter has another shape than its start: it was pruned.
    """
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            start = starts.get(name)
            if start is not None and start.shape != parameter.shape:
                raise ValueError(
                    f"{name} is {tuple(parameter.shape)} now, and {tuple(start.shape)} where it started, so there is no"
                    " distance for l2_sp to penalise. Prune before or after the transfer, or set l2_sp to 0."
                )
            distance = parameter.detach() if start is None else parameter.detach() - start.to(parameter.device)
            parameter.grad.add_(distance.to(parameter.grad.dtype), alpha=strength)


def pending_loss_scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """The factor that is still in the gradients when a step is about to be taken.

    With fp16 Lightning's gradient scaler takes it out before ``on_before_optimizer_step``, unless the optimizer is a
    fused one, which does so in its step.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
