"""Which network is pruned, what it is called with, and that looking for it leaves no trace."""

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.utils import ModelEma
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from harness import PlainData, PlainModule, fit
from prunable import InnerModule, pruning, widths


class Taught(InnerModule):
    """Asks a teacher first, which is a larger network."""

    def __init__(self, frozen: bool, evaluates: bool) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 3))
        self.teacher.requires_grad_(not frozen)
        self.evaluates = evaluates

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.teacher.train(not self.evaluates)
        with torch.set_grad_enabled(not self.teacher[0].weight.requires_grad):
            taught = self.teacher(batch[0]).mean((2, 3)).detach()
        return F.cross_entropy(self.net(batch[0]), batch[1]) + 0.01 * F.mse_loss(self.net(batch[0]), taught)


@pytest.mark.parametrize("evaluates", [False, True], ids=["training", "eval"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "no_grad"])
def test_a_teacher_that_is_called_first_is_not_meant(frozen: bool, evaluates: bool, tmp_path: Path) -> None:
    tip = pruning(start_epoch=0)
    trainer = fit(tip, Taught(frozen, evaluates), folder=tmp_path, max_epochs=2)
    assert tip.found is not None
    assert tip.found[0] == "net"
    assert widths(trainer.lightning_module.teacher) == [16, 10]


class Features(PlainModule):
    """Trains a linear head on what a frozen network gives."""

    def __init__(self, gradients: bool = True, recomputes: bool = False) -> None:
        super().__init__()
        self.features.requires_grad_(recomputes)
        self.gradients, self.recomputes = gradients, recomputes

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("nobody calls it")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.set_grad_enabled(self.gradients):
            if self.recomputes:
                features = checkpoint(self.features, batch[0].requires_grad_(), use_reentrant=True)
            else:
                features = self.features(batch[0])
        return F.cross_entropy(self.head(features.mean((2, 3))), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""


def test_the_only_network_may_be_frozen_for_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tip = pruning()
    fit(tip, Features(), folder=tmp_path)
    assert tip.found is not None
    assert (tip.found[0], len(tip.events)) == ("features", 2)
    assert "prunes 'features', though nothing in it trains now" in capsys.readouterr().out


def test_a_network_without_gradients_is_pruned_only_if_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="calls 'features' without gradients"):
        fit(pruning(), Features(gradients=False), folder=tmp_path)
    tip = pruning(module="features")
    fit(tip, Features(gradients=False), folder=tmp_path)
    assert len(tip.events) == 2


def test_a_network_that_is_checkpointed_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tip = pruning()
    fit(tip, Features(recomputes=True), folder=tmp_path)
    assert tip.found is not None
    assert (tip.found[0], len(tip.events)) == ("features", 2)
    assert "though" not in capsys.readouterr().out


class Careless(InnerModule):
    """Changes its batch and itself before it calls the network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[float] = []
        self.calls = 0
        self.running = torch.zeros(2)
        self.matrix = torch.eye(2).to_sparse()
        self.latest_ones: deque[int] = deque(maxlen=3)
        self.by_epoch: dict[int, list[int]] = {0: [], 1: []}
        self.generator = torch.Generator().manual_seed(1)
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.matrix.mul_(2)
        self.latest_ones.append(batch_idx)
        self.by_epoch[self.current_epoch].append(batch_idx)
        self.drawn.append(torch.rand((), generator=self.generator).item())
        images = batch.pop("images").div_(8)
        self.steps += 1
        self.calls += 1
        self.running += 1
        self.latest = images
        self.seen.append(images.abs().max().item())
        self.log("steps", self.steps, reduce_fx="sum", on_epoch=True)
        return F.cross_entropy(self.net(images), batch.pop("labels"))


def test_a_step_may_change_its_batch_and_itself(tmp_path: Path) -> None:
    class Named(PlainData):
        def train_dataloader(self) -> Any:
            samples = [
                {"images": image, "labels": label} for image, label in zip(self.images, self.labels, strict=True)
            ]
            return DataLoader(samples, batch_size=8)

    def run(*tips: Any) -> tuple[Careless, Any]:
        torch.manual_seed(0)
        module = Careless()
        trainer = fit(*tips, module, Named(), folder=tmp_path, num_sanity_val_steps=0, max_epochs=2)
        return module, trainer.callback_metrics["steps"]

    (plain, logged), tip = run(), pruning(start_epoch=1, schedule="one_shot")
    watched, logged_beside = run(tip)
    assert len(tip.events) == 1
    assert watched.seen == plain.seen
    assert (watched.calls, float(watched.steps), logged_beside) == (plain.calls, float(plain.steps), logged)
    assert torch.equal(watched.running, plain.running)
    assert torch.equal(watched.matrix.to_dense(), plain.matrix.to_dense())
    assert (watched.latest_ones, watched.by_epoch, watched.drawn) == (plain.latest_ones, plain.by_epoch, plain.drawn)
    assert torch.equal(watched.latest, plain.latest)


class Options(nn.Module):
    """Takes any arguments by name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, **options: float) -> Tensor:
        assert set(options) <= {"scale"}, options
        return self.net(images) * options["scale"]


