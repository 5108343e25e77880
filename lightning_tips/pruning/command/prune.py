"""Prune and fine-tune a trained checkpoint, and leave a smaller one with a report: `lightning-tips prune`."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_tips.core import callbacks_of, log_picture, report_folder, resize_to, say
from lightning_tips.core.resize import named_tensors
from lightning_tips.pruning.command.comparison import as_page, as_terminal, compare_networks
from lightning_tips.pruning.command.export import SUFFIX, Kind, choose_kinds, export_network
from lightning_tips.pruning.command.watch import Watch, limit_by_sensitivity, numbers_of
from lightning_tips.pruning.fit.base import PruningCallback
from lightning_tips.pruning.fit.capture import Inputs, find_network
from lightning_tips.pruning.fit.filter_callback import FilterPruningCallback
from lightning_tips.pruning.fit.report import plot_channels
from lightning_tips.pruning.networks.copies import plain_copy

MARK = "lightning_tips_pruned"
"""The key in a checkpoint that says that its network is pruned."""


def prune_checkpoint(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    ckpt_path: str | Path,
    datamodule: Any = None,
    *,
    export: Sequence[str] | None = None,
    keep: Literal["last", "best"] = "last",
    sensitivity_drop: float | None = None,
    batch_sizes: Sequence[int] = (1, 256),
    repeats: int = 30,
    out: str | Path | None = None,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Validates a trained checkpoint, prunes and fine-tunes it, validates again, and writes what is left.

    The weights are loaded, optimizers start fresh: this is a new run, for ``max_epochs`` of the Trainer. When and how
    much is pruned says the FilterPruningCallback or LayerPruningCallback among the Trainer's callbacks. A guard
    (``max_drop``) compares with the validation before.

    In the folder: ``pruned.ckpt`` (weights and hyper-parameters), ``pruned.pt2`` and ``pruned.onnx`` (the network as
    the module's steps call it, in eval mode, for any batch size, compared with the module), ``report.json``,
    ``report.md`` and ``channels.png``; with ``sensitivity_drop`` also ``sensitivity.json`` and ``sensitivity.png``.

    Args:
        trainer: With the pruning callback.
        model: The module, as it was before it was trained; also for a checkpoint that is pruned already.
        ckpt_path: The trained checkpoint.
        datamodule: As for ``fit``; by default the module has loaders of its own.
        export: ``"torch"``, ``"onnx"``; by default all that can be written here.
        keep: ``"last"``: the weights at the end. ``"best"``: ModelCheckpoint's best since the last pruning step.
        sensitivity_drop: Before pruning, every layer is tried alone, and no more is taken from it than costs so much of
            the callback's ``monitor`` (see :func:`~lightning_tips.pruning.sensitivity`). Takes three validations for
            each convolution.
        batch_sizes: For which time and memory are measured.
        repeats: Measured passes.
        out: The folder; by default the run's, beside what its other tips leave.
        weights_only: ``False`` for a checkpoint with objects in it that you trust.

    Returns:
        The report, plain data as in ``report.json``.

    Raises:
        MisconfigurationException: Before training, for a Trainer without pruning callback, a checkpoint of another
            network, and what the callback raises; after it, where nothing was pruned, or the guard took all of it back.
        ValueError: Before training, for unknown arguments, or an export that cannot be written here.
    """
    kinds, absent = choose_kinds(export)
    tip = _check(trainer, keep, batch_sizes, repeats, sensitivity_drop)
    load_weights(model, ckpt_path, weights_only)
    watch = Watch(tip)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    try:
        metrics_before = _validated(trainer, model, datamodule)
        if not isinstance(tip.monitor, str) or tip.monitor not in metrics_before:
            _say_which(trainer, tip, metrics_before)
        for each in _tips(trainer):
            each.take_reference(metrics_before)
        original = plain_copy(model)
        folder = _folder(trainer, out)
        table = None
        if sensitivity_drop is not None:
            table = limit_by_sensitivity(trainer, tip, original, watch, datamodule, sensitivity_drop, folder)
        watch.rows.clear()
        trainer.fit(model, datamodule=datamodule)
        steps = _steps(trainer, watch.rows)
        found = tip.found
        if not steps or found is None:
            raise MisconfigurationException(f"{type(tip).__name__}: {tip.outlook()}. Nothing was written.")
        if _size(model) == _size(original):
            raise MisconfigurationException(
                f"{type(tip).__name__}: each step cost more than max_drop of {tip.monitor}, so the network is what it"
                " was, and nothing was written. Allow more (max_drop), ask for less (target), or fine-tune for longer"
                " (every_n_epochs)."
            )
        kept = _keep(trainer, model, keep)
        metrics_after = _validated(trainer, model, datamodule)
    finally:
        trainer.callbacks.remove(watch)  # type: ignore[attr-defined]

    path = folder / "pruned.ckpt"
    trainer.save_checkpoint(path, weights_only=True)  # on all ranks
    report: dict[str, Any] = {}
    if trainer.is_global_zero:
        name, example = found
        nets = [find_network(m, name) for m in (original, plain_copy(model))]
        device = trainer.strategy.root_device
        comparison = compare_networks(nets[0].to(device), nets[1].to(device), example, batch_sizes, repeats)
        report = {
            "title": f"{type(model).__name__}, pruned",
            "run": {
                "from": str(ckpt_path),
                "plan": "; ".join(each.describe() for each in _tips(trainer)),
                "epochs": trainer.current_epoch,
                "target": "reached" if all(each.reached for each in _tips(trainer)) else "not reached",
                "weights": kept,
                "network": f"{name or type(model).__name__}, called with {_shapes(example)}",
            },
            **comparison,
            "metrics": {k: [v, metrics_after[k]] for k, v in metrics_before.items() if k in metrics_after},
            "steps": steps,
            "left_out": _untouched(_tips(trainer), comparison["channels"]),
            "sensitivity": None if table is None else table.to_dict(),
        }
        _mark(path, {"network": name, "channels": report["channels"]})
        report["files"] = {path.name: "weights and hyper-parameters; load_pruned, lightning-tips test --ckpt_path"}
        report["files"] |= _export(nets[1], example, folder, kinds, absent)
        _write(trainer, report, folder)
    trainer.strategy.barrier()
    return report


