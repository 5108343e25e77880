"""What trains and what stays as it is: parameters by ``requires_grad``, buffers by eval mode."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_tips.transfer.layers import HEAD, LayerGroup

BatchNormPolicy = Literal["frozen", "stats", "live"]
BATCH_NORM_POLICIES = ("frozen", "stats", "live")


def set_trainable(module: nn.Module, names: Collection[str]) -> list[str]:
    """Lets the named parameters of a module train, and no others.

    A frozen parameter loses its gradient, so that no optimizer moves it by what is left of it.

    Args:
        module: The module.
        names: Names of parameters.

    Returns:
        The names of those that train now and did not before.

    Raises:
        KeyError: For a name that is none of a parameter.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]) for name in names}  # tied weights have several names
    thawed = []
    for name, parameter in module.named_parameters():
        trains = id(parameter) in wanted
        if trains and not parameter.requires_grad:
            thawed.append(name)
        if parameter.requires_grad != trains:
            parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
    return thawed


def modules_to_hold(
    module: nn.Module, groups: Sequence[LayerGroup], trainable: Collection[str], batch_norm: BatchNormPolicy = "frozen"
) -> list[nn.Module]:
    """The modules that have to be in eval mode, so that their buffers keep their values.

    Frozen layers with buffers are held: norms with running statistics, and what else writes into buffers in training.

    Args:
        module: The module that the groups are of.
        groups: Its layers.
        trainable: Names of the parameters that train.
        batch_norm: ``"frozen"``: norms hold their statistics in frozen layers, and in thawed ones too, except in the
            head. ``"stats"``: norms normalise with the batch and go on estimating statistics everywhere, in frozen
            layers too. ``"live"``: as the layer is, so thawed norms are live and frozen ones are held.
    """
    trainable = set(trainable)
    held = []
    for group in groups:
        for name in group.modules:
            part = module.get_submodule(name)
            if not any(True for _ in part.buffers(recurse=False)):
                continue
            is_norm = has_running_statistics(part)
            if is_norm and batch_norm == "stats":
                continue
            always = is_norm and batch_norm == "frozen" and group.name != HEAD
            if always or not _trains(module, name, trainable):
                held.append(part)
    return held


def has_running_statistics(module: nn.Module) -> bool:
    """Whether it normalises, in eval mode, by statistics that it keeps: BatchNorm of whatever make."""
    return getattr(module, "running_mean", None) is not None


def hold(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Puts modules themselves, not what they contain, into eval mode; returns those that were not."""
    moved = [module for module in modules if module.training]
    for module in moved:
        module.training = False
    return moved


def release(modules: Iterable[nn.Module]) -> None:
    """The inverse of :func:`hold`."""
    for module in modules:
        module.training = True


class Held:
    """Modules that are kept in eval mode, whoever calls ``train()``, and later let go."""

    def __init__(self) -> None:
        self._wanted: list[nn.Module] = []
        self._moved: list[nn.Module] = []

    def want(self, modules: Sequence[nn.Module]) -> None:
        """From now on these, and no others."""
        self._wanted = list(modules)
        kept = {id(module) for module in modules}
        release(module for module in self._moved if id(module) not in kept)
        self._moved = [module for module in self._moved if id(module) in kept]

    def hold(self) -> None:
        """Puts into eval mode what is not there (any more)."""
        known = {id(module) for module in self._moved}
        self._moved += [module for module in hold(self._wanted) if id(module) not in known]

    def hold_if_moved(self) -> None:
        """The same, for every step: as good as free where nothing happened."""
        if any(module.training for module in self._wanted):
            self.hold()

    def leave(self) -> None:
        """Lets go of all."""
        self.want([])


class Frozen:
    """Parameters that do not train, whoever says that they should.

    ``LightningModule.unfreeze()``, say, in a hook of the module's: from then on they would train, without a word.

    Args:
        asker: Who warns of it.
    """

    def __init__(self, asker: str) -> None:
        self._asker = asker
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._warned = False

    def keep(self, module: nn.Module) -> None:
        """From now on those that do not require a gradient at this moment."""
        self._parameters = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]

    def freeze_again(self) -> None:
        """Takes their gradients away, just before a step; warns of the first time that there were any."""
        moved = [name for name, p in self._parameters if p.requires_grad or p.grad is not None]
        if not moved:
            return
        for _, parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._asker}: the module lets {len(moved)} frozen parameters train, {moved[0]} for one. They are"
                " frozen again before each step, and their gradients computed in vain. Take unfreeze() or"
                " requires_grad_(True) out of the module's hooks, or the tip."
            )


def frozen_state(module: nn.Module, groups: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of frozen layers, to compare with later.

    Args:
        module: The module that the groups are of.
        groups: Its layers. Where a group trains in part, only what does not is in the answer.
    """
    parameters = dict(module.named_parameters())
    names = {name for group in groups for name in group.parameters if not parameters[name].requires_grad}
    state = {name: parameters[name].detach().clone() for name in sorted(names)}
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for group in groups:
        for name in group.modules:
            if not _trains(module, name, trainable):
                for key, buffer in module.get_submodule(name).named_buffers(recurse=False):
                    state[f"{name}.{key}"] = buffer.detach().clone()
    return state


def changed_since(module: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """The names in ``state`` (see :func:`frozen_state`) whose values in ``module`` are others now, to the bit."""
    now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [name for name, before in state.items() if not torch.equal(now[name].detach().cpu(), before.cpu())]


def _trains(module: nn.Module, name: str, trainable: set[str]) -> bool:
    """Whether a module has a parameter that trains; one without parameters goes by what it is a part of."""
    while True:
        prefix = f"{name}." if name else ""
        own = [f"{prefix}{parameter}" for parameter, _ in module.get_submodule(name).named_parameters()]
        if own or not name:
            return any(parameter in trainable for parameter in own)
        name = name.rpartition(".")[0]
