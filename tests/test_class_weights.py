"""`ClassWeightCallback` in runs: when it weights, resumed, compiled, and on two ranks."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy  # by another name than F's
from torch.utils.data import DataLoader, IterableDataset

from lightning_tips.core import parameter_hash
from lightning_tips.imbalance import ClassWeightCallback, class_weights, weighted_cross_entropy

from harness import PlainModule, ResumableLoader, assert_same, bits, build, every_epoch, every_step, fit
from processes import on_two_ranks
from weighted import RareData, WithCriterion, is_weighted, seeded

# ---- the callback


def test_training_loss_alone_is_weighted(tmp_path, capsys) -> None:
    module, tip = WithCriterion(), ClassWeightCallback()
    trainer = fit(tip, folder=tmp_path, module=module, data=RareData(), max_epochs=2)
    assert all(is_weighted(module))
    assert len(module.plain) == 8
    for loss, expected in module.validated:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert "forward" not in vars(module.criterion)
    assert "training_step" not in vars(trainer.strategy)
    assert "training_step" not in vars(module)
    assert [event.what for event in tip.events] == ["class weights begin"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "inverse class weights of" in printed
    pickle.dumps(tip)
    copy.deepcopy(module.criterion)


@pytest.mark.parametrize("name", ["F", "imported"])
def test_functional_loss_where_it_is_told(name, tmp_path) -> None:
    class Imported(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1])

    weights = class_weights(torch.bincount(RareData().train_dataloader().labels))

    class ByHand(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return weighted_cross_entropy(self(batch[0]), batch[1], weights)

    run = {"folder": tmp_path, "data": RareData(), "max_epochs": 2}
    module = seeded(Imported if name == "imported" else PlainModule)
    ours = fit(ClassWeightCallback(functional=True), module=module, **run)
    expected = fit(module=seeded(ByHand), **run)
    plain = fit(module=seeded(PlainModule), **run)
    assert_same(bits(ours)["weights"], bits(expected)["weights"])
    assert not torch.equal(bits(ours)["weights"]["head.weight"], bits(plain)["weights"]["head.weight"])


def test_deferred_start(tmp_path) -> None:
    module, tip = WithCriterion(), ClassWeightCallback(start_epoch=2)
    fit(tip, folder=tmp_path, module=module, data=RareData(), max_epochs=4)
    assert is_weighted(module) == [False] * 8 + [True] * 8
    assert [(event.epoch, event.step) for event in tip.events] == [(2, 8)]
    # until then the run is that of the plain module, to the bit
    begun = fit(
        ClassWeightCallback(start_epoch=2), folder=tmp_path, module=seeded(WithCriterion), data=RareData(), max_epochs=2
    )
    plain = fit(folder=tmp_path, module=seeded(WithCriterion), data=RareData(), max_epochs=2)
    assert_same(bits(begun)["weights"], bits(plain)["weights"])


class Compilable(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.compile itself
def test_compiled_module(tmp_path) -> None:
    losses = []
    for compiled in (False, True):
        tip = ClassWeightCallback({0: 50.0}, start_epoch=1)
        trainer, module = build(tip, folder=tmp_path, max_epochs=2, module=seeded(Compilable))
        trainer.fit(torch.compile(module, backend="eager") if compiled else module, datamodule=RareData())
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    trainer, module = build(ClassWeightCallback(functional=True), folder=tmp_path, module=seeded(PlainModule))
    with pytest.raises(MisconfigurationException, match="inside a compiled training_step"):
        trainer.fit(torch.compile(module, backend="eager"), datamodule=RareData())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_resume_is_exact(start: int, functional: bool, tmp_path) -> None:
    def run(*callbacks: Callback, **arguments: Any) -> Any:
        tip = ClassWeightCallback(start_epoch=start, functional=functional)
        module = seeded(PlainModule if functional else WithCriterion)
        trainer = fit(tip, *callbacks, folder=tmp_path, module=module, data=RareData(), max_epochs=4, **arguments)
        assert len(tip.events) == 1
        return bits(trainer) | {"tip": tip.state_dict()}

    expected = run(every_step(tmp_path / "kept"), every_epoch(tmp_path / "kept"))
    for name in ("step-step=3", "step-step=7", "epoch-epoch=1", "step-step=8", "step-step=10", "epoch-epoch=2"):
        checkpoint = tmp_path / "kept" / f"{name}.ckpt"
        torch.load(checkpoint, weights_only=True)
        assert_same(run(ckpt_path=checkpoint), expected, name)


def test_same_trainer_goes_on_and_another_starts_afresh(tmp_path) -> None:
    tip, module = ClassWeightCallback(start_epoch=1), WithCriterion()
    trainer, _ = build(tip, folder=tmp_path, max_epochs=2, module=module)
    trainer.fit(module, datamodule=RareData())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=RareData())
    assert is_weighted(module) == [False] * 4 + [True] * 8
    assert len(tip.events) == 1
    fit(tip, folder=tmp_path, module=(again := WithCriterion()), data=RareData(), max_epochs=2)
    assert is_weighted(again) == [False] * 4 + [True] * 4
    assert len(tip.events) == 1


def test_nothing_is_left_behind_by_a_run_that_fails(tmp_path) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            raise ZeroDivisionError

    trainer, module = build(ClassWeightCallback(), Fails(), folder=tmp_path, module=seeded(WithCriterion))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, datamodule=RareData())
    assert "training_step" not in vars(trainer.strategy)
    assert "forward" not in vars(module.criterion)


@pytest.mark.parametrize("weights", [[10.0] + [1.0] * 9, {0: 10.0}, {"0": 10}, {"zero": 10}])
def test_given_weights_are_scaled_to_mean_one(weights, tmp_path) -> None:
    data = RareData()

    class Named(RareData):
        def train_dataloader(self) -> ResumableLoader:
            loader = super().train_dataloader()
            loader.dataset.classes = ["zero", *map(str, range(1, 10))]  # type: ignore[attr-defined]
            return loader

    tip = ClassWeightCallback(weights)
    fit(tip, folder=tmp_path, module=seeded(WithCriterion), data=Named() if "zero" in weights else data, max_epochs=1)
    found = torch.tensor(tip.state_dict()["weights"])
    counts = torch.bincount(data.train_dataloader().labels)
    assert float(found[0] / found[1]) == pytest.approx(10)
    assert float((found * counts).sum() / counts.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("missing", [4, 9])
@pytest.mark.parametrize("weights", [[1.0] * 8 + [3.0, 2.0], {9: 2.0, 8: 3.0}])
def test_given_weights_do_without_samples_of_a_class(weights, missing: int, tmp_path) -> None:
    class Gap(RareData):
        def __init__(self) -> None:
            super().__init__()
            self.labels[self.labels == missing] = 5

    tip, keep = ClassWeightCallback(weights), every_epoch(tmp_path / "kept")
    fit(tip, keep, folder=tmp_path, module=seeded(WithCriterion), data=Gap(), max_epochs=1)
    found = torch.tensor(tip.state_dict()["weights"])
    assert (found / found[0]).tolist() == pytest.approx([1.0] * 8 + [3.0, 2.0])
    counts = torch.bincount(Gap().train_dataloader().labels, minlength=10)
    assert float((found * counts).sum() / counts.sum()) == pytest.approx(1.0)
    assert tip.trained_prior is not None
    assert float(tip.trained_prior[missing]) == 0.0


def test_given_weights_do_without_labels(tmp_path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(RareData().images[:64], RareData().labels[:64], strict=True)

    tip = ClassWeightCallback([3.0] + [1.0] * 9)
    trainer, module = build(tip, folder=tmp_path, module=seeded(WithCriterion), max_epochs=1)
    trainer.fit(module, DataLoader(Stream(), batch_size=32), RareData().val_dataloader())
    assert tip.state_dict()["weights"] == [3.0] + [1.0] * 9
    trainer, module = build(ClassWeightCallback(), folder=tmp_path, module=seeded(WithCriterion), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"IterableDataset.*weights as a list"):
        trainer.fit(module, DataLoader(Stream(), batch_size=32), RareData().val_dataloader())
    assert trainer.global_step == 0


# ---- two ranks


def both_ways(folder: Path) -> dict[str, Any]:
    results = {}
    for functional in (False, True):
        module = seeded(PlainModule if functional else WithCriterion)
        tip = ClassWeightCallback(functional=functional, start_epoch=1)
        fit(tip, folder=folder, data=RareData(), module=module, max_epochs=2, devices=2, strategy="ddp")
        results[str(functional)] = [parameter_hash(module), [str(e) for e in tip.events], tip.state_dict()["weights"]]
        if not functional:
            results["losses"] = module.plain
    return results


def test_two_ranks(tmp_path) -> None:
    first, second = on_two_ranks(tmp_path, both_ways)
    assert first["False"] == second["False"]
    assert first["True"] == second["True"]
    assert first["False"][0] == first["True"][0]  # the functional loss is weighted as the module is
    assert first["losses"] != second["losses"]
    for losses in (first["losses"], second["losses"]):
        assert [loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses] == [False] * 4 + [True] * 4
