"""What pruning refuses, before the first step and with what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import LayerPruningCallback, TransferLearningCallback

from harness import PlainModule, assert_same, fit
from prunable import pruning


@pytest.mark.parametrize(
    "other",
    [
        lambda: EMAWeightAveraging(),
        lambda: StochasticWeightAveraging(swa_lrs=1e-2),
        lambda: ModelPruning("l1_unstructured", amount=0.5),
        lambda: TransferLearningCallback("lp_ft", l2_sp=0.1),
    ],
    ids=["ema", "swa", "masks", "l2_sp"],
)
def test_who_keeps_shapes_is_refused(other: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="cannot work together"):
        fit(pruning(), other(), folder=tmp_path)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "fsdp", "fsdp2"])
def test_strategies_that_cannot_are_refused(strategy: str, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

    from lightning_tips.pruning.fit.checks import check_run

    sharded: dict[str, Any] = {"fsdp": FSDPStrategy, "fsdp2": ModelParallelStrategy}
    made = sharded[strategy]() if strategy in sharded else DDPStrategy(start_method=strategy[4:])  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"does not work with"):
        check_run(SimpleNamespace(strategy=made), pruning())  # type: ignore[arg-type]


class NoConvolution(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Flatten()
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Functional(PlainModule):
    """Calls no module."""

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.features[0].weight
        return F.conv2d(batch[0], weight).mean() ** 2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Smooth(PlainModule):
    """Without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.features[2] = nn.GELU()


class ScriptedNetwork(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.jit.script(self.features)


def mine(name: str, layer: nn.Module) -> Tensor:
    raise RuntimeError("no idea")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "module", "message"),
    [
        ({}, NoConvolution, "no convolution"),
        ({}, ScriptedNetwork, "a scripted network cannot be pruned"),
        ({"criterion": "apoz"}, Smooth, "apoz counts zeros after a ReLU, but gelu follows features.0"),
        ({"criterion": mine}, PlainModule, "The criterion mine fails for features.0: RuntimeError: no idea$"),
        ({}, Functional, "did not find what the network is called with"),
        ({"module": "features.9"}, PlainModule, "no submodule 'features.9'"),
        ({"target": {"params": 100000}}, PlainModule, "met already"),
        ({"target": {"macs": 0.001}}, PlainModule, "cannot be reached"),
        ({"plan": {"protect": ["features.x"]}}, PlainModule, "features.x"),
        ({"example_inputs": torch.rand(2, 3, 8, 8)}, PlainModule, "does not run"),
    ],
)
@pytest.mark.parametrize("sanity", [0, 1])
def test_what_cannot_work_is_said_before_the_first_step(
    changes: dict[str, Any], module: type, message: str, sanity: int, tmp_path: Path
) -> None:
    made: LightningModule = module()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(pruning(**changes), made, folder=tmp_path, num_sanity_val_steps=sanity)
    assert_same(dict(made.state_dict()), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"criterion": "l3"},
        {"target": {}},
        {"target": {"flops": 0.5}},
        {"target": {"macs": 0}},
        {"target": {"latency": 2.0}},
        {"target": {"macs": 1.5}},
        {"target": {"params": 50}},  # per cent?
        {"target": {"filters": 1.5}},
        {"filters_per_step": 0},
        {"filters_per_step": 1.5},
        {"schedule": "square"},
        {"steps": 0},
        {"start_epoch": -1},
        {"mode": "top"},
        {"on_drop": "cry"},
        {"distill": -1},
        {"temperature": 0},
        {"samples": 1},
        {"plan": {"flor": 0.2}},
        {"end_epoch": 0},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]):
        pruning(**changes)


def test_a_share_above_one_is_taken_for_a_mistake() -> None:
    for tip in (pruning, LayerPruningCallback):
        with pytest.raises(ValueError, match="For a share write one below 1"):
            tip(target={"macs": 1.5})
    assert pruning(target={"filters": 40}).target == {"filters": 40}
    assert LayerPruningCallback(target={"params": 1000}).target == {"params": 1000}


def test_an_optimizer_with_one_state_for_all_is_refused(tmp_path: Path) -> None:
    class Quasi(PlainModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.01)

    with pytest.raises(MisconfigurationException, match="LBFGS, which keeps its history"):
        fit(pruning(), Quasi(), folder=tmp_path)
