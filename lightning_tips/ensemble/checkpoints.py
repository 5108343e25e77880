"""Members from checkpoints: of one class or several, pruned or whole, or snapshots of one run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.core import accept_other_shapes, did_you_mean

__all__ = ["find_checkpoints", "give_what_they_added", "load_member", "what_it_adds"]

Maker = type[pl.LightningModule] | Callable[[], pl.LightningModule]


def find_checkpoints(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that ``paths`` name: a list of them, or a folder, whose ``*.ckpt`` are taken by their names.

    ``last.ckpt`` of a folder is left out: it is a copy of another one.

    Raises:
        FileNotFoundError: If a folder has none.
    """
    if not isinstance(paths, str | Path):
        return [Path(path) for path in paths]
    folder = Path(paths)
    if not folder.is_dir():
        return [folder]
    found = sorted(path for path in folder.glob("*.ckpt") if path.stem.split("-v")[0] != "last")
    if not found:
        raise FileNotFoundError(
            f"There is no checkpoint (*.ckpt) in {folder}, last.ckpt left aside. Give the folder in which a"
            " ModelCheckpoint kept several (save_top_k=-1), or a list of files."
        )
    return found


def load_member(path: Path, maker: Maker, index: int = 0, **arguments: Any) -> pl.LightningModule:
    """A module with the weights of a checkpoint, on the CPU; tensors of other shapes (pruned) are taken as they are.

    Args:
        path: A Lightning checkpoint. It is read with ``weights_only=True``.
        maker: The module's class, which is made from the hyper-parameters in the checkpoint; or a function that makes
            the module.
        index: Number of the member, for errors.
        **arguments: For the class, beside the hyper-parameters.

    Raises:
        FileNotFoundError: With the member's number, if there is no such file.
        ValueError: Likewise, if it is damaged, or of another module.
    """
    who = f"member {index}: "
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        near = f" {did_you_mean(path.name, there)}" if there else ""
        raise FileNotFoundError(f"{who}there is no checkpoint {path}.{near}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or of another format
        reason = (str(error).splitlines()[0] if str(error) else type(error).__name__).partition(". ")[0]
        raise ValueError(
            f"{who}{path} is damaged, no checkpoint, or holds more than plain data ({reason}). Use an earlier"
            " checkpoint, or leave the member out."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{who}{path} is no Lightning checkpoint: it holds no state_dict.")
    if "ensemble" in checkpoint:
        raise ValueError(
            f"{who}{path} is a whole ensemble: EnsembleModule.load_from_checkpoint(path, member=..., n=...) loads it."
        )
    name = getattr(maker, "__name__", type(maker).__name__)
    try:
        if isinstance(maker, type) and issubclass(maker, pl.LightningModule):
            return _by_class(maker, path, checkpoint, arguments)
        member = maker()
        if not isinstance(member, pl.LightningModule):
            raise TypeError(f"{name} gives a {type(member).__name__}, not a LightningModule.")
        member.on_load_checkpoint(checkpoint)
        _load_any_shape(member, checkpoint["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{who}{path} does not fit {name}: {error}. {_advice(error, name)}") from error
    return member


def _advice(error: Exception, name: str) -> str:
    if isinstance(error, TypeError):
        return (
            f"{name} is made from the hyper-parameters in the checkpoint, which save_hyperparameters() in its __init__"
            " puts there; or pass a function that makes it."
        )
    if isinstance(error, KeyError):
        return (
            "A Trainer writes that into each checkpoint. To load weights alone, pass a function that makes the module."
        )
    return "It is of another class or other arguments: give each checkpoint its own class, module_class=[...]."


def _by_class(
    kind: type[pl.LightningModule], path: Path, checkpoint: dict[str, Any], arguments: dict[str, Any]
) -> pl.LightningModule:
    try:
        return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **arguments)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
    # Lightning makes the module, from a checkpoint without weights; these come afterwards, in whatever shape.
    empty = io.BytesIO()
    torch.save(checkpoint | {"state_dict": {}}, empty)
    empty.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no weights
        member = kind.load_from_checkpoint(empty, map_location="cpu", weights_only=True, strict=False, **arguments)
    _load_any_shape(member, checkpoint["state_dict"])
    return member


def _load_any_shape(member: pl.LightningModule, state: dict[str, Any]) -> None:
    handle = accept_other_shapes(member)
    try:
        member.load_state_dict(state)
    finally:
        handle.remove()


# ---- members in the checkpoint of an ensemble


def what_it_adds(member: pl.LightningModule, index: int, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a member's ``on_save_checkpoint`` adds; what it does to its own weights is done to the ensemble's.

    Args:
        member: It sees a checkpoint like that of a fit of its own.
        index: Its number.
        checkpoint: Of the ensemble; its ``state_dict`` may be changed.

    Returns:
        The entries that are new.
    """
    beginning = f"members.{index}."
    weights = checkpoint["state_dict"]
    state = {k[len(beginning) :]: v for k, v in weights.items() if k.startswith(beginning)}
    given: dict[str, Any] = {"state_dict": state}
    given |= {k: checkpoint[k] for k in ("epoch", "global_step") if k in checkpoint}
    seen = dict(given)
    member.on_save_checkpoint(seen)
    for key in [k for k in weights if k.startswith(beginning)]:
        del weights[key]
    weights.update({beginning + k: v for k, v in seen["state_dict"].items()})
    return {k: v for k, v in seen.items() if k not in given}


def give_what_they_added(members: Sequence[pl.LightningModule], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Calls each member's ``on_load_checkpoint`` with what it added.

    Returns:
        What the ensemble keeps in its checkpoints.

    Raises:
        MisconfigurationException: If the checkpoint is of something else, or of another number of members.
    """
    own = checkpoint.get("ensemble")
    if own is None:
        raise MisconfigurationException(
            "The checkpoint is not of an EnsembleModule. Join the checkpoints of single modules with"
            " EnsembleModule.from_checkpoints(paths, module_class)."
        )
    if len(own["added"]) != len(members):
        raise MisconfigurationException(
            f"The checkpoint is of an ensemble of {len(own['added'])} members, and this one has {len(members)}:"
            " make it with as many."
        )
    for index, (member, added) in enumerate(zip(members, own["added"], strict=True)):
        beginning = f"members.{index}."
        state = {k[len(beginning) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(beginning)}
        loaded = {"state_dict": state, **added}
        member.on_load_checkpoint(loaded)
        changed = {beginning + k: v for k, v in loaded["state_dict"].items()}
        for key in [k for k in checkpoint["state_dict"] if k.startswith(beginning)]:
            del checkpoint["state_dict"][key]
        checkpoint["state_dict"].update(changed)
    return dict(own)
