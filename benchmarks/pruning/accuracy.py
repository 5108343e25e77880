"""What pruning costs in accuracy: half the operations, by criterion, against two honest controls.

    python benchmarks/pruning/accuracy.py

Fashion-MNIST, ResNet-20 and VGG-11-BN (half its width), in bfloat16, tested in float32. One base network for each
seed; every arm goes on from it for the same epochs, half of the target pruned at once, half after an epoch. Criteria
that look at data of the run cannot prune before its first epoch: they do it an epoch later, and so does ``l1_later``,
beside which they are to be read.
The controls (Liu et al. 2019, arXiv 1810.05270): ``unpruned``, the base given the same extra epochs; ``scratch``, the
shapes that ``l1`` ended with, from new weights, for the epochs of base and pruning together.

Each finished run is appended to ``accuracy.csv`` and skipped the next time, so the study can be interrupted; two
processes with other ``--seeds`` or ``--networks`` and OMP_NUM_THREADS=1 share the work. Base networks are kept in
``--cache``. Test accuracy in per cent, of the last epoch. ``temperature.csv`` is of ``--networks resnet20 --seeds 0
--images 24000 --arms l1 l1_distilled`` with several ``--distill`` and ``--temperature``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_tips import FilterPruningCallback
from lightning_tips.core import resize_to
from lightning_tips.pruning import count_cost
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet20": ("resnet20", {}),
    "vgg11_bn": ("cifar_vgg11_bn", {"width": 32}),
}
STEPS = 2

# Arm: arguments of the callback; None for the controls.
ARMS: dict[str, dict[str, Any] | None] = {
    "unpruned": None,
    "l1": {},
    "l1_distilled": {},
    "scratch": None,
    "random": {"criterion": "random"},
    "l1_distilled_30": {"target": {"macs": 0.3}},
    "l1_30": {"target": {"macs": 0.3}},
    "l2": {"criterion": "l2"},
    "l1_global_raw": {"scope": "global_raw"},
    "l1_later": {"start_epoch": 1},
    "taylor": {"criterion": "taylor", "start_epoch": 1},
    "taylor_distilled": {"criterion": "taylor", "start_epoch": 1},
    "apoz": {"criterion": "apoz", "start_epoch": 1},
    "mean_activation": {"criterion": "mean_activation", "start_epoch": 1},
}
COLUMNS = [
    "network",
    "arm",
    "seed",
    "distill",
    "temperature",
    "images",
    "base_epochs",
    "epochs",
    "base_acc",
    "test_acc",
    "test_loss",
]
COLUMNS += ["macs", "parameters", "cpu_seconds", "machine"]


def classifier(network: str, steps: int, lr: float | None = None) -> ImageClassifier:
    """The module of every arm: one cycle for a network from new weights, ``lr`` falling to 0 for one that goes on."""
    name, arguments = NETWORKS[network]

    def falling(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    def one_cycle(optimizer: Any) -> OneCycleLR:
        return OneCycleLR(optimizer, 0.1, total_steps=steps + 1, pct_start=0.2)

    module = ImageClassifier(
        name,
        in_channels=1,
        network_args=arguments,
        optimizer=lambda p: SGD(p, lr=lr or 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        lr_scheduler=falling if lr else one_cycle,
        lr_scheduler_interval="step",
    )
    return module.to(memory_format=torch.channels_last)


def fit(module: ImageClassifier, data: LightningDataModule, epochs: int, prune: Any = None) -> dict[str, float]:
    """Trains, tests, and says what it took."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tempfile.gettempdir(),
    }
    trainer = Trainer(**quiet, max_epochs=epochs, callbacks=[prune] if prune else [], precision="bf16-mixed")
    started = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - started
    result = Trainer(**quiet).test(module, datamodule=data, verbose=False)[0]
    cost = count_cost(module, torch.zeros(1, 1, 28, 28).contiguous(memory_format=torch.channels_last))
    return {
        "test_acc": round(100 * result["test_acc"], 2),
        "test_loss": round(result["test_loss"], 4),
        "macs": cost.macs,
        "parameters": cost.parameters,
        "cpu_seconds": round(seconds, 1),
    }


def new_weights(module: nn.Module) -> None:
    """The initialisation of torch's own layers, in the shapes that they have."""
    for layer in module.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()


