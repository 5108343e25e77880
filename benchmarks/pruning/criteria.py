"""What the criteria find, and what BatchNorm statistics are worth: ResNet-20 on Fashion-MNIST.

    python benchmarks/pruning/criteria.py            some minutes a seed; seeds that are in the file are not run again
    python benchmarks/pruning/criteria.py --smoke    a moment, on digits

For each seed a network is trained for two epochs. Then a quarter of the channels of every inner convolution (the first
of each block) is tampered with, and a criterion is asked for the quarter to drop in each layer:

- silent: filter, scale and shift are 0
- closed: filter 3 times as large, shift -100, so that the ReLU never opens
- ignored: as trained, but the next convolution's weights for it are 0
- small: filter and statistics a hundredth, which computes the same; to drop these would be a mistake

Last, untampered: half of each inner convolution's channels is taken away at once without fine-tuning, and the
validation accuracy is measured as it is, with statistics by torch's ``update_bn``, and with ``reestimate_batch_norm``.
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
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from lightning_tips.pruning import NEEDS_BATCHES, channel_scores, reestimate_batch_norm
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule
from lightning_tips.vision.data import collate
from lightning_tips.vision.networks import build_network

CRITERIA = ["l1", "l2", "geometric_median", "bn_scale", "mean_activation", "apoz", "taylor", "random"]
Batches = list[tuple[Tensor, Tensor]]


def batches_of(data: Any, indices: Tensor, size: int) -> Batches:
    images, labels = collate(data.__getitems__(indices.tolist()))
    return list(zip(images.sub(0.5).div(0.5).split(size), labels.split(size), strict=True))


def train(model: nn.Module, batches: Batches, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * len(batches))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(images), generator=generator).chunk(len(batches)):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[indices]), labels[indices]).backward()
            optimizer.step()
            scheduler.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batches) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def inner_layers(model: nn.Module) -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]]:
    """The first convolution of each block, its BatchNorm and the convolution that reads it."""
    blocks = {name: m for name, m in model.named_modules() if hasattr(m, "conv1") and hasattr(m, "conv2")}
    return {f"{name}.conv1": (m.conv1, m.bn1, m.conv2) for name, m in blocks.items()}


@torch.no_grad()
def tamper(kind: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, reader: nn.Conv2d, channels: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if kind == "silent":
        conv.weight[channels], norm.weight[channels], norm.bias[channels] = 0, 0, 0
    elif kind == "closed":
        conv.weight[channels] *= 3
        norm.bias[channels] = -100
    elif kind == "ignored":
        reader.weight[:, channels] = 0
    else:
        conv.weight[channels] *= 0.01
        norm.running_mean[channels] *= 0.01
        # The variance's epsilon makes up for what it no longer is beside it.
        norm.running_var[channels] = ((norm.running_var[channels] + norm.eps) * 1e-4 - norm.eps).clamp(min=0)


def found(model: nn.Module, kind: str, criterion: str, batches: Batches, seed: int) -> float:
    """The share of what was tampered with among the quarter that the criterion would drop."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    planted = {}
    for name, (conv, norm, reader) in inner_layers(model).items():
        planted[name] = torch.randperm(conv.out_channels, generator=generator)[: conv.out_channels // 4]
        tamper(kind, conv, norm, reader, planted[name])
    scores = channel_scores(model, list(planted), criterion, batches, seed=seed)
    shares = [
        torch.isin(score.argsort(stable=True)[: len(planted[name])], planted[name]).float().mean()
        for name, score in scores.items()
    ]
    return float(torch.stack(shares).mean())


def halved(model: nn.Module, criterion: str, batches: Batches, seed: int) -> tuple[nn.Module, float]:
    """A copy whose inner layers have lost half their channels; and the CPU seconds that the scores took."""
    model = copy.deepcopy(model)
    layers = inner_layers(model)
    started = time.process_time()
    scores = channel_scores(model, list(layers), criterion, batches, seed=seed)
    seconds = time.process_time() - started
    for name, (conv, norm, reader) in layers.items():
        tamper("silent", conv, norm, reader, scores[name].argsort(stable=True)[: conv.out_channels // 2])
    return model, seconds


def one_seed(seed: int, smoke: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data: Any = DigitsDataModule() if smoke else FashionMNISTDataModule()
    data.prepare_data()
    data.setup("fit")
    images, checked, epochs = (128, 32, 1) if smoke else (12_000, 2_000, 2)
    chosen = torch.randperm(len(data.train_set), generator=generator)[:images]
    batches = batches_of(data.train_set, chosen, 64)
    validation = batches_of(data.val_set, torch.arange(checked), 32 if smoke else 250)
    for_scores, for_statistics = validation[:2], batches[:16]
    model = build_network("resnet8" if smoke else "resnet20", 10, 1)[0]
    train(model, batches, epochs, generator)

    result: dict[str, Any] = {"accuracy": accuracy(model, validation)}
    result["found"] = {
        kind: {criterion: found(model, kind, criterion, for_scores, seed) for criterion in CRITERIA}
        for kind in ("silent", "closed", "ignored", "small")
    }
    result["halved"] = {}
    for criterion in CRITERIA:
        cut, seconds = halved(model, criterion, for_scores, seed)
        row = {"scores_cpu_seconds": seconds, "as it is": accuracy(cut, validation)}
        repairs: dict[str, Callable[[nn.Module], Any]] = {
            "update_bn": lambda network: update_bn(for_statistics, network),
            "reestimate_batch_norm": lambda network: reestimate_batch_norm(network, for_statistics),
        }
        for repair, do in repairs.items():
            repaired = copy.deepcopy(cut)
            do(repaired)
            row[repair] = accuracy(repaired.eval(), validation)
        result["halved"][criterion] = row
    return result


def summary(rows: dict[str, Any]) -> str:
    def cell(values: list[float], scale: float = 1) -> str:
        mean = f"{statistics.mean(values) * scale:.1f}"
        return f"{mean} ({statistics.stdev(values) * scale:.1f})" if len(values) > 1 else mean

    kinds, repairs = ("silent", "closed", "ignored", "small"), ("as it is", "update_bn", "reestimate_batch_norm")
    lines = [f"accuracy {cell([row['accuracy'] for row in rows.values()])}"]
    lines.append("| criterion | " + " | ".join((*kinds, *repairs)) + " |")
    lines.append("|---" * (1 + len(kinds) + len(repairs)) + "|")
    for criterion in CRITERIA:
        cells = [cell([row["found"][kind][criterion] for row in rows.values()], 100) for kind in kinds]
        cells += [cell([row["halved"][criterion][repair] for row in rows.values()]) for repair in repairs]
        lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.smoke and options.out is None:
        parser.error("--smoke needs --out, so that it does not overwrite the real numbers")
    out = options.out or Path(__file__).with_suffix(".json")
    assert set(CRITERIA) >= NEEDS_BATCHES
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"seeds": {}}
    result["machine"] = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    for seed in options.seeds:
        if str(seed) not in result["seeds"]:
            result["seeds"][str(seed)] = one_seed(seed, options.smoke)
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result["seeds"]))
    return result


if __name__ == "__main__":
    main()
