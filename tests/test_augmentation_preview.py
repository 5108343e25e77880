"""The contact sheet, and `lightning-tips preview`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_tips.augmentation.surroundings import label_names


def test_rows_of_the_sheet_are_named() -> None:
    names = TensorDataset(torch.zeros(1))
    names.classes = ["cat", "dog", "cow"]  # type: ignore[attr-defined]
    images = torch.zeros(2, 1, 4, 4)
    cases = [
        (torch.tensor([2, 0]), ["cow", "cat"]),
        (torch.tensor([[1], [5]]), ["dog", "5"]),
        (torch.tensor([1.0, 0.0]), ["dog", "cat"]),
        (torch.tensor([[1, 0, 1], [0, 0, 0]]), ["cat, cow", ""]),
        (torch.tensor([0.25, 3.14159]), ["0.25", "3.14"]),
        (torch.zeros(2, 4, 4), ["", ""]),
        ("ab", ["", ""]),
    ]
    for targets, expected in cases:
        assert label_names(Subset(names, [0]), (images, targets), 2) == expected
    assert label_names(names, images, 2) == ["", ""]


def test_preview_from_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    import yaml

    from lightning_tips.cli import main
    from lightning_tips.vision import DigitsDataModule

    config = {
        "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "BatchAugmentationCallback"}]},
        "model": {"class_path": "ImageClassifier", "init_args": {"in_channels": 1}},
        "data": {"class_path": "DigitsDataModule"},
    }
    config["trainer"]["callbacks"][0]["init_args"] = {  # type: ignore[index]
        "policy": [
            "HorizontalFlip",
            {"Rotate": {"degrees": 15}},
            {"class_path": "torchvision.transforms.v2.RandomErasing"},
        ],
        "mixup": 0.2,
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("sys.argv", ["lightning-tips"])
    assert main(["preview", "--config", "run.yaml", "--out", "sheet.png"]) == 0
    assert Path("sheet.png").stat().st_size > 5000
    assert "HorizontalFlip, Rotate, RandomErasing, mixup 0.2" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "sheet.png"}  # nothing was trained

    class Late(DigitsDataModule):
        """Makes floats of its images on the device."""

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] / 16, batch[1]

        def train_dataloader(self) -> DataLoader:
            return DataLoader([(16 * image, label) for image, label in super().train_dataloader().dataset], 32)

    monkeypatch.setattr("lightning_tips.vision.DigitsDataModule", Late)
    config["data"]["class_path"] = "lightning_tips.vision.DigitsDataModule"
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["preview", "--config", "run.yaml", "--out", "new/folder/late.png"]) == 0
    assert Path("new/folder/late.png").exists()
    config["trainer"]["callbacks"] = []
    Path("run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="no BatchAugmentationCallback"):
        main(["preview", "--config", "run.yaml"])
