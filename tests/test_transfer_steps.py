"""What transfer learning does to optimizer steps, in the company of others that do something to them too."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_tips import OptimizerSwitchCallback, TransferLearningCallback
from lightning_tips.core import scale_again, scale_steps, warm_up
from lightning_tips.core.warmup import carry_shares
from lightning_tips.transfer import Phase, layer_groups
from lightning_tips.transfer.rates import gradient_shares

from harness import STEPS_A_EPOCH, PlainModule, assert_same, bits, every_step, fit

BY_GRADIENT = [{"epochs": 1}, {"name": "all", "train": ["all"], "auto_rates": True, "l2_sp": 0.1}]


class Recording(torch.optim.SGD):
    """Notes, in the body of each step, the rates it is taken with and the gradients there are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.taken: list[tuple[list[float], list[float] | None]] = []

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.taken.append(([group["lr"] for group in self.param_groups], gradient_shares(self)))
        super().step()
        return loss


class Recorded(PlainModule):
    def configure_optimizers(self) -> Any:
        return Recording(self.parameters(), lr=0.1)


class ByHand(Recorded):
    """Manual optimization with two optimizers, one of which steps in every other batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return Recording(self.features.parameters(), lr=0.1), Recording(self.head.parameters(), lr=0.2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()  # type: ignore[misc, attr-defined]
        images, labels = batch
        self.manual_backward(F.cross_entropy(self(images), labels))
        for optimizer in [head, body] if batch_idx % 2 else [head]:
            optimizer.step()
            optimizer.zero_grad()


def expect_own_gradients(taken: list[Any], full: float, phase_two: int) -> None:
    for number, (rates, shares) in enumerate(taken):
        expected = [full] * len(rates) if number < phase_two else [full * share for share in shares]
        assert rates == pytest.approx(expected), number


@pytest.mark.parametrize("more", [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 2}])
def test_rates_by_gradient_are_those_of_the_step_itself(more: dict[str, Any], tmp_path: Path) -> None:
    phases = [Phase(epochs=1), Phase(["all"], name="all", auto_rates=True)]
    trainer = fit(TransferLearningCallback(phases), folder=tmp_path, module=Recorded(), max_epochs=3, **more)
    (optimizer,) = trainer.optimizers
    expect_own_gradients(optimizer.taken, 0.1, STEPS_A_EPOCH // more.get("accumulate_grad_batches", 1))
    assert len({tuple(rates) for rates, _ in optimizer.taken}) > 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_rates_by_gradient_with_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    phases = [Phase(epochs=1), Phase(["all"], name="all", auto_rates=True)]
    trainer = fit(TransferLearningCallback(phases), folder=tmp_path, module=ByHand(), max_epochs=3)
    body, head = trainer.optimizers
    assert len(body.taken) == STEPS_A_EPOCH // 2 * 3
    expect_own_gradients(body.taken, 0.1, STEPS_A_EPOCH // 2)
    expect_own_gradients(head.taken, 0.2, STEPS_A_EPOCH)


def test_rates_by_gradient_with_a_loss_scale(tmp_path: Path) -> None:
    """fp16's gradient scaler makes the gradients before the step begins, and leaves out steps that overflow."""

    def run(scaler: Any) -> Trainer:
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if scaler else []
        transfer = TransferLearningCallback(BY_GRADIENT)  # type: ignore[arg-type]
        return fit(transfer, folder=tmp_path, module=Recorded(), max_epochs=3, plugins=plugins)

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**19))
    (optimizer,) = scaled.optimizers
    assert 4 < len(optimizer.taken) < 3 * STEPS_A_EPOCH  # some overflowed
    assert len({tuple(rates) for rates, _ in optimizer.taken}) > 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_penalty_is_not_divided_by_the_loss_scale_of_a_fused_optimizer(tmp_path: Path) -> None:
    class Fused(PlainModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    def run(scale: float) -> float:
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))]
        transfer = TransferLearningCallback([Phase(l2=5.0)])
        module = Fused()
        fit(transfer, folder=tmp_path, module=module, max_epochs=1, plugins=plugins)
        return float(module.head.weight.detach().norm())

    assert run(1.0) == pytest.approx(run(1024.0), rel=0.02)


