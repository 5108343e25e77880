"""How important each channel of a layer is, by weights or by data.

Pure functions on torch objects. The network is the same afterwards to the bit, and works in any gradient mode.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lightning_tips.core.messages import did_you_mean
from lightning_tips.pruning.networks.layers import channels_of, filters_of, weight_of
from lightning_tips.pruning.networks.runs import Forward, Loss, Reduce, call, default_forward, default_loss
from lightning_tips.pruning.ranking.data_criteria import activation_scores, taylor_scores
from lightning_tips.pruning.ranking.importances import importance_scores, is_importance
from lightning_tips.pruning.ranking.statistics import ChannelWatch, watch

Criterion = str | Callable[..., Tensor]

NEEDS_BATCHES = frozenset({"mean_activation", "apoz", "taylor"})
"""Criteria that look at data."""


def channel_scores(
    model: nn.Module,
    layers: Sequence[str],
    criterion: Criterion = "l1",
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    *,
    reduce: Reduce | None = None,
    example_inputs: Any = None,
) -> dict[str, Tensor]:
    """The importance of each output channel of convolutions and linear layers; the higher, the more worth keeping.

    Scores of one layer compare with each other. Between layers they differ in scale: normalise them for a ranking over
    all layers.

    Criteria:

    - ``l1``, ``l2``: the norm of the channel's filter (Li et al. 2017).
    - ``geometric_median``: the sum of the L2 distances to all other filters of the layer; a low one can be replaced by
      the others (FPGM, He et al. 2019).
    - ``bn_scale``: the size of gamma of the BatchNorm that follows (Liu et al. 2017).
    - ``mean_activation``: mean size of the activations after the nonlinearity that follows (Molchanov et al. 2017); of
      the last value that is the layer's own where none does, such as before the sum with a shortcut.
    - ``apoz``: 1 - APoZ, the share of activations that are not zero after the ReLU that follows (Hu et al. 2016), on
      validation data.
    - ``taylor``: mean over batches of the sum over the filter's weights of (gradient * weight)^2 (Molchanov et al.
      2019, first order, on weights), in eval mode.
    - ``random``: uniform in [0, 1), from ``seed`` and the layer's name alone, so the same on all ranks.
    - a function of (name, layer) that returns a tensor ``(out_channels,)``.
    - one of ``torch_pruning.importance``, such as ``LAMPImportance()``: it gets each layer with the BatchNorm that
      follows as a group of its own. Those that use gradients find them where ``loss.backward()`` left them.

    Args:
        model: The network; parameters, gradients, buffers, mode, hooks and random states stay as they are.
        layers: Names of the layers, as in ``model.named_modules()``.
        criterion: See above.
        batches: Data, for those in :data:`NEEDS_BATCHES`; moved to the model's device one by one.
        forward: ``forward(model, batch)`` returns the outputs. By default the model is called with the batch's inputs.
        loss: ``loss(model, batch)`` returns a scalar, for ``taylor``. By default cross entropy, binary cross entropy or
            mean squares, where outputs and targets leave no doubt.
        seed: For ``random``, and for importances that draw random numbers.
        reduce: Sums a tensor over ranks. With it scores from data are those of the data of all ranks, and equal on all.
        example_inputs: For ``bn_scale``: a forward pass with them finds the BatchNorm by the way that data takes
            (first of ``batches`` if not given). Without either it is the next one in the order of the modules.

    Returns:
        For each layer float32 ``(out_channels,)`` on the layer's device, all finite.

    Raises:
        ValueError: Unknown criterion or layer, a function that raises, no data where it is needed, a layer without the
            BatchNorm or ReLU that the criterion asks for, a layer that did not run, or scores that are not finite.
        TypeError: A layer that is no convolution and no linear layer; a loss that cannot be told.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {name: _layer(modules, name) for name in layers}
    if is_importance(criterion):
        names = following_norms(model, layers, batches, forward, example_inputs)
        norms = {layer: None if norm is None else model.get_submodule(norm) for layer, norm in names.items()}
        return _checked(importance_scores(criterion, chosen, norms, seed), chosen, type(criterion).__name__)
    if callable(criterion):
        return _checked(_own_scores(criterion, chosen), chosen, getattr(criterion, "__name__", "the criterion"))
    if criterion not in _BY_WEIGHTS and criterion not in ("random", "bn_scale", *NEEDS_BATCHES):
        known = (*_BY_WEIGHTS, "random", "bn_scale", *sorted(NEEDS_BATCHES))
        raise ValueError(f"Unknown criterion {criterion!r}. {did_you_mean(str(criterion), known)}")
    if criterion in NEEDS_BATCHES and batches is None:
        raise ValueError(f"The criterion {criterion!r} looks at data: pass batches=..., such as a validation loader.")

    if criterion == "random":
        scores = {name: _random(name, layer, seed) for name, layer in chosen.items()}
    elif criterion == "bn_scale":
        scores = _bn_scales(model, chosen, batches, forward, example_inputs)
    elif criterion == "taylor":
        assert batches is not None
        scores = taylor_scores(model, chosen, batches, loss or default_loss(forward or default_forward), reduce)
    elif criterion in NEEDS_BATCHES:
        assert batches is not None
        scores = activation_scores(model, chosen, criterion, batches, forward, reduce)
    else:
        with torch.no_grad():
            scores = {name: _BY_WEIGHTS[criterion](filters_of(layer)) for name, layer in chosen.items()}
    return _checked(scores, chosen, criterion)


