"""BatchNorm statistics for a network whose channels are no longer what they were computed from.

A pure function on torch objects.

Why not ``torch.optim.swa_utils.update_bn``: it turns dropout on, averages the variances of batches (so it loses what
lies between their means, and counts a short last batch like a full one), knows nothing of other ranks, resets
statistics that somebody has frozen, and takes the first element of a batch or a tensor as the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_tips.pruning.networks.runs import Forward, Reduce, default_forward, device_of, moved, untouched


@dataclass
class _Sums:
    """Of the inputs of one BatchNorm: ``(3, features)``: values, n * mean, n * mean of squares."""

    norm: _BatchNorm
    batch: Tensor | None = None
    total: Tensor | None = None


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    reduce: Reduce | None = None,
    include_frozen: bool = False,
) -> list[str]:
    """Sets the running statistics of every BatchNorm to those of the given batches, in place.

    Each BatchNorm normalises with the statistics of the running batch meanwhile, as in training. Its mean and
    variance are then those of all values of all batches together: E[x^2] - E[x]^2, weighted by size, and not the
    average of the batches' variances (the population statistics of Wu & Johnson 2021). ``num_batches_tracked`` is the
    number of batches, so that a ``momentum=None`` goes on rightly; momentum itself is not touched.

    What is left alone: layers without running statistics, layers that do not run, and, while the model is in training
    mode, those that are in eval mode, since somebody has frozen them. In a model that is in eval mode as a whole nobody
    can tell, and all are estimated.

    Args:
        model: The network. Everything but the statistics stays as it is: mode, other buffers, random states. Dropout
            is off.
        batches: Training batches; a batch with a single value for each channel is skipped.
        forward: ``forward(model, batch)``; by default the model is called with the batch's inputs.
        reduce: Sums a tensor over ranks; the statistics are then those of the batches of all ranks, equal on all.
            With a SyncBatchNorm all ranks need the same number of batches.
        include_frozen: Whether frozen layers are estimated too.

    Returns:
        Names of the layers with new statistics; empty for a network without BatchNorm.

    Raises:
        ValueError: If there are no usable batches, or statistics are not finite; the model is then as it was.
    """
    forward = forward or default_forward
    sums = {
        name: _Sums(module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.training or include_frozen or not model.training)
    }
    if not sums:
        return []
    number = _run(model, sums, batches, forward)
    totals = _reduced(sums, number, reduce, device_of(model))
    return _write(sums, totals)


def _run(model: nn.Module, sums: dict[str, _Sums], batches: Iterable[Any], forward: Forward) -> int:
    number = 0
    device = device_of(model)
    with untouched(model), ExitStack() as hooks:
        for entry in sums.values():
            hooks.callback(entry.norm.register_forward_pre_hook(_summing(entry)).remove)
            entry.norm.training = True
        for batch in batches:
            try:
                forward(model, moved(batch, device))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                for entry in sums.values():
                    entry.batch = None
                continue
            number += 1
            for entry in sums.values():
                if entry.batch is not None:
                    entry.total = entry.batch if entry.total is None else entry.total + entry.batch
                    entry.batch = None
    return number


def _summing(entry: _Sums) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].detach().transpose(0, 1).flatten(1).float()  # (features, N)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        if values.device.type != "mps":
            variance, mean = variance.double(), mean.double()
        size = torch.full_like(mean, values.shape[1])
        new = torch.stack([size, size * mean, size * (variance + mean.square())])
        entry.batch = new if entry.batch is None else entry.batch + new  # a layer may run more than once

    return hook


def _reduced(sums: dict[str, _Sums], number: int, reduce: Reduce | None, device: torch.device) -> Tensor:
    """All sums in one tensor, and the number of batches at its end, so that all ranks reduce exactly once."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    parts = [
        torch.zeros(3 * entry.norm.num_features, device=device) if entry.total is None else entry.total.flatten()
        for entry in sums.values()
    ]
    together = torch.cat([part.to(device, dtype) for part in (*parts, torch.tensor([float(number)], device=device))])
    return together if reduce is None else reduce(together)


def _write(sums: dict[str, _Sums], totals: Tensor) -> list[str]:
    number = int(totals[-1])
    if not number:
        raise ValueError(
            "No batch to estimate BatchNorm statistics from: pass training batches of more than one sample."
        )
    split = totals[:-1].split([3 * entry.norm.num_features for entry in sums.values()])
    new: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, entry), part in zip(sums.items(), split, strict=True):
        size, first, second = part.view(3, entry.norm.num_features)
        if not size[0]:
            continue  # did not run
        mean = first / size
        # Unbiased, as BatchNorm's own running variance.
        variance = (second / size - mean.square()).clamp(min=0) * size / (size - 1).clamp(min=1)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise ValueError(f"The inputs of {name} are not finite. Look for NaN in the data or the network's weights.")
        new[name] = mean, variance
    with torch.no_grad():
        for name, (mean, variance) in new.items():
            norm = sums[name].norm
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(number)
    return list(new)
