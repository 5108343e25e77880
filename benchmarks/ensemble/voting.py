"""What a vote is worth: single networks, hard and soft votes, and weights; and what a soup is, on Fashion-MNIST.

    python benchmarks/ensemble/voting.py --cache FOLDER

A draw is 12,000 training images, 5,000 others on which weights and the temperature are fitted, and initialisations.
``voting.csv`` has the test results on all 10,000 test images of these ensembles of five:

* ``five_equal``: ResNet-8 of width 8, 5 epochs, different initialisation and order;
* ``two_weak``: three of those, and two that saw 1,000 of the images;
* ``strong_and_equal``: a stronger network (width 16, 8 epochs) and four of the equal ones;
* ``strong_and_weak``: it and four of the weak ones.

Arms: ``mean_single``, the mean of the members' own results; ``best_single``, the member with the best accuracy on
held-out images, and ``best_single_on_test``, the best in hindsight; ``hard``; the weighted votes ``uniform``,
``greedy``, ``greedy_bags`` (20 bags), ``fit`` and ``best``. Columns with ``_t`` are after one temperature.
``auroc_entropy`` and ``auroc_disagreement`` tell how well these detect the vote's errors. Percent, but for NLL.

``soup.json``: what lies between two networks of different initialisation, and between two forks of one network
(2 epochs from its weights, other orders); the greedy soup of four forks, and their vote. BatchNorm's statistics are
estimated again on training images.

Members are kept in the folder ``--cache``, so an interrupted study goes on with the next one; a draw whose rows are in
the tables is not repeated. 5 minutes a draw on one core. ``--smoke`` takes scikit-learn's digits and a few steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from lightning_tips.ensemble import (
    apply_temperature,
    calibration_error,
    ensemble_weights,
    fit_temperature,
    greedy_soup,
    vote,
    weight_barrier,
)
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataset

BATCH = 64


@dataclass(frozen=True)
class Kind:
    """How a member is trained.

    Attributes:
        number: Members of this kind.
        width: Of ResNet-8.
        epochs: Over its images.
        images: The first so many of the draw's training images; None: all of them.
        rate: Learning rate of Adam, falling as a cosine to 0.
        start: The member whose weights it begins with; None: its own initialisation.
    """

    number: int
    width: int = 8
    epochs: int = 5
    images: int | None = None
    rate: float = 3e-3
    start: str | None = None


KINDS = {
    "equal": Kind(5),
    "weak": Kind(4, epochs=8, images=1_000),
    "strong": Kind(1, width=16, epochs=8),
    "fork": Kind(4, epochs=2, rate=1e-3, start="equal0"),
}
TRAIN_IMAGES, HELD_OUT_SHARE = 12_000, 1 / 12
CASES = {
    "five_equal": [f"equal{i}" for i in range(5)],
    "two_weak": ["equal0", "equal1", "equal2", "weak0", "weak1"],
    "strong_and_equal": ["strong0", *(f"equal{i}" for i in range(4))],
    "strong_and_weak": ["strong0", *(f"weak{i}" for i in range(4))],
}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "greedy": {"method": "greedy"},
    "greedy_bags": {"method": "greedy", "bags": 20},
    "fit": {"method": "fit"},
    "best": {"method": "best"},
}
ARMS = ("mean_single", "best_single", "best_single_on_test", "hard", *METHODS)
NUMBERS = ["acc", "nll", "ece", "temperature", "nll_t", "ece_t", "auroc_entropy", "auroc_disagreement"]
COLUMNS = ["case", "arm", "draw", "held_out", *NUMBERS, "weights", "machine"]


def small(kind: Kind) -> Kind:
    """The same for the digits, in a second."""
    return replace(kind, width=8, epochs=min(kind.epochs, 2), images=None if kind.images is None else 100)


def build(kind: Kind) -> ImageClassifier:
    return ImageClassifier("resnet8", in_channels=1, network_args={"width": kind.width})


def predict(module: ImageClassifier, data: ImageDataset) -> Tensor:
    """Probabilities (N, C) in float32."""
    module.eval()
    with torch.no_grad():
        return torch.cat([module(images).softmax(1) for images, _ in DataLoader(data, 500)])


def train(kind: Kind, data: Any, seed: int, start: dict[str, Tensor] | None) -> dict[str, Any]:
    """A member: its weights, its probabilities on held-out and test images, steps and CPU seconds."""
    images = data.train_set
    if kind.images is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(data.seed))
        images = images.subset(order[: kind.images].sort().values)
    steps = kind.epochs * -(-len(images) // BATCH)
    seed_everything(seed, verbose=False)
    module = build(kind)
    if start is not None:
        module.load_state_dict(start)
    module.optimizer = lambda parameters: Adam(parameters, lr=kind.rate)
    module.lr_scheduler = lambda optimizer: CosineAnnealingLR(optimizer, steps)
    module.lr_scheduler_interval = "step"
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=kind.epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    trainer.fit(module.to(memory_format=torch.channels_last), DataLoader(images, BATCH, shuffle=True))
    spent = time.process_time() - started
    return {
        "held_out": predict(module, data.val_set),
        "test": predict(module, data.test_set),
        "state": {name: value.contiguous() for name, value in module.state_dict().items()},
        "steps": trainer.global_step,
        "cpu_seconds": spent,
    }


def members(draw: int, data: Any, kinds: dict[str, Kind], cache: Path) -> dict[str, dict[str, Any]]:
    """All members of a draw, those in the cache read from there, the others trained and put there."""
    found: dict[str, dict[str, Any]] = {}
    for number, (name, kind) in enumerate(kinds.items()):
        for index in range(kind.number):
            path = cache / f"draw{draw}" / f"{name}{index}.pt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                start = found[kind.start]["state"] if kind.start else None
                member = train(kind, data, seed=1000 * draw + 100 * number + index, start=start)
                part = path.with_suffix(".part")
                torch.save(member, part)
                part.replace(path)  # whole or not at all
            found[f"{name}{index}"] = torch.load(path, weights_only=True)
            accuracy = (found[f"{name}{index}"]["test"].argmax(1) == data.test_set.targets).float().mean()
            print(f"draw {draw} {name}{index}: {100 * accuracy:.2f} %", flush=True)
    return found


# ---- votes


def scores(held_out: Tensor, held_out_labels: Tensor, test: Tensor, labels: Tensor) -> dict[str, float]:
    """Of probabilities (N, C) on test images, before and after the temperature that those on held-out ones need."""
    temperature = fit_temperature(held_out, held_out_labels)
    tempered = apply_temperature(test, temperature)
    return {
        "acc": 100 * float((test.argmax(1) == labels).float().mean()),
        "nll": nll(test, labels),
        "ece": 100 * calibration_error(test, labels),
        "temperature": temperature,
        "nll_t": nll(tempered, labels),
        "ece_t": 100 * calibration_error(tempered, labels),
    }


def nll(probabilities: Tensor, labels: Tensor) -> float:
    lowest = torch.finfo(torch.float32).tiny
    return float(-probabilities.gather(1, labels[:, None]).clamp_min(lowest).log().mean())


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return float((probabilities.argmax(1) == labels).float().mean())


def compare(held_out: Tensor, held_out_labels: Tensor, test: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """All arms of an ensemble, from the members' probabilities (M, N, C)."""
    single = [scores(h, held_out_labels, t, labels) for h, t in zip(held_out, test, strict=True)]
    chosen = max(range(len(single)), key=lambda i: accuracy(held_out[i], held_out_labels))
    arms: dict[str, dict[str, Any]] = {
        "mean_single": {key: statistics.mean(one[key] for one in single) for key in single[0]},
        "best_single": single[chosen],
        "best_single_on_test": max(single, key=lambda one: one["acc"]),
        "hard": {"acc": 100 * float((vote(test, voting="hard").prediction == labels).float().mean())},
    }
    for name, arguments in METHODS.items():
        weights = ensemble_weights(held_out, held_out_labels, **arguments)
        together = vote(test, weights)
        wrong = (together.prediction != labels).long()
        arms[name] = scores(vote(held_out, weights).probabilities, held_out_labels, together.probabilities, labels)
        arms[name]["weights"] = " ".join(f"{weight:.3f}" for weight in weights.tolist())
        arms[name]["auroc_entropy"] = 100 * float(binary_auroc(together.entropy, wrong))
        arms[name]["auroc_disagreement"] = 100 * float(binary_auroc(together.disagreement, wrong))
    return arms


