"""What does a network lose with one of its layers? Residual against plain networks, after Veit et al. 2016.

    python benchmarks/pruning/veit.py --cache folder --train-images 12000     # deletions: veit.csv and the picture
    python benchmarks/pruning/veit.py --cache folder --drop                   # dropped and fine-tuned: dropped.csv

From a trained ResNet-20 each block that can go is deleted alone, from the plain net without skips the same two layers
(and each single layer), from VGG-11-BN each convolution that keeps the number of channels, with its BatchNorm and ReLU.
Test accuracy is measured at once and again after BatchNorm's statistics have been estimated anew from 2,048 training
images. With ``--drop`` the blocks that a validation set misses least are taken out of ResNet-20 three and four at a
time, and the network is fine-tuned for an epoch. Latency is the median of interleaved passes at batch 1 on one thread,
in CPU time: wall time means nothing where other processes share the cores.

Trained networks are kept in the cache folder, finished rows in the CSV files: a stopped study goes on.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from base_networks import NETWORKS, Data, Part, accuracy, base, load, train  # type: ignore[import-not-found]
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from lightning_tips.pruning import (
    count_cost,
    find_blocks,
    reestimate_batch_norm,
    remove_blocks,
)

HERE = Path(__file__).parent
COLUMNS = ["network", "seed", "unit", "deleted", "base", "raw", "recalibrated", "macs_left"]
COLUMNS += ["epochs", "train_images", "test_images", "machine"]
DROP_COLUMNS = ["network", "seed", "blocks", "base", "recalibrated", "fine_tuned", "macs_left", "milliseconds"]
DROP_COLUMNS += ["base_milliseconds", "speedup", "removed", "epochs", "train_images", "test_images", "machine"]
Deletion = tuple[str, str, dict[str, nn.Module]]  # unit, name, what stands where


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def deletions(name: str, model: nn.Module, example: torch.Tensor) -> Iterator[Deletion]:
    """What can be deleted without a change of shapes."""
    if name == "vgg11_bn":
        for layer_name, layer in model.named_children():
            if not layer_name.startswith("conv"):
                continue
            conv = layer.get_submodule("0")
            if conv.in_channels == conv.out_channels:
                yield "layer", layer_name, {layer_name: nn.Identity()}
        return
    if name == "resnet20":
        for block in find_blocks(model, example):
            if block.removable:
                assert not block.activation  # nothing stays: what comes in has been through a ReLU
                yield "block", block.name, {block.name: nn.Identity()}
        return
    for block_name, block in model.named_modules():
        if hasattr(block, "conv1"):
            if block.conv1.in_channels == block.conv1.out_channels:
                yield "block", block_name, {block_name: nn.Identity()}
                yield (
                    "layer",
                    f"{block_name}.conv1",
                    {f"{block_name}.{part}1": nn.Identity() for part in ("conv", "bn")},
                )
            yield "layer", f"{block_name}.conv2", {f"{block_name}.{part}2": nn.Identity() for part in ("conv", "bn")}


@contextmanager
def replaced(model: nn.Module, places: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """While it is open, other modules stand in ``places``."""
    before = {name: model.get_submodule(name) for name in places}
    try:
        for name, module in places.items():
            model.set_submodule(name, module)
        yield model
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def measure(model: nn.Module, places: dict[str, nn.Module], data: Data, test: Part) -> dict[str, float]:
    """Accuracy without what is deleted, at once and with new statistics, and the share of MACs left."""
    whole = count_cost(model, test.images[:1]).macs
    changed = copy.deepcopy(model)
    with replaced(changed, places):
        raw = accuracy(changed, test)
        reestimate_batch_norm(changed, calibration(data))
        left = count_cost(changed, test.images[:1]).macs / whole
        return {"raw": round(raw, 2), "recalibrated": round(accuracy(changed, test), 2), "macs_left": round(left, 3)}


def calibration(data: Data) -> list[torch.Tensor]:
    """2,048 training images, of all classes: the order of the training part is random."""
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(0))[:2048]
    return list(data.train.images[order].split(256))


def drop(seed: int, data: Data, test: Part, epochs: int, cache: Path, counts: list[int], repeats: int) -> Any:
    """ResNet-20 with some blocks dropped: accuracy before and after an epoch of fine-tuning, latency."""
    model = base("resnet20", seed, data, epochs, cache)
    judge = Part(data.val.images[:2000], data.val.labels[:2000])
    for count in counts:
        smaller = copy.deepcopy(model)
        report = remove_blocks(
            smaller,
            data.train.images[:2],
            count=count,
            evaluate=lambda network: accuracy(network, judge),
            batches=calibration(data),
        )
        recalibrated = accuracy(smaller, test)
        train(smaller, data.train, 1, seed, lr=0.02)
        whole, left = cpu_milliseconds([model, smaller], test.images[:1], repeats)
        yield {
            "network": "resnet20",
            "seed": seed,
            "blocks": count,
            "base": round(accuracy(model, test), 2),
            "recalibrated": round(recalibrated, 2),
            "fine_tuned": round(accuracy(smaller, test), 2),
            "macs_left": round(report.ratios["macs"], 3),
            "milliseconds": round(left, 3),
            "base_milliseconds": round(whole, 3),
            "speedup": round(whole / left, 2),
            "removed": " ".join(report.removed),
        }


def cpu_milliseconds(models: list[nn.Module], images: torch.Tensor, repeats: int) -> list[float]:
    """The median CPU time of a pass of each, in turns and in random order."""
    times: list[list[float]] = [[] for _ in models]
    draw = random.Random(0)
    with torch.inference_mode():
        for turn in range(repeats + 10):
            for i in draw.sample(range(len(models)), len(models)):
                models[i].eval()
                started = time.process_time()
                models[i](images)
                if turn >= 10:
                    times[i].append(1000 * (time.process_time() - started))
    return [statistics.median(row) for row in times]


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def append(path: Path, columns: list[str], row: dict[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{key} {value}" for key, value in row.items() if key != "machine"), flush=True)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Accuracy for each deletion, a panel for each network; the mean over seeds."""
    names = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        mine = [
            row for row in rows if row["network"] == name and row["unit"] == ("layer" if "vgg" in name else "block")
        ]
        deleted = list(dict.fromkeys(row["deleted"] for row in mine))
        base_accuracy = sum(float(row["base"]) for row in mine) / len(mine)
        for shift, column, colour in ((-0.2, "raw", "lightgray"), (0.2, "recalibrated", "tab:blue")):
            heights = []
            for place in deleted:
                values = [float(row[column]) for row in mine if row["deleted"] == place]
                heights.append(sum(values) / len(values))
            axis.bar([i + shift for i in range(len(deleted))], heights, 0.4, color=colour, label=column)
        axis.axhline(base_accuracy, color="black", linewidth=0.8, label="nothing deleted")
        axis.set_xticks(range(len(deleted)), [d.replace("stages.", "") for d in deleted], fontsize="small")
        axis.set_title(name)
        axis.set_xlabel("deleted")
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of trained networks")
    parser.add_argument("--out", type=Path, help="the CSV file")
    parser.add_argument("--picture", type=Path, default=HERE.parents[1] / "docs" / "veit.png")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=55_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--drop", action="store_true", help="blocks dropped and fine-tuned, instead of one deleted")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 4], help="how many blocks, with --drop")
    parser.add_argument("--repeats", type=int, default=400, help="of the latency measurement")
    parser.add_argument("--smoke", action="store_true", help="scikit-learn's digits, to see that it runs")
    chosen = parser.parse_args(arguments)

    torch.set_num_threads(1)
    data = load(chosen.smoke)
    data = data._replace(train=Part(data.train.images[: chosen.train_images], data.train.labels[: chosen.train_images]))
    test = Part(data.test.images[: chosen.test_images], data.test.labels[: chosen.test_images])
    size = str(len(data.train.labels))
    common = {"epochs": chosen.epochs, "train_images": size, "test_images": len(test.labels), "machine": machine()}
    out = chosen.out or HERE / ("dropped.csv" if chosen.drop else "veit.csv")
    rows = read(out)
    for seed in chosen.seeds:
        if chosen.drop:
            dropped = {(row["seed"], row["blocks"]) for row in rows if row["train_images"] == size}
            counts = [count for count in chosen.counts if (str(seed), str(count)) not in dropped]
            for row in drop(seed, data, test, chosen.epochs, chosen.cache, counts, chosen.repeats) if counts else ():
                append(out, DROP_COLUMNS, row | common)
            continue
        for name in chosen.networks:
            model = base(name, seed, data, chosen.epochs, chosen.cache)
            done = {(row["network"], row["seed"], row["deleted"]) for row in rows if row["train_images"] == size}
            todo = [d for d in deletions(name, model, test.images[:2]) if (name, str(seed), d[1]) not in done]
            whole = round(accuracy(model, test), 2) if todo else 0.0
            for unit, deleted, places in todo:
                row = {"network": name, "seed": seed, "unit": unit, "deleted": deleted, "base": whole}
                append(out, COLUMNS, row | measure(model, places, data, test) | common)
    rows = read(out)
    if not chosen.drop:
        plot([row for row in rows if row["train_images"] == size], chosen.picture)
    return rows


if __name__ == "__main__":
    main()
