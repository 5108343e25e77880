"""Trains the learning curves that `curve.py` extrapolates, and writes every score to `curve_scores.csv`.

    python benchmarks/data/curve_scores.py

A curve is a network (or another learner) on a task, at sizes from a few samples to at least ten times the largest that
`curve.py` fits on, with three seeds each: of the subset (`nested_subset`), the start and the order. All tasks are made
of Fashion-MNIST's real images: all ten classes, parts of them, pairs that look alike, coarser classes, and ten classes
with a tenth of the training labels wrong. Scores are of all test images of the task: accuracy and, where there are
probabilities, negative log likelihood (nats).

Networks see each size for at least 20 epochs and 400 steps of 128 images (of all, where there are fewer), with AdamW
and a rate that falls as a cosine to 0, so that none is cut short. Each finished fit is appended to the file and skipped
the next time.

Networks of several seeds are
trained side by side. Some 5 minutes of one core. ``--smoke`` takes scikit-learn's digits and a few steps.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tips.data import nested_subset
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule

FILE = Path(__file__).with_name("curve_scores.csv")
COLUMNS = ["task", "learner", "n", "seed", "accuracy", "nll", "cpu_seconds"]
SEEDS = (0, 1, 2)


class Task(NamedTuple):
    """Images (N, 1, H, W) in [0, 1] and labels (N,), of training and test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    # What becomes of Fashion-MNIST's labels; -1 leaves the image out.
    "clothes10": lambda y: y,
    "tops5": lambda y: _map(y, {0: 0, 2: 1, 3: 2, 4: 3, 6: 4}),
    "coarse4": lambda y: _map(y, {0: 0, 6: 0, 2: 1, 4: 1, 3: 2, 1: 2, 5: 3, 7: 3, 9: 3}),
    "shirt_or_tshirt": lambda y: _map(y, {0: 0, 6: 1}),
    "pullover_or_coat": lambda y: _map(y, {2: 0, 4: 1}),
    "shirt_or_other": lambda y: (y == 6).long(),
    "noisy10": lambda y: y,
}


def _map(labels: Tensor, table: dict[int, int]) -> Tensor:
    return torch.tensor([table.get(label, -1) for label in range(10)])[labels]


