"""What helps rare classes? All of the tip's corrections on real data, over seeds, in two tables.

    python benchmarks/imbalance/accuracy.py

``long_tail.csv``: Fashion-MNIST with 3,000 to 30 images a class, exponentially. Which class is how rare is drawn anew
for each seed (column ``order``, from the most common to the rarest), and is the same for all arms of a seed. 500 steps
of 64 images for every arm, tested on all 10,000 images, of which each class has 1,000.

``weapon.csv``: a rare class among others that look like it, 50 shirts against 1,000 T-shirts, pullovers, dresses and
coats. 400 steps. ``balanced_acc``, ``recall``, ``auroc`` and ``tuned_acc``, the balanced accuracy at the threshold that
is best on validation data, are of 1,000 shirts and 4,000 others. The mean predicted probability of a shirt and its
calibration are of 200 and 4,000, which is the share of the training data; so is validation, with 50 and 1,000. Three
means: ``mean`` as predicted, ``shift`` with the prior corrected, ``fit`` with the correction's strength fitted on
validation; each over the true share is a ``ratio``.

``shortcut`` is the share of the others that are taken for rare ones when they are augmented as in training, minus that
when they are not. Where only the rare are augmented, it tells what the network has learned to look for. In the long
tail "rare" is the three rarest.

In 400 steps the network learns 1,050 images by heart, all but where all are augmented; ``shift`` then takes away what
is not there. Training cut short, in ``weapon_100_steps.csv``, shows weights before that (over-sampling, which draws
each rare image 20 times an epoch, has the rare ones by heart even so):

    python benchmarks/imbalance/accuracy.py --studies weapon --steps 100 --seeds 0 1 2

All arms have ResNet-8 of width 8, and Adam with 3e-3 falling as a cosine to 0. Each finished run is appended to its
file and skipped the next time, so the study can be interrupted. 40 minutes on one core. ``--smoke`` takes
scikit-learn's digits and a few steps, for a quick look.
"""

from __future__ import annotations

import argparse
import csv
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error
from torchvision.transforms import v2

from lightning_tips.imbalance import (
    ClassWeightCallback,
    ImbalancedSamplerCallback,
    best_threshold,
    correct_prior,
    fit_prior_correction,
    weighted_prior,
)
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier, ImageDataset

BATCH, CLASSES, RAREST, CALIBRATION_BINS = 64, 10, 3, 15
AUGMENT_ALL, AUGMENT_RARE = "all", "rare"

COMMON = ["arm", "seed", "balanced_acc", "recall", "ece", "nll", "shortcut"]
ENDING = ["steps", "cpu_seconds", "machine"]
COLUMNS = {
    "long_tail": [*COMMON, "order", *ENDING],
    "weapon": [
        *COMMON,
        *("auroc", "threshold", "tuned_acc", "true_share", "trained_share", "strength"),
        *("mean", "mean_shift", "mean_fit", "ratio", "ratio_shift", "ratio_fit", "ece_shift", "ece_fit"),
        *ENDING,
    ],
}


@dataclass
class Arm:
    """Arguments of the callbacks, and what is augmented.

    Attributes:
        weights: Of `ClassWeightCallback`; None: without it. ``start`` stands for deferred re-weighting, from the epoch
            at which about 0.7 of the steps are done.
        sampling: The strategy of `ImbalancedSamplerCallback`; None: without it.
        augment: ``"all"`` classes, the ``"rare"`` alone, or None.
    """

    weights: dict[str, Any] | None = None
    sampling: Any = None
    augment: str | None = None


LONG_TAIL = {
    "plain": Arm(),
    "weights_sqrt": Arm(weights={"scheme": "sqrt"}),
    "weights_inverse": Arm(weights={"scheme": "inverse"}),
    "weights_effective": Arm(weights={"scheme": "effective"}),
    "deferred_inverse": Arm(weights={"scheme": "inverse", "start": True}),
    "logit_adjustment_loss": Arm(weights={"logit_adjustment": 1.0}),
    "logit_adjustment_outputs": Arm(weights={"logit_adjustment": 1.0, "adjust": "outputs"}),
    "oversample": Arm(sampling="oversample"),
    "oversample_augment_all": Arm(sampling="oversample", augment=AUGMENT_ALL),
    "oversample_augment_rare": Arm(sampling="oversample", augment=AUGMENT_RARE),
    "undersample": Arm(sampling="undersample"),
    "sqrt_sampling": Arm(sampling="sqrt"),
}
WEAPON = {
    "plain": Arm(),
    "weights_inverse": Arm(weights={"scheme": "inverse"}),
    "oversample": Arm(sampling="oversample"),
    "oversample_weights_sqrt": Arm(sampling="oversample", weights={"scheme": "sqrt"}),
    "undersample": Arm(sampling="undersample"),
    "oversample_augment_all": Arm(sampling="oversample", augment=AUGMENT_ALL),
    "oversample_augment_rare": Arm(sampling="oversample", augment=AUGMENT_RARE),
}
ARMS = {"long_tail": LONG_TAIL, "weapon": WEAPON}