class Several(Options):
    """Takes any number of images."""

    def forward(self, *images: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return self.net(images[0]) * scale


@pytest.mark.parametrize("kind", [Options, Several])
def test_arguments_by_name(kind: type[Options], tmp_path: Path) -> None:
    class Called(InnerModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = kind(self.net)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0], scale=2.0), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Nothing."""

    if kind is Several:
        with pytest.raises(MisconfigurationException, match="'images' by position only, and with scale by name"):
            fit(pruning(), Called(), folder=tmp_path)
    tip = pruning(**{"module": "net.net"} if kind is Several else {})
    fit(tip, Called(), folder=tmp_path)
    assert len(tip.events) == 2


class Logging(PlainModule):
    """Logs by step in its forward."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.training:
            self.log("size", logits.abs().mean(), on_step=True, on_epoch=False)
            self.log_dict({"largest": logits.abs().max()}, on_step=True, on_epoch=False)
        return logits


def test_a_forward_that_logs_is_run_apart_without_logging(tmp_path: Path) -> None:
    tip = pruning(distill=1.0)
    trainer = fit(tip, Logging(), folder=tmp_path)
    assert len(tip.events) == 2
    assert {"size", "largest"} <= trainer.callback_metrics.keys()  # in training it logs as before
    assert "log" not in vars(trainer.lightning_module)


class TwoNetworks(InnerModule):
    """``forward`` is one of two networks; the other's layers could read the first one's, by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.net)

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_layers_that_others_may_read_are_told_from_those_that_somebody_protects(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"net.0 by other.3, for example\). .* module='net'"):
        fit(pruning(), TwoNetworks(), folder=tmp_path)
    tip = pruning(module="net")
    fit(tip, TwoNetworks(), folder=tmp_path)
    assert len(tip.events) == 2


class Averaging(InnerModule):
    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.net)


class OwnAverage(Callback):
    def __init__(self, average: Callable[[nn.Module], Any]) -> None:
        self.average = average

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.mean = self.average(pl_module)


def test_averages_of_the_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Averaging\.average averages the network's weights"):
        fit(pruning(), Averaging(), folder=tmp_path)
    for average in (AveragedModel, lambda module: AveragedModel(module.net[0]), lambda module: ModelEma(module.net)):
        with pytest.raises(MisconfigurationException, match=r"OwnAverage\.mean averages the network's weights"):
            fit(pruning(), OwnAverage(average), InnerModule(), folder=tmp_path)


def test_what_may_be_an_average_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(pruning(), OwnAverage(lambda module: copy.deepcopy(module.net)), InnerModule(), folder=tmp_path)
    assert "OwnAverage.mean has the network's shapes, and keeps them" in capsys.readouterr().out


class Iterating(InnerModule):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, number, _ = next(dataloader_iter)
        return super().training_step(batch, number)


class NoForward(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = InnerModule().net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        pytest.param(
            *(Iterating, {}, "dataloader_iter by itself. Let it take a batch"),
            marks=pytest.mark.filterwarnings("ignore:.*dataloader_iter"),
        ),
        (NoForward, {"example_inputs": [2, 1, 8, 8]}, "whole NoForward, which has no forward. Name the network"),
    ],
)
def test_what_nobody_can_see_is_refused(module: type, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(pruning(**changes), module(), folder=tmp_path)
