"""What is found of planted near-duplicates and of planted label errors.

    python benchmarks/data/quality.py                  # some three minutes on one core; takes up where it stopped
    python benchmarks/data/quality.py --only duplicates

Duplicates: of N images M get a changed copy, and M others get none; all 2 M are looked for among the N by the defaults
of ``find_duplicates``. Recall is the share of copies whose original is found. What is found of the M others, which have
no copy that we planted, is the share of false alarms, as far as the data has no duplicates of its own. Precision is
given for data of which one image in a hundred has a copy.

Labels: Fashion-MNIST, some thousand images, of which a share of the labels is changed: to any other class, or to the
class that it is most like (each class to one other). A small convolutional network judges each third of the images
after training on the two others. Precision and recall of the list, and precision of its first hundred.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_tips.data import find_label_errors, stratified_folds
from lightning_tips.data.duplicates import match
from lightning_tips.data.fingerprints import take_fingerprints
from lightning_tips.vision import FashionMNISTDataModule

SEEDS = (0, 1, 2)
SHARE = 0.01
"""Of images with a copy, for the precision."""
LIKE = {0: 6, 1: 3, 2: 4, 3: 0, 4: 2, 5: 7, 6: 0, 7: 9, 8: 3, 9: 7}
"""The class that each class of Fashion-MNIST is most like."""

Bytes = NDArray[np.uint8]


def images_of(name: str, count: int, part: str = "train") -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) uint8 and (N,) labels."""
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8))[:, None]
        return images[:count], torch.from_numpy(digits.target)[:count]
    data = FashionMNISTDataModule(download=False)
    data.setup("fit" if part == "train" else "test")
    kept = data.train_set if part == "train" else data.test_set
    assert kept is not None
    assert isinstance(kept.images, Tensor)
    places = kept.indices[:count]
    return kept.images[places], kept.labels[places]


# ---- duplicates


def changed(images: Tensor, how: str, rng: np.random.Generator) -> Tensor:
    """Copies of (N, 1, H, W) uint8 images, changed."""
    array: NDArray[Any] = images.numpy()[:, 0].astype(np.float32)
    if how == "identical":
        return images.clone()
    if how == "brightness and contrast":
        array = array * rng.uniform(0.7, 1.0, (len(array), 1, 1)) + rng.uniform(0, 40, (len(array), 1, 1))
    elif how.startswith("noise"):
        array = array + rng.normal(0, float(how.split()[-1]), array.shape)
    elif how.startswith("JPEG"):
        array = np.stack([_jpeg(one.astype(np.uint8), int(how.split()[-1])) for one in array]).astype(np.float32)
    elif how == "moved by 1 pixel":
        moves = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])[rng.integers(0, 4, len(array))]
        padded = np.pad(array, ((0, 0), (1, 1), (1, 1)), "edge")
        height, width = array.shape[1:]
        cut = [p[1 + y : 1 + y + height, 1 + x : 1 + x + width] for p, (y, x) in zip(padded, moves, strict=True)]
        array = np.stack(cut)
    elif how == "double size":
        return F.interpolate(images.float(), scale_factor=2, mode="bicubic").clamp(0, 255).round().to(torch.uint8)
    elif how == "mirrored":
        return images.flip(-1)
    else:
        raise ValueError(how)
    return torch.from_numpy(np.clip(np.round(array), 0, 255).astype(np.uint8))[:, None]


def _jpeg(image: Bytes, quality: int) -> Bytes:
    kept = io.BytesIO()
    Image.fromarray(image).save(kept, "JPEG", quality=quality)
    return np.array(Image.open(kept))


CHANGES = (
    "identical",
    "brightness and contrast",
    "noise 10",
    "noise 20",
    "JPEG 75",
    "JPEG 40",
    "moved by 1 pixel",
    "double size",
    "mirrored",
)


def duplicates(name: str, count: int, copies: int, seed: int) -> dict[str, Any]:
    """Recall of each change, and false alarms."""
    rng = np.random.default_rng([seed, 1])
    images, _ = images_of(name, 10**9)
    order = rng.permutation(len(images))
    base = images[np.sort(order[:count])]
    strangers = images[order[count : count + copies]]
    chosen = np.sort(rng.choice(len(base), copies, replace=False))
    base_prints, strange = take_fingerprints(base), take_fingerprints(strangers)
    began = time.process_time()
    found = match(base_prints, strange)
    seconds = time.process_time() - began
    false = len({pair.second for pair in found}) / len(strangers)
    threshold_only = match(base_prints, strange, ratio=0)
    row: dict[str, Any] = {
        "data": name,
        "seed": seed,
        "images": len(base),
        "looked_for": len(strangers),
        "found_without_a_copy": round(false, 5),
        "identical_without_a_copy": len({pair.second for pair in found if pair.exact}) / len(strangers),
        "found_without_a_copy_by_the_threshold": len({pair.second for pair in threshold_only}) / len(strangers),
        "cpu_seconds": round(seconds, 2),
        "recall": {},
        "recall_by_the_threshold": {},
    }
    for how in CHANGES:
        copy = take_fingerprints(changed(base[chosen], how, rng))
        for key, ratio in (("recall", None), ("recall_by_the_threshold", 0.0)):
            if key != "recall" and how in ("mirrored", "double size"):
                continue
            pairs = match(base_prints, copy, ratio=ratio, mirrored=how == "mirrored")
            hits = {pair.second for pair in pairs if pair.first == chosen[pair.second]}
            row[key][how] = round(len(hits) / copies, 4)
    recall = statistics.fmean(value for how, value in row["recall"].items() if how != "mirrored")
    row["precision_at_1_percent"] = round(SHARE * recall / (SHARE * recall + (1 - SHARE) * false), 4)
    return row


