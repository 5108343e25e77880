"""What is wrong on one rank only: no rank is left waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from test_class_report import Clouds, Linear
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_tips import ClassReportCallback, ClassWeightCallback

from harness import fit
from processes import on_two_ranks


class Sharded(IterableDataset):
    """All that there is goes to rank 0."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Clouds().sets[1] if torch.distributed.get_rank() == 0 else ())


class SeenByOne(Clouds):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(Sharded(), batch_size=100)


class LabelledOnOne(Clouds):
    """Labels that are class ids on rank 0, and none on rank 1."""

    def train_dataloader(self) -> DataLoader:
        points, labels = Clouds().sets[0].tensors
        return DataLoader(TensorDataset(points, labels + 0.5 * torch.distributed.get_rank()), batch_size=40)


def refused(folder: Path) -> list[str]:
    found = []
    runs: list[tuple[Any, Any]] = [(ClassReportCallback(), SeenByOne()), (ClassWeightCallback(), LabelledOnOne())]
    for tip, data in runs:
        options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 1, "num_sanity_val_steps": 0}
        try:
            fit(tip, folder=folder, data=data, module=Linear(), **options)
        except Exception as error:  # whatever it is
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_all_ranks_raise_where_one_cannot_go_on(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, refused)
    assert [text.partition(":")[0] for text in first + second] == ["MisconfigurationException"] * 4
    assert "saw no logits in validation on rank 1" in second[0]
    assert "ClassWeightCallback: The labels are floats" in second[1]
    assert all("1 of 2 ranks cannot go on" in text for text in first)