@dataclass
class Size:
    """Of a study: Fashion-MNIST's, or the small one of the digits."""

    data: Callable[..., Any]
    steps: dict[str, int]
    most: int  # images of the most common class in the long tail
    least: int
    rare_class: int
    other_classes: tuple[int, ...]
    rare: int  # images of the rare class in the weapon story
    others: int
    padding: int  # pixels that augmentation shifts by, at most


FASHION = Size(FashionMNISTDataModule, {"long_tail": 500, "weapon": 400}, 3000, 30, 6, (0, 2, 3, 4), 50, 1000, 2)
DIGITS = Size(DigitsDataModule, {"long_tail": 4, "weapon": 4}, 90, 5, 8, (1, 3, 5, 9), 5, 100, 1)


# ---- data


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples of a dataset, each transformed by itself.

    Args:
        data: The dataset.
        transform: From an image to an image.
        classes: Which classes are transformed; None: all.
    """

    def __init__(
        self, data: ImageDataset, transform: Callable[[Tensor], Tensor], classes: Sequence[int] | None
    ) -> None:
        self.data, self.transform, self.classes = data, transform, classes
        self.targets = data.targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        if self.classes is None or int(label) in self.classes:
            image = self.transform(image)
        return image, label


def augmentation(pixels: int, padding: int) -> Callable[[Tensor], Tensor]:
    bilinear = v2.InterpolationMode.BILINEAR
    operations = [v2.RandomHorizontalFlip(), v2.RandomCrop(pixels, padding), v2.RandomRotation(10, bilinear)]
    transform: Callable[[Tensor], Tensor] = v2.Compose(operations)
    return transform


def choose(data: ImageDataset, counts: dict[int, int], seed: int, binary: int | None = None) -> ImageDataset:
    """So many random images of each class; with ``binary`` that class is 1 and the others are 0."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in counts.items():
        members = torch.nonzero(data.targets == label).flatten()
        assert len(members) >= count, f"{len(members)} images of class {label}, {count} wanted"
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    subset = data.subset(torch.cat(chosen))
    if binary is None:
        return subset
    return ImageDataset(subset.images, (subset.labels == binary).long(), subset.indices, subset.scale)


