"""The layers of a network in groups from the first to the last, and its head. No Lightning in sight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_tips.transfer.heads import (
    find_head,
    find_network,
    has_timm_groups,
    join,
    nearest,
    weighted_children,
    within,
)

HEAD = "head"
"""Name of the last group, whatever the network calls it."""

# What people call the containers that hold a network's stages.
_CONTAINER_NAMES = {"features", "encoder", "layers", "blocks", "stages", "backbone", "model", "network", "net", "body"}
_CONTAINER_NAMES |= {"trunk", "trunk_output", "encoder_layers", "transformer", "feature_extractor"}


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are frozen, thawed and given a learning rate together.

    Attributes:
        name: Their name relative to the network, such as ``"layer4"`` or ``"blocks.3"``; the last one is ``"head"``.
        parameters: Names of their parameters in the module that was asked about.
        modules: Names, likewise, of the modules that own a parameter or a buffer of theirs.
    """

    name: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]


def layer_groups(module: nn.Module, backbone: str | None = None, head: str | None = None) -> list[LayerGroup]:
    """All parameters of a module in groups, from the first layers to the head, each parameter once.

    A timm network says itself how it is grouped (``group_matcher``). In any other each child is a group, and a child
    that is a container of stages is opened; what follows has parameters of its own, such as a class token, goes with
    the first layers.

    Args:
        module: A network, or a module that holds one under any attribute.
        backbone: Name of the pretrained part, where it is not found by itself.
        head: Name of the head, likewise.

    Returns:
        The groups; the last one is called ``"head"``.

    Raises:
        ValueError: For an unknown name, or where no layers are left beside the head.

    Example:
        >>> import torchvision
        >>> [group.name for group in layer_groups(torchvision.models.resnet18())]
        ['conv1', 'layer1', 'layer2', 'layer3', 'layer4', 'head']
    """
    network_name = find_network(module, backbone)
    heads = find_head(module, backbone, head)
    # Tied weights have two names. Each belongs where it is first found, but to the head if that has it.
    owner: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if within(name, heads):
            owner[id(parameter)] = HEAD
    grouped: dict[str, list[str]] = {}
    stage_of = _stages(module, network_name, heads)
    for name, parameter in module.named_parameters():
        stage = owner.get(id(parameter)) or stage_of(name)
        if stage == HEAD and id(parameter) not in owner:  # another part of that name, where the head is elsewhere
            stage = f"{HEAD}+"
        grouped.setdefault(stage, []).append(name)
    in_head = grouped.pop(HEAD, [])
    grouped = _without_tiny(module, grouped)
    if not grouped or not in_head:
        raise ValueError(
            f"{type(module).__name__} has no layers with weights beside its head {heads}. Pass head=... or"
            " backbone=..., the names of parts of the module."
        )
    grouped[HEAD] = in_head
    modules = _modules_of(module, grouped)
    return [LayerGroup(name, tuple(names), tuple(modules[name])) for name, names in grouped.items()]


def match_parameters(groups: Sequence[LayerGroup], patterns: Iterable[str], network: str = "") -> list[str]:
    """The parameters that patterns name.

    Args:
        groups: The groups of a module.
        patterns: Each is the name of a group, else of a module or of a parameter, in the module or in its network,
            with ``*``, ``?`` and ``[...]`` as in ``fnmatch``. ``"all"`` is everything.
        network: The name of the network in the module, which patterns may leave out.

    Raises:
        ValueError: For a pattern that names nothing, with the nearest names.
    """
    names_of: dict[str, set[str]] = {}  # what a parameter is called, alone and as a part
    for group in groups:
        for parameter in group.parameters:
            names = {group.name, *_parts(parameter)}
            if network and parameter.startswith(f"{network}."):
                names |= set(_parts(parameter.removeprefix(f"{network}.")))
            names_of[parameter] = names
    chosen: set[str] = set()
    for pattern in patterns:
        # A module may have the name of a group too: timm's ConvNeXt has a norm in its `head`.
        found = {parameter for group in groups if group.name == pattern for parameter in group.parameters}
        if not found:
            found = {p for p, ns in names_of.items() if pattern == "all" or any(fnmatchcase(n, pattern) for n in ns)}
        if not found:
            known = {name for names in names_of.values() for name in names}
            listed = ", ".join(group.name for group in groups)
            raise ValueError(f"No layer matches {pattern!r}. {nearest(pattern, known)} The groups are: {listed}.")
        chosen |= found
    return [parameter for parameter in names_of if parameter in chosen]