@cache
def task(name: str) -> Task:
    module = DigitsDataModule() if name == "digits" else FashionMNISTDataModule()
    (train, _), test = module.load_train(), module.load_test()
    relabel = TASKS.get(name, lambda y: y)

    def part(images: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        new = relabel(labels)
        return images[new >= 0].float() / scale, new[new >= 0]

    parts = [part(d.images[d.indices], d.targets, d.scale) for d in (train, test)]  # type: ignore[index]
    if name == "noisy10":
        generator = torch.Generator().manual_seed(0)
        labels = parts[0][1].clone()
        wrong = torch.rand(len(labels), generator=generator) < 0.1
        labels[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
        parts[0] = (parts[0][0], labels)
    return Task(parts[0], parts[1], int(parts[1][1].max()) + 1)


WIDTHS: dict[str, tuple[int, ...]] = {"logistic": (), "mlp": (128,), "mlp3": (256, 128)}
DROPOUT = {"mlp3": 0.2}
RATES = {"logistic": 5e-3, "mlp": 2e-3, "mlp3": 2e-3, "cnn": 3e-3}


class Layers(nn.Module):
    """Fully connected networks, one for each seed, side by side: (S, B, inputs) to (S, B, classes)."""

    def __init__(self, widths: tuple[int, ...], seeds: list[int], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for inputs, outputs in pairwise(widths):
            for size, to in (((inputs, outputs), self.weights), ((1, outputs), self.biases)):
                drawn = [torch.rand(size, generator=generator) for generator in generators]
                to.append(nn.Parameter((torch.stack(drawn) * 2 - 1) * inputs**-0.5))  # as in nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if number < last:
                x = F.dropout(x.relu(), self.dropout, self.training)
        return x


class Convolutions(nn.Module):
    """Two convolutions on halved images, for one seed; of the same form."""

    def __init__(self, side: int, classes: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.side = side
        self.layers = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(32 * (side // 8) ** 2, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(-1, 1, self.side, self.side))[None]


def train_networks(
    learner: str, data: Task, n: int, seeds: list[int], epochs: int, steps: int
) -> list[tuple[float, float]]:
    images, labels = data.train[0].flatten(1), data.train[1]
    chosen = torch.stack([torch.from_numpy(nested_subset(labels, n, seed)) for seed in seeds])  # (S, n)
    model: nn.Module
    if learner == "cnn":
        assert len(seeds) == 1
        model = Convolutions(data.train[0].shape[-1], data.classes, seeds[0])
    else:
        widths = (images.shape[1], *WIDTHS[learner], data.classes)
        model = Layers(widths, seeds, DROPOUT.get(learner, 0.0))
    batch = min(128, n)
    total = max(epochs * -(-n // batch), steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[learner], weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # of dropout
    order, at = chosen, n
    for _ in range(total):
        if at + batch > n:  # an epoch ends; its last batch, where it is not full, comes in another one
            order = torch.stack([c[torch.randperm(n, generator=g)] for c, g in zip(chosen, generators, strict=True)])
            at = 0
        part = order[:, at : at + batch]
        at += batch
        optimizer.zero_grad()
        logits = model(images[part])
        # The sum over seeds: each network has its own loss.
        (F.cross_entropy(logits.flatten(0, 1), labels[part].flatten()) * len(seeds)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        parts = data.test[0].flatten(1).split(1000)
        logits = torch.cat([model(part.expand(len(seeds), *part.shape)) for part in parts], 1)
    target = data.test[1]
    return [(float((one.argmax(1) == target).float().mean()), float(F.cross_entropy(one, target))) for one in logits]


_halved: dict[int, Tensor] = {}


def halved_test(data: Task) -> Tensor:
    if id(data) not in _halved:
        _halved[id(data)] = F.avg_pool2d(data.test[0], 2).flatten(1)
    return _halved[id(data)]


def train_other(learner: str, data: Task, n: int, seed: int) -> tuple[float, float | None]:
    """Learners that are trained to their end by construction. Those that vote or regress have no likelihood."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier

    chosen = torch.from_numpy(nested_subset(data.train[1], n, seed))
    train, test = F.avg_pool2d(data.train[0][chosen], 2).flatten(1), halved_test(data)
    if learner == "random_features":
        weights = torch.randn(train.shape[1], 500, generator=torch.Generator().manual_seed(seed))
        train, test = ((x @ weights / 10).relu() for x in (train, test))
    model = {
        "forest": lambda: ExtraTreesClassifier(40, random_state=seed, min_samples_leaf=2),
        "knn": lambda: KNeighborsClassifier(5, algorithm="brute"),
        "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        "random_features": lambda: RidgeClassifier(alpha=10.0),
    }[learner]()
    target = data.test[1]
    model.fit(train.numpy(), data.train[1][chosen].numpy())
    right = float((torch.from_numpy(model.predict(test.numpy())) == target).float().mean())
    if learner in ("knn", "random_features"):
        return right, None
    probability = torch.from_numpy(model.predict_proba(test.numpy())).clamp_min(1e-4)
    return right, float(F.nll_loss(probability.log(), target))


class Curve(NamedTuple):
    """Which sizes of a task a learner is trained on."""

    task: str
    learner: str
    sizes: tuple[int, ...]


SIZES = (60, 120, 250, 500, 1000, 2000, 4000, 10000)
CURVES = [
    Curve(name.split("/")[0], name.split("/")[1], SIZES)
    for name in (
        # Those for development.
        "clothes10/logistic",
        "clothes10/mlp",
        "pullover_or_coat/forest",
        "shirt_or_tshirt/mlp",
        # Those for the test.
        "tops5/lda",
        "coarse4/random_features",
        "shirt_or_other/logistic",
        "clothes10/random_features",
        "shirt_or_tshirt/knn",
        "tops5/logistic",
        "pullover_or_coat/mlp",
        "noisy10/lda",
        "clothes10/knn",
        "coarse4/forest",
        "noisy10/mlp",
        "tops5/mlp3",
        "shirt_or_other/forest",
        "shirt_or_tshirt/cnn",
    )
]


def append(path: Path, row: dict[str, str]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", help="names of curves, as task/learner")
    parser.add_argument("--epochs", type=int, default=20, help="at least")
    parser.add_argument("--steps", type=int, default=400, help="at least")
    parser.add_argument("--smoke", action="store_true")
    chosen = parser.parse_args(arguments)
    curves = [Curve("digits", "mlp", (20, 40, 80, 160, 320, 1280))] if chosen.smoke else CURVES
    if chosen.only:  # in that order
        curves = [curve for name in chosen.only for curve in curves if f"{curve.task}/{curve.learner}" == name]
    rows: list[dict[str, str]] = []
    if chosen.out.exists():
        with chosen.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["task"], row["learner"], row["n"], row["seed"]) for row in rows}
    for curve in curves:
        for n in curve.sizes:
            missing = [s for s in chosen.seeds if (curve.task, curve.learner, str(n), str(s)) not in done]
            together = curve.learner in WIDTHS
            for seeds in [missing] if together and missing else [[seed] for seed in missing]:
                data = task(curve.task)
                began = time.process_time()
                scores: Sequence[tuple[float, float | None]]
                if curve.learner not in (*WIDTHS, "cnn"):
                    scores = [train_other(curve.learner, data, n, seeds[0])]
                else:
                    scores = train_networks(curve.learner, data, n, seeds, chosen.epochs, chosen.steps)
                spent = (time.process_time() - began) / len(seeds)
                for seed, (accuracy, nll) in zip(seeds, scores, strict=True):
                    values = [
                        curve.task,
                        curve.learner,
                        n,
                        seed,
                        f"{accuracy:.5f}",
                        "" if nll is None else f"{nll:.5f}",
                    ]
                    values.append(f"{spent:.1f}")
                    rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
                    append(chosen.out, rows[-1])
                    print(",".join(map(str, values)), flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