def test_resume_with_rates_by_gradient(tmp_path: Path) -> None:
    def run(**resume: Any) -> dict[str, Any]:
        transfer = TransferLearningCallback(BY_GRADIENT)  # type: ignore[arg-type]
        return bits(fit(transfer, every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=3, **resume))

    expected = run()
    for step in range(1, 3 * STEPS_A_EPOCH):
        assert_same(run(ckpt_path=tmp_path / "kept" / f"step-step={step}.ckpt"), expected, str(step))


@pytest.mark.parametrize("at", [1, 5, 6])
@pytest.mark.parametrize("auto_rates", [False, True])
def test_switch_of_the_optimizer_during_a_warm_up(at: int, auto_rates: bool, tmp_path: Path) -> None:
    phases = [
        Phase(epochs=1, warmup_steps=3),
        Phase(["all"], name="all", warmup_steps=7, layer_decay=0.5, auto_rates=auto_rates, lr=2e-3),
    ]

    def run(**resume: Any) -> dict[str, Any]:
        switch = OptimizerSwitchCallback(lambda p: Recording(p, lr=0.05, momentum=0.9), trigger="step", at=at)
        transfer = TransferLearningCallback(phases)
        trainer = fit(switch, transfer, every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=3, **resume)
        taken.append([rates for rates, _ in trainer.optimizers[0].taken])
        return bits(trainer)

    taken: list[list[list[float]]] = []
    expected = run()
    if not auto_rates:
        fastest = dict(enumerate((max(rates) for rates in taken[0]), at))  # by step
        for step in range(max(at, STEPS_A_EPOCH), 3 * STEPS_A_EPOCH):
            assert fastest[step] == pytest.approx(fastest[11] * min(1.0, (step - 3) / 7)), step
    for step in range(1, 3 * STEPS_A_EPOCH):
        assert_same(run(ckpt_path=tmp_path / "kept" / f"step-step={step}.ckpt"), expected, str(step))


# ---- learning rate finder


class Suggesting(PlainModule):
    def __init__(self, schedule: bool) -> None:
        super().__init__(schedule)
        self.lr = 1e-3


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches")
@pytest.mark.parametrize("finder_first", [True, False])
@pytest.mark.parametrize("schedule", [False, True])
def test_layer_decay_on_the_rate_of_a_finder(finder_first: bool, schedule: bool, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    phases = [Phase(epochs=2, name="probe"), Phase(["all"], name="all", epochs=1), Phase(["all"], name="own", lr=0.004)]
    transfer = TransferLearningCallback(phases, layer_decay=0.5)
    module = Suggesting(schedule)
    parts = [finder, transfer] if finder_first else [transfer, finder]
    trainer = fit(*parts, folder=tmp_path, module=module, max_epochs=4)
    assert module.lr != 1e-3
    by_epoch = [event.details["lr"] for event in transfer.events]
    assert by_epoch[:2] == pytest.approx([module.lr, module.lr])
    after = 0.5 if schedule else 1.0  # StepLR halves it after three epochs
    assert by_epoch[2] == pytest.approx(0.004 * after)
    layer = {n: i for i, group in enumerate(layer_groups(module)) for n in group.parameters}
    rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.004 * after * 0.5 ** (2 - layer[name]))


