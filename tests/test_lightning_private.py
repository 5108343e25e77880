"""Private attributes still are what they are taken for: those of Lightning in `core/lightning_private.py`, and those of
torch in `core/schedulers.py`."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _METADATA_FILENAME
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.core.lightning_private import (
    SHARDED_METADATA,
    change_train_loaders,
    delay_static_graph_again,
    epoch_of_samplers,
    logging_step,
    with_sampler,
)

from harness import STEPS_A_EPOCH, PlainData, PlainModule, build, fit


class TwoOptimizers(PlainModule):
    """Steps two optimizers a batch, which `global_step` counts as two steps and Lightning's loggers as one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.log("step_loss", loss)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.features, self.head)]


class Notebook(Logger):
    """Writes down what is logged under which step."""

    name, version = "notebook", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines += [(name, step) for name in metrics]

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class AsksAtValidation(Callback):
    def __init__(self) -> None:
        self.answers: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.answers.append(logging_step(trainer))


def test_logging_step_is_the_one_that_lightning_logs_under(tmp_path: Path) -> None:
    notebook, asks, switch = Notebook(), AsksAtValidation(), OptimizerSwitchCallback(trigger="epoch", at=2)
    arguments = {"module": TwoOptimizers(), "logger": notebook, "log_every_n_steps": 1, "max_epochs": 3}
    fit(switch, asks, folder=tmp_path, **arguments)
    steps = {name: [step for other, step in notebook.lines if other == name] for name, _ in notebook.lines}
    assert asks.answers == steps["val_loss"]
    assert asks.answers[-1] in (3 * STEPS_A_EPOCH - 1, 3 * STEPS_A_EPOCH)  # batches, not optimizer steps
    # Between the last batch before the switch and the first after it, so that no logger drops the event.
    before, after = (steps["step_loss"][2 * STEPS_A_EPOCH - 1], steps["step_loss"][2 * STEPS_A_EPOCH])
    assert before <= steps["tips/optimizer"][0] <= after
    assert [step for _, step in notebook.lines] == sorted(step for _, step in notebook.lines)


def test_metadata_file_of_a_sharded_checkpoint() -> None:
    assert SHARDED_METADATA == _METADATA_FILENAME


def test_static_graph_delay_of_ddp_is_still_a_flag_that_starts_unset() -> None:
    strategy = DDPStrategy(accelerator=CPUAccelerator())
    assert strategy._pl_static_graph_delay_done is False
    strategy._pl_static_graph_delay_done = True
    delay_static_graph_again(strategy)
    assert strategy._pl_static_graph_delay_done is False


def test_parts_of_torch_schedulers_that_are_copied_to_another_optimizer() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    kinds = torch.optim.lr_scheduler
    parts = [kinds.ConstantLR(optimizer), kinds.ExponentialLR(optimizer, 0.9)]
    for compound in (kinds.SequentialLR(optimizer, parts, [2]), kinds.ChainedScheduler(parts)):
        assert list(compound._schedulers) == parts
        assert compound.get_last_lr() == compound._last_lr
    plateau = kinds.ReduceLROnPlateau(optimizer)
    plateau.step(1.0)
    plateau._reset()
    assert (plateau.best, plateau.num_bad_epochs) == (float("inf"), 0)
    assert plateau.get_last_lr() == plateau._last_lr


class OwnLoader(DataLoader):
    """A subclass with an argument of its own."""

    def __init__(self, dataset: Any, colour: str, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self.colour = colour


def test_train_loaders_pass_through_a_change_and_no_more_after_it_was_taken_back(tmp_path: Path) -> None:
    seen: list[str] = []
    change = {"undo": lambda: None}

    class Changes(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            change["undo"] = change_train_loaders(
                trainer, lambda loaders: seen.append(type(loaders).__name__) or loaders
            )

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            change["undo"]()

    trainer = fit(Changes(), folder=tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    assert trainer.global_step == 2 * STEPS_A_EPOCH
    assert seen == ["ResumableLoader"]


def test_loader_keeps_its_class_and_arguments_with_another_sampler(tmp_path: Path) -> None:
    loaders: list[DataLoader] = []

    class Own(PlainData):
        def train_dataloader(self) -> DataLoader:
            return OwnLoader(super().train_dataloader().dataset, colour="red", batch_size=32, drop_last=True)

    class Changes(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            def change(loader: Any) -> Any:
                loaders.append(with_sampler(loader, SequentialSampler(range(64))))
                return loaders[-1]

            change_train_loaders(trainer, change)

    trainer = fit(Changes(), folder=tmp_path, data=Own(), max_epochs=1)
    (loader,) = loaders
    assert (type(loader), loader.colour, loader.batch_size, loader.drop_last) == (OwnLoader, "red", 32, True)
    assert trainer.global_step == 2


def test_epoch_of_samplers_is_the_one_that_lightning_sets(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []

    class Listens(DistributedSampler):
        def set_epoch(self, epoch: int) -> None:
            said.append((epoch, epoch_of_samplers(run[0])))

    class Own(PlainData):
        def train_dataloader(self) -> DataLoader:
            dataset = super().train_dataloader().dataset
            return DataLoader(dataset, 32, sampler=Listens(dataset, num_replicas=1, rank=0))

    run = build(folder=tmp_path, max_epochs=3)
    run[0].fit(run[1], datamodule=Own())
    assert said == [(0, 0), (1, 1), (2, 2)]