# ---- how a network is divided


def _stages(module: nn.Module, network_name: str, heads: Sequence[str]) -> Callable[[str], str]:
    """A function from the name of a parameter outside of the head to its stage."""
    network = module.get_submodule(network_name)
    prefix = f"{network_name}." if network_name else ""
    if has_timm_groups(network):
        stages = {f"{prefix}{name}": stage for name, stage in _timm_stages(network, prefix, heads).items()}
        first = next(iter(stages.values()), "first")
        return lambda name: stages.get(name, first if not name.startswith(prefix) else name.split(".")[0])

    opened = _open(module, network_name, heads)
    firsts = [part for part in opened if not within(part, heads)]
    first = firsts[0].removeprefix(prefix) if firsts else "first"

    def stage_of(name: str) -> str:
        part = max((part for part in opened if within(name, [part])), key=len, default="")
        if part and has_timm_groups(inner := module.get_submodule(part)):
            found = _timm_stages(inner, f"{part}.", heads).get(name.removeprefix(f"{part}."))
            if found is not None:
                return f"{part.removeprefix(prefix)}.{found}"
        return part.removeprefix(prefix) or first

    return stage_of


def _open(module: nn.Module, name: str, heads: Sequence[str]) -> list[str]:
    """The parts of a network: its children, and in place of a child that holds the stages those."""
    opened: list[str] = []
    for child in weighted_children(module.get_submodule(name)):
        full = join(name, child)
        part = module.get_submodule(full)
        contains_head = any(h.startswith(f"{full}.") for h in heads)
        several = len(weighted_children(part)) > 1
        is_container = child in _CONTAINER_NAMES and not has_timm_groups(part)
        single = len(weighted_children(part)) == 1 and weighted_children(part)[0] in _CONTAINER_NAMES
        if (is_container and (several or single)) or contains_head:
            opened += _open(module, full, heads)
        else:
            opened.append(full)
    return opened


def _timm_stages(network: Any, prefix: str, heads: Sequence[str]) -> dict[str, str]:
    """Parameter to stage, by timm's own matcher."""
    from timm.models import group_parameters

    stages: dict[str, str] = {}
    for names in group_parameters(network, network.group_matcher(coarse=True)).values():
        outside = [name for name in names if not within(f"{prefix}{name}", heads)]
        if outside:
            label = _common(network, outside)
            label = f"{label}+" if label in stages.values() else label
            stages |= dict.fromkeys(outside, label)
    return stages


def _common(network: nn.Module, names: Sequence[str]) -> str:
    """What to call a group: the part in which all its matrices lie, or else most of them."""
    matrices = [name for name in names if network.get_parameter(name).ndim > 1] or list(names)
    owners = [name.split(".")[:-1] or [name] for name in matrices]
    shared = []
    for level in zip(*owners, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
        if level[0].isdigit():  # deep enough
            break
    if shared:
        return ".".join(shared)
    firsts = [".".join(owner[:2] if len(owner) > 1 and owner[1].isdigit() else owner[:1]) for owner in owners]
    return max(firsts, key=firsts.count)


def _without_tiny(module: nn.Module, grouped: dict[str, list[str]]) -> dict[str, list[str]]:
    """A norm layer that stands alone goes with the layers before it, or after it at the start."""
    merged: dict[str, list[str]] = {}
    waiting: list[str] = []
    parameters = dict(module.named_parameters())
    for name, names in grouped.items():
        if all(parameters[n].ndim <= 1 for n in names):
            if merged:
                merged[next(reversed(merged))].extend(names)
            else:
                waiting += names
        else:
            merged[name] = waiting + names
            waiting = []
    return merged or grouped


def _modules_of(module: nn.Module, grouped: dict[str, list[str]]) -> dict[str, list[str]]:
    """For each group the modules that own its parameters; one with buffers only goes with the module before it."""
    group_of = {name: group for group, names in grouped.items() for name in names}
    modules: dict[str, list[str]] = {group: [] for group in grouped}
    before = next(iter(grouped))
    for name, part in module.named_modules():
        own = [join(name, parameter) for parameter, _ in part.named_parameters(recurse=False)]
        known = [group_of[p] for p in own if p in group_of]
        if known:
            before = known[0]
        if known or (name and any(True for _ in part.buffers(recurse=False))):
            modules[before].append(name)
    return modules


def _parts(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]
