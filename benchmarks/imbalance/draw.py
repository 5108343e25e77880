"""What drawing an epoch costs, against torch's WeightedRandomSampler in the same run.

    python benchmarks/imbalance/draw.py            1e7 and 1e8 samples: about five minutes and 2 GB
    python benchmarks/imbalance/draw.py --smoke    a moment

Process CPU time, one thread, medians. An epoch is as long as the data and balanced. Two kinds of data: ten classes with
a long tail, 100 to 1 from the largest to the smallest, and two classes 20 to 1. WeightedRandomSampler cannot draw 1e8.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import WeightedRandomSampler

from lightning_tips.imbalance import ImbalancedSampler

DATA = {"10 classes, 100:1": np.logspace(0, -2, 10), "2 classes, 20:1": np.array([20.0, 1.0])}


def make_labels(size: int, shares: np.ndarray) -> np.ndarray:
    """Labels in random order, block by block: the random numbers for 1e8 at once would not fit."""
    rng = np.random.default_rng(0)
    edges = np.cumsum(shares / shares.sum())[:-1]
    labels = np.empty(size, np.uint8)
    for at in range(0, size, 1 << 20):
        block = labels[at : at + (1 << 20)]
        block[:] = np.searchsorted(edges, rng.random(len(block)), side="right")
    return labels


def cpu_seconds(what: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.process_time()
        what()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def measure(size: int, shares: np.ndarray, times: int, against_torch: bool) -> dict[str, Any]:
    labels = make_labels(size, shares)
    result: dict[str, Any] = {"build_cpu_s": cpu_seconds(lambda: ImbalancedSampler(labels, num_samples=size), 1)}
    sampler = ImbalancedSampler(labels, num_samples=size)
    epochs = iter(range(1, 10_000))  # a new one each time, so that nothing is left over from the last

    def drain() -> None:
        sampler.set_epoch(next(epochs))
        deque(sampler, maxlen=0)

    result["vectorised_cpu_s"] = cpu_seconds(lambda: sampler.indices(next(epochs)), times)
    result["vectorised_ns_an_index"] = 1e9 * result["vectorised_cpu_s"] / size
    result["iterated_cpu_s"] = cpu_seconds(drain, times)
    if against_torch:
        weights = torch.from_numpy((1.0 / sampler.counts)[labels])
        torchs = WeightedRandomSampler(weights, size)  # type: ignore[arg-type]
        result["torch_cpu_s"] = cpu_seconds(lambda: deque(torchs, maxlen=0), times)
        result["times_faster_vectorised"] = result["torch_cpu_s"] / result["vectorised_cpu_s"]
        result["times_faster_iterated"] = result["torch_cpu_s"] / result["iterated_cpu_s"]

    result["first_index_ms"] = {}
    for world, rank in ((1, 0), (8, 0), (8, 7)):
        sampler.num_replicas, sampler.rank = world, rank

        def first() -> None:
            sampler.set_epoch(next(epochs))
            next(iter(sampler))

        result["first_index_ms"][f"rank {rank} of {world}"] = 1000 * cpu_seconds(first, 5)
    del sampler

    tracemalloc.start()
    sampler = ImbalancedSampler(labels, num_samples=size)
    index = sampler._pool.index.nbytes
    for part in sampler._parts(0, 0, min(size, 20 * 65_536)):  # the parts are alike
        del part
    result["index_bytes_a_sample"] = index / size
    result["peak_beside_index_mb"] = (tracemalloc.get_traced_memory()[1] - index) / 1e6
    tracemalloc.stop()
    return result


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.3g}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("draw.json"))
    parser.add_argument("--times", type=int, default=3, help="how often to take each time")
    parser.add_argument("--smoke", action="store_true", help="1e5 samples instead of 1e7 and 1e8")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)

    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, numpy {np.__version__}",
        "median_of": chosen.times,
    }
    for size in [100_000] if chosen.smoke else [10_000_000, 100_000_000]:
        for name, shares in DATA.items():
            key = f"{size:.0e}".replace("e+0", "e") + ", " + name
            result[key] = rounded(measure(size, shares, chosen.times, against_torch=size < 1 << 24))
            print(key, json.dumps(result[key], indent=2), flush=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
