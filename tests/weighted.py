"""What tests of class weights train: rare classes among digits, and a module with its loss as an attribute."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_tips.imbalance import class_weights

from harness import PlainData, PlainModule, ResumableLoader

COUNTS = torch.tensor([60, 30, 10])


class LabelledLoader(ResumableLoader):
    """With a dataset, as a DataLoader has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dataset = TensorDataset(self.images, self.labels)


class RareData(PlainData):
    """Zeros are rare among the digits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        keep = (self.labels != 0) | (torch.rand(len(self.labels), generator=generator) < 0.4)
        self.images, self.labels = self.images[keep], self.labels[keep]

    def train_dataloader(self) -> ResumableLoader:
        return LabelledLoader(*(t[: 128 * ResumableLoader._world()[0]] for t in (self.images, self.labels)), 32, True)


class WithCriterion(PlainModule):
    """The loss as an attribute, for training and validation alike."""

    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.plain: list[tuple[float, float]] = []
        self.validated: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = self.criterion(logits, batch[1])
        with torch.no_grad():
            counts = torch.bincount(getattr(self.trainer.train_dataloader, "labels", batch[1]), minlength=10)
            weights = class_weights(counts.clamp(1))
            expected = -(logits.log_softmax(1)[torch.arange(len(logits)), batch[1]] * weights[batch[1]]).mean()
        self.plain.append((float(loss.detach()), float(expected)))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.validated.append((float(self.criterion(logits, batch[1])), float(nll(logits, batch[1]))))
        self.log("val_loss", self.criterion(logits, batch[1]), sync_dist=True)


def seeded(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy that no tip can know of."""
    return -logits.log_softmax(1)[torch.arange(len(targets)), targets].mean()


def is_weighted(module: WithCriterion) -> list[bool]:
    return [loss == pytest.approx(expected, rel=1e-5) for loss, expected in module.plain]