def spread(total: int, classes: Sequence[int]) -> dict[int, int]:
    return {label: total // len(classes) for label in classes}


def predict(module: ImageClassifier, data: Dataset[Any]) -> Tensor:
    module.eval()
    with torch.no_grad():
        return torch.cat([module(images) for images, _ in DataLoader(data, batch_size=500)])


# ---- a run


def train(arm: Arm, classes: int, data: ImageDataset, rare: Sequence[int], size: Size, steps: int, seed: int) -> Any:
    """The Trainer, the trained module, the prior that it was taught, and CPU seconds."""
    pixels = data[0][0].shape[-1]
    train_set: Dataset[Any] = data
    if arm.augment is not None:
        chosen = None if arm.augment == AUGMENT_ALL else rare
        train_set = Augmented(data, augmentation(pixels, size.padding), chosen)
    callbacks: list[Callback] = []
    sampler = weights = None
    if arm.sampling is not None:
        sampler = ImbalancedSamplerCallback(arm.sampling, seed=seed, show=False)
        callbacks.append(sampler)
    if arm.weights is not None:
        arguments = dict(arm.weights)
        if arguments.pop("start", False):
            arguments["start_epoch"] = int(0.7 * steps * BATCH / len(data))
        weights = ClassWeightCallback(**arguments)
        callbacks.append(weights)

    seed_everything(seed, verbose=False)
    module = ImageClassifier(
        "resnet8",
        num_classes=classes,
        in_channels=1,
        network_args={"width": 8},
        optimizer=lambda params: Adam(params, lr=3e-3),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, steps),
        lr_scheduler_interval="step",
    ).to(memory_format=torch.channels_last)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    trainer.fit(module, DataLoader(train_set, BATCH, shuffle=True))
    spent = time.process_time() - started
    assert trainer.global_step == steps

    counts = torch.bincount(data.targets, minlength=classes).float()
    prior = counts / counts.sum()
    if sampler is not None and sampler.trained_prior is not None:
        prior = sampler.trained_prior
    if weights is not None and sampler is not None:
        # The callback of the weights does not know of the sampler: what it weights is what that one draws.
        assert weights.trained_prior is not None
        prior = weighted_prior(prior, weights.trained_prior / counts)
    elif weights is not None and weights.trained_prior is not None:
        prior = weights.trained_prior
    ending = {
        "steps": steps,
        "cpu_seconds": round(spent, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    return trainer, module, prior, ending


def run_long_tail(arm: Arm, seed: int, size: Size, steps: int) -> dict[str, Any]:
    source = size.data(seed=seed)
    source.setup()
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed)).tolist()
    fall = (size.least / size.most) ** (1 / (CLASSES - 1))
    data = choose(source.train_set, {label: round(size.most * fall**rank) for rank, label in enumerate(order)}, seed)
    rare = order[-RAREST:]
    trainer, module, _, ending = train(arm, CLASSES, data, rare, size, steps, seed)

    # Through the Trainer, so that outputs are those that the callbacks make of them.
    others = source.test_set.subset(torch.nonzero(~torch.isin(source.test_set.targets, torch.tensor(rare))).flatten())
    others = others.subset(torch.arange(0, len(others), 3))
    augmented = Augmented(others, augmentation(others[0][0].shape[-1], size.padding), None)
    test = partial(trainer.test, module, verbose=False)
    (scores,) = test(dataloaders=DataLoader(source.test_set, batch_size=500))
    taken = [_share_taken(module, arm, trainer, part, rare) for part in (others, augmented)]
    return {
        "balanced_acc": 100 * scores["test_balanced_acc"],
        "recall": 100 * statistics.mean(scores[f"test_recall/{label}"] for label in rare),
        "ece": 100 * scores["test_ece"],
        "nll": scores["test_loss"],
        "shortcut": 100 * (taken[1] - taken[0]),
        "order": "".join(map(str, order)),
    } | ending


def _share_taken(module: ImageClassifier, arm: Arm, trainer: Trainer, data: Dataset[Any], rare: Sequence[int]) -> float:
    """The share of the images that are predicted to be of a rare class."""
    found = trainer.predict(module, DataLoader(data, batch_size=500))
    assert found is not None
    return float(torch.isin(torch.cat(found).argmax(1), torch.tensor(rare)).float().mean())  # type: ignore[arg-type]


def run_weapon(arm: Arm, seed: int, size: Size, steps: int) -> dict[str, Any]:
    source = size.data(seed=seed, val_fraction=0.3)
    source.setup()
    counts = {size.rare_class: size.rare} | spread(size.others, size.other_classes)
    data = choose(source.train_set, counts, seed, size.rare_class)
    val = choose(source.val_set, counts, seed, size.rare_class)
    labels = source.test_set.targets
    wanted = {c: int((labels == c).sum()) for c in (size.rare_class, *size.other_classes)}
    test = choose(source.test_set, wanted, seed, size.rare_class)
    _, module, prior, ending = train(arm, 2, data, [1], size, steps, seed)

    logits, truth = predict(module, test), test.targets
    val_logits = predict(module, val)
    scores = logits.softmax(1)[:, 1]
    threshold = best_threshold(val_logits.softmax(1)[:, 1], val.targets).value

    def balanced(threshold: float) -> float:
        flagged = scores >= threshold
        return float((flagged[truth == 1].float().mean() + (~flagged[truth == 0]).float().mean()) / 2)

    negatives = test.subset(torch.nonzero(truth == 0).flatten())
    augmented = Augmented(negatives, augmentation(negatives[0][0].shape[-1], size.padding), None)
    flagged = [(predict(module, part).argmax(1) == 1).float().mean() for part in (negatives, augmented)]

    # The share of the training data: all the others, and as many of the rare (which `choose` put first) as fit.
    true = torch.tensor([size.others, size.rare]) / (size.others + size.rare)
    number = round(len(negatives) * size.rare / size.others)
    kept = torch.cat([torch.arange(number), torch.nonzero(truth == 0).flatten()])
    share = number / len(kept)
    fitted = fit_prior_correction(val_logits, val.targets, prior, true)
    as_trained = logits[kept]
    kinds = {"": as_trained, "_shift": correct_prior(as_trained, prior, true), "_fit": fitted(as_trained)}
    row: dict[str, Any] = {
        "balanced_acc": 100 * balanced(0.5),
        "recall": 100 * float((scores[truth == 1] >= 0.5).float().mean()),
        "nll": float(torch.nn.functional.cross_entropy(as_trained, truth[kept])),
        "shortcut": 100 * float(flagged[1] - flagged[0]),
        "auroc": 100 * float(binary_auroc(scores, truth)),
        "threshold": threshold,
        "tuned_acc": 100 * balanced(threshold),
        "true_share": share,
        "trained_share": float(prior[1]),
        "strength": fitted.strength,
    }
    for name, values in kinds.items():
        rare = values.softmax(1)[:, 1].contiguous()
        row["mean" + name] = float(rare.mean())
        row["ratio" + name] = float(rare.mean()) / share
        row["ece" + name] = 100 * float(binary_calibration_error(rare, truth[kept], n_bins=CALIBRATION_BINS))
    return row | ending


