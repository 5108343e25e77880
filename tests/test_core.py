"""What the tips stand on: batches, names, order and conflicts, agreement."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.core import (
    ActsOn,
    Event,
    LogitWatcher,
    ReplacedStep,
    TipCallback,
    TipMixin,
    did_you_mean,
    find_tips,
    parameter_hash,
    reason_of,
    split_batch,
)
from lightning_tips.data.pseudo_teacher import _inputs_of
from lightning_tips.ensemble.evaluated_module import EvaluatedModule

from harness import PlainData, PlainModule, build, every_epoch, fit


@pytest.mark.parametrize(
    "batch",
    [
        ("x", "y"),
        ["x", "y", "weights"],
        {"image": "x", "label": "y"},
        {"y": "y", "x": "x"},
        {"pixel_values": "x", "labels": "y", "ids": "z"},
    ],
)
def test_inputs_and_targets_are_found_in_any_batch(batch: Any) -> None:
    assert split_batch(batch) == ("x", "y")


def test_keys_can_be_given() -> None:
    assert split_batch({"scan": "x", "image": "?", "grade": "y"}, "scan", "grade") == ("x", "y")


def test_unknown_keys_say_what_to_pass() -> None:
    with pytest.raises(KeyError, match=r"\['grade', 'scan'\].*input_key"):
        split_batch({"scan": 1, "grade": 2})
    with pytest.raises(KeyError, match="Did you mean 'grade'"):
        split_batch({"image": 1, "grade": 2}, target_key="grades")
    with pytest.raises(TypeError, match="pairs or a dict"):
        split_batch(torch.zeros(3))


class Silent(dict):
    """Says nothing when it raises."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError


class Watcher(LogitWatcher):
    def watched(self, trainer, pl_module, seen) -> None:
        raise AssertionError


def test_errors_without_a_message_are_told_of() -> None:
    watcher = Watcher()
    watcher._outputs._logits = torch.zeros(1)
    ensemble = SimpleNamespace(_running=None, target_key=None)
    for look in (
        lambda: watcher.on_validation_batch_end(None, None, None, Silent(label=1), 0),
        lambda: _inputs_of(Silent(image=1), None),
        lambda: EvaluatedModule._evaluate(ensemble, "test_step", Silent(label=1), 0, 0, []),
    ):
        with pytest.raises(MisconfigurationException, match=r": KeyError\(\)"):
            look()
    assert reason_of(KeyError("no 'x'")) == "no 'x'"
    assert reason_of(FileNotFoundError(2, "No such file", "a.yaml")) == "[Errno 2] No such file: 'a.yaml'"


def test_wrong_names_are_answered_with_the_nearest() -> None:
    assert did_you_mean("val_los", ["val_loss", "val_acc"]) == "Did you mean 'val_loss'?"
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."
    assert did_you_mean("zzz", []) == "There are none."


def test_event_survives_as_plain_data() -> None:
    event = Event("pruning", "16 filters", 10, 2, {"macs": 0.5, "layer": "conv1", "done": False})
    assert Event.from_dict(event.to_dict()) == event
    assert event.numbers == {"macs": 0.5, "done": 0.0}
    assert str(event) == "[pruning] epoch 2, step 10: 16 filters (macs 0.5, layer conv1, done False)"


class Network(TipCallback):
    tip, acts_on = "network", ActsOn.NETWORK

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary

    def start_epoch(self, trainer: Any, pl_module: Any) -> None:
        self.diary.append(self.tip)


class Optimizer(Network):
    tip, acts_on = "optimizer", ActsOn.OPTIMIZER


class Data(Network):
    tip, acts_on = "data", ActsOn.DATA


class Bystander(Callback):
    pass


