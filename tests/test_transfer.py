"""Transfer learning: what trains, what stays as it is to the bit, and when that changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_transfer_phases import Stalls
from torch import nn

from lightning_tips import TransferLearningCallback
from lightning_tips.transfer import (
    Phase,
    changed_since,
    frozen_state,
    layer_groups,
    set_trainable,
)
from lightning_tips.transfer.freeze import modules_to_hold

import worker
from harness import STEPS_A_EPOCH, PlainModule, assert_same, bits, every_step, fit
from processes import on_two_ranks

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


# ---- two ranks


def test_two_ranks(tmp_path: Path) -> None:
    def plan(name: str, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
        arguments = {"max_epochs": 3, "devices": 2, "strategy": "ddp"} | more.pop("arguments", {})
        return {"name": name, "tips": [["TransferLearningCallback", changes]], "arguments": arguments} | more

    unused = {"strategy": "ddp_find_unused_parameters_true"}
    gate = {"schedule": "lp_ft", "monitor": "val_loss", "patience": 1, "phase_epochs": 1}
    long = {"schedule": "lp_ft", "phase_epochs": 3}
    runs = [
        plan("ddp", {}, arguments={"keep": 6}),
        plan("again", {}, arguments={"keep": 6}, resume="ddp/checkpoints/step-step=6.ckpt"),
        plan("unused", {}, arguments=unused),
        plan("static", {}, arguments={"strategy": {"class": "DDPStrategy", "static_graph": True}}),
        plan("views", {}, arguments={"strategy": {"class": "DDPStrategy", "gradient_as_bucket_view": True}}),
        plan("branching", {"schedule": "lp_ft"}, arguments=unused | {"module": "BranchingModule"}),
        plan("gate", gate, arguments={"module": "UnevenModule", "max_epochs": 5}),
        plan("live", {"batch_norm": "live"}, arguments={"sync_batchnorm": False}),
        plan("plain", long, arguments={"max_epochs": 4}),
        plan("cached", long | {"cache_features": True}, arguments={"max_epochs": 4}),
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
    first, second = on_two_ranks(tmp_path, worker.run_all, runs)
    for name in ("ddp", "again", "unused", "static", "views", "branching", "live", "cached"):
        assert first[name] == second[name], name
        assert first[name]["events"][0], name
    for name in ("again", "unused", "static", "views"):
        assert first[name] == first["ddp"], name
    assert first["cached"] == first["plain"]
    printed = "".join(path.read_text() for path in tmp_path.glob("printed-*.txt"))
    assert printed.count("samples' features") == 1  # of rank 0
    assert "not cached" not in printed
    assert first["gate"]["hash"] == second["gate"]["hash"]
    assert first["gate"]["events"] == second["gate"]["events"]
    assert len(first["gate"]["events"][0]) == 2
    assert "does not work with ModelParallelStrategy" in first["fsdp"]["error"]
    assert first["fsdp"]["steps"] == 0
