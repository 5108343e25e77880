"""The base networks of the block studies: trained once, kept in a cache folder, the same for every study.

ResNet-20, the plain net of the same layers without skips, and VGG-11-BN of half the width, on Fashion-MNIST in memory:
SGD with Nesterov momentum and a one-cycle rate, horizontal flips, nothing else, in bfloat16 (float32 weights). Training
goes on where it was stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, build_network

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet20": ("resnet20", {}),
    "vgg11_bn": ("cifar_vgg11_bn", {"width": 32}),
    "plain20": ("cifar_plain20", {}),
}


class Part(NamedTuple):
    """Normalised images (N, 1, H, W) float32 in channels_last, and labels (N,)."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All of it, in order."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


class Data(NamedTuple):
    """The three parts; what is ranked is ranked on ``val``, what is reported is measured on ``test``."""

    train: Part
    val: Part
    test: Part


def load(smoke: bool = False, val_fraction: float = 1 / 12) -> Data:
    """Fashion-MNIST: 55,000, 5,000 and 10,000 images; for a smoke run scikit-learn's digits."""
    module: Any = DigitsDataModule(seed=0) if smoke else FashionMNISTDataModule(val_fraction=val_fraction, seed=0)
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    loaders = (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())
    return Data(*(_part(loader.dataset) for loader in loaders))


def _part(dataset: Any) -> Part:
    samples = dataset.__getitems__(list(range(len(dataset))))
    images = (samples.images - 0.5) / 0.5
    return Part(images.contiguous(memory_format=torch.channels_last), samples.labels)


def accuracy(model: nn.Module, part: Part, batch_size: int = 500) -> float:
    """In per cent."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in part.batches(batch_size))
    model.train(training)
    return 100 * right / len(part.labels)


def train(
    model: nn.Module,
    part: Part,
    epochs: int,
    seed: int,
    lr: float = 0.1,
    batch_size: int = 128,
    progress: Path | None = None,
) -> None:
    """Trains in place; with a file ``progress`` a stopped training goes on at its last epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(part.labels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps, pct_start=0.2)
    start = 0
    if progress is not None and progress.exists():
        state = torch.load(progress, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["epoch"]
    model.train()
    for epoch in range(start, epochs):
        draw = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(part.labels), generator=draw)
        for i in range(steps):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            images = part.images[chosen]
            flipped = torch.rand(len(images), generator=draw) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = F.cross_entropy(model(images), part.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state | {"schedule": schedule.state_dict()}, progress)
            print(f"{progress.stem}: epoch {epoch + 1} of {epochs}, loss {loss:.3f}", flush=True)


def build(name: str) -> nn.Module:
    """A network of :data:`NETWORKS`, untrained."""
    network, arguments = NETWORKS[name]
    return build_network(network, 10, in_channels=1, **arguments)[0].to(memory_format=torch.channels_last)


def base(name: str, seed: int, data: Data, epochs: int, cache: Path) -> nn.Module:
    """A trained network of :data:`NETWORKS`, from the cache if it is there."""
    seed_everything(seed, verbose=False)
    model = build(name)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name}-seed{seed}-{epochs}epochs-{len(data.train.labels)}.pt"
    if not path.exists():
        progress = path.with_suffix(".progress")
        train(model, data.train, epochs, seed, progress=progress)
        torch.save(model.state_dict(), path)
        progress.unlink()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
