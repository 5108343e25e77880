"""Pruned networks out of checkpoints, without any callback."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor

from lightning_tips.core import resize_to

Module = TypeVar("Module", bound=pl.LightningModule)

_CLI = "lightning.pytorch.cli.instantiate_module"


def load_pruned(
    path: str | Path,
    module_class: type[Module] | Callable[..., Module],
    *,
    map_location: Any = "cpu",
    strict: bool = True,
    **kwargs: Any,
) -> Module:
    """A module with the weights and shapes of a checkpoint, pruned or not.

    ``load_from_checkpoint`` fails where the shapes differ; this makes the module as it does, gives it the shapes that
    the checkpoint has, and loads. Nothing but plain data is read (``weights_only=True``).

    Args:
        path: A checkpoint of Lightning, of whatever kind (``save_weights_only`` too), or a file with a ``state_dict``.
        module_class: The LightningModule's class, made with the hyper-parameters in the checkpoint; or a function that
            makes the module.
        map_location: See ``torch.load``; the module goes to the device of its weights.
        strict: See ``load_state_dict``.
        **kwargs: Arguments of ``module_class``, before those in the checkpoint.

    Returns:
        The module, in train mode as ``load_from_checkpoint`` returns it.

    Raises:
        TypeError: If what ``module_class`` returns is no LightningModule, or the file is neither.
        RuntimeError: If names do not agree.
    """
    checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"{path} holds a {type(checkpoint).__name__}, no checkpoint.")
    if "state_dict" not in checkpoint:
        if not all(isinstance(value, Tensor) for value in checkpoint.values()):
            raise TypeError(f"{path} is neither a checkpoint of Lightning nor a state_dict.")
        checkpoint = {"state_dict": checkpoint}
    checkpoint = dict(checkpoint)
    if isinstance(module_class, type):
        module = _make(cast("type[Module]", module_class), checkpoint, kwargs)
    else:
        module = module_class(**kwargs)
    if not isinstance(module, pl.LightningModule):
        raise TypeError(f"Expected a LightningModule, {module_class!r} gives a {type(module).__name__}.")
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    resize_to(module, state)
    module.load_state_dict(state, strict=strict)
    device = next((value.device for value in state.values() if isinstance(value, Tensor)), torch.device("cpu"))
    return module.to(device)


def _make(cls: type[Module], checkpoint: Mapping[str, Any], given: Mapping[str, Any]) -> Module:
    """The module as ``load_from_checkpoint`` makes it, from the hyper-parameters that were saved."""
    saved = dict(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})) | dict(given)
    if saved.pop("_instantiator", None) == _CLI:  # LightningCLI's, for arguments that are classes
        from lightning.pytorch.cli import instantiate_module

        _check_class(cls, saved.get("_class_path"))
        return instantiate_module(cls, saved)
    parameters = inspect.signature(cls.__init__).parameters
    whole = str(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME, ""))
    if whole in parameters and parameters[whole].kind is not inspect.Parameter.VAR_KEYWORD:
        saved = {whole: AttributeDict(saved)} | dict(given)  # save_hyperparameters(one_argument)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        unknown = set(given) - set(parameters)
        if unknown:
            raise TypeError(f"{cls.__name__} takes no argument {', '.join(sorted(unknown))}.")
        saved = {name: value for name, value in saved.items() if name in parameters}
    return cls(**saved)


def _check_class(cls: type, class_path: str | None) -> None:
    """A checkpoint must not import what it likes."""
    if class_path is None:
        return
    module_name, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(found, type) and issubclass(found, cls)):
        raise TypeError(f"The checkpoint asks for {class_path}, which is not imported, or no {cls.__name__}.")
