"""CPU time of a pruning step to half of the MACs, beside that of torch-pruning's own step, which tries nothing.

python benchmarks/pruning/plan_time.py            # writes plan_time.json
python benchmarks/pruning/plan_time.py --smoke    # one small network, once
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import nn

from lightning_tips import prune_filters
from lightning_tips.vision.networks import build_network

NETWORKS = {"resnet20": 32, "resnet18": 224, "resnet50": 224}


def ours(model: nn.Module, images: torch.Tensor) -> None:
    prune_filters(model, images, target={"macs": 0.5})


def theirs(model: nn.Module, images: torch.Tensor) -> None:
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    pruner = torch_pruning.MagnitudePruner(
        model,
        (images,),
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.3,
        isomorphic=True,
        global_pruning=True,
        ignored_layers=heads,
        pruning_ratio_dict={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        customized_pruners={},
    )
    pruner.step()


def measure(name: str, step: Callable[[nn.Module, torch.Tensor], None], times: int) -> dict[str, Any]:
    seconds = []
    for seed in range(times + 1):
        torch.manual_seed(seed)
        model, _ = build_network(name, 10)
        images = torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
        start = time.process_time()
        step(model, images)
        seconds.append(time.process_time() - start)
    seconds = seconds[1:]  # the first one imports things
    return {"median": round(statistics.median(seconds), 3), "all": [round(s, 3) for s in seconds]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's
        return measure_all(arguments)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, CPU seconds"}
    for name in ["resnet20"] if arguments.smoke else NETWORKS:
        times = 1 if arguments.smoke else arguments.times
        mine, other = measure(name, ours, times), measure(name, theirs, times)
        result[name] = {"ours": mine, "torch-pruning": other, "ratio": round(mine["median"] / other["median"], 2)}
        print(name, result[name])
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
