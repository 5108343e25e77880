"""What the tests of the reference model and data share."""

from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_tips.vision import (
    ImageClassifier,
)


def make_trainer(**kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **kwargs})


def small_classifier(**kwargs: Any) -> ImageClassifier:
    seed_everything(3, verbose=False)
    return ImageClassifier(**{"in_channels": 1, "network_args": {"width": 4}, **kwargs})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def labels_of(loader: DataLoader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()