def _layer(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise ValueError(f"The model has no layer {name!r}. {did_you_mean(name, modules)}")
    layer = modules[name]
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        raise TypeError(f"{name} is a {type(layer).__name__}; channels are ranked in convolutions and linear layers.")
    if is_lazy(weight_of(layer)):
        raise ValueError(f"{name} has no weights yet; run the model once before its channels are ranked.")
    return layer


def _own_scores(criterion: Callable[[str, nn.Module], Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    scores = {}
    with torch.no_grad():
        for name, layer in layers.items():
            try:
                scores[name] = criterion(name, layer)
            except Exception as error:  # else it would be taken for one of the network
                own = getattr(criterion, "__name__", type(criterion).__name__)
                raise ValueError(f"The criterion {own} fails for {name}: {type(error).__name__}: {error}") from error
    return scores


def _checked(scores: Mapping[str, Tensor], layers: Mapping[str, nn.Module], criterion: str) -> dict[str, Tensor]:
    result = {}
    for name, layer in layers.items():
        score = torch.as_tensor(scores[name], device=weight_of(layer).device).detach()
        if score.shape != (channels_of(layer),):
            raise ValueError(
                f"{criterion} gave {name} scores of shape {tuple(score.shape)}, not ({channels_of(layer)},)."
            )
        score = score.to(torch.float32)
        wrong = int((~torch.isfinite(score)).sum())
        if wrong:
            raise ValueError(
                f"{criterion} of {wrong} of the {len(score)} channels of {name} is not finite. Look for NaN or infinity"
                " in the layer's weights, the data or the loss."
            )
        result[name] = score
    return result


def _distances(filters: Tensor) -> Tensor:
    # Without the quick formula for squares, which makes the distance of equal filters larger than 0.
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


_BY_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda filters: filters.abs().sum(1),
    "l2": lambda filters: torch.linalg.vector_norm(filters, dim=1),
    "geometric_median": _distances,
}


def _random(name: str, layer: nn.Module, seed: int) -> Tensor:
    # The CPU's generator looks at the low 32 bits of a seed only, so both go into these.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.rand(channels_of(layer), generator=generator, device="cpu")


def _bn_scales(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any] | None,
    forward: Forward | None,
    example_inputs: Any,
) -> dict[str, Tensor]:
    norms = following_norms(model, list(layers), batches, forward, example_inputs)
    scores = {}
    for name, norm_name in norms.items():
        norm = model.get_submodule(norm_name) if norm_name is not None else None
        if norm is None:
            raise ValueError(f"bn_scale: no BatchNorm follows {name}. Leave the layer out, or take another criterion.")
        if norm.weight is None:
            raise ValueError(f"bn_scale: the BatchNorm {norm_name} after {name} has affine=False, so no scale.")
        scores[name] = norm.weight.detach().abs()  # type: ignore[operator]
    return scores


def following_norms(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    example_inputs: Any = None,
) -> dict[str, str | None]:
    """The name of the BatchNorm that follows each layer, or ``None``.

    Args:
        model: The network.
        layers: Names of convolutions and linear layers.
        batches: The first of them runs through the model, if there are no ``example_inputs``.
        forward: See :func:`channel_scores`.
        example_inputs: A tensor, a tuple of arguments or a dict of them: they run through the model. With neither, the
            next BatchNorm in the order of the modules is taken, unless another layer comes before it or the number of
            channels differs.
    """
    seen: ChannelWatch | None = None
    if example_inputs is not None:
        seen = watch(model, layers, [example_inputs], call)
    elif batches is not None:
        seen = watch(model, layers, batches, forward, limit=1)
    if seen is not None and seen.following:
        return {name: seen.following[name].norm for name in layers}
    result: dict[str, str | None] = dict.fromkeys(layers)
    last: str | None = None
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            last = name
        elif isinstance(module, _BatchNorm) and last is not None:
            if last in result and channels_of(model.get_submodule(last)) == module.num_features:
                result[last] = name
            last = None
    return result