class Study:
    """The runs of one network and one seed, and what they share."""

    def __init__(self, network: str, seed: int, data: LightningDataModule, args: argparse.Namespace) -> None:
        self.network, self.seed, self.data, self.args = network, seed, data, args
        self.steps_per_epoch = len(data.train_dataloader())
        self.stem = args.cache / f"{network}-{args.images}-{args.base_epochs}-seed{seed}"

    def base(self) -> tuple[ImageClassifier, float]:
        """The base network, from the cache if it is there, and its test accuracy."""
        path = self.stem.with_suffix(".pt")
        steps = self.args.epochs * self.steps_per_epoch
        if not path.exists():
            seed_everything(self.seed, verbose=False)
            trained = classifier(self.network, self.args.base_epochs * self.steps_per_epoch)
            result = fit(trained, self.data, self.args.base_epochs)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weights": trained.state_dict(), "test_acc": result["test_acc"]}, path)
        saved = torch.load(path, weights_only=True)
        module = classifier(self.network, steps, self.args.lr)
        module.load_state_dict(saved["weights"])
        return module, saved["test_acc"]

    def run(self, arm: str) -> dict[str, float]:
        """One row of the table."""
        module, accuracy = self.base()
        seed_everything(1000 + self.seed, verbose=False)
        shapes = self.stem.with_suffix(".l1.pt")
        if arm == "scratch":
            if not shapes.exists():
                raise SystemExit("scratch takes the shapes of the arm l1: run that first.")
            total = self.args.base_epochs + self.args.epochs
            module = classifier(self.network, total * self.steps_per_epoch)
            resize_to(module, torch.load(shapes, weights_only=True))
            new_weights(module)
            return {"base_acc": accuracy} | fit(module, self.data, total)
        if arm == "unpruned":
            return {"base_acc": accuracy} | fit(module, self.data, self.args.epochs)
        arguments: dict[str, Any] = {"target": {"macs": 0.5}, "start_epoch": 0} | (ARMS[arm] or {})
        if "distilled" in arm:
            arguments |= {"distill": self.args.distill, "temperature": self.args.temperature}
        prune = FilterPruningCallback(steps=STEPS, module="network", **arguments)
        result = fit(module, self.data, self.args.epochs, prune)
        if arm == "l1":
            torch.save(module.state_dict(), shapes)
        return {"base_acc": accuracy} | result


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--base-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="of the arms, the steps of pruning among them")
    parser.add_argument("--distill", type=float, default=1.0, help="weight, in the arms with distillation")
    parser.add_argument("--temperature", type=float, default=1.0, help="likewise")
    parser.add_argument("--lr", type=float, default=0.05, help="of the arms, at their start")
    parser.add_argument("--out", type=Path, default=here / "accuracy.csv")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lightning_tips_pruning")
    parser.add_argument("--smoke", action="store_true", help="digits, two epochs")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    if args.smoke:
        args.base_epochs, args.epochs = 1, STEPS + 1
        data: Any = DigitsDataModule(batch_size=128)
    else:
        data = FashionMNISTDataModule(batch_size=128, train_size=args.images)
    data.prepare_data()
    data.setup("fit")
    args.images = len(data.train_dataloader().dataset)

    rows: list[dict[str, Any]] = []
    if args.out.exists():
        with args.out.open() as file:
            rows = list(csv.DictReader(file))
    done = {tuple(row[column] for column in COLUMNS[:5]) for row in rows}
    for seed in args.seeds:
        for network in args.networks:
            for arm in args.arms:
                how = (args.distill, args.temperature) if "distilled" in arm else ("", "")
                key = dict(zip(COLUMNS, (network, arm, seed, *how), strict=False))
                if tuple(map(str, key.values())) in done:
                    continue
                key |= {"images": args.images}
                study = Study(network, seed, data, args)
                row = key | {"base_epochs": args.base_epochs, "epochs": args.epochs} | study.run(arm)
                row["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
                rows.append(row)
                new = not args.out.exists()
                with args.out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print({k: row[k] for k in COLUMNS[:-1]}, flush=True)
    show(rows)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The tables of the card: mean and spread over seeds, against the base and the unpruned network of each seed."""
    for network in NETWORKS:
        of = {arm: {str(r["seed"]): r for r in rows if (r["network"], r["arm"]) == (network, arm)} for arm in ARMS}
        whole = of["unpruned"]
        if not any(of.values()):
            continue
        print(f"| {network} | seeds | MACs (M) | parameters (k) | test % | minus base | minus unpruned |")
        print("|---|---|---|---|---|---|---|")
        for arm, mine in of.items():
            if not mine:
                continue
            accuracy = {seed: float(r["test_acc"]) for seed, r in mine.items()}
            gains = [accuracy[seed] - float(r["base_acc"]) for seed, r in mine.items()]
            losses = [accuracy[s] - float(whole[s]["test_acc"]) for s in mine if s in whole and arm != "unpruned"]
            cells = [arm, str(len(mine))]
            cells += [f"{statistics.fmean(float(r['macs']) for r in mine.values()) / 1e6:.1f}"]
            cells += [f"{statistics.fmean(float(r['parameters']) for r in mine.values()) / 1e3:.0f}"]
            cells += [spread(list(accuracy.values()), ""), spread(gains), spread(losses)]
            print(f"| {' | '.join(cells)} |")


def spread(values: list[float], sign: str = "+") -> str:
    """Mean and standard deviation, or what there is of them."""
    if len(values) < 2:
        return f"{values[0]:{sign}.2f}" if values else ""
    return f"{statistics.fmean(values):{sign}.2f} (sd {statistics.stdev(values):.2f})"


if __name__ == "__main__":
    main()