def load_weights(model: pl.LightningModule, ckpt_path: str | Path, weights_only: bool | None = None) -> None:
    """Loads a trained checkpoint into the module, also a pruned one, which is smaller.

    Args:
        model: The module.
        ckpt_path: The checkpoint.
        weights_only: See ``torch.load``; by default ``True``.

    Raises:
        MisconfigurationException: If there is no such file, or it is of another network.
    """
    if not Path(ckpt_path).is_file():
        raise MisconfigurationException(f"There is no checkpoint {ckpt_path}.")
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=weights_only is not False)
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"{ckpt_path} holds objects, not plain data only. If you trust it, pass weights_only=False (in the terminal"
            " --weights_only false)."
        ) from error
    if "state_dict" not in checkpoint:
        raise MisconfigurationException(f"{ckpt_path} is no checkpoint of Lightning: it has no state_dict.")
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    mine = named_tensors(model)
    larger = [n for n, t in mine.items() if n in state and not _fits_into(state[n].shape, t.shape)]
    other = f"{ckpt_path} is the checkpoint of another network than {type(model).__name__} is here: "
    if larger:
        name = larger[0]
        raise MisconfigurationException(
            f"{other}{name} is {tuple(state[name].shape)} there and {tuple(mine[name].shape)} here."
        )
    resize_to(model, state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise MisconfigurationException(f"{other}{reason[:300]}") from error


def is_pruned(ckpt_path: str | Path) -> bool:
    """Whether a checkpoint says that it is of :func:`prune_checkpoint`, or of a run with a callback that prunes."""
    try:
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(ckpt_path))
    except pickle.UnpicklingError:
        return False  # one with objects in it, which is not loaded to find out
    kinds = [cls.__name__ for cls in PruningCallback.__subclasses__()]
    return MARK in checkpoint or any(str(key).startswith(tuple(kinds)) for key in checkpoint.get("callbacks", {}))


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _fits_into(small: Sequence[int], large: Sequence[int]) -> bool:
    return len(small) == len(large) and all(s <= b for s, b in zip(small, large, strict=True))


# ---- before


def _tips(trainer: pl.Trainer) -> list[PruningCallback]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PruningCallback)]


def _check(
    trainer: pl.Trainer, keep: str, batch_sizes: Sequence[int], repeats: int, drop: float | None
) -> PruningCallback:
    if keep not in ("last", "best"):
        raise ValueError(f"keep={keep!r} must be 'last' or 'best'.")
    if repeats < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes={list(batch_sizes)} and repeats={repeats} must be 1 or more.")
    tips = _tips(trainer)
    if not tips:
        raise MisconfigurationException(
            "There is no FilterPruningCallback or LayerPruningCallback among the callbacks."
        )
    if getattr(trainer, "fast_dev_run", False):
        raise MisconfigurationException("fast_dev_run prunes nothing. Set max_epochs and limit_train_batches instead.")
    first, epochs = min(tip.schedule.start_epoch for tip in tips), trainer.max_epochs
    if epochs is not None and 0 <= epochs <= first:
        raise MisconfigurationException(
            f"The first pruning step is due in epoch {first}, and the run ends after {epochs}. Set start_epoch to 0, or"
            " max_epochs higher."
        )
    if keep == "best" and not _monitored(trainer):
        raise MisconfigurationException("keep='best' needs a ModelCheckpoint with a monitor among the callbacks.")
    if drop is not None:
        if not drop >= 0:
            raise ValueError(f"The drop of the sensitivity analysis must be 0 or more, not {drop}.")
        if not isinstance(tips[0], FilterPruningCallback):
            raise MisconfigurationException(
                "The sensitivity analysis is of filters, and no FilterPruningCallback is there."
            )
        if trainer.world_size > 1:
            raise MisconfigurationException(
                "The sensitivity analysis runs on one device. Run it there, and give its limits to the callback, as"
                " plan: {limits: {layer: share}}."
            )
    return tips[0]


