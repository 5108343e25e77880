"""What the tests drive tips with: a plain module that knows nothing of tips, data that can resume, a run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn

STEPS_A_EPOCH = 4
EPOCHS = 6


class PlainModule(LightningModule):
    """A small convolutional network with BatchNorm, Adam and a scheduler, as anybody would write it."""

    def __init__(self, scheduler: bool = True) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        if not self.scheduler:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)]


class ResidualBlock(nn.Module):
    """As anybody would write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResidualModule(PlainModule):
    """With residual blocks: a stem and four of them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), *(ResidualBlock(12) for _ in range(4))
        )


class UnevenModule(PlainModule):
    """Logs without ``sync_dist``, so each rank has a validation loss of its own: rank 0's stalls, rank 1's falls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\('val_loss', \.\.\., sync_dist=True\)`")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0 - 0.1 * self.global_rank * self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        self.seen.append(float(self.trainer.callback_metrics["val_loss"]))


class BranchingModule(PlainModule):
    """Uses its second head in every other batch only: without ``find_unused_parameters`` DDP refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.second_head = nn.Linear(12, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        head = self.second_head if batch_idx % 2 else self.head
        return F.cross_entropy(head(self.features(images).mean((2, 3))), labels)


class ByHandModule(PlainModule):
    """Steps two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, rest = [*self.features[0].parameters()], [*self.features[1:].parameters(), *self.head.parameters()]
        return torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.Adam(rest, lr=1e-3)


class CommunicatingModule(PlainModule):
    """Centers its features by what all ranks see, as codebooks and routed experts do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images).mean((2, 3))
        mean = features.detach().mean(0)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        return self.head(features - mean)


class ShardedModule(PlainModule):
    """Shards its parameters over the ranks (FSDP2), as Lightning's ModelParallelStrategy asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.features[1] = nn.GroupNorm(2, 8)  # a checkpoint holds one rank's running statistics only

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # Without a mesh it is a run under another strategy; and this is called again in each fit.
        if self.device_mesh is not None and not isinstance(self.head, FSDPModule):
            for part in (self.features, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class RanksDrift(Callback):
    """Adds noise of its own to each rank, in epoch 1."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                pl_module.head.bias += 1e-6 * trainer.global_rank


class ResumableLoader:
    """Batches in an order that depends on (seed, epoch) alone, which goes on after a resume where it was."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, shuffle: bool) -> None:
        self.images, self.labels, self.batch_size, self.shuffle = images, labels, batch_size, shuffle
        self.dataset = torch.utils.data.TensorDataset(images, labels)
        self.epoch, self.position = 0, 0
        self.sampler, self.batch_sampler = self, None  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return len(self.images) // (self.batch_size * self._world()[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle:
            self.position = 0
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.epoch))
        world, rank = self._world()
        for batch in range(self.position, len(self)):
            chosen = order[rank::world][batch * self.batch_size : (batch + 1) * self.batch_size]
            self.position = batch + 1
            yield self.images[chosen], self.labels[chosen]

    @staticmethod
    def _world() -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class PlainData(LightningDataModule):
    """A few of scikit-learn's digits: real images, 8x8."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target)
        self.batch_size = batch_size

    def train_dataloader(self) -> ResumableLoader:
        size = STEPS_A_EPOCH * self.batch_size * ResumableLoader._world()[0]
        return ResumableLoader(self.images[:size], self.labels[:size], self.batch_size, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.images[-128:], self.labels[-128:], 64, shuffle=False)


class LoaderData(PlainData):
    """The same digits through a DataLoader of torch; of the classes 5 to 9 only a few. It cannot resume by itself."""

    def __init__(self, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__(batch_size)
        self.num_workers = num_workers
        keep = torch.cat([(self.labels[:1600] == c).nonzero()[:, 0][: 80 if c < 5 else 8 + c] for c in range(10)])
        self.train = torch.utils.data.TensorDataset(self.images[keep], self.labels[keep])

    def unlabelled_dataset(self) -> Any:
        """Some that are not trained on."""
        return torch.utils.data.TensorDataset(self.images[1500:1564], self.labels[1500:1564])

    def old_dataset(self) -> Any:
        """What an older model was trained on."""
        return torch.utils.data.TensorDataset(self.images[1400:1464], self.labels[1400:1464])

    def old_val_dataset(self) -> Any:
        """What it was validated on."""
        return torch.utils.data.TensorDataset(self.images[1464:1500], self.labels[1464:1500])

    def train_dataloader(self) -> Any:
        workers = {"num_workers": self.num_workers, "persistent_workers": False}
        return torch.utils.data.DataLoader(self.train, self.batch_size, shuffle=True, **workers)


def build(
    *parts: Any, folder: Path, max_epochs: int = EPOCHS, module: LightningModule | None = None, **trainer: Any
) -> tuple[Trainer, LightningModule]:
    """A trainer and a module, seeded, quiet, on CPU. Of ``parts``, callbacks go to the trainer; a module is it."""
    seed_everything(0, verbose=False)
    callbacks = [part for part in parts if isinstance(part, Callback)]
    module = module or next((part for part in parts if isinstance(part, LightningModule)), None) or PlainModule()
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
        "num_sanity_val_steps": 1,
    }
    return Trainer(callbacks=callbacks, max_epochs=max_epochs, **arguments | trainer), module


def data_in(*parts: Any) -> LightningDataModule:
    """The DataModule among ``parts``, or the plain one."""
    return next((part for part in parts if isinstance(part, LightningDataModule)), None) or PlainData()


def fit(*parts: Any, folder: Path, ckpt_path: Path | None = None, data: Any = None, **arguments: Any) -> Trainer:
    """Trains with ``parts``: callbacks, and where others than the plain ones are wanted a module and a DataModule.

    Returns:
        The trainer, whose ``lightning_module`` is the trained one.
    """
    trainer, module = build(*parts, folder=folder, **arguments)
    trainer.fit(module, datamodule=data or data_in(*parts), ckpt_path=ckpt_path)
    return trainer


def every_step(folder: Path, steps: int = 1) -> ModelCheckpoint:
    """Keeps a checkpoint of every training step, or of every so many."""
    return ModelCheckpoint(folder, filename="step-{step}", every_n_train_steps=steps, save_top_k=-1)


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Keeps a checkpoint of every epoch, written after its validation."""
    return ModelCheckpoint(folder, filename="epoch-{epoch}", save_top_k=-1)


def bits(trainer: Trainer) -> dict[str, Any]:
    """Everything that training produced: weights, buffers, optimizer and scheduler state, the tips' events."""
    from lightning_tips.core import find_tips

    return {
        "weights": {k: v.clone() for k, v in trainer.lightning_module.state_dict().items()},
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "kinds": [type(o).__name__ for o in trainer.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "events": [[str(e) for e in tip.events] for tip in find_tips(trainer)],
        "step": trainer.global_step,
    }


def momenta(trainer: Trainer) -> str:
    """A hash of the optimizers' state, gathered from all ranks where it is sharded."""
    digest = hashlib.blake2b(digest_size=16)
    for optimizer in trainer.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for key, value in sorted(optimizer.state[parameter].items() if parameter in optimizer.state else ()):
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                digest.update(key.encode() + (value.numpy().tobytes() if isinstance(value, Tensor) else b""))
    return digest.hexdigest()


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal to the bit, all the way down."""
    assert type(first) is type(second), where
    if isinstance(first, Tensor):
        assert torch.equal(first, second), f"{where}: max |d| = {(first - second).abs().max()}"
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif not callable(first):
        assert first == second, where