# ---- tables


def summary(study: str, rows: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds for each arm, and the paired difference to plain in balanced accuracy."""
    shown = [c for c in COLUMNS[study] if c not in ("arm", "seed", "order", "true_share", "steps", "machine")]
    lines = [f"{'arm':<26}{'seeds':>6}{'minus plain':>15}" + "".join(f"{column:>16}" for column in shown)]
    by_arm = {arm: {int(r["seed"]): r for r in rows if r["arm"] == arm} for arm in ARMS[study]}
    for arm, found in by_arm.items():
        if not found:
            continue
        plain = by_arm["plain"]
        pairs = [float(r["balanced_acc"]) - float(plain[s]["balanced_acc"]) for s, r in found.items() if s in plain]
        line = f"{arm:<26}{len(found):>6}{_spread(pairs, '+.1f') if pairs else '':>15}"
        for column in shown:
            percent = column in ("balanced_acc", "recall", "shortcut", "auroc", "tuned_acc", "cpu_seconds")
            form = ".1f" if percent or column.startswith("ece") else ".3f"
            line += f"{_spread([float(r[column]) for r in found.values()], form):>16}"
        lines.append(line)
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    spread = f" ({statistics.stdev(values):{form.lstrip('+')}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the two tables")
    parser.add_argument("--studies", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default: 0 1 2 3; with --smoke: 0")
    parser.add_argument("--steps", type=int, help="other than the study's own; has a table of its own")
    parser.add_argument("--smoke", action="store_true", help="scikit-learn's digits, few steps; needs another --out")
    chosen = parser.parse_args(arguments)
    if chosen.smoke and chosen.out.resolve() == Path(__file__).parent.resolve():
        parser.error("--smoke would add to the tables of the full study: give another folder with --out.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = DIGITS if chosen.smoke else FASHION
    torch.set_num_threads(1)

    for study in chosen.studies:
        other = f"_{chosen.steps}_steps" if chosen.steps else ""
        out = chosen.out / f"{study}{other}.csv"
        rows: list[dict[str, Any]] = list(csv.DictReader(out.read_text().splitlines())) if out.exists() else []
        done = {(row["arm"], int(row["seed"])) for row in rows}
        run = run_long_tail if study == "long_tail" else run_weapon
        for seed in chosen.seeds or ([0] if chosen.smoke else [0, 1, 2, 3]):
            for name, arm in ARMS[study].items():
                if (name, seed) in done or (chosen.arms and name not in chosen.arms):
                    continue
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|LeafSpec).*")
                    warnings.filterwarnings("ignore", ".*both balance the classes.*")  # one arm is about that
                    result = run(arm, seed, size, chosen.steps or size.steps[study])
                values = {"arm": name, "seed": seed} | result
                row = {c: round(v, 4) if isinstance(v := values[c], float) else v for c in COLUMNS[study]}
                fresh = not out.exists()
                with out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS[study])
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)
                rows.append(row)
                print(", ".join(f"{key} {value}" for key, value in row.items() if key != "machine"), flush=True)
        print(f"\n{study}\n{summary(study, rows)}\n")


if __name__ == "__main__":
    main()
