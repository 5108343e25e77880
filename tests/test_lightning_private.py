"""Private attributes still are what they are taken for: those of Lightning in `core/lightning_private*.py`, and
those of torch in `core/schedulers.py`."""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _METADATA_FILENAME
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.core.lightning_private import (
    SHARDED_METADATA,
    delay_static_graph_again,
    is_redirected,
    logging_step,
    starts_processes,
)
from lightning_tips.core.lightning_private_members import MemberRun, count_step, log_levels, run_members
from lightning_tips.core.lightning_private_scores import OldScores

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


def test_a_step_that_goes_through_a_wrapper_is_no_call_of_forward() -> None:
    from lightning.pytorch.strategies.strategy import _ForwardRedirection

    seen: list[bool] = []
    module = PlainModule()
    module.validation_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign]
    module.register_forward_pre_hook(lambda module, args: seen.append(is_redirected(module)))

    class Wrapper(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return module(*args)

    _ForwardRedirection()(Wrapper(), module, "validation_step", (torch.rand(2, 1, 8, 8), None), 0)
    assert seen == [True, False]  # the step, and the module's own forward in it
    module(torch.rand(2, 1, 8, 8))
    assert seen[2:] == [False]


def test_strategies_that_start_processes_say_so() -> None:
    assert [starts_processes(DDPStrategy(start_method=m)) for m in ("popen", "spawn", "fork")] == [False, True, True]


def test_a_member_runs_inside_another_trainer_without_leaving_a_trace(tmp_path: Path) -> None:
    trainer, parent = build(folder=tmp_path)
    trainer.strategy.connect(parent)
    member = TwoOptimizers()
    run = MemberRun(trainer, member, "member_0/", [])
    before = trainer.global_step
    assert isinstance(run.trainer, Trainer)
    assert run.trainer.lightning_module is member
    assert trainer.lightning_module is parent
    optimizers, _ = run.configure_optimizers()
    assert run.trainer.optimizers == optimizers
    assert not trainer.optimizers
    for optimizer in member.optimizers():
        assert optimizer._strategy.lightning_module is member
    run.trainer.should_stop = True
    assert not trainer.should_stop
    run.trainer.fit_loop.max_epochs = 9  # what is not the member's own is the Trainer's
    assert trainer.fit_loop.max_epochs == 9
    images, labels = PlainData().images[:4], PlainData().labels[:4]
    member.log = lambda *_, **__: None
    run.train((images, labels), 0)
    assert run.trainer.global_step == 2
    assert trainer.global_step == before == 0
    count_step(trainer)
    assert trainer.global_step == 1
    state = run.state_dict()
    again = MemberRun(trainer, TwoOptimizers(), "", [])
    again.load_state_dict(state)
    assert again.trainer.global_step == 2
    assert again.trainer.should_stop


def test_schedulers_of_members_are_stepped_by_the_epoch_loop(tmp_path: Path) -> None:
    trainer, parent = build(folder=tmp_path)
    trainer.strategy.connect(parent)
    told: list[Any] = []

    class Told:
        def update_schedulers(self, *args: Any, **kwargs: Any) -> None:
            told.append((args, kwargs))

    take_back = run_members(trainer, [Told()])
    trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    take_back()
    assert told == [(("epoch",), {"update_plateau_schedulers": True})]
    assert (
        trainer.fit_loop.epoch_loop.update_lr_schedulers.__func__
        is type(trainer.fit_loop.epoch_loop).update_lr_schedulers
    )


def test_keepers_of_scores_have_the_methods_that_wait_for_a_measurement(tmp_path: Path) -> None:
    keep, stop = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_train_steps=2), EarlyStopping("val_loss")
    trainer, module = build(keep, stop, folder=tmp_path)
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING
    assert not stop._should_skip_check(trainer)
    trainer.callback_metrics["val_loss"] = torch.tensor(1.0)
    scores = OldScores()
    scores.begin(trainer)
    assert scores.due == {keep.state_key}
    assert stop._should_skip_check(trainer)
    assert torch.isnan(keep._monitor_candidates(trainer)["val_loss"])
    keep._save_topk_checkpoint(trainer, keep._monitor_candidates(trainer))
    assert not keep.best_model_path
    trainer.callback_metrics["val_loss"] = torch.tensor(1.0)  # the same, measured anew
    assert not stop._should_skip_check(trainer)
    assert keep._monitor_candidates(trainer)["val_loss"] == 1
    again = OldScores()  # of another tip, released first
    again.begin(trainer)
    scores.release()
    assert stop._should_skip_check(trainer)
    again.release()
    for owner, methods in (
        (keep, ("_save_topk_checkpoint", "_monitor_candidates", "on_validation_end", "on_train_epoch_end")),
        (stop, ("_should_skip_check",)),
        (module, ("lr_scheduler_step",)),
    ):
        assert all(hasattr(owner, name) and name not in vars(owner) for name in methods)
    assert list(inspect.signature(keep._save_topk_checkpoint).parameters) == ["trainer", "monitor_candidates"]
    assert list(inspect.signature(keep._save_last_checkpoint).parameters) == ["trainer", "monitor_candidates"]
    assert keep._last_global_step_saved == 0
    assert (keep._every_n_train_steps, keep._train_time_interval) == (2, None)
    for at_epoch_end in (True, False):
        asked = ModelCheckpoint(tmp_path, save_on_train_epoch_end=at_epoch_end)
        assert asked._should_save_on_train_epoch_end(trainer) is at_epoch_end


def test_a_deep_copy_of_a_keeper_of_scores_acts_for_itself(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer, module = build(keep, folder=tmp_path)
    trainer.strategy.connect(module)
    trainer.state.fn = TrainerFn.FITTING
    trainer.callback_metrics["val_loss"] = torch.tensor(1.0)
    scores = OldScores()
    scores.begin(trainer)
    copied = copy.deepcopy(keep)
    copied._save_topk_checkpoint(trainer, copied._monitor_candidates(trainer))
    assert not copied.best_model_path  # it waits as well
    scores.release()
    saved: list[str] = []
    trainer.save_checkpoint = lambda path, *_: saved.append(path)  # type: ignore[method-assign]
    copied._save_topk_checkpoint(trainer, copied._monitor_candidates(trainer))
    assert saved == [copied.best_model_path]
    assert not keep.best_model_path


def test_levels_of_logging_are_those_of_the_hook() -> None:
    module = PlainModule()
    for hook, levels in (("training_step", (True, False)), ("validation_step", (False, True))):
        module._current_fx_name = hook
        assert log_levels(module, None, None) == levels
    assert log_levels(module, True, None) == (True, True)
