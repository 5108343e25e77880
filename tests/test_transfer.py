"""Transfer learning: what trains, what stays as it is to the bit, and when that changes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from lightning_tips import TransferLearningCallback
from lightning_tips.core import warm_up
from lightning_tips.transfer import (
    InputExpectation,
    Phase,
    changed_since,
    check_images,
    find_head,
    frozen_state,
    layer_groups,
    load_with_new_classes,
    match_parameters,
    preset_phases,
    read_plan,
    set_trainable,
)
from lightning_tips.transfer.freeze import modules_to_hold
from lightning_tips.transfer.rates import add_parameters, add_pull, gradient_shares, set_rates, split_groups
from lightning_tips.transfer.schedule import Gate

from harness import STEPS_A_EPOCH, PlainModule, assert_same, bits, build, every_step, fit
from settings import SETTINGS, make

WORKER = Path(__file__).parent / "worker.py"


class Holder(LightningModule):
    """Keeps a network under a name that nobody would guess."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.quux = network


# ---- layers


@pytest.mark.parametrize(
    ("make", "head", "some"),
    [
        (lambda: timm.create_model("resnet18"), "fc", ["conv1", "layer1", "layer2", "layer3", "layer4", "head"]),
        (lambda: timm.create_model("tf_efficientnet_lite0"), "classifier", ["conv_stem", "blocks.1", "blocks.6"]),
        (lambda: timm.create_model("test_vit"), "head", ["blocks.0", "blocks.5", "head"]),
        (lambda: timm.create_model("test_convnext"), "head.fc", ["stem.0", "stages.0", "stages.3", "head"]),
        (torchvision.models.resnet18, "fc", ["conv1", "layer1", "layer2", "layer3", "layer4", "head"]),
        (torchvision.models.mobilenet_v3_small, "classifier.3", ["features.0", "features.12", "classifier.0", "head"]),
        (torchvision.models.squeezenet1_1, "classifier.1", ["features.0", "features.12", "head"]),
        (torchvision.models.regnet_y_400mf, "fc", ["stem", "trunk_output.block1", "head"]),
    ],
    ids=["resnet", "lite0", "vit", "convnext", "tv-resnet", "tv-mobilenet", "tv-squeezenet", "tv-regnet"],
)
def test_layers_of_a_network_in_a_module(make: Callable[[], nn.Module], head: str, some: list[str]) -> None:
    module = Holder(make())
    groups = layer_groups(module)
    names = [group.name for group in groups]
    assert [name for name in names if name in some] == some  # in this order
    assert names[-1] == "head"
    assert len(set(names)) == len(names)
    assert find_head(module) == [f"quux.{head}"]
    parameters = [name for group in groups for name in group.parameters]
    assert sorted(parameters) == sorted(name for name, _ in module.named_parameters())
    buffered = {n for n, m in module.named_modules() if list(m.buffers(recurse=False))}
    assert buffered <= {name for group in groups for name in group.modules}


def test_head_beside_a_network_without_one() -> None:
    module = LightningModule()
    module.backbone = timm.create_model("test_resnet", num_classes=0)
    module.mine = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    assert find_head(module) == ["mine"]
    assert find_head(module, backbone="back*") == ["mine"]
    assert next(iter(layer_groups(module))).name.startswith("backbone.")
    assert find_head(module, head="mine.2") == ["mine.2"]
    assert [g.name for g in layer_groups(module, head="mine.2")][-2:] == ["mine.0", "head"]


def test_tied_weights_belong_to_the_head() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    module["head"].weight = module["embedding"].weight
    groups = {group.name: group.parameters for group in layer_groups(module)}
    assert groups == {"body": ("body.weight", "body.bias"), "head": ("embedding.weight", "head.bias")}
    set_trainable(module, groups["head"])
    assert module["head"].weight.requires_grad
    assert not module["body"].weight.requires_grad


