"""Importances of torch-pruning as criteria.

torch-pruning is looked at only if the user has imported it, which who holds one of its importances has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_tips.core import same_random_numbers
from lightning_tips.pruning.networks.layers import channels_of


def is_importance(criterion: Any) -> bool:
    """Whether it is one of torch-pruning's importances, such as ``LAMPImportance()``."""
    loaded = sys.modules.get("torch_pruning")
    return loaded is not None and isinstance(criterion, loaded.importance.Importance)


def importance_scores(
    importance: Any, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module | None], seed: int
) -> dict[str, Tensor]:
    """Scores of one of torch-pruning's importances, layer by layer.

    Each layer is handed to it as a group of its own, with the BatchNorm that follows: what couples layers is left to
    the planner. Of importances that look at a whole group's inputs too, that part is missing.

    Args:
        importance: One of ``torch_pruning.importance``.
        layers: Convolutions and linear layers by name.
        norms: The BatchNorm that follows each, or ``None``.
        seed: Of the random numbers that it draws.

    Returns:
        For each layer ``(out_channels,)``.

    Raises:
        ValueError: If it needs gradients that are not there, or has not been prepared, or gives nothing.
    """
    kind = type(importance).__name__
    scores: dict[str, Tensor] = {}
    with same_random_numbers(), torch.no_grad():
        torch.manual_seed(seed)
        for name, layer in layers.items():
            try:
                score = importance(_group(name, layer, norms.get(name)))
            except Exception as error:
                missing = [n for n, p in layer.named_parameters() if p.grad is None]
                if missing and isinstance(error, (AttributeError, KeyError, TypeError)):
                    raise ValueError(
                        f"{kind} needs gradients, and {name}.{missing[0]} has none: run loss.backward() on some batches"
                        " first (and what else this importance asks for, such as accumulate_grad), or take"
                        " criterion='taylor', which computes its own."
                    ) from error
                raise ValueError(
                    f"{kind} cannot score {name} by itself: {type(error).__name__}: {error}. Importances that collect"
                    " statistics have to be prepared on this network first; those that need whole groups of"
                    " torch-pruning cannot be used here."
                ) from error
            if score is None:
                raise ValueError(
                    f"{kind} has no score for {name}{'' if norms.get(name) else ', which no BatchNorm follows'}; take"
                    " another criterion, or protect the layer."
                )
            scores[name] = score
    return scores


def _group(name: str, layer: nn.Module, norm: nn.Module | None) -> Any:
    from torch_pruning import function
    from torch_pruning.dependency import Dependency, Group, Node

    # Of a depthwise convolution too the first dimension of the weight is its outputs.
    cut = function.prune_conv_out_channels if isinstance(layer, _ConvNd) else function.prune_linear_out_channels
    source = Node(layer, None, name)
    group = Group()
    for target, function_of_it in ((layer, cut), (norm, function.prune_batchnorm_out_channels)):
        if target is not None:
            indices = list(range(channels_of(layer)))
            group.add_dep(Dependency(cut, function_of_it, source, Node(target, None, name)), indices)
            group[len(group) - 1].root_idxs = list(indices)
    return group
