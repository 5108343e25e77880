"""The criteria that look at data: on batches of their own, or on the gradients that training computes anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_tips.pruning.networks.copies import COMPILED
from lightning_tips.pruning.networks.layers import by_channel, channels_of, weight_of
from lightning_tips.pruning.networks.runs import Forward, Loss, Reduce, device_of, moved, untouched
from lightning_tips.pruning.ranking.statistics import watch


def activation_scores(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    criterion: str,
    batches: Iterable[Any],
    forward: Forward | None,
    reduce: Reduce | None,
) -> dict[str, Tensor]:
    """``mean_activation`` and ``apoz``: means over all values of a channel."""
    seen = watch(model, list(layers), batches, forward, (lambda x: x != 0) if criterion == "apoz" else torch.abs)
    for name in layers if seen.following else ():  # no batch on this rank: the others know
        following = seen.following[name]
        if not following.calls:
            raise ValueError(f"{criterion}: {name} did not run in the forward pass. Leave the layer out.")
        if criterion == "apoz" and not following.rectifier:
            what = f"{following.activation} follows" if following.activation else "no nonlinearity of its own follows"
            raise ValueError(
                f"apoz counts zeros after a ReLU, but {what} {name} (in a residual block the ReLU after the sum is not"
                " the layer's own). Leave the layer out (inner channels of blocks only), or take another criterion."
            )
    return _means(layers, seen.sums, seen.counts, reduce, criterion)


def taylor_scores(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    loss: Loss,
    reduce: Reduce | None,
) -> dict[str, Tensor]:
    """``taylor``: the mean over batches of what each filter adds to the first order."""
    weights = [_leaf(name, layer) for name, layer in layers.items()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    sums: dict[str, Tensor] = {}
    number = 0
    device = device_of(model)
    try:
        with untouched(model, grad=True):
            for weight in frozen:
                weight.requires_grad_(True)
            for batch in batches:
                value = loss(model, moved(batch, device))
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise TypeError("taylor: the loss is no scalar with gradients; let loss(model, batch) return one.")
                # Not backward(): that would add to .grad and wake the hooks of DistributedDataParallel.
                gradients = torch.autograd.grad(value, weights, allow_unused=True)
                for (name, layer), weight, gradient in zip(layers.items(), weights, gradients, strict=True):
                    if gradient is None:
                        raise ValueError(f"taylor: the loss does not depend on {name}. Leave the layer out.")
                    score = by_channel(layer, gradient.float() * weight.detach().float()).square().sum(1)
                    score = score if score.device.type == "mps" else score.double()
                    sums[name] = score if name not in sums else sums[name] + score
                number += 1
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return _means(layers, sums, dict.fromkeys(layers, number), reduce, "taylor")


def _leaf(name: str, layer: nn.Module) -> Tensor:
    weight = weight_of(layer)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"taylor: the weight of {name} is computed from others (weight_norm or another parametrisation). Remove"
            " that first, or take another criterion."
        )
    return weight


def _means(
    layers: Mapping[str, nn.Module],
    sums: Mapping[str, Tensor],
    counts: Mapping[str, int],
    reduce: Reduce | None,
    criterion: str,
) -> dict[str, Tensor]:
    """Sums over counts, both over all ranks: one tensor, so that all ranks reduce once whatever they have seen."""
    device = weight_of(next(iter(layers.values()))).device if layers else torch.device("cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    parts = []
    for name, layer in layers.items():
        empty = torch.zeros(channels_of(layer), device=device)
        parts.append(torch.cat([sums.get(name, empty).to(device, dtype), _scalar(counts.get(name, 0), device, dtype)]))
    if not parts:
        return {}
    together = torch.cat(parts)
    if reduce is not None:
        together = reduce(together)
    result = {}
    for (name, layer), part in zip(
        layers.items(), together.split([channels_of(layer) + 1 for layer in layers.values()]), strict=True
    ):
        if not part[-1]:
            raise ValueError(f"{criterion}: the batches are empty, so {name} has seen no data.")
        result[name] = (part[:-1] / part[-1]).to(weight_of(layer).device)
    return result


def _scalar(value: float, device: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], device=device, dtype=dtype)


class GradientScores:
    """Sums (gradient * weight)^2 of each filter over optimizer steps: what the loss would change without it, squared.

    It needs no loss and no batches of its own, only a call before each optimizer step, where gradients are those of
    all ranks and unscaled. Steps with gradients that are not finite (AMP) are passed over.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}  # by layer, as each of several optimizers steps when it likes

    @property
    def steps(self) -> int:
        """How many there were for the layer that has seen most."""
        return max(self._steps.values(), default=0)

    @torch.no_grad()
    def add(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Adds the gradients of what the optimizer is about to step; those of others may be old."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in network.named_modules():
            weight = getattr(layer, "weight", None)
            if (
                not isinstance(layer, _ConvNd | nn.Linear)
                or not isinstance(weight, Tensor)
                or id(weight) not in stepped
            ):
                continue
            if weight.grad is None:
                continue
            score = by_channel(layer, weight.grad.float() * weight.float()).sum(1).square()
            name = name.replace(f"{COMPILED}.", "")
            total = self._sums.get(name)
            if total is None or total.shape != score.shape:
                total = torch.zeros_like(score)
            total = total.to(score.device)  # a checkpoint brings them on the CPU
            self._sums[name] = torch.where(score.isfinite(), total + score, total)
            self._steps[name] = self._steps.get(name, 0) + 1

    def criterion(self, network: nn.Module) -> Callable[[str, nn.Module], Tensor]:
        """The means so far, as ``plan_filters`` takes a criterion; 0 for a layer that got no gradient."""

        def taylor(name: str, layer: nn.Module) -> Tensor:
            device = next(layer.parameters()).device
            if name not in self._sums:
                return torch.zeros(channels_of(layer), device=device)
            return self._sums[name].to(device) / self._steps[name]

        return taylor

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._sums, self._steps = dict(state["sums"]), dict(state["steps"])
