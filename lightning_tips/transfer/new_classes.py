"""A trained model that is to know more classes: the new head keeps what the old one learnt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_tips.transfer.layers import HEAD, layer_groups


@torch.no_grad()
def load_with_new_classes(
    module: nn.Module, state: Mapping[str, Tensor], backbone: str | None = None, head: str | None = None
) -> list[str]:
    """Loads weights into a module whose head has more classes than they were trained with.

    The rows of the old classes, which come first, are kept; those of new classes stay as the module made them. All
    else has to fit.

    Args:
        module: Made with the larger number of classes.
        state: The ``state_dict`` of the model with fewer, for example a checkpoint's.
        backbone: Name of the pretrained part, where it is not found by itself.
        head: Name of the head, likewise.

    Returns:
        Names of the tensors that grew.

    Raises:
        ValueError: If something else than the head differs, or the head shrank.

    Example:
        >>> from torch import nn
        >>> def make(classes):
        ...     return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, classes))
        >>> load_with_new_classes(make(5), make(2).state_dict())
        ['2.weight', '2.bias']
    """
    in_head = next(group.parameters for group in layer_groups(module, backbone, head) if group.name == HEAD)
    own = module.state_dict()
    if missing := sorted(set(own) ^ set(state)):
        raise ValueError(
            f"The weights are those of another module: {', '.join(missing[:3])} is in one of the two only."
        )
    loaded, grown = {}, []
    for name, old in state.items():
        new = own[name]
        if new.shape == old.shape:
            loaded[name] = old
        elif name in in_head and new.shape[1:] == old.shape[1:] and len(new) > len(old):
            loaded[name] = torch.cat([old.to(new), new[len(old) :]])
            grown.append(name)
        else:
            raise ValueError(
                f"{name} is {tuple(old.shape)} in the weights and {tuple(new.shape)} in the module. Only the last layer"
                " may have more rows than before; make the module with all old classes first and the new ones after."
            )
    module.load_state_dict(loaded, strict=True)
    return grown