def test_tips_act_in_their_order_however_they_were_given(tmp_path: Path) -> None:
    diary: list[str] = []
    bystander = Bystander()
    given = [Data(diary), bystander, Optimizer(diary), Network(diary)]
    trainer = fit(*given, folder=tmp_path, max_epochs=1)
    assert diary == ["network", "optimizer", "data"]
    assert [type(tip).__name__ for tip in find_tips(trainer)] == ["Network", "Optimizer", "Data"]
    assert trainer.callbacks.index(bystander) == 1  # callbacks that are no tips keep their place


def test_tips_are_prepared_in_their_order_and_again_in_each_fit(tmp_path: Path) -> None:
    diary: list[str] = []

    class Early(Network):
        def prepare(self, trainer: Any, pl_module: Any) -> None:
            diary.append(f"prepare {self.tip}")

    class Late(Early):
        tip, acts_on = "late", ActsOn.DATA

    class Stops(Callback):
        armed = False

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if self.armed:
                raise RuntimeError("stop")

    stops = Stops()
    trainer, module = build(Late([]), Early([]), stops, folder=tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=PlainData())
    assert diary == ["prepare network", "prepare late"]
    trainer.fit_loop.max_epochs = 2
    stops.armed = True
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, datamodule=PlainData())
    stops.armed = False
    trainer.fit(module, datamodule=PlainData())
    assert diary == ["prepare network", "prepare late"] * 3


class CountingTip(TipCallback):
    tip, acts_on = "counting", ActsOn.DATA

    def __init__(self, word: str) -> None:
        self.word, self.resets = word, 0

    def reset(self) -> None:
        super().reset()
        self.resets += 1

    def start_epoch(self, trainer: Any, pl_module: Any) -> None:
        self.record(trainer, self.word)


class CountingMixin(TipMixin):
    def __init__(self, *args: Any, word: str = "hello", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bring(CountingTip(word))


class CountingData(CountingMixin, PlainData):
    def setup(self, stage: str) -> None:
        """Overrides without super, as users do."""


def test_mixin_takes_part_in_all_that_tips_do(tmp_path: Path, capsys) -> None:
    data = CountingData(word="hi")
    given = [Optimizer([]), every_epoch(tmp_path / "kept"), Data([])]
    trainer, module = build(*given, folder=tmp_path, max_epochs=2)
    trainer.fit(module, datamodule=data)
    (tip,) = data.tips
    assert [type(t).__name__ for t in find_tips(trainer)] == ["Optimizer", "Data", "CountingTip"]
    assert isinstance(trainer.callbacks[-1], ModelCheckpoint)
    assert [event.what for event in tip.events] == ["hi", "hi"]
    assert "CountingTip" in capsys.readouterr().out

    resumed = CountingData()
    checkpoint = tmp_path / "kept" / "epoch-epoch=0.ckpt"
    keep = every_epoch(tmp_path / "kept")
    fit(Optimizer([]), Data([]), keep, resumed, folder=tmp_path, max_epochs=3, ckpt_path=checkpoint)
    assert [event.what for event in resumed.tips[0].events] == ["hi", "hello", "hello"]

    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=PlainData())  # it leaves with its DataModule
    assert tip not in trainer.callbacks
    assert len(tip.events) == 2


def test_mixin_leaves_with_its_data_also_when_it_is_the_only_tip(tmp_path: Path) -> None:
    data = CountingData()
    (tip,) = data.tips
    trainer, module = build(data, folder=tmp_path, max_epochs=1)
    for use in (trainer.validate, trainer.fit):
        trainer.fit(module, datamodule=data)
        assert tip in trainer.callbacks
        use(module, datamodule=PlainData())
        assert tip not in trainer.callbacks


def test_a_tip_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="There are 2 CountingTip, and checkpoints cannot tell"):
        fit(CountingData(), CountingTip("again"), folder=tmp_path)


def test_mixin_comes_again_with_every_trainer(tmp_path: Path) -> None:
    data = CountingData()
    for _ in range(2):
        trainer = fit(data, folder=tmp_path, max_epochs=1)
        trainer.validate(trainer.lightning_module, datamodule=data, verbose=False)
        assert trainer.callbacks.count(data.tips[0]) == 1
        assert len(data.tips[0].events) == 1


