"""Criteria in a Trainer: each finds the data it needs, and what it has gathered comes back with a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from harness import STEPS_A_EPOCH, PlainData, PlainModule, assert_same, bits, build, every_step, fit
from prunable import TogglingModule, pruning


@pytest.mark.parametrize("criterion", ["l2", "geometric_median", "bn_scale", "mean_activation"])
def test_criteria_find_what_they_need(criterion: str, tmp_path: Path) -> None:
    # bn_scale: of the layer that has the norm
    changes: Any = {"target": {"macs": 0.8}, "plan": {"protect": ["features.3"]}} if criterion == "bn_scale" else {}
    tip = pruning(criterion=criterion, **changes)
    fit(tip, folder=tmp_path, max_epochs=3)
    assert len(tip.events) == 2


@pytest.mark.parametrize("criterion", ["random", "taylor", "apoz"])
def test_criteria_that_need_data_or_chance_resume(criterion: str, tmp_path: Path) -> None:
    def run(**more: Any) -> Trainer:
        # apoz: of the layer that has the norm
        changes: Any = {"target": {"macs": 0.8}, "plan": {"protect": ["features.3"]}} if criterion == "apoz" else {}
        parts = pruning(criterion=criterion, **{"samples": 200} | changes), every_step(tmp_path / criterion)
        return fit(*parts, folder=tmp_path, max_epochs=3, **more)

    expected = bits(run())
    for step in (2, 6) if criterion == "random" else (2, 4, 6):
        assert_same(bits(run(ckpt_path=tmp_path / criterion / f"step-step={step}.ckpt")), expected, f"step {step}")


def test_gradients_that_rank_come_back_with_the_network(tmp_path: Path) -> None:
    falls: Any = {"max_drop": 0.1, "monitor": "val_loss", "mode": "min", "reference": -9.0, "on_drop": "smaller"}

    def run(**more: Any) -> Trainer:
        return fit(pruning(criterion="taylor", **falls), every_step(tmp_path / "k"), folder=tmp_path, **more)

    whole = run(max_epochs=4)
    whats = [event.what for event in whole.callbacks[0].events]  # type: ignore[attr-defined]
    assert [what[:4] for what in whats] == ["3 fi", "back", "2 fi", "back", "1 fi", "back"]
    for step in (9, 14):
        again = run(max_epochs=4, ckpt_path=tmp_path / "k" / f"step-step={step}.ckpt")
        assert_same(bits(again), bits(whole), f"step {step}")


def test_taylor_adds_up_the_steps_of_the_optimizer_that_has_the_layer(tmp_path: Path) -> None:
    class Noting(TogglingModule):
        """While the other optimizer steps, the network's gradients are still those of its own step."""

        expected = torch.zeros(8)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if optimizer is self.trainer.optimizers[0]:
                weight = self.net[0].weight
                self.expected = self.expected + (weight.grad * weight).detach().sum((1, 2, 3)).square()

    tip = pruning(criterion="taylor", start_epoch=1, schedule="one_shot", module="net")
    module = Noting()
    trainer, _ = build(tip, module, folder=tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="The target is not reached"):
        trainer.fit(module, datamodule=PlainData())
    assert tip._taylor.steps == STEPS_A_EPOCH
    found = tip._taylor.criterion(module.net)("0", module.net[0])
    torch.testing.assert_close(found, module.expected / STEPS_A_EPOCH)


@pytest.mark.parametrize("criterion", ["taylor", "apoz", "mean_activation"])
def test_criteria_cannot_begin_before_there_is_data(criterion: str, tmp_path: Path) -> None:
    class Untouched(PlainModule):
        def configure_optimizers(self) -> Any:
            raise AssertionError("too late")

    with pytest.raises(MisconfigurationException, match="start_epoch"):
        fit(pruning(criterion=criterion, start_epoch=0), Untouched(), folder=tmp_path)
