"""Members stacked into one network by torch.func against a loop over them: which predicts sooner?

    python benchmarks/ensemble/stacked.py

Process CPU time on one thread, no Trainer; the two arms in turns, medians over rounds. ResNet-8 on 28x28 images, and
networks of two layers (64 inputs, 64 hidden) that are so small that a loop spends its time in Python. Weights are
stacked beforehand and not counted. The ratio is the time of the stacked members to that of the loop: below 1 they are
quicker. Results go to ``stacked.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lightning_tips.vision import ImageClassifier


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def resnet() -> nn.Module:
    return ImageClassifier("resnet8", in_channels=1).network


# How to build one, the shape of an image, and how many members and images there are.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[int, int]]]] = {
    "two layers": (small, (1, 8, 8), [(5, 32), (5, 256), (16, 32), (16, 256)]),
    "ResNet-8": (resnet, (1, 28, 28), [(5, 32)]),
}


def seconds(work: Callable[[], Tensor]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def compare(build: Callable[[], nn.Module], shape: tuple[int, ...], members: int, batch: int, rounds: int) -> Any:
    torch.manual_seed(0)
    networks = [build().eval() for _ in range(members)]
    parameters, buffers = stack_module_state(networks)
    skeleton = copy.deepcopy(networks[0]).to("meta")
    images = torch.rand(batch, *shape)

    def one(weights: Any, states: Any, inputs: Tensor) -> Tensor:
        return functional_call(skeleton, (weights, states), (inputs,))

    def loop() -> Tensor:
        return torch.stack([network(images) for network in networks]).softmax(2).mean(0)

    def stacked() -> Tensor:
        return vmap(one, in_dims=(0, 0, None))(parameters, buffers, images).softmax(2).mean(0)

    with torch.inference_mode():
        torch.testing.assert_close(stacked(), loop(), atol=1e-5, rtol=0)
        times: dict[str, list[float]] = {"loop": [], "stacked": []}
        for number in range(rounds):
            for name, work in [("loop", loop), ("stacked", stacked)][:: 1 if number % 2 else -1]:
                times[name].append(seconds(work))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "members": members,
        "batch": batch,
        "ratio": round(medians["stacked"] / medians["loop"], 3),
        "milliseconds": {name: round(1000 * value, 3) for name, value in medians.items()},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--smoke", action="store_true", help="as small as can be")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("stacked.json"))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()} {platform.system()}, 1 thread, torch {torch.__version__}"
    }
    for name, (build, shape, sizes) in NETWORKS.items():
        result[name] = []
        for members, batch in [(2, 4)] if chosen.smoke else sizes:
            found = compare(build, shape, members, batch, 1 if chosen.smoke else chosen.rounds)
            print(f"{name}, {members} members, batch {batch}: stacked {found['ratio']} times the loop", flush=True)
            result[name].append(found)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
