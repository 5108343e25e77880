"""The network inside a module, and its head: what is new in transfer learning. No Lightning in sight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_tips.core import did_you_mean

# What people call the part that is made anew for each task.
_HEAD_NAMES = ("head", "heads", "*_head", "head_*", "fc", "classifier", "classif", "last_linear", "logits", "output")


def find_network(module: nn.Module, backbone: str | None = None) -> str:
    """The name of the network inside a module (a LightningModule, say), under whatever attribute it is kept.

    It is what one reaches by going down for as long as a single child holds all parameters; the empty name is the
    module itself.

    Args:
        module: The module.
        backbone: The name of a part, if given; patterns as in ``fnmatch`` are allowed.

    Raises:
        ValueError: If nothing has the name.
    """
    if backbone is not None:
        return _find_module(module, backbone, "backbone")
    name = ""
    while not has_timm_groups(here := module.get_submodule(name)):
        children = weighted_children(here)
        own = any(True for _ in here.parameters(recurse=False))
        if own or len(children) != 1 or not weighted_children(here.get_submodule(children[0])):
            break
        name = join(name, children[0])
    return name


def find_head(module: nn.Module, backbone: str | None = None, head: str | None = None) -> list[str]:
    """The names of the modules that make up the head: what is new in transfer learning.

    Args:
        module: A network, or a module that holds one.
        backbone: The name of the pretrained part; then the head is what lies outside of it, or, if nothing does,
            the head within it.
        head: The name of the head, or a pattern as in ``fnmatch``, if it is not to be looked for.

    Returns:
        Names in ``module``.

    Raises:
        ValueError: If a given name is unknown, or no head can be found.

    Example:
        >>> from torch import nn
        >>> find_head(nn.ModuleDict({"features": nn.Conv2d(1, 4, 3), "fc": nn.Linear(4, 10)}))
        ['fc']
    """
    if head is not None:
        names = [n for n, _ in module.named_modules() if n and any(fnmatchcase(t, head) for t in _tails(module, n))]
        names = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
        if not names:
            raise ValueError(f"There is no head {head!r}. {nearest(head, _module_names(module))}")
        return names
    network_name = find_network(module, backbone)
    network = module.get_submodule(network_name)
    if backbone is not None:
        inside = {id(p) for p in network.parameters()}
        if outside := list(largest_without(module, inside)):
            learning = [n for n in outside if any(p.requires_grad for p in module.get_submodule(n).parameters())]
            if learning or not any(p.requires_grad for p in network.parameters()):  # else a teacher, say
                return learning or outside
    if names := _declared_head(network):
        return [join(network_name, name) for name in names]
    children = weighted_children(network)
    headless = [c for c in children if has_timm_groups(part := network.get_submodule(c)) and not _declared_head(part)]
    if len(headless) == 1 < len(children):  # made with num_classes=0: the head is beside it
        return [join(network_name, child) for child in children if child not in headless]
    named = [child for child in children if any(fnmatchcase(child.lower(), pattern) for pattern in _HEAD_NAMES)]
    if named and len(named) < len(children):
        if type(network).__module__.startswith(
            "torchvision."
        ):  # its classifiers have pretrained layers before the last
            named = [join(named[-1], name) if (name := _last_weighted(network.get_submodule(named[-1]))) else named[-1]]
        return [join(network_name, name) for name in named]
    last = _last_weighted(network)
    if not last:
        raise ValueError(
            f"No head can be found in {type(network).__name__}: it is a single layer, or has no weights. Pass head=..."
            " or backbone=..., the names of parts of the module."
        )
    return [join(network_name, last)]


def where_to_cache(module: nn.Module, backbone: str | None = None, head: str | None = None) -> tuple[str, list[str]]:
    """Which part's calls a cache takes over, and what may follow the frozen layers in it.

    Where all frozen layers are in one part beside the head, that is the part, and its output is kept. Where the head is
    inside of the network, it is the network, and what its head is given is kept: of the head itself, or of a part that
    it lies in, pooling and dropout included, whichever the network ends with.

    Args:
        module: A network, or a module that holds one.
        backbone: Name of the pretrained part, where it is not found by itself.
        head: Name of the head, likewise.

    Returns:
        ``network`` and ``tail`` of :class:`~lightning_tips.transfer.cache.FeatureCache`.

    Raises:
        ValueError: If there are several heads inside of the network.

    Example:
        >>> import torchvision
        >>> where_to_cache(torchvision.models.mobilenet_v3_small())
        ('', ['classifier.3', 'classifier'])
        >>> where_to_cache(torchvision.models.densenet121())
        ('', ['classifier'])
        >>> where_to_cache(nn.ModuleDict({"features": nn.Conv2d(1, 4, 3), "fc": nn.Linear(4, 10)}))
        ('features', [])
    """
    heads = find_head(module, backbone, head)
    inside = {id(p) for name in heads for p in module.get_submodule(name).parameters()}
    network = find_network(module, backbone)
    beside = list(largest_without(module, inside))
    # timm's and torchvision's end with their head; what comes just before it is pooled, so it takes less memory.
    library = type(module.get_submodule(network)).__module__.startswith(("timm.", "torchvision."))
    if len(beside) == 1 and not (library and heads[0].startswith(f"{network}." if network else "")):
        return beside[0], []
    if len(heads) > 1:
        raise ValueError(
            f"Features cannot be cached in a network with several heads, {' and '.join(heads)}. Take cache_features"
            " away, or give one of them as head."
        )
    tail = heads[0]
    if network and not tail.startswith(f"{network}."):
        network = ""
    parts = tail.removeprefix(f"{network}.").split(".") if network else tail.split(".")
    return network, [join(network, ".".join(parts[:end])) for end in range(len(parts), 0, -1)]


# ---- looking for it


def _declared_head(network: nn.Module) -> list[str]:
    """What a timm network says of its classifier, as far as it is there."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    declared = config.get("classifier") if isinstance(config, dict) else None
    names = [declared] if isinstance(declared, str) else list(declared or ())
    modules = dict(network.named_modules())
    return [name for name in names if name in modules and any(True for _ in modules[name].parameters())]