def rows_of(draw: int, data: Any, found: dict[str, dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    labels, test_labels = data.val_set.targets, data.test_set.targets
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    for case, names in CASES.items():
        held_out = torch.stack([found[name]["held_out"] for name in names])
        test = torch.stack([found[name]["test"] for name in names])
        for size in sizes:
            part = order[:size]
            for arm, values in compare(held_out[:, part], labels[part], test, test_labels).items():
                ends = {"case": case, "arm": arm, "draw": draw, "held_out": len(part), "machine": machine}
                row = {column: (ends | values).get(column, "") for column in COLUMNS}
                rows.append({c: round(v, 4) if isinstance(v, float) else v for c, v in row.items()})
    return rows


# ---- soups


def soups(data: Any, found: dict[str, dict[str, Any]], width: int) -> dict[str, Any]:
    """What lies between members, and the greedy soup of the forks; accuracies in percent."""
    network = build(replace(KINDS["equal"], width=width))
    labels, test_labels = data.val_set.targets, data.test_set.targets
    few = data.train_set.subset(torch.arange(0, len(data.train_set), 6))

    def score(state: dict[str, Tensor], part: ImageDataset, again: bool = True) -> float:
        network.load_state_dict(state)
        if again:
            update_bn(DataLoader(few, 500), network)
        return 100 * accuracy(predict(network, part), part.targets)

    states = {name: member["state"] for name, member in found.items()}
    forks = [name for name in states if name.startswith("fork")]
    between = {}
    for pair in (("equal0", "equal1"), (forks[0], forks[1])):
        first, second = (states[name] for name in pair)
        barrier = weight_barrier(first, second, partial(score, part=data.val_set))
        stale = weight_barrier(first, second, partial(score, part=data.val_set, again=False))
        between[" and ".join(pair)] = {
            "cosine": barrier.cosine,
            "ends": barrier.ends,
            "halfway": barrier.halfway,
            "halfway_without_new_statistics": stale.halfway,
        }
    soup, chosen = greedy_soup([states[name] for name in forks], partial(score, part=data.val_set))
    try:
        greedy_soup([states[f"equal{i}"] for i in range(5)], partial(score, part=data.val_set))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    best = max(forks, key=lambda name: accuracy(found[name]["held_out"], labels))
    together = vote(torch.stack([found[name]["test"] for name in forks]))
    result = {
        "between": between,
        "test": {
            "origin": 100 * accuracy(found["equal0"]["test"], test_labels),
            "mean_fork": statistics.mean(100 * accuracy(found[name]["test"], test_labels) for name in forks),
            "best_fork": 100 * accuracy(found[best]["test"], test_labels),
            "soup": score(soup, data.test_set),
            "vote_of_forks": 100 * accuracy(together.probabilities, test_labels),
        },
        "in_soup": len(chosen),
        "refusal_of_equal": refusal,
    }
    return json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 3))