def test_mixin_that_was_not_set_up_says_so(tmp_path: Path) -> None:
    class Forgetful(CountingMixin, PlainData):
        def __init__(self) -> None:
            PlainData.__init__(self)

    with pytest.raises(MisconfigurationException, match=r"Forgetful.*call super\(\).__init__\(\)"):
        fit(Forgetful(), folder=tmp_path)


def test_plan_and_events_are_shown_once_in_that_order(tmp_path: Path, capsys) -> None:
    fit(Data([]), Network([]), folder=tmp_path, max_epochs=1)
    shown = capsys.readouterr().out
    assert shown.count("Tips in the order in which they act") == shown.count("What the tips did") == 1
    assert shown.index("Network") < shown.index("Data")


def test_tips_that_cannot_work_together_are_refused_before_the_first_step(tmp_path: Path) -> None:
    class Jealous(Network):
        def conflict_with(self, other: object) -> str | None:
            return "it wants to be alone." if isinstance(other, Bystander) else None

    trainer, module = build(Jealous([]), Bystander(), folder=tmp_path)
    with pytest.raises(MisconfigurationException, match="Jealous and Bystander cannot work together: it wants"):
        trainer.fit(module, datamodule=PlainData())
    assert trainer.global_step == 0


def test_hash_tells_one_bit(tmp_path: Path) -> None:
    module = PlainModule()
    before = parameter_hash(module)
    assert before == parameter_hash(module)
    with torch.no_grad():
        bits = module.head.bias.view(torch.int32)
        bits[0] ^= 1
    assert parameter_hash(module) != before


def test_hash_takes_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert len(parameter_hash(torch.nn.Linear(2, 2).to(dtype))) == 32


def test_metric_of_a_rare_validation_is_waited_for(tmp_path: Path) -> None:
    # The first validation comes in the middle of the second epoch.
    switch = OptimizerSwitchCallback(trigger="plateau", patience=1)
    trainer = fit(switch, folder=tmp_path, max_epochs=4, check_val_every_n_epoch=None, val_check_interval=6)
    assert trainer.global_step == 16


def test_testing_another_checkpoint_does_not_rewind_a_tip(tmp_path: Path) -> None:
    switch = OptimizerSwitchCallback(trigger="epoch", at=2)
    trainer, module = build(switch, every_epoch(tmp_path / "kept"), folder=tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=PlainData())
    trainer.validate(module, datamodule=PlainData(), ckpt_path=tmp_path / "kept" / "epoch-epoch=0.ckpt", verbose=False)
    assert switch.switched
    assert len(switch.events) == 1


@pytest.mark.parametrize("first", [0, 1, 2])
def test_steps_that_are_replaced_together_leave_nothing_behind_in_whatever_order(first: int) -> None:
    class Strategy:
        def training_step(self, word: str) -> str:
            return word

    strategy: Any = Strategy()
    tips = [ReplacedStep(strategy, lambda step, word, own=own: own + step(word)) for own in "abc"]
    assert strategy.training_step("!") == "cba!"
    tips[first].remove()
    assert strategy.training_step("!") == "cba!".replace("abc"[first], "")
    for tip in tips:
        tip.remove()
    assert "training_step" not in vars(strategy)


def test_a_step_that_somebody_else_replaces_stays_his() -> None:
    strategy: Any = type("Strategy", (), {"training_step": lambda self, word: word})()
    inner = ReplacedStep(strategy, lambda step, word: "a" + step(word))
    below = strategy.training_step
    strategy.training_step = lambda word: "theirs " + below(word)
    outer = ReplacedStep(strategy, lambda step, word: "b" + step(word))
    assert strategy.training_step("!") == "btheirs a!"
    inner.remove()
    outer.remove()
    assert strategy.training_step("!") == "theirs !"
