"""Copies of networks to try things on, and running them without a trace on the original."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_tips.core import Kept, same_random_numbers
from lightning_tips.core.resize import named_tensors

COMPILED = "_orig_mod"  # where torch.compile keeps the network of a submodule that it wraps

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def copy_network(model: nn.Module) -> nn.Module:
    """A copy without the user's hooks (those of ``torch.nn.utils``, which compute weights, stay) and without a Trainer.

    Raises:
        ValueError: If the network cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for kind in _HOOKS:
            hooks = module.__dict__.get(kind)
            if hooks:
                kept = OrderedDict((k, h) for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils"))
                memo[id(hooks)] = copy.deepcopy(kept)
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # weights computed by a hook
                memo[id(value)] = value.detach().clone()
            elif type(value).__module__.startswith(("lightning.", "pytorch_lightning.")) and not isinstance(
                value, (nn.Module, dict)
            ):
                memo[id(value)] = value  # the Trainer and what belongs to it are shared, not copied
            elif (
                isinstance(module, pl.LightningModule)
                and callable(value)
                and not (isinstance(value, nn.Module) or inspect.ismethod(value))
            ):
                memo[id(value)] = value  # what makes an optimizer, as LightningCLI gives it, cannot be copied
    for parameter in model.parameters():
        if parameter.grad is not None:
            memo[id(parameter.grad)] = None  # not needed, so not copied
    try:
        with torch.inference_mode(False), torch.no_grad():
            twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"The network cannot be copied, and what cannot be copied cannot be tried out before it is changed: {error}"
        ) from error
    for module in twin.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def log_nothing(network: nn.Module) -> None:
    """From now on LightningModules in a copy do not log: their ``forward`` runs apart from any step."""
    for part in network.modules():
        if isinstance(part, pl.LightningModule):
            vars(part)["log"] = _nothing  # `log_dict` calls it


@contextmanager
def logs_nothing(network: nn.Module) -> Iterator[None]:
    """While it is open, LightningModules in ``network`` do not log, nor do copies that are made of it meanwhile."""
    modules = [part for part in network.modules() if isinstance(part, pl.LightningModule)]
    before = [vars(part).get("log") for part in modules]
    log_nothing(network)
    try:
        yield
    finally:
        for part, former in zip(modules, before, strict=True):
            vars(part).pop("log", None)
            if former is not None:
                vars(part)["log"] = former


def _nothing(*_: Any, **__: Any) -> None:
    """Stands where a module's ``log`` was."""


@contextmanager
def without_autocast() -> Iterator[None]:
    """What runs inside runs in the network's own precision, on every kind of device."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if kind == "cpu" or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Random states are put back at the end, and gradients can be computed inside, in the network's own precision."""
    with same_random_numbers(), torch.inference_mode(False), torch.enable_grad(), without_autocast():
        yield


def prepare_inputs(model: nn.Module, example_inputs: Any, samples: int) -> tuple[Any, float]:
    """The first samples of the inputs, on the model's device, as ordinary tensors.

    Returns:
        The inputs, and how many times larger the batch was.
    """
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    tensors = [leaf for leaf in tree_flatten(example_inputs)[0] if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    batch = sizes.pop() if len(sizes) == 1 else 0  # tensors that disagree are no batch
    cut = batch > samples > 0

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with torch.inference_mode(False), torch.no_grad():
            return (value[:samples] if cut else value).detach().to(device).clone()

    return tree_map(take, example_inputs), batch / samples if cut else 1.0


def repeated(inputs: Any) -> Any:
    """Inputs of one sample twice, for layers that need more than one when they train."""
    tensors = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if tensors and all(tensor.ndim and tensor.shape[0] == 1 for tensor in tensors):
        return tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, inputs)
    return inputs


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused layers of nn.MultiheadAttention: one operation, which nothing can look into or count."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def plain_copy(network: nn.Module) -> nn.Module:
    """A copy that runs on one rank and in eager mode: nothing compiled, no BatchNorm that waits for other ranks.

    Names in it lack the ``_orig_mod`` of compiled parts; :func:`real_names` gives it back.
    """
    network = copy_network(network)
    for part in list(network.modules()):
        for child, module in list(part.named_children()):
            if hasattr(module, COMPILED):
                setattr(part, child, getattr(module, COMPILED))
            elif isinstance(module, nn.SyncBatchNorm):
                setattr(part, child, _unsynced(module))
        forward = vars(part).get("forward")
        # Not one that the class itself chose among its methods.
        if forward is not None and not (inspect.ismethod(forward) and forward.__self__ is part):
            del part.forward
    return network


def real_names(network: nn.Module, kept: Kept) -> dict[str, Any]:
    """``kept`` under the names that the tensors have in ``network``."""
    names = {name.replace(f"{COMPILED}.", ""): name for name in named_tensors(network)}
    return {names[name]: dims for name, dims in kept.items()}


def _unsynced(module: nn.SyncBatchNorm) -> nn.Module:
    plain = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    plain.__dict__["_check_input_dim"] = lambda *_: None  # of any number of dimensions
    if module.affine:
        plain.weight, plain.bias = module.weight, module.bias
    plain.running_mean, plain.running_var = module.running_mean, module.running_var
    plain.num_batches_tracked = module.num_batches_tracked
    return plain.train(module.training)
