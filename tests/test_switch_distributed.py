"""The optimizer switch on two ranks: DDP, its variants, and FSDP2 on CPU.

Two processes train each of the two groups below in one go. With LIGHTNING_TIPS_DEBUG set they also check after each
switch that the ranks have the same parameters.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.core import parameter_hash

import worker
from harness import fit
from processes import on_two_ranks

AT_EPOCH = {"trigger": "epoch", "at": 2}
AT_STEP = {"trigger": "step", "at": 14, "lr": "auto"}  # in the middle of epoch 3
CHAIN = [
    {"trigger": "step", "at": 6},  # in the middle of epoch 1
    {
        "trigger": "epoch",
        "at": 4,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
        "warmup_steps": 3,
    },
]


def plan(name: str, *switches: dict[str, Any], resume: str = "", **arguments: Any) -> dict[str, Any]:
    """One run for the worker; a switch says what differs from the settings table's row."""
    arguments = {"max_epochs": 6, "devices": 2, "strategy": "ddp"} | arguments
    afterwards = {key: arguments.pop(key) for key in ("raises", "more", "validate") if key in arguments}
    return {
        "name": name,
        "tips": [["OptimizerSwitchCallback", {"at": None} | s] for s in switches],
        "arguments": arguments,
    } | ({"resume": resume} | afterwards)


def resumed(run: dict[str, Any], *steps: int) -> list[dict[str, Any]]:
    """The same run again from its checkpoints of these steps."""
    return [run | {"name": f"{run['name']}-from-{n}", "resume": checkpoint(run["name"], n)} for n in steps]


def checkpoint(name: str, step: int) -> str:
    return f"{name}/checkpoints/step-step={step}.ckpt"


