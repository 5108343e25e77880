"""`ClassWeightCallback`: what it refuses or warns of, and where it does nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_tips.imbalance import ClassWeightCallback

from harness import PlainModule, ResumableLoader, assert_same, bits, build, fit
from weighted import LabelledLoader, RareData, WithCriterion, nll, seeded


def refuses(message: str, folder: Path, *tips: Callback, module: Any = None, data: Any = None) -> None:
    trainer, module = build(*tips, folder=folder, module=module or WithCriterion(), max_epochs=1)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer.fit(module, datamodule=data or RareData())
    assert trainer.global_step == 0
    assert "training_step" not in vars(trainer.strategy)


def test_refusals_before_the_first_step(tmp_path) -> None:
    tip = ClassWeightCallback
    refuses("finds no loss in PlainModule.*functional=True", tmp_path, tip(), module=seeded(PlainModule))
    refuses("There are 3 weights, but .* 10 classes", tmp_path, tip([1.0, 2.0, 3.0]))
    for start in (0, 5):
        refuses("A loss sees 10 classes .*for 13", tmp_path, tip({12: 2.0}, start_epoch=start))
    refuses("None of the classes", tmp_path, tip([0.0] * 10 + [1.0]))
    refuses("no names of classes", tmp_path, tip({"weapon": 2.0}))
    refuses("both would weight the same loss", tmp_path, tip(), tip(scheme="sqrt"))
    refuses("weight of its own", tmp_path, tip(), module=WithCriterion(nn.CrossEntropyLoss(weight=torch.ones(10))))
    refuses("no loss 'criterio'.*Did you mean 'criterion'", tmp_path, tip(losses=["criterio"]))

    class Unused(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    for start in (0, 5):
        refuses("did not call CrossEntropyLoss.*functional=True", tmp_path, tip(start_epoch=start), module=Unused())
    own = PlainModule()
    own.training_step = lambda batch, batch_idx: nll(own(batch[0]), batch[1])  # type: ignore[method-assign]
    refuses("did not call torch's loss functions", tmp_path, tip(functional=True), module=own)

    class Mixed(WithCriterion):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self(batch[0]), F.one_hot(batch[1], 10).float())

    for start in (0, 5):
        refuses("mixed or soft", tmp_path, tip(start_epoch=start), module=Mixed())

    class Gap(RareData):
        def __init__(self) -> None:
            super().__init__()
            self.labels[self.labels == 4] = 5

    refuses("No samples of class 4", tmp_path, tip(), data=Gap())

    class OneClass(RareData):
        def __init__(self) -> None:
            super().__init__()
            self.labels[:] = 0

    refuses("nothing to balance with 1 class", tmp_path, tip(), data=OneClass())

    class Negative(RareData):
        def train_dataloader(self) -> ResumableLoader:
            return LabelledLoader(self.images[:128], self.labels[:128] - 1, 32, True)

    refuses("negative class ids", tmp_path, tip(), data=Negative())


def test_data_without_labels_is_refused(tmp_path) -> None:
    class WithLoss(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    trainer, module = build(ClassWeightCallback(), folder=tmp_path, module=WithLoss(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="No labels can be found in RandomDataset"):
        trainer.fit(module, DataLoader(RandomDataset(32, 64), batch_size=8))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "balanced"}, "must be 'auto'"),
        ({"weights": [1.0, -1.0]}, "not negative"),
        ({"weights": {0: -1.0}}, "not negative"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": [1.0]}, "two or more"),
        ({"scheme": "squrt"}, "Did you mean 'sqrt'"),
        ({"beta": 2.0}, "beta"),
        ({"start_epoch": -1}, "counts from 0"),
        ({"weights": [1.0, 2.0], "logit_adjustment": 1.0}, "twice is too much"),
        ({"weights": None, "logit_adjustment": -1.0}, "tau must be positive"),
        ({"adjust": "outputs"}, "pass logit_adjustment"),
        ({"weights": None, "logit_adjustment": 1.0, "adjust": "output"}, "Did you mean 'outputs'"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ClassWeightCallback(**arguments)


def test_sampler_beside_the_weights_warns(tmp_path) -> None:
    data = RareData()
    dataset = TensorDataset(data.images[:64], data.labels[:64])
    loader = DataLoader(dataset, 32, sampler=WeightedRandomSampler([1.0] * 64, 64))
    trainer, module = build(ClassWeightCallback({0: 3.0}), folder=tmp_path, module=seeded(WithCriterion), max_epochs=1)
    module.training_step = lambda batch, batch_idx: module.criterion(module(batch[0]), batch[1])
    with pytest.warns(UserWarning, match="ClassWeightCallback and WeightedRandomSampler both balance the classes"):
        trainer.fit(module, loader, RareData().val_dataloader())

    class ImbalancedSamplerCallback(Callback):
        pass

    trainer, module = build(
        ClassWeightCallback(), ImbalancedSamplerCallback(), folder=tmp_path, module=seeded(WithCriterion), max_epochs=1
    )
    with pytest.warns(UserWarning, match="and ImbalancedSamplerCallback both"):
        trainer.fit(module, datamodule=RareData())


def test_no_weights_do_nothing_and_say_so(tmp_path, capsys) -> None:
    ours = fit(ClassWeightCallback(None), folder=tmp_path, data=RareData(), max_epochs=1)
    assert "weights=None" in capsys.readouterr().out
    assert_same(bits(ours)["weights"], bits(fit(folder=tmp_path, data=RareData(), max_epochs=1))["weights"])