# ---- tables


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over draws."""
    lines = []
    for case in CASES:
        for size in sorted({int(row["held_out"]) for row in rows}, reverse=True):
            lines.append(f"\n{case}, {size} held-out images")
            lines.append(f"{'arm':<22}{'minus mean single':>18}" + "".join(f"{column:>20}" for column in NUMBERS))
            here = [row for row in rows if row["case"] == case and int(row["held_out"]) == size]
            base = {row["draw"]: float(row["acc"]) for row in here if row["arm"] == "mean_single"}
            for arm in ARMS:
                found = [row for row in here if row["arm"] == arm]
                line = f"{arm:<22}{_spread([float(row['acc']) - base[row['draw']] for row in found], '+.2f'):>18}"
                for column in NUMBERS:
                    values = [float(row[column]) for row in found if row[column] != ""]
                    form = ".4f" if column.startswith("nll") else ".2f"
                    line += f"{_spread(values, form) if values else '':>20}"
                lines.append(line)
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    spread = f" ({statistics.stdev(values):{form.lstrip('+')}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the members, to go on with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the tables")
    parser.add_argument("--smoke", action="store_true", help="digits and tiny networks; needs another --out")
    options = parser.parse_args(arguments)
    if options.smoke and options.out.resolve() == Path(__file__).parent.resolve():
        parser.error("--smoke would add to the tables of the full study: give another folder with --out.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    kinds = {name: small(kind) for name, kind in KINDS.items()} if options.smoke else KINDS
    table, soup_file = options.out / "voting.csv", options.out / "soup.json"
    rows: list[dict[str, Any]] = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    soup: dict[str, Any] = json.loads(soup_file.read_text()) if soup_file.exists() else {}
    for draw in options.draws:
        if str(draw) in {str(row["draw"]) for row in rows} and str(draw) in soup:
            continue
        if options.smoke:
            data: Any = DigitsDataModule(val_fraction=0.2, seed=draw, train_size=320)
        else:
            data = FashionMNISTDataModule(val_fraction=HELD_OUT_SHARE, seed=draw, train_size=TRAIN_IMAGES)
        data.setup()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|LeafSpec).*")
            found = members(draw, data, kinds, options.cache)
        rows = [row for row in rows if str(row["draw"]) != str(draw)]
        rows += rows_of(draw, data, found, [100, 50] if options.smoke else [5000, 500])
        soup[str(draw)] = soups(data, found, kinds["equal"].width)
        soup_file.write_text(json.dumps(soup, indent=2) + "\n")
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(summary(rows))
    print(json.dumps(soup, indent=2))
    return rows


if __name__ == "__main__":
    main()
