"""Running a network on batches of any form without leaving a trace in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_tips.core import unchanged
from lightning_tips.core.batch import inputs_of, split_batch

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch)`` returns the outputs of the model."""
Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)`` returns the mean loss of the batch, a scalar."""
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, for example ``lambda t: strategy.reduce(t, reduce_op="sum")``; all ranks call it."""


def uncompiled() -> AbstractContextManager[Any]:
    """While it is open, what ``torch.compile`` compiled runs as it is written: hooks see nothing of it otherwise.

    Before torch 2.6, where there is no such thing, compiled networks compile once more instead.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and the import takes seconds
        return nullcontext()
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def untouched(model: nn.Module, grad: bool = False, compiled: bool = False) -> Iterator[None]:
    """While it is open, ``model`` is in eval mode; then mode, buffers and all random states are what they were.

    Args:
        model: Any module.
        compiled: Whether compiled networks run compiled.
        grad: Whether gradients are needed. They are recorded then also within ``no_grad`` and ``inference_mode``, and
            not recorded otherwise.
    """
    with unchanged(model), ExitStack() as stack:
        if grad:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if not compiled:
            stack.enter_context(uncompiled())
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def call(model: nn.Module, inputs: Any) -> Any:
    """The outputs for inputs that are a tensor, a tuple or list of arguments, or a dict of them by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """The outputs for the inputs of a batch: ``(inputs, targets, ...)``, a dict, or a tensor."""
    return call(model, inputs_of(batch))


def default_loss(forward: Forward) -> Loss:
    """The loss that the forms of outputs and targets tell.

    Cross entropy for integer targets ``(N, ...)`` and logits ``(N, C, ...)``, binary cross entropy for integer targets
    of the outputs' shape, mean squares for floating point targets ``(N,)`` or ``(N, 1)``.

    Raises:
        TypeError: From the returned function, for anything else.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        _, targets = split_batch(batch)
        outputs = forward(model, batch)
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            outputs = outputs.float()
            if not targets.is_floating_point():
                if targets.shape == outputs.shape[:1] + outputs.shape[2:]:
                    return nn.functional.cross_entropy(outputs, targets.long())
                if targets.shape == outputs.shape:
                    return nn.functional.binary_cross_entropy_with_logits(outputs, targets.float())
            elif targets.numel() == outputs.numel() == len(targets):
                return nn.functional.mse_loss(outputs.flatten(), targets.float().flatten())
        raise TypeError(
            f"Cannot tell the loss of outputs {_form(outputs)} and targets {_form(targets)}; pass loss=a function of"
            " (model, batch) that returns the mean loss of the batch."
        )

    return loss


def _form(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on ``device``, its tensors fit for autograd also when they were made in inference mode."""
    batch = move_data_to_device(batch, device)
    if torch.is_inference_mode_enabled():
        return batch
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
