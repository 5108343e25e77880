"""What the trained networks of a comparison cost: operations, and latency measured in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_tips.cli.run import ParseCLI
from lightning_tips.core import accept_other_shapes, inputs_of
from lightning_tips.pruning import count_cost, measure_latencies, measure_latency

SHARE = 0.003
"""Of the time of the fits, at most so much goes into measuring latencies; but a few passes are made in any case."""


def measure_arms(
    cli: ParseCLI, files: Mapping[str, Path], checkpoints: Mapping[str, Path], spent: float
) -> tuple[dict[str, dict[str, Any]], str]:
    """Counts and measures one sample's way through the trained network of each arm.

    Args:
        cli: What read the configuration.
        files: By arm, its yaml.
        checkpoints: By arm, a trained one.
        spent: Seconds that the fits took, for how long the measurement may take.

    Returns:
        By arm ``macs`` and ``latency_seconds``, or ``why_not``; and the device. The first arm's data serve for all, and
        arms with equal networks have one latency.
    """
    modules: dict[str, pl.LightningModule] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in files}
    built: dict[str, pl.LightningModule] = {}
    models: dict[str, str] = {}
    example: Any = None
    device = torch.device("cpu")
    for name, path in files.items():
        try:
            models[name] = model = yaml.safe_dump(yaml.safe_load(path.read_text())["model"])
            if model not in built:
                cli.config = cli.parser.parse_args([f"--config={path}"])
                cli.build()
                built[model] = cli.model
                if example is None:
                    device = cli.trainer.strategy.root_device
                    example = _first_sample(cli)
            modules[name] = _trained(built[model], checkpoints[name]).to(device)
            found[name]["macs"] = count_cost(modules[name], example).macs
        except Exception as error:  # of whatever kind: any module, any data; it is told in the report
            modules.pop(name, None)
            found[name] = {"why_not": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    kinds: dict[Any, list[str]] = {}
    for name, module in modules.items():
        shapes = tuple((key, tuple(value.shape)) for key, value in module.state_dict().items())
        kinds.setdefault((models[name], shapes), []).append(name)
    networks = [modules[names[0]] for names in kinds.values()]  # of equal ones a difference would be noise
    if networks:
        started = time.perf_counter()
        for network in networks:
            measure_latency(network, example, repeats=1, warmup=2)
        a_pass = (time.perf_counter() - started) / 3
        repeats = max(15, min(100, int(SHARE * spent / a_pass)))
        for names, latency in zip(kinds.values(), measure_latencies(networks, example, repeats), strict=True):
            for name in names:
                found[name] |= {"latency_seconds": latency.median, "latency": latency.to_dict()}
    return found, str(device)


def _first_sample(cli: ParseCLI) -> Any:
    """The inputs of one sample, on the CPU, with the batch dimension."""
    source = cli.model if cli.datamodule is None else cli.datamodule
    source.prepare_data()
    source.setup("fit")
    source.setup("validate")
    loader = source.val_dataloader() or source.train_dataloader()
    while isinstance(loader, list | tuple):
        loader = loader[0]
    inputs = inputs_of(next(iter(loader)))
    return apply_to_collection(inputs, Tensor, lambda tensor: tensor[:1])


def _trained(model: pl.LightningModule, checkpoint: Path) -> pl.LightningModule:
    """A copy with the weights of a checkpoint, whatever shapes they have."""
    model = copy.deepcopy(model)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model.configure_model()
    model.on_load_checkpoint(state)
    accept_other_shapes(model)
    model.load_state_dict(state["state_dict"])
    return model