def test_patterns() -> None:
    module = Holder(timm.create_model("test_resnet"))
    groups = layer_groups(module)
    assert match_parameters(groups, ["head"], "quux") == ["quux.fc.weight", "quux.fc.bias"]
    assert match_parameters(groups, ["quux.fc.bias"], "quux") == ["quux.fc.bias"]
    assert len(match_parameters(groups, ["all"])) == len(list(module.parameters()))
    assert all(name.startswith("quux.layer2.") for name in match_parameters(groups, ["layer2"], "quux"))
    assert match_parameters(groups, ["*.bn1"], "quux")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "quuxx"}, "Did you mean 'quux'"),
        ({"head": "quux.fd"}, "Did you mean 'quux.fc'"),
        ({"head": "quux"}, "no layers with weights beside its head"),
    ],
)
def test_unknown_parts(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_groups(Holder(timm.create_model("test_resnet")), **arguments)


def test_single_layer_has_no_head() -> None:
    with pytest.raises(ValueError, match="no layers with weights"):
        layer_groups(Holder(nn.Linear(2, 2)))


# ---- frozen


class Restless(PlainModule):
    """Puts itself into train mode at every chance."""

    def on_train_epoch_start(self) -> None:
        self.train()

    def on_validation_end(self) -> None:
        self.train()


class Watcher(Callback):
    """Takes the state of frozen layers at the start of each epoch and looks for changes at its end."""

    def __init__(self) -> None:
        self.changed: list[list[str]] = []
        self.seen: list[int] = []
        self.graph: list[bool] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.features.register_forward_hook(lambda m, a, out: self.graph.append(out.requires_grad))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.state = frozen_state(pl_module, layer_groups(pl_module))
            self.seen.append(len(self.state))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.changed.append(changed_since(pl_module, self.state))


@pytest.mark.parametrize("policy", ["frozen", "stats", "live"])
def test_frozen_is_frozen_to_the_bit(policy: Any, tmp_path: Path) -> None:
    watcher, module = Watcher(), Restless()
    start = {k: v.clone() for k, v in module.state_dict().items()}
    transfer = TransferLearningCallback("lp_ft", phase_epochs=2, batch_norm=policy)
    fit(transfer, watcher, folder=tmp_path, module=module, max_epochs=3)
    statistics = ["features.1.running_mean", "features.1.running_var", "features.1.num_batches_tracked"]
    assert watcher.changed == [statistics if policy == "stats" else []] * 2 + [[]]
    assert watcher.seen == [9, 9, 0]
    assert len(start) == 11
    after = module.state_dict()
    assert all(not torch.equal(start[name], after[name]) for name, _ in module.named_parameters())
    assert torch.equal(start[statistics[0]], after[statistics[0]]) == (policy == "frozen")


def test_frozen_layers_build_no_graph(tmp_path: Path) -> None:
    watcher = Watcher()
    fit(TransferLearningCallback(), watcher, folder=tmp_path, max_epochs=2, limit_val_batches=0)
    assert watcher.graph == [False] * STEPS_A_EPOCH + [True] * STEPS_A_EPOCH


def test_module_is_left_as_it_was_found(tmp_path: Path) -> None:
    module = PlainModule()
    module.features[0].bias.requires_grad_(False)
    fit(TransferLearningCallback("head_only"), folder=tmp_path, module=module, max_epochs=1)
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["features.0.bias"]
    assert all(part.training for part in module.modules())


def test_what_the_module_froze_stays_frozen(tmp_path: Path) -> None:
    module = PlainModule()
    module.features[0].bias.requires_grad_(False)
    before = module.features[0].bias.clone()
    fit(TransferLearningCallback("lp_ft"), folder=tmp_path, module=module, max_epochs=2)
    assert torch.equal(module.features[0].bias, before)


def test_head_norms_are_live() -> None:
    module = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))})
    module["head"] = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    groups = layer_groups(module)
    everything = [name for name, _ in module.named_parameters()]
    assert modules_to_hold(module, groups, everything, "frozen") == [module["body"][1]]
    assert modules_to_hold(module, groups, everything, "live") == []
    assert modules_to_hold(module, groups, groups[-1].parameters, "stats") == []


def test_other_buffers_of_frozen_layers() -> None:
    module = nn.ModuleDict({"body": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "head": nn.Linear(3, 2)})
    module.train()
    groups = layer_groups(module)
    set_trainable(module, groups[-1].parameters)
    for part in modules_to_hold(module, groups, groups[-1].parameters):
        part.training = False
    before = frozen_state(module, groups)
    assert len(before) == 4  # weight, bias and two vectors of the power iteration
    module["body"](torch.rand(2, 3))
    assert changed_since(module, before) == []


# ---- the optimizer


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


# ---- phases


def test_gate() -> None:
    gate = Gate("max", patience=2, min_delta=0.1)
    assert [gate.update(v) for v in (0.5, 0.7, 0.75, float("nan"))] == [False, False, False, True]
    again = Gate("max", 2, 0.1)
    again.load_state_dict(gate.state_dict())
    assert again.update(0.7)
    assert not again.update(0.9)