def train(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the results of rank 0 and those of rank 1."""
    return on_two_ranks(folder, worker.run_all, runs)


# ---- DDP


def ddp_runs() -> list[dict[str, Any]]:
    at_step = plan("at-step", AT_STEP, keep=5)
    chain = plan("chain", *CHAIN, keep=9)
    return [
        plan("plateau", {"trigger": "plateau"}, module="UnevenModule"),
        plan("at-epoch", AT_EPOCH),
        at_step,
        *resumed(at_step, 5, 15),
        chain,
        *resumed(chain, 9, 18),
        plan("branching", AT_STEP, module="BranchingModule", strategy="ddp_find_unused_parameters_true"),
        plan("unused", AT_STEP, strategy="ddp_find_unused_parameters_true"),
        plan("static", AT_STEP, strategy={"class": "DDPStrategy", "static_graph": True}),
        plan("bucket-view", AT_STEP, strategy={"class": "DDPStrategy", "gradient_as_bucket_view": True}),
        plan("drift", AT_EPOCH, callbacks=["RanksDrift"], raises=True),
    ]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("ddp"), ddp_runs())


@pytest.mark.parametrize("name", [run["name"] for run in ddp_runs() if run["name"] not in ("plateau", "drift")])
def test_ddp_ranks_stay_equal(ddp, name: str) -> None:
    first, second = (rank[name] for rank in ddp)
    assert first == second
    assert all(first["events"])
    assert first["steps"] == 24


def test_ranks_that_see_different_metrics_switch_together(ddp) -> None:
    first, second = (dict(rank["plateau"]) for rank in ddp)
    assert first.pop("seen")[1:] == [1.0] * 6  # without the sanity check
    assert second.pop("seen")[1:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert first == second
    assert [event.split(":")[0] for event in first["events"][0]] == ["[optimizer] epoch 4, step 16"]
    assert first["optimizers"] == ["SGD"]


def test_step_trigger_switches_in_the_middle_of_an_epoch_at_the_projected_rate(ddp) -> None:
    (event,) = ddp[0]["at-step"]["events"][0]
    assert event.startswith("[optimizer] epoch 3, step 14: Adam -> SGD (lr ")
    rate, projected = (float(event.split(f"{name} ")[1].split(",")[0].rstrip(")")) for name in ("(lr", "swats_lr"))
    assert rate == projected
    # StepLR halves every three epochs: once before the switch, once at the end
    assert ddp[0]["at-step"]["rates"][0] == [pytest.approx(rate / 2, rel=1e-3)]


def test_chain_switches_twice(ddp) -> None:
    first, second = ddp[0]["chain"]["events"]
    assert first[0].startswith("[optimizer] epoch 1, step 6: Adam -> SGD")
    assert second[0].startswith("[optimizer] epoch 4, step 16: SGD -> AdamW")
    assert ddp[0]["chain"]["optimizers"] == ["AdamW"]


@pytest.mark.parametrize(
    ("run", "step"),
    [("at-step", 5), ("at-step", 15), ("chain", 9), ("chain", 18)],
    ids=["before", "after", "between", "in the warm-up after both"],
)
def test_ddp_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(ddp, run: str, step: int) -> None:
    for rank in ddp:
        assert rank[f"{run}-from-{step}"] == rank[run]


@pytest.mark.parametrize("variant", ["unused", "static", "bucket-view"])
def test_variants_of_ddp_train_the_same(ddp, variant: str) -> None:
    assert ddp[0][variant] == ddp[0]["at-step"]


def test_debug_mode_raises_on_every_rank_when_ranks_came_apart(ddp) -> None:
    assert ddp[0]["drift"]["hash"] != ddp[1]["drift"]["hash"]
    for rank in ddp:
        assert rank["drift"]["error"].startswith("RuntimeError: 1 of 2 ranks have other parameters than rank 0 after: ")


def test_spawned_processes_train_the_same(ddp, tmp_path: Path, capfd) -> None:
    # a lambda could not be sent to the processes
    switch = OptimizerSwitchCallback(partial(torch.optim.SGD, lr=0.05, momentum=0.9), **AT_EPOCH)
    trainer = fit(switch, folder=tmp_path, strategy="ddp_spawn", devices=2)
    assert parameter_hash(trainer.lightning_module) == ddp[0]["at-epoch"]["hash"]
    assert "epoch 2, step 8: Adam -> SGD" in capfd.readouterr().out


# ---- FSDP2


def fsdp_runs() -> list[dict[str, Any]]:
    strategy = {"class": "ModelParallelStrategy", "data_parallel_size": 2, "tensor_parallel_size": 1}
    whole = {"module": "ShardedModule", "strategy": strategy | {"save_distributed_checkpoint": False}}
    sharded = {"module": "ShardedModule", "strategy": strategy | {"save_distributed_checkpoint": True}}
    at_step = [plan("whole", AT_STEP, keep=5, **whole), plan("sharded", AT_STEP, keep=5, **sharded)]
    chain = plan("chain", *CHAIN, keep=9, **sharded)
    late = checkpoint("whole", 15)  # after the switch
    return [
        *(again for run in at_step for again in [run, *resumed(run, 5, 15)]),
        chain,
        *resumed(chain, 9, 18),
        plan("chain-ddp", *CHAIN, module="ShardedModule"),
        plan("goes-on", AT_EPOCH, more=2, **sharded),
        plan("goes-on-ddp", AT_EPOCH, more=2, module="ShardedModule"),
        plan("five-steps", AT_EPOCH, max_steps=5, **sharded),
        plan("validated-whole", AT_STEP, resume=late, keep=5, validate=checkpoint("whole", 5), **whole),
        plan("validated-sharded", AT_STEP, resume=late, keep=5, validate=checkpoint("sharded", 5), **sharded),
        plan("wrong", AT_STEP | {"at": 16}, resume=late, keep=5, raises=True, **whole),
    ]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("fsdp"), fsdp_runs())


def test_fsdp_ranks_agree(fsdp) -> None:
    assert fsdp[0] == fsdp[1]


def test_fsdp_switches_in_mid_epoch_at_the_projected_rate(fsdp) -> None:
    (event,) = fsdp[0]["whole"]["events"][0]
    assert event.startswith("[optimizer] epoch 3, step 14: Adam -> SGD (lr ")
    assert "swats_lr" in event
    assert fsdp[0]["whole"]["optimizers"] == ["SGD"]
    assert fsdp[0]["whole"]["steps"] == 24


def test_fsdp_trains_the_same_as_ddp(fsdp) -> None:
    assert fsdp[0]["chain"] == fsdp[0]["chain-ddp"]
    assert fsdp[0]["chain"]["optimizers"] == ["AdamW"]


@pytest.mark.parametrize("step", [5, 15], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_fsdp_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(fsdp, kind: str, step: int) -> None:
    assert fsdp[0][f"{kind}-from-{step}"] == fsdp[0]["whole"]


@pytest.mark.parametrize("step", [9, 18], ids=["between", "in the warm-up after both"])
def test_fsdp_chain_resumed_equals_the_uninterrupted_one(fsdp, step: int) -> None:
    assert fsdp[0][f"chain-from-{step}"] == fsdp[0]["chain"]


def test_fsdp_trainer_that_goes_on_keeps_the_new_optimizer(fsdp) -> None:
    assert fsdp[0]["goes-on"]["optimizers"] == ["SGD"]
    assert fsdp[0]["goes-on"] == fsdp[0]["goes-on-ddp"]


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_fsdp_validates_a_checkpoint_from_before_the_switch_after_it(fsdp, kind: str) -> None:
    result = fsdp[0][f"validated-{kind}"]
    assert result["hash"] == fsdp[0]["five-steps"]["hash"]
    assert result["momenta"] == fsdp[0]["whole"]["momenta"]  # the optimizer in use is left alone


def test_fsdp_refuses_a_checkpoint_of_another_optimizer(fsdp) -> None:
    error = fsdp[0]["wrong"]["error"]
    assert error.startswith("MisconfigurationException: The checkpoint was written after the switch of")
