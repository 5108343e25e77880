"""Transfer learning and the optimizer: what is in it, rates by layer, schedules, penalties, warm-up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lightning_tips import TransferLearningCallback
from lightning_tips.core import warm_up
from lightning_tips.transfer import (
    Phase,
    layer_groups,
)
from lightning_tips.transfer.penalties import add_pull
from lightning_tips.transfer.rates import add_parameters, gradient_shares, set_rates, split_groups

from harness import PlainModule, fit


class Choosy(PlainModule):
    """Configures its optimizer in some way."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def configure_optimizers(self) -> Any:
        if self.which == "all":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.which == "requiring grad":
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
        if self.which == "head":
            optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]
        if self.which == "groups":
            decay = [p for p in self.parameters() if p.ndim > 1]
            rest = [p for p in self.parameters() if p.ndim <= 1]
            return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.1)
        return torch.optim.SGD(self.named_parameters(), lr=0.1)


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("which", ["all", "requiring grad", "head", "groups", "named"])
def test_thawed_parameters_are_in_the_optimizer_once_with_their_rate(which: str, decay: float, tmp_path: Path) -> None:
    module = Choosy(which)
    before = {name: p.clone() for name, p in module.named_parameters()}
    transfer = TransferLearningCallback("gradual", layer_decay=decay, warmup_steps=0, fine_tune_lr=0.02)
    trainer = fit(transfer, folder=tmp_path, module=module, max_epochs=3)
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    layer = {n: i for i, group in enumerate(layer_groups(module)) for n in group.parameters}
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.02 * decay ** (2 - layer[name])), name
        assert not torch.equal(parameter, before[name]), name
    if which == "groups":
        weight_decay = {id(p): g["weight_decay"] for g in trainer.optimizers[0].param_groups for p in g["params"]}
        assert all((weight_decay[id(p)] == 0.0) == (p.ndim <= 1) for p in module.parameters())


def test_equal_values_are_told_apart() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([one], lr=0.1)
    add_parameters(optimizer, [one, other])
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(one)], [id(other)]]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: LambdaLR(o, lambda step: 0.9**step),
        lambda o: OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: SequentialLR(
            o,
            [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            [3],
        ),
    ],
    ids=["step", "lambda", "one-cycle", "cosine", "sequential"],
)
def test_schedules_go_on_at_the_new_rates(make: Callable[[Any], Any]) -> None:
    from lightning.pytorch.utilities.types import LRSchedulerConfig

    def run(layers: bool) -> list[list[float]]:
        parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        if layers:
            configs = [LRSchedulerConfig(scheduler)]
            split_groups(optimizer, {id(p): i for i, p in enumerate(parameters)}, configs)
            scales = {id(parameters[0]): 0.25, id(parameters[1]): 1.0}
            set_rates(optimizer, scales, None, configs)
        rates = []
        for step in range(8):
            if step == 5 and layers:
                set_rates(optimizer, scales, 0.05, configs)
            optimizer.step()
            scheduler.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
        return rates

    plain, layered = run(False), run(True)
    for step, ((rate,), (first, second)) in enumerate(zip(plain, layered, strict=True)):
        share = 0.5 if step >= 5 else 1.0
        assert second == pytest.approx(rate * share), step
        assert first == pytest.approx(rate * share / 4), step


def test_plateau_schedule_keeps_its_floor_in_proportion() -> None:
    from lightning.pytorch.utilities.types import LRSchedulerConfig

    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    configs = [LRSchedulerConfig(ReduceLROnPlateau(optimizer, min_lr=0.01))]
    split_groups(optimizer, {id(p): i for i, p in enumerate(parameters)}, configs)
    set_rates(optimizer, {id(parameters[0]): 0.5, id(parameters[1]): 1.0}, 0.2, configs)
    assert configs[0].scheduler.min_lrs == pytest.approx([0.01, 0.02])


def test_optimizer_made_once_is_not_slowed_twice(tmp_path: Path) -> None:
    class Keeps(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.made = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.made

    module = Keeps()
    for _ in range(2):
        fit(TransferLearningCallback("lp_ft", layer_decay=0.5), folder=tmp_path, module=module, max_epochs=2)
        assert sorted({group["lr"] for group in module.made.param_groups}) == pytest.approx([0.025, 0.05, 0.1])


def test_penalty_pulls_to_the_start_and_the_head_to_zero() -> None:
    parameters = {"a": nn.Parameter(torch.tensor([3.0])), "b": nn.Parameter(torch.tensor([3.0]))}
    for parameter in parameters.values():
        parameter.grad = torch.zeros(1)
    add_pull(parameters, {"a": torch.tensor([1.0])}, 0.5)
    assert [float(p.grad) for p in parameters.values()] == [1.0, 1.5]


def test_penalty_on_what_was_pruned_says_so() -> None:
    weight = nn.Parameter(torch.ones(1, 2))
    weight.grad = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"w is \(1, 2\) now, and \(4, 2\) where it started"):
        add_pull({"w": weight}, {"w": torch.zeros(4, 2)}, 0.5)


def test_l2_sp_keeps_the_layers_near_where_they_started(tmp_path: Path) -> None:
    def distance(strength: float) -> float:
        module = Choosy("all")
        start = {n: p.detach().clone() for n, p in module.features.named_parameters()}
        phases = [Phase(["all"], l2_sp=strength)]
        fit(TransferLearningCallback(phases), folder=tmp_path, module=module, max_epochs=4)
        return float(sum((p.detach() - start[n]).square().sum() for n, p in module.features.named_parameters()))

    assert distance(3.0) < distance(0.0) / 4


def test_warm_up_rises_from_near_zero(tmp_path: Path) -> None:
    class Noting(torch.optim.SGD):
        rates: ClassVar[list[float]] = []

        def step(self, closure: Any = None) -> Any:
            # the body of step, after the hooks before it
            self.rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Noted(PlainModule):
        def configure_optimizers(self) -> Any:
            return Noting(self.parameters(), lr=0.1)

    transfer = TransferLearningCallback([Phase(epochs=1), Phase(["all"], warmup_steps=4, lr=0.04)])
    fit(transfer, folder=tmp_path, module=Noted(), max_epochs=3)
    assert Noting.rates == pytest.approx([0.1] * 4 + [0.01, 0.02, 0.03, 0.04] + [0.04] * 4)


def test_two_that_lower_the_rate_leave_it_as_it_was() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    first, second = (warm_up(optimizer, 4, lambda: 0) for _ in range(2))
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 / 16)
    assert optimizer.param_groups[0]["lr"] == 0.1
    first.remove()
    second.remove()
    optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 / 16 - 0.1)


def test_rates_by_gradient(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([4.0])), nn.Parameter(torch.ones(1))]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    assert gradient_shares(optimizer) is None
    parameters[0].grad, parameters[1].grad = torch.ones(1), torch.ones(1)
    assert gradient_shares(optimizer) == [1.0, 0.5, 0.0]

    module = Choosy("all")
    phases = [Phase(epochs=1), Phase(["all"], auto_rates=True)]
    trainer = fit(TransferLearningCallback(phases), folder=tmp_path, module=module, max_epochs=2)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1] * 3