class Stalls(PlainModule):
    """Its validation accuracy stops rising in epoch 1."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", float(min(self.current_epoch, 1)))


def test_metric_decides_and_the_next_epoch_acts(tmp_path: Path) -> None:
    transfer = TransferLearningCallback("lp_ft", monitor="val_acc", mode="max", patience=2)
    fit(transfer, folder=tmp_path, module=Stalls())
    assert [(event.epoch, event.step) for event in transfer.events] == [(0, 0), (4, 4 * STEPS_A_EPOCH)]
    assert transfer.phase is not None
    assert transfer.phase.name == "fine-tune"


def test_metric_that_nobody_logs(tmp_path: Path) -> None:
    trainer, module = build(TransferLearningCallback(monitor="val_los", patience=1), folder=tmp_path)
    from harness import PlainData

    with pytest.raises(MisconfigurationException, match="Did you mean 'val_loss'"):
        trainer.fit(module, datamodule=PlainData())
    assert trainer.global_step == 0


def test_plan_can_be_written_edited_and_run(tmp_path: Path) -> None:
    module = PlainModule()
    TransferLearningCallback("gradual").write_plan(str(tmp_path / "plan.yaml"), module)
    text = (tmp_path / "plan.yaml").read_text()
    assert "#   features.3 (2 parameters)" in text
    assert read_plan(tmp_path / "plan.yaml") == TransferLearningCallback("gradual").plan(module)
    (tmp_path / "plan.yaml").write_text(text.replace("epochs: 1", "epochs: 2"))
    transfer = TransferLearningCallback(str(tmp_path / "plan.yaml"))
    fit(transfer, folder=tmp_path, module=module)
    assert [event.epoch for event in transfer.events] == [0, 2, 4]


def test_phases_by_hand(tmp_path: Path) -> None:
    phases = [
        {"train": "head", "epochs": 1},
        {"train": ["features.0", "head"], "name": "surgical", "lr": 0.01, "batch_norm": "live"},
        {"train": ["all"], "start": 3},
    ]
    transfer = TransferLearningCallback(phases)  # type: ignore[arg-type]
    fit(transfer, folder=tmp_path, max_epochs=4)
    assert [event.epoch for event in transfer.events] == [0, 1, 3]
    assert transfer.events[1].what == "surgical: features.0, head train"
    assert transfer.events[1].details["lr"] == pytest.approx(0.01)
    assert transfer.events[0].details["trainable"] == 130


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "at least one phase"),
        ([{"train": []}], "trains nothing"),
        ([{"trian": ["head"]}], "Did you mean 'train'"),
        ([{}, {}], "'phase 1' never ends, so 'phase 2' never begins"),
        ([{"epochs": 3}, {"start": 2}], "overlap: one ends before epoch 3"),
        ([{"epochs": 1}, {"start": 2}], "leave a gap"),
        ([{"epochs": 1}, {"epochs": 2}, {"start": 1}], "overlap: both cover epoch 1"),
        ([{"monitor": "val_loss"}, {"start": 2}], "ends by 'val_loss' and also"),
        ([{"start": 2}], "starts with the run"),
        ([{"epochs": 0}], "epochs=0"),
        ([{"lr": -1.0}], "lr=-1.0"),
        ([{"layer_decay": 1.5}], "early layers would be faster"),
        ([{"batch_norm": "froze"}], "Did you mean 'frozen'"),
        ([{"name": "a", "epochs": 1}, {"name": "a"}], "Two phases have the name 'a'"),
        ("lpft", "Did you mean 'lp_ft'"),
    ],
)
def test_bad_schedules(phases: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferLearningCallback(phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"batch_norm": "livee"}, "Did you mean 'live'"),
        ({"phase_epochs": 0}, "phase_epochs=0"),
        ({"fine_tune_lr": 0.0}, "no learning rate"),
        ({"mode": "least"}, "must be 'min' or 'max'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferLearningCallback(**arguments)


def test_phases_in_a_configuration(tmp_path: Path) -> None:
    row = next(setting for setting in SETTINGS if setting.tip is TransferLearningCallback)
    phases = [{"train": ["head"], "epochs": 1}, {"name": "all", "train": ["all"], "layer_decay": 0.9}]
    parts, tip = make((row, {"schedule": phases, "warmup_steps": 20, "l2_sp": 0.0}))
    assert [phase.name for phase in tip[0]._given] == ["phase 1", "all"]
    assert tip[0]._given[1].layer_decay == 0.9
    assert parts


def test_presets_name_their_phases() -> None:
    groups = layer_groups(PlainModule())
    assert [p.train for p in preset_phases("gradual", groups)] == [["head"], ["head", "features.3"], ["all"]]
    assert preset_phases("lp_ft", groups, monitor="val_loss")[0].epochs is None


def test_warns_of_a_phase_that_never_begins(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'fine-tune' never begins"):
        fit(TransferLearningCallback(phase_epochs=2), folder=tmp_path, max_epochs=2)


def test_warns_of_arguments_that_are_not_read() -> None:
    with pytest.warns(UserWarning, match="does not look at patience"):
        TransferLearningCallback([Phase()], patience=7)


# ---- refused before the first step


class NoOptimizer(PlainModule):
    def configure_optimizers(self) -> None:
        return None


def unfrozen_nothing() -> PlainModule:
    module = PlainModule()
    module.head.requires_grad_(False)
    return module


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned.*None.*")
@pytest.mark.parametrize(
    ("parts", "module", "message"),
    [
        ([TransferLearningCallback(head="hed")], PlainModule, "Did you mean 'head'"),
        ([TransferLearningCallback([Phase(["featurs.0"])])], PlainModule, "No layer matches 'featurs.0'"),
        ([TransferLearningCallback()], unfrozen_nothing, "the module itself has frozen all of head"),
        ([TransferLearningCallback()], NoOptimizer, "configures no optimizer"),
        ([TransferLearningCallback(), BackboneFinetuning()], PlainModule, "both decide which layers train"),
        ([TransferLearningCallback(), StochasticWeightAveraging(0.1)], PlainModule, "BatchNorm's statistics anew"),
        ([TransferLearningCallback(), TransferLearningCallback("gradual")], PlainModule, "There are 2|state_key"),
    ],
)
def test_refused_before_the_first_step(parts: list[Any], module: Callable[[], Any], message: str, tmp_path) -> None:
    with pytest.raises((MisconfigurationException, RuntimeError), match=message):
        fit(*parts, folder=tmp_path, module=module(), max_epochs=2)


# ---- resume


def test_resume_from_every_step_with_a_gate(tmp_path: Path) -> None:
    def run(**resume: Any) -> Trainer:
        transfer = TransferLearningCallback(
            "lp_ft", monitor="val_acc", mode="max", patience=1, warmup_steps=3, layer_decay=0.7, l2_sp=0.1
        )
        return fit(transfer, every_step(tmp_path / "kept"), folder=tmp_path, module=Stalls(), max_epochs=4, **resume)

    expected = bits(run())
    assert [line.split(":")[0] for line in expected["events"][0]] == [
        "[transfer] epoch 0, step 0",
        "[transfer] epoch 3, step 12",
    ]
    for step in (1, 5, 9, 10, 11, 13, 14, 15):  # in both phases, in the warm-up and after it
        resumed = run(ckpt_path=tmp_path / "kept" / f"step-step={step}.ckpt")
        assert_same(bits(resumed), expected, str(step))


def test_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    fit(TransferLearningCallback(), every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=2)
    checkpoint = tmp_path / "kept" / "step-step=6.ckpt"
    with pytest.raises(MisconfigurationException, match="another schedule"):
        fit(
            TransferLearningCallback("gradual"),
            every_step(tmp_path / "kept"),
            folder=tmp_path,
            ckpt_path=checkpoint,
            max_epochs=3,
        )


# ---- inputs


IMAGENET = InputExpectation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224))
HALF = InputExpectation((0.5,) * 3, (0.5,) * 3, (224, 224))


def images(mean: Any, std: Any, size: int = 224) -> Tensor:
    raw = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return (raw - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)


def test_right_inputs_are_passed() -> None:
    assert check_images(images(IMAGENET.mean, IMAGENET.std), IMAGENET) == []
    assert check_images(images(HALF.mean, HALF.std, 128), HALF) == []
    assert check_images(torch.zeros(2, 5), HALF) == []  # no images


@pytest.mark.parametrize(
    ("given", "expected", "words"),
    [
        (images([0.0], [1.0]), IMAGENET, "from 0 to 1 that are not normalised"),
        (images([0.0], [1.0]), HALF, "from 0 to 1 that are not normalised"),
        (images([0.0], [1 / 255]), IMAGENET, "from 0 to 255"),
        (images(IMAGENET.mean, IMAGENET.std), HALF, "ImageNet's mean and std"),
        (images(HALF.mean, HALF.std), IMAGENET, "mean 0.5 and std 0.5"),
        (images(HALF.mean, HALF.std, 28), HALF, "28x28"),
    ],
)
def test_wrong_inputs_are_told(given: Tensor, expected: InputExpectation, words: str) -> None:
    (finding,) = check_images(given, expected)
    assert words in finding


class TinyTimm(PlainModule):
    """A timm network inside, fed with digits as they are."""

    def __init__(self) -> None:
        super().__init__()
        del self.features, self.head
        self.inner = timm.create_model("test_resnet", num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(nn.functional.interpolate(images, size=(64, 64)).expand(-1, 3, -1, -1))


def test_first_batch_is_looked_at(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not normalised"):
        fit(TransferLearningCallback("head_only"), folder=tmp_path, module=TinyTimm(), max_epochs=1)
    module = TinyTimm()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit(TransferLearningCallback("head_only", check_inputs=False), folder=tmp_path, module=module, max_epochs=1)
    moved = [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["inner.fc.weight", "inner.fc.bias"]


# ---- new classes


def test_old_rows_are_kept_when_classes_come_on() -> None:
    old, new = PlainModule(), PlainModule()
    new.head = nn.Linear(12, 13)
    fresh = new.head.weight[10:].clone()
    assert load_with_new_classes(new, old.state_dict()) == ["head.weight", "head.bias"]
    assert torch.equal(new.head.weight[:10], old.head.weight)
    assert torch.equal(new.head.weight[10:], fresh)
    assert torch.equal(new.features[0].weight, old.features[0].weight)
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(new.eval()(images)[:, :10], old.eval()(images), atol=1e-6)
    with pytest.raises(ValueError, match="Only the last layer may have more rows"):
        load_with_new_classes(old, new.state_dict())
    with pytest.raises(ValueError, match="those of another module"):
        load_with_new_classes(old, {})


# ---- two ranks


def test_two_ranks(tmp_path: Path) -> None:
    def plan(name: str, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
        arguments = {"max_epochs": 3, "devices": 2, "strategy": "ddp"} | more.pop("arguments", {})
        return {"name": name, "tips": [["TransferLearningCallback", changes]], "arguments": arguments} | more

    unused = {"strategy": "ddp_find_unused_parameters_true"}
    gate = {"schedule": "lp_ft", "monitor": "val_loss", "patience": 1, "phase_epochs": 1}
    runs = [
        plan("ddp", {}, arguments={"keep": "step"}),
        plan("again", {}, arguments={"keep": "step"}, resume="ddp/checkpoints/step-step=6.ckpt"),
        plan("unused", {}, arguments=unused),
        plan("static", {}, arguments={"strategy": {"class": "DDPStrategy", "static_graph": True}}),
        plan("views", {}, arguments={"strategy": {"class": "DDPStrategy", "gradient_as_bucket_view": True}}),
        plan("branching", {"schedule": "lp_ft"}, arguments=unused | {"module": "BranchingModule"}),
        plan("gate", gate, arguments={"module": "UnevenModule", "max_epochs": 5}),
        plan("live", {"batch_norm": "live"}, arguments={"sync_batchnorm": False}),
        plan(
            "fsdp",
            {},
            arguments={
                "module": "ShardedModule",
                "strategy": {"class": "ModelParallelStrategy", "data_parallel_size": 2, "tensor_parallel_size": 1},
            },
            raises=True,
        ),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), json.dumps(runs)],
        env=environment | {"LIGHTNING_TIPS_DEBUG": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("ddp", "again", "unused", "static", "views", "branching", "live"):
        assert first[name] == second[name], name
        assert first[name]["events"][0], name
    for name in ("again", "unused", "static", "views"):
        assert first[name] == first["ddp"], name
    assert first["gate"]["hash"] == second["gate"]["hash"]
    assert first["gate"]["events"] == second["gate"]["events"]
    assert len(first["gate"]["events"][0]) == 2
    assert "does not work with ModelParallelStrategy" in first["fsdp"]["error"]
    assert first["fsdp"]["steps"] == 0