def _monitored(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [c for c in callbacks_of(trainer) if isinstance(c, ModelCheckpoint) and c.monitor is not None]


def _say_which(trainer: pl.Trainer, tip: PruningCallback, metrics: Mapping[str, float]) -> None:
    say(trainer, f"Validation logs no {tip.monitor!r}; it logs {', '.join(metrics) or 'nothing'}.")


def _validated(trainer: pl.Trainer, model: pl.LightningModule, datamodule: Any) -> dict[str, float]:
    trainer.validate(model, datamodule=datamodule, verbose=False)
    return numbers_of(trainer)


def _folder(trainer: pl.Trainer, out: str | Path | None) -> Path:
    """The same on all ranks."""
    folder = None
    if trainer.is_global_zero:
        folder = Path(out) if out is not None else report_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
    return Path(trainer.strategy.broadcast(str(folder)))


# ---- after


def _untouched(tips: Sequence[PruningCallback], channels: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Layers and blocks from which no step took anything, and why. The reasons are those of the last step."""
    reasons: dict[str, str] = {}
    for tip in tips:
        reasons |= tip.left_out
    return {name: why for name, why in reasons.items() if name not in channels or len(set(channels[name])) == 1}


def _steps(trainer: pl.Trainer, rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """What was done, each with the metrics after the fine-tuning that followed."""
    tips = _tips(trainer)
    events = sorted((event for tip in tips for event in tip.events), key=lambda event: event.step)
    watched = {tip.monitor for tip in tips}
    steps = []
    for event, following in zip(events, [*events, None][1:], strict=True):
        until = float("inf") if following is None else following.step
        then = [row for row in rows if event.step < row["step"] <= until]
        last = {k: v for k, v in then[-1].items() if k in watched or k == "val_loss"} if then else {}
        steps.append(
            {"step": event.step, "epoch": event.epoch, "what": event.what, "details": event.details, "fine_tuned": last}
        )
    return steps


def _keep(trainer: pl.Trainer, model: pl.LightningModule, keep: str) -> str:
    """Brings the chosen weights into the module."""
    if keep == "last":
        return f"of the last epoch ({trainer.current_epoch})"
    best = next((c for c in _monitored(trainer) if c.best_model_path), None)
    if best is not None:
        state = _own(best.best_model_path)["state_dict"]
        mine = model.state_dict()
        if all(n in state and getattr(v, "shape", 0) == getattr(state[n], "shape", 0) for n, v in mine.items()):
            model.load_state_dict(state)
            return f"of {Path(best.best_model_path).name}, the best {best.monitor} since the last step"
    say(trainer, "keep='best': no checkpoint was kept since the last step, so the last weights are.")
    return f"of the last epoch ({trainer.current_epoch}), as no better were kept since the last step"


def _mark(path: Path, what: Mapping[str, Any]) -> None:
    torch.save(_own(path) | {MARK: dict(what)}, path)


def _own(path: str | Path) -> dict[str, Any]:
    """A checkpoint that this run has written, with whatever objects its module keeps in it."""
    return torch.load(path, map_location="cpu", weights_only=False)


def _export(
    network: nn.Module, example: Inputs, folder: Path, kinds: Sequence[Kind], absent: Mapping[str, str]
) -> dict[str, str]:
    """What each file is, or why it is not there."""
    files = {}
    for kind in kinds:
        path = folder / f"pruned{SUFFIX[kind]}"
        try:
            worst = export_network(network, example, path, kind)
        except (RuntimeError, ValueError) as error:  # hours of training are not lost to it
            files[path.name] = f"NOT WRITTEN: {error}"
            continue
        checked = (
            "not compared: pip install onnxruntime"
            if worst is None
            else f"its outputs are the network's (within {worst:.1g})"
        )
        files[path.name] = f"{kind}, any batch size, {checked}"
    return files | {f"pruned{SUFFIX[kind]}": f"not written: {reason}" for kind, reason in absent.items()}


def _write(trainer: pl.Trainer, report: dict[str, Any], folder: Path) -> None:
    plot_channels(report["channels"], folder / "channels.png")
    log_picture(trainer, "tips/channels", folder / "channels.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(as_page(report))
    files = "\n".join(f"  {folder / name}: {what}" for name, what in report["files"].items())
    say(trainer, f"{as_terminal(report)}\n{files}\n  {folder / 'report.md'}: all of this, and channels.png")


def _shapes(example: Inputs) -> str:
    values = example.values() if isinstance(example, dict) else example
    return ", ".join(
        f"{str(v.dtype).removeprefix('torch.')} (B, {', '.join(map(str, v.shape[1:]))})"
        if isinstance(v, torch.Tensor) and v.ndim
        else repr(v)
        for v in values
    )
