"""How much faster is a network with half of its operations, or with fewer blocks? CPU time, against the whole network.

    python benchmarks/pruning/latency.py            # writes latency.json
    python benchmarks/pruning/latency.py --smoke    # one network, a few passes

Shapes decide, so the weights are untrained. The median CPU time of passes on one thread, in turns and in random order:
wall time means nothing where other processes share the cores. ``of_macs`` is the speed-up divided by what the
operations promise: 1 means that half of the operations take half of the time.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_tips import prune_filters
from lightning_tips.pruning import count_cost, remove_blocks
from lightning_tips.vision.networks import build_network

BATCHES = (1, 256)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet20": ("resnet20", {}),
    "vgg11_bn": ("cifar_vgg11_bn", {"width": 32}),
}
# What is pruned: the arguments of prune_filters.
FILTERS: dict[str, dict[str, Any]] = {
    "half, default": {},
    "half, round_to=8": {"round_to": 8},
    "half, scope=global_raw": {"scope": "global_raw"},
}
# Which blocks of ResNet-20 go: from the first stage, where they cost most time, or from the last.
BLOCKS = {
    "3 blocks out, early": ["stages.0.0", "stages.0.1", "stages.0.2"],
    "3 blocks out, late": ["stages.1.2", "stages.2.1", "stages.2.2"],
    "4 blocks out": ["stages.0.1", "stages.0.2", "stages.1.2", "stages.2.2"],
}


def variants(network: str) -> dict[str, nn.Module]:
    """The whole network and its smaller ones, in eval mode."""
    torch.manual_seed(0)
    name, arguments = NETWORKS[network]
    whole = build_network(name, 10, in_channels=1, **arguments)[0].eval()
    images = torch.randn(2, 1, 28, 28)
    made = {"whole": whole}
    for label, options in FILTERS.items():
        made[label] = copy.deepcopy(whole)
        prune_filters(made[label], images, target={"macs": 0.5}, **options)
    for label, blocks in BLOCKS.items() if network == "resnet20" else ():
        made[label] = copy.deepcopy(whole)
        remove_blocks(made[label], images, blocks)
    return made


def cpu_seconds(models: Sequence[nn.Module], images: torch.Tensor, repeats: int) -> list[list[float]]:
    """CPU times of passes of each, in turns and in random order; the first two turns warm up."""
    times: list[list[float]] = [[] for _ in models]
    draw = random.Random(0)
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for i in draw.sample(range(len(models)), len(models)):
                started = time.process_time()
                models[i](images)
                if turn >= 2:
                    times[i].append(time.process_time() - started)
    return times


def measure(made: Mapping[str, nn.Module], batch: int, form: torch.memory_format, repeats: int) -> dict[str, Any]:
    """The rows of one batch size and memory format."""
    models = [copy.deepcopy(model).to(memory_format=form) for model in made.values()]
    images = torch.randn(batch, 1, 28, 28).contiguous(memory_format=form)
    times = cpu_seconds(models, images, repeats)
    costs = [count_cost(model, images[:1]).macs for model in models]
    rows = {}
    for name, seconds, macs in zip(made, times, costs, strict=True):
        # Each pass against the whole network's in the same turn: what slows the machine down slows both.
        speedup = statistics.median(a / b for a, b in zip(times[0], seconds, strict=True))
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        rows[name] = {
            "milliseconds": round(1000 * statistics.median(seconds), 3),
            "quartiles": [round(1000 * low, 3), round(1000 * high, 3)],
            "macs_left": round(macs / costs[0], 3),
            "speedup": round(speedup, 2),
            "of_macs": round(speedup * macs / costs[0], 2),
        }
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--repeats", type=int, default=25, help="at batch 256; ten times as many at batch 1")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, CPU time"}
    for network in ["resnet20"] if arguments.smoke else NETWORKS:
        made = variants(network)
        for batch in (1,) if arguments.smoke else BATCHES:
            repeats = 2 if arguments.smoke else arguments.repeats * (10 if batch == 1 else 1)
            for form, memory_format in FORMATS.items():
                rows = measure(made, batch, memory_format, repeats)
                result.setdefault(network, {}).setdefault(f"batch {batch}", {})[form] = rows
                for name, row in rows.items():
                    print(f"{network} batch {batch} {form}: {name}: {row}", flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