def largest_without(module: nn.Module, inside: set[int], name: str = "") -> Iterator[str]:
    """The names of the largest parts that have parameters, and none of those in ``inside`` (by ``id``)."""
    for child, part in module.named_children():
        parameters = [id(p) for p in part.parameters()]
        if parameters and not any(p in inside for p in parameters):
            yield join(name, child)
        elif any(p not in inside for p in parameters):
            yield from largest_without(part, inside, join(name, child))


def _last_weighted(module: nn.Module) -> str:
    """The last layer that multiplies by a matrix."""
    found = ""
    for name, part in module.named_modules():
        if name and any(p.ndim > 1 for p in part.parameters(recurse=False)):
            found = name
    return found


def _find_module(module: nn.Module, pattern: str, role: str) -> str:
    names = _module_names(module)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"There is no {role} {pattern!r}. {nearest(pattern, names)}")
    return min(found, key=len)


def _tails(module: nn.Module, name: str) -> list[str]:
    """A name, and what is left of it inside the network."""
    network = find_network(module)
    return [name, name.removeprefix(f"{network}.")] if network else [name]


# ---- names


def has_timm_groups(module: nn.Module) -> bool:
    """Whether it is a timm network, which says itself how its layers are grouped."""
    return callable(getattr(module, "group_matcher", None))


def weighted_children(module: nn.Module) -> list[str]:
    """The names of the children that have parameters."""
    return [name for name, child in module.named_children() if any(True for _ in child.parameters())]


def _module_names(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if name and any(True for _ in part.parameters())]


def nearest(wrong: str, names: Iterable[str]) -> str:
    """The names that are near, or the short ones: a network has hundreds."""
    names = list(names)
    near = did_you_mean(wrong, names)
    return near if near.startswith("Did") else did_you_mean(wrong, [name for name in names if name.count(".") < 2])


def within(name: str, parents: Sequence[str]) -> bool:
    """Whether a name is one of ``parents``, or of something in them."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def join(prefix: str, name: str) -> str:
    """A name inside of another; both may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
