"""The probe for what goes wrong when augmentation is of the rare class only."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips import BatchAugmentationCallback, ImbalancedSamplerCallback
from lightning_tips.augmentation import Shortcut, minority_classes, shortcut_probe
from lightning_tips.core import replace_inputs

from harness import PlainModule, build, fit


class Spotted(LightningDataModule):
    """Noise with a faint spot in images of the rare class, too faint to learn from so few."""

    def __init__(self, form: str = "pair") -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.form = form
        self.sets = []
        for _ in range(2):
            images = torch.rand(320, 1, 8, 8, generator=random)
            labels = torch.tensor([0] * 288 + [1] * 32)
            images[288:, :, 2:4, 2:4] += 0.2
            self.sets.append(TensorDataset(images, labels))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[0], 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[1], 64)


def darker(image: Tensor) -> Tensor:
    return image * 0.3


RANGE = (0.0, 1.2)


def tip_for(only: Any, **more: Any) -> BatchAugmentationCallback:
    return BatchAugmentationCallback([darker], only_classes=only, value_range=RANGE, preview=False, **more)


@pytest.mark.parametrize("only", ["minority", None])
def test_literal_advice_is_caught_and_the_safe_way_is_not(only, tmp_path: Path) -> None:
    tip = tip_for(only)
    run = {"folder": tmp_path, "data": Spotted(), "module": PlainModule(scheduler=False), "max_epochs": 12}
    sampler = ImbalancedSamplerCallback(show=False)
    if only is None:
        fit(tip, sampler, **run)
        assert tip.shortcut is None
        images, targets = Spotted().sets[1].tensors
        found = shortcut_probe(run["module"].eval(), images, targets, [darker], [1], value_range=RANGE)
        assert found.total == 288
        assert not found.suspicious
        return
    with pytest.warns(UserWarning, match="learnt that what looks augmented"):
        fit(tip, sampler, **run)
    assert tip.shortcut.suspicious
    assert tip.shortcut.total == 288
    assert [event.what for event in tip.events] == ["function, classes 1 only", "shortcut suspected"]


@pytest.mark.parametrize("error", [IndexError, RuntimeError])
def test_a_forward_of_another_kind_does_not_end_the_run(error, tmp_path: Path) -> None:
    class Another(PlainModule):
        def forward(self, images: Tensor) -> Tensor:
            if not self.training:  # which it does not call in its own validation
                raise error("not with images alone")
            return super().forward(images)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with pytest.warns(UserWarning, match="cannot be probed.*: not with images alone"):
        trainer, _ = fit_with(tip_for([1]), tmp_path, Another())
    assert trainer.global_step == 20


def test_a_module_that_cannot_be_probed_is_trained_all_the_same(tmp_path: Path) -> None:
    class Around(PlainModule):
        """Its forward returns no logits."""

        def forward(self, images: Tensor) -> Any:
            return {"logits": super().forward(images)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])["logits"], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    tip = tip_for([1])
    with pytest.warns(UserWarning, match=r"cannot be probed.*does not return logits") as told:
        trainer, _ = fit_with(tip, tmp_path, Around())
    assert trainer.global_step == 20
    assert sum("cannot be probed" in str(one.message) for one in told) == 1
    assert tip.shortcut == Shortcut(0, 0, 0)


def fit_with(tip: BatchAugmentationCallback, folder: Path, module: PlainModule) -> Any:
    trainer, module = build(tip, folder=folder, module=module, max_epochs=2)
    trainer.fit(module, datamodule=Spotted())
    return trainer, module


def test_probe_knows_several_kinds_of_targets_and_outputs() -> None:
    """A network that calls everything dark the class 1."""
    images = torch.full((40, 1, 4, 4), 0.8)
    images[:10] = 0.1
    score = lambda x: (0.5 - x.mean((1, 2, 3))) * 10  # noqa: E731
    labels = torch.tensor([1] * 10 + [0] * 30)
    models = {
        "two logits": (lambda x: torch.stack([-score(x), score(x)], 1), labels),
        "one logit": (score, labels.float()),
        "one logit in a row": (lambda x: score(x)[:, None], labels[:, None]),
        "several labels": (lambda x: torch.stack([score(x) * 0 - 1, score(x)], 1), F.one_hot(labels, 2)),
    }
    for name, (model, targets) in models.items():
        found = shortcut_probe(model, images, targets, [darker], [1])
        assert (found.clean, found.augmented, found.total) == (0, 30, 30), name
    assert shortcut_probe(score, images[:10], labels[:10], [darker], [1]) == Shortcut(0, 0, 0)


def test_minority_and_suspicion() -> None:
    assert minority_classes([100, 10, 50, 8]) == [1, 3]
    assert Shortcut(2, 60, 100).suspicious
    assert not Shortcut(2, 6, 100).suspicious
    assert not Shortcut(0, 2, 8).suspicious  # too few to say
    assert not Shortcut(0, 0, 0).suspicious
    assert Shortcut(10, 30, 100).gap == pytest.approx(0.2)


def test_inputs_are_replaced_in_any_batch() -> None:
    Pair = namedtuple("Pair", ["x", "y"])
    assert replace_inputs((1, 2), 9) == (9, 2)
    assert replace_inputs([1, 2, 3], 9) == [9, 2, 3]
    assert replace_inputs(Pair(1, 2), 9) == Pair(9, 2)
    batch = {"label": 1, "image": 2}
    assert replace_inputs(batch, 9) == {"label": 1, "image": 9}
    assert batch["image"] == 2
    assert replace_inputs({"scan": 1}, 9, "scan") == {"scan": 9}
    with pytest.raises(KeyError, match="input_key"):
        replace_inputs({"scan": 1}, 9)
    nested = {"views": {"image": 1, "mask": 2}, "label": (3, Pair(4, 5))}
    assert replace_inputs(nested, 9, "views.image") == {"views": {"image": 9, "mask": 2}, "label": (3, Pair(4, 5))}
    assert replace_inputs(nested, 9, "label.1.1")["label"] == (3, Pair(4, 9))
    assert nested["views"]["image"] == 1
    assert nested["label"][1] == Pair(4, 5)
    assert replace_inputs({"a.b": 1}, 9, "a.b") == {"a.b": 9}  # a key with a dot of its own
    for way in ("views.scan", "views.image.x", "label.7", "nothing.1"):
        with pytest.raises(KeyError, match="leads nowhere"):
            replace_inputs(nested, 9, way)
