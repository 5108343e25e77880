"""What tests of the optimizer switch train, and what they ask it."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as S

from lightning_tips import OptimizerSwitchCallback as Switch

from harness import PlainData, PlainModule

SHORT: dict[str, Any] = {"limit_train_batches": 1, "limit_val_batches": 1}  # an epoch is one step


class Scripted(PlainModule):
    """Logs what the test says, by the number of steps done, and has the optimizers that the test says."""

    def __init__(self, script: Callable[[int], float] = lambda step: 1.0, configure: Any = None, key: str = "val_loss"):
        super().__init__(scheduler=False)
        self.script, self.configure, self.key = script, configure, key

    def training_step(self, batch, batch_idx):
        if self.key == "train_metric":
            self.log("train_metric", self.script(self.global_step), on_step=False, on_epoch=True)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_other", 0.0)
        if self.key != "train_metric":
            self.log(self.key, self.script(self.global_step))

    def configure_optimizers(self):
        return self.configure(self) if self.configure else super().configure_optimizers()


class Gan(PlainModule):
    """Manual optimization of two optimizers in turn; steps its own schedulers."""

    def __init__(self, scheduler: Any = lambda o: S.StepLR(o, 1, gamma=0.5), keeps: str = "") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_scheduler, self.keeps, self.kept = scheduler, keeps, None

    def configure_optimizers(self):
        optimizers = [Adam(self.features.parameters(), lr=1e-3), Adam(self.head.parameters(), lr=2e-3)]
        if self.keeps == "torch optimizer":
            self.kept = optimizers[0]
        return optimizers, [self.make_scheduler(o) for o in optimizers]

    def training_step(self, batch, batch_idx):
        if self.keeps == "Lightning optimizer" and self.kept is None:
            self.kept = self.optimizers()[0]
        for i, optimizer in enumerate(self.optimizers()):
            optimizer = self.kept if i == 0 and self.kept is not None else optimizer
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()


class Trace(Callback):
    """What each optimizer step really was: (optimizer's class, its rate). Stands behind the switch in the list."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []
        self.hooked: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for optimizer in trainer.optimizers:
            if not any(optimizer is known for known in self.hooked):
                self.hooked.append(optimizer)
                optimizer.register_step_pre_hook(
                    lambda o, *_: self.steps.append((type(o).__name__, o.param_groups[0]["lr"]))
                )

    def rates(self, name: str = "SGD") -> list[float]:
        return [rate for kind, rate in self.steps if kind == name]


def sgd(params: Any, lr: float = 0.05) -> SGD:
    return SGD(params, lr=lr, momentum=0.9)


def when(tip: Switch) -> tuple[int, int] | None:
    """Epoch and step of the one event."""
    assert len(tip.events) <= 1
    return (tip.events[0].epoch, tip.events[0].step) if tip.events else None


def kinds(trainer: Trainer) -> list[str]:
    return [type(o).__name__ for o in trainer.optimizers]


def long_epochs() -> dict[str, Any]:
    data = PlainData(batch_size=1)
    data.train_dataloader = lambda: type(data.val_dataloader())(data.images[:150], data.labels[:150], 1, True)
    return {"data": data, "max_epochs": 3, "limit_val_batches": 1}


def watched_sgd(rate: float) -> Callable[[LightningModule], SGD]:
    return lambda module: SGD(module.parameters(), lr=rate)
