"""The guard: when pruning goes back to the last good network, with what; and distillation from the unpruned one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips import FilterPruningCallback, LayerPruningCallback
from lightning_tips.pruning.fit.guard import DropGuard

from harness import PlainData, PlainModule, ResidualModule, assert_same, bits, every_step, fit
from prunable import InnerModule, ManualModule, Scripted, pruning, snapshots, widths


def test_goes_back_to_the_last_good_network_and_stops(tmp_path: Path) -> None:
    tip = pruning(max_drop=0.05, steps=4)
    before = snapshots(tip)
    back: list[Any] = []
    go_back = tip._go_back

    def noting(trainer: Any, module: Any, **more: Any) -> None:
        go_back(trainer, module, **more)
        back.append(({k: v.clone() for k, v in module.state_dict().items()}, trainer.current_epoch))

    tip._go_back = noting  # type: ignore[method-assign]
    trainer = fit(tip, Scripted([0.9, 0.88, 0.7]), folder=tmp_path)
    assert [event.what for event in tip.events][2:] == ["back to the last good network, no more steps"]
    assert [event.epoch for event in tip.events] == [1, 2, 3]
    assert tip.events[-1].details["reference"] == pytest.approx(0.9)
    assert_same(back[0][0], before[1])
    assert trainer.global_step == 24
    state = trainer.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in trainer.lightning_module.parameters())


def test_takes_smaller_steps_after_a_fall(tmp_path: Path) -> None:
    tip = pruning(max_drop=0.05, steps=2, on_drop="smaller")
    fit(tip, Scripted([0.9, 0.7, 0.9, 0.9, 0.9, 0.9]), folder=tmp_path, max_epochs=7)
    whats = [event.what.split(" ", 1)[1] for event in tip.events]
    assert whats[1] == "to the last good network, smaller steps"
    shares = [event.details["macs"] for event in tip.events if "macs" in event.details]
    assert 1 > shares[1] > shares[0]  # half a step, from the start
    assert shares[1] > shares[2] > shares[3] > shares[4]
    assert shares[4] <= 0.6


def test_the_last_step_is_judged_at_the_end(tmp_path: Path) -> None:
    tip = pruning(max_drop=0.05, schedule="one_shot", start_epoch=2)
    trainer = fit(tip, Scripted([0.9, 0.9, 0.9, 0.9, 0.9, 0.8]), folder=tmp_path)
    assert [event.epoch for event in tip.events] == [2, 6]
    assert widths(trainer.lightning_module) == [8, 12]


def test_best_and_last_are_of_the_network_that_came_back(tmp_path: Path) -> None:
    """While it was smaller it had the better score; what was refused must not be the best, nor the last."""
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", monitor="val_acc", mode="max", save_last="link")
    stop = EarlyStopping("val_acc", mode="max", patience=10)
    tip = pruning(max_drop=0.05, schedule="one_shot", start_epoch=2)
    trainer = fit(tip, Scripted([0.9, 0.92, 0.95, 0.95, 0.8]), keep, stop, folder=tmp_path, max_epochs=5)
    assert [event.epoch for event in tip.events] == [2, 5]
    assert Path(keep.best_model_path).name == "epoch=1.ckpt"
    assert float(stop.best_score) == pytest.approx(0.92)
    last = torch.load(keep.last_model_path, weights_only=True)
    assert_same(dict(last["state_dict"]), dict(trainer.lightning_module.state_dict()))
    refused = torch.load(tmp_path / "kept" / "epoch=2.ckpt", weights_only=True)["state_dict"]
    assert len(refused["features.0.weight"]) < 8  # not overwritten through the link
    tip = pruning(max_drop=0.05, steps=2, every_n_epochs=2)
    keep = ModelCheckpoint(tmp_path / "mid", filename="{epoch}", monitor="val_acc", mode="max")
    fit(tip, Scripted([0.9, 0.95, 0.7, 0.89]), keep, folder=tmp_path, max_epochs=4)
    assert Path(keep.best_model_path).name == "epoch=0.ckpt"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_a_fall(value: float, tmp_path: Path) -> None:
    tip = pruning(max_drop=0.5, schedule="one_shot")
    with pytest.warns(UserWarning, match="val_acc is"):
        trainer = fit(tip, Scripted([0.9, 0.9, value]), folder=tmp_path, max_epochs=3)
    assert widths(trainer.lightning_module) == [8, 12]


def test_guard_by_loss_and_a_given_reference() -> None:
    guard = DropGuard(0.1, "min", reference=1.0)
    guard.update(0.2)
    guard.begin()
    assert guard.reference == 1.0
    assert not guard.fell  # nothing measured yet
    guard.update(1.1)
    assert not guard.fell
    guard.update(1.11)
    assert guard.fell
    with pytest.raises(ValueError, match="max_drop"):
        pruning(max_drop=-1.0)


def test_guard_survives_a_resume_at_any_step(tmp_path: Path) -> None:
    def run(**more: Any) -> Trainer:
        tip = pruning(max_drop=0.05, steps=3, on_drop="smaller", distill=0.5)
        parts = tip, Scripted([0.9, 0.7, 0.9, 0.9]), every_step(tmp_path / "kept")
        return fit(*parts, folder=tmp_path, max_epochs=5, **more)

    expected = bits(run())
    for step in (2, 5, 9, 13, 18):  # not the last of an epoch: Lightning leaves out the validation after it
        path = tmp_path / "kept" / f"step-step={step}.ckpt"
        torch.load(path, weights_only=True)
        assert_same(bits(run(ckpt_path=path)), expected, path.stem)


def test_it_waits_for_a_first_validation(tmp_path: Path) -> None:
    tip = pruning(max_drop=0.5, start_epoch=0, schedule="one_shot")
    fit(tip, folder=tmp_path, max_epochs=3)
    assert [event.epoch for event in tip.events] == [1]


def test_missing_monitor_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="val_f1"):
        fit(pruning(max_drop=0.1, monitor="val_f1"), folder=tmp_path)


def test_without_a_first_value_that_is_a_number_nothing_is_pruned(tmp_path: Path) -> None:
    tip = pruning(max_drop=0.5)
    with pytest.warns(UserWarning, match="val_acc is nan"):
        fit(tip, Scripted([math.nan]), folder=tmp_path, max_epochs=3)
    assert not tip.events
    assert "no value of val_acc" in tip.outlook()


def test_a_guard_is_for_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="brings the whole module back"):
        fit(pruning(max_drop=0.1), LayerPruningCallback(), ResidualModule(), folder=tmp_path)


def test_distillation_changes_training_and_resumes(tmp_path: Path) -> None:
    def run(weight: float, **more: Any) -> Trainer:
        parts = pruning(distill=weight), InnerModule(), every_step(tmp_path / str(weight))
        return fit(*parts, folder=tmp_path, max_epochs=3, **more)

    plain, taught = bits(run(0.0)), bits(run(1.0))
    assert not torch.equal(plain["weights"]["net.0.weight"], taught["weights"]["net.0.weight"])
    for step in (3, 4, 9):
        again = run(1.0, ckpt_path=tmp_path / "1.0" / f"step-step={step}.ckpt")
        assert_same(bits(again), taught, str(step))
        assert "training_step" not in vars(again.strategy)


class Teachers(FilterPruningCallback):
    def _teach(self, trainer: Any, module: Any) -> None:
        super()._teach(trainer, module)
        self.teachers = [*getattr(self, "teachers", []), self._teacher.network]


def test_distillation_pulls_the_outputs_to_the_unpruned_networks(tmp_path: Path) -> None:
    distances = []
    for weight in (0.0, 30.0):
        tip = Teachers(target={"macs": 0.6}, schedule="one_shot", start_epoch=1, samples=64, distill=weight)
        before = snapshots(tip)
        trainer = fit(tip, folder=tmp_path, max_epochs=10)
        unpruned = PlainModule()
        unpruned.load_state_dict(before[0])
        images = PlainData().images[-128:]
        with torch.no_grad():
            old, new = unpruned.eval()(images).softmax(1), trainer.lightning_module.eval()(images).softmax(1)
        distances.append(float((old - new).abs().sum(1).mean()))
        teachers = getattr(tip, "teachers", [])
        assert bool(teachers) == bool(weight)
        assert all(not t.training and not any(p.requires_grad for p in t.parameters()) for t in teachers)
    assert distances[1] < 0.7 * distances[0]


def test_distillation_needs_a_returned_loss(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="optimizes manually"):
        fit(pruning(distill=1.0), ManualModule(), folder=tmp_path)