# ---- labels


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip


def out_of_sample(images: Tensor, labels: Tensor, folds: int, epochs: int, seed: int) -> Tensor:
    """(N, C) probabilities from networks that have not seen the sample."""
    dealt = torch.from_numpy(stratified_folds(labels, folds, seed))
    inputs = images.float() / 255 - 0.3
    result = torch.empty(len(labels), 10)
    for fold in range(folds):
        torch.manual_seed(1000 * seed + fold)
        network = small_network()
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        inside = torch.nonzero(dealt != fold).flatten()
        for _ in range(epochs):
            for batch in inside[torch.randperm(len(inside))].split(100):
                optimizer.zero_grad()
                F.cross_entropy(network(inputs[batch]), labels[batch]).backward()
                optimizer.step()
        network.eval()
        outside = torch.nonzero(dealt == fold).flatten()
        with torch.no_grad():
            result[outside] = network(inputs[outside]).softmax(1)
    return result


def planted(labels: Tensor, share: float, kind: str, rng: np.random.Generator) -> Tensor:
    """Labels of which a share is changed."""
    changed_labels = labels.clone()
    places = rng.choice(len(labels), round(share * len(labels)), replace=False)
    for place in places.tolist():
        old = int(labels[place])
        changed_labels[place] = LIKE[old] if kind == "by class" else (old + int(rng.integers(1, 10))) % 10
    return changed_labels


def label_errors(count: int, share: float, kind: str, seed: int, folds: int, epochs: int) -> dict[str, Any]:
    """Precision and recall of the list."""
    rng = np.random.default_rng([seed, 2])
    images, labels = images_of("fashion", 10**9)
    places = np.sort(rng.choice(len(images), count, replace=False))
    images, labels = images[places], labels[places]
    given = planted(labels, share, kind, rng)
    began = time.process_time()
    probabilities = out_of_sample(images, given, folds, epochs, seed)
    found = find_label_errors(probabilities, given)
    wrong = [bool(given[one.place] != labels[one.place]) for one in found]
    total = int((given != labels).sum())
    row: dict[str, Any] = {
        "kind": kind,
        "share": share,
        "seed": seed,
        "images": count,
        "folds": folds,
        "accuracy_out_of_sample": round(float((probabilities.argmax(1) == labels).float().mean()), 4),
        "planted": total,
        "listed": len(found),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    if total:
        right = sum(int(one.suggested == int(labels[one.place])) for one, bad in zip(found, wrong, strict=True) if bad)
        row["precision"] = round(sum(wrong) / max(len(found), 1), 4)
        row["recall"] = round(sum(wrong) / total, 4)
        row["precision_of_first_100"] = round(sum(wrong[:100]) / 100, 4)
        row["suggestion_is_the_true_class"] = round(right / max(sum(wrong), 1), 4)
    else:
        row["places"] = [int(places[one.place]) for one in found[:100]]
        row["first"] = [[int(places[one.place]), one.given, one.suggested, round(one.score, 4)] for one in found[:20]]
    return row


ARMS = [(0.0, "none"), (0.05, "symmetric"), (0.1, "symmetric"), (0.05, "by class"), (0.1, "by class")]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--only", choices=["duplicates", "labels"])
    parser.add_argument("--smoke", action="store_true", help="digits only, and few of them")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"duplicates": [], "labels": []}
    if chosen.out.exists():
        result = json.loads(chosen.out.read_text())

    def keep(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        result["machine"] = f"{platform.machine()}, one thread, torch {torch.__version__}"
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
        print(row, flush=True)

    if chosen.only != "labels":
        tasks = [("digits", 400, 100)] if chosen.smoke else [("digits", 1200, 500), ("fashion", 10000, 1000)]
        for name, count, copies in tasks:
            for seed in SEEDS[: 1 if chosen.smoke else None]:
                if not any((row["data"], row["seed"]) == (name, seed) for row in result["duplicates"]):
                    keep("duplicates", duplicates(name, count, copies, seed))
    if chosen.only != "duplicates" and not chosen.smoke:
        for seed in SEEDS:
            for share, kind in ARMS:
                if share == 0 and seed:
                    continue
                if not any((r["share"], r["kind"], r["seed"]) == (share, kind, seed) for r in result["labels"]):
                    keep("labels", label_errors(3000, share, kind, seed, 3, 10))
    return result


if __name__ == "__main__":
    main()
