"""Members and their checkpoints, for tests of ensembles."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from harness import PlainData, PlainModule, build


class Wide(PlainModule):
    """Of another width, and its forward gives log-probabilities."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features[3] = nn.Conv2d(8, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).log_softmax(1)


def saved(folder: Path, *modules: LightningModule) -> list[Path]:
    paths = []
    for index, module in enumerate(modules):
        trainer, _ = build(folder=folder, module=module)
        trainer.strategy.connect(module)
        module.trainer = trainer
        paths.append(folder / f"member-{index}.ckpt")
        trainer.save_checkpoint(paths[-1])
    return paths


def digits() -> tuple[Tensor, Tensor]:
    data = PlainData()
    return data.images[:64], data.labels[:64]


def by_hand(members: list[LightningModule], images: Tensor) -> Tensor:
    outputs = [member.eval()(images) for member in members]
    return torch.stack(
        [o.exp() if isinstance(m, Wide) else o.softmax(1) for m, o in zip(members, outputs, strict=True)]
    )