@pytest.mark.parametrize("finder_first", [True, False])
def test_rate_of_a_phase_beats_that_of_a_finder_where_it_has_one(finder_first: bool, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    phases = [Phase(epochs=1, name="probe", lr=0.01), Phase(["all"], name="all")]
    transfer = TransferLearningCallback(phases, layer_decay=0.5)
    module = Suggesting(False)
    fit(*([finder, transfer] if finder_first else [transfer, finder]), folder=tmp_path, module=module, max_epochs=2)
    assert [event.details["lr"] for event in transfer.events] == pytest.approx([0.01, module.lr])


# ---- without Lightning


def step_with(optimizer: torch.optim.Optimizer, again: bool) -> None:
    def closure() -> Tensor:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        if again:
            scale_again(optimizer)
        return torch.zeros(())

    optimizer.step(closure)


def test_share_is_asked_again_within_a_step() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = Recording([parameter], lr=0.1)
    warm = warm_up(optimizer, 2, lambda: 0)
    scale_steps(optimizer, lambda o: [0.0 if parameter.grad is None else 0.5])
    step_with(optimizer, again=True)
    assert optimizer.taken[0][0] == [0.1 * 0.5 * 0.5]
    assert optimizer.param_groups[0]["lr"] == 0.1
    warm.remove()
    step_with(optimizer, again=False)
    assert optimizer.taken[1][0] == [0.1 * 0.5]
    scale_again(optimizer)  # between two steps: nothing
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_what_follows_goes_on_with_another_optimizer_and_comes_off_both() -> None:
    parameter = nn.Parameter(torch.ones(1))
    old, new = Recording([parameter], lr=0.1), Recording([parameter], lr=0.2)
    follows = warm_up(old, 2, lambda: 0, follows=True)
    warm_up(old, 4, lambda: 0)
    carry_shares(old, new)
    for optimizer in (old, new):
        step_with(optimizer, again=False)
    assert [old.taken[0][0], new.taken[0][0]] == [[0.1 / 8], [0.1]]
    follows.remove()
    for optimizer in (old, new):
        step_with(optimizer, again=False)
    assert [old.taken[1][0], new.taken[1][0]] == [[0.1 / 4], [0.2]]


def test_step_that_an_exception_cuts_off_leaves_the_rate_as_it_was() -> None:
    optimizer = Recording([nn.Parameter(torch.ones(1))], lr=0.1)
    warm = warm_up(optimizer, 10, lambda: 0)

    def fails() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    warm.remove()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_shares_of_huge_gradients() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    parameters[0].grad, parameters[1].grad = torch.full((2,), 1e30), torch.full((2,), math.inf)
    assert gradient_shares(optimizer) == [1.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.param_groups[0]["lr"] == 0.1


# ---- validations within an epoch


class FallsAndRises(PlainModule):
    """Logs an accuracy that is best in the second of its validations, whichever epoch that is in."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", -abs(self.global_step / 2 - 2.0))


@pytest.mark.parametrize("interval", [0.5, 0.25])
def test_gate_with_several_validations_in_an_epoch(interval: float, tmp_path: Path) -> None:
    phases = [Phase(monitor="val_acc", mode="max", patience=2, warmup_steps=3), Phase(["all"], name="all", l2_sp=0.1)]

    class AfterValidation(ModelCheckpoint):
        """Another class, so that the two are told apart."""

    def run(**resume: Any) -> dict[str, Any]:
        transfer, keep = TransferLearningCallback(phases), every_step(tmp_path / "in")
        validated = AfterValidation(tmp_path / "after", filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
        module, length = FallsAndRises(), {"max_epochs": 4, "val_check_interval": interval}
        return bits(fit(transfer, keep, validated, folder=tmp_path, module=module, **length, **resume))

    expected = run()
    # With 0.5 the best is at step 4, the second without improvement at step 8, the end of epoch 1; with 0.25 at step 6.
    assert [line.split(":")[0] for line in expected["events"][0]] == [
        "[transfer] epoch 0, step 0",
        "[transfer] epoch 2, step 8",
    ]
    # A checkpoint of `on_train_batch_end` is written before the validation that is due at its step, and Lightning goes
    # on from it with the next batch: that validation is lost, with or without tips. Where the gate waits for it the
    # resumed run cannot be the same; from the checkpoint that is written after it, it is.
    every = int(interval * STEPS_A_EPOCH)
    decided = 8 if interval == 0.5 else 6
    for step in range(1, 10):
        if step % every or step > decided:
            assert_same(run(ckpt_path=tmp_path / f"in/step-step={step}.ckpt"), expected, f"in {step}")
        if step % every == 0:
            assert_same(run(ckpt_path=tmp_path / f"after/step={step}.ckpt"), expected, f"after {step}")


@pytest.mark.parametrize("step", [2, 4])
def test_lightning_loses_the_validation_that_is_due_at_a_checkpoint(step: int, tmp_path: Path) -> None:
    class Validations(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            validated.append(trainer.global_step)

    validated: list[int] = []
    length = {"max_epochs": 2, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    fit(every_step(tmp_path), Validations(), folder=tmp_path, **length)
    assert validated == [2, 4, 6, 8]
    validated.clear()
    checkpoint = tmp_path / f"step-step={step}.ckpt"
    fit(every_step(tmp_path / "again"), Validations(), folder=tmp_path, ckpt_path=checkpoint, **length)
    assert validated == list(range(step + 2, 9, 2))  # once `step` comes first, the test above need pass by none
