"""What the tests of pruning share: modules of several makes, a residual network, and a callback with small numbers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tips import FilterPruningCallback

from harness import PlainData, PlainModule


class InnerModule(PlainModule):
    """Keeps its network in an attribute, calls it by name, and never calls its own ``forward``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        del self.features, self.head
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 12, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 10),
        )

    def forward(self, batch: Any) -> Tensor:
        raise AssertionError("nobody calls it")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(input=batch[0]), batch[1])
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])


class ManualModule(InnerModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, rest = list(self.net[0].parameters()), list(self.net[1:].parameters())
        return torch.optim.SGD(first, lr=0.05, momentum=0.9), torch.optim.Adam(rest, lr=1e-3)


class TogglingModule(InnerModule):
    """As in adversarial training: two networks, of which each step freezes one while the other learns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            self.toggle_optimizer(optimizer)
            images = batch[0] if optimizer is first else self.other(batch[0])
            loss = F.cross_entropy(self.net(images), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.Adam(self.other.parameters(), lr=1e-3)


class Scripted(PlainModule):
    """Logs the validation accuracy that it is told to, by epoch."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.scores[min(self.current_epoch, len(self.scores) - 1)])


class TestData(PlainData):
    __test__ = False

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    predict_dataloader = test_dataloader


def pruning(**changes: Any) -> FilterPruningCallback:
    arguments: dict[str, Any] = {"target": {"macs": 0.6}, "schedule": "linear", "steps": 2, "start_epoch": 1}
    return FilterPruningCallback(**arguments | {"samples": 64} | changes)


def widths(module: nn.Module) -> list[int]:
    return [layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def snapshots(tip: FilterPruningCallback) -> list[dict[str, Any]]:
    """What the module was before each step."""
    taken: list[dict[str, Any]] = []
    step = tip._step

    def noting(trainer: Any, module: Any, batches: Any) -> None:
        taken.append({k: v.clone() for k, v in module.state_dict().items()})
        step(trainer, module, batches)

    tip._step = noting  # type: ignore[method-assign]
    return taken


class Block(nn.Module):
    """A residual network with one block; functional and in-place calls as they come in the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(x)).relu_()
        out = self.bn3(self.conv3(out))
        out += x
        out = torch.relu(out)
        return self.head(self.drop(out.mean((2, 3))))


def network() -> Block:
    """With statistics and scales as after training."""
    torch.manual_seed(0)
    model = Block()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.constant_(module.running_var, 0.1)
    return model


BATCHES = [
    (torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3) for n in (4, 4, 2)
]
