"""The phases of a transfer: what ends them, plans in yaml, and what is told of a plan that makes no sense."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips import TransferLearningCallback
from lightning_tips.transfer import (
    Phase,
    layer_groups,
    preset_phases,
    read_plan,
)
from lightning_tips.transfer.progress import Gate

from harness import STEPS_A_EPOCH, PlainModule, build, fit
from settings import SETTINGS, make


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
        ([{"lr": "fast"}], "lr='fast'"),
        ([{"epochs": 1.5}], "epochs=1.5"),
        ([{"train": None}], "trains nothing"),
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
        ({"phase_epochs": 1.5}, "phase_epochs=1.5"),
        ({"fine_tune_lr": 0.0}, "no learning rate"),
        ({"fine_tune_lr": "3e-4"}, "no learning rate"),
        ({"l2_sp": float("inf")}, "l2_sp=inf"),
        ({"mode": "least"}, "must be 'min' or 'max'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransferLearningCallback(**arguments)


def test_plan_as_people_write_it(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("phases:\n  - {train: 3, epochs: 1, lr: 3e-4}\n  - {name: b, train: [4, head], l2_sp: 1e-2}\n")
    first, second = read_plan(str(plan))
    assert (first.train, first.lr, second.train, second.l2_sp) == (["3"], 3e-4, ["4", "head"], 1e-2)
    plan.write_text("- {train: [head")
    with pytest.raises(ValueError, match=r"(?s)plan.yaml is no yaml: .*line 1"):
        TransferLearningCallback(str(plan))
    with pytest.raises(ValueError, match="neither a file nor known by name"):
        TransferLearningCallback(str(tmp_path))


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


@pytest.mark.parametrize(("epochs", "warns"), [(4, True), (5, False)])
def test_warns_of_a_metric_that_cannot_decide_in_time(epochs: int, warns: bool, tmp_path: Path) -> None:
    tip = TransferLearningCallback(monitor="val_loss", patience=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tip, folder=tmp_path, max_epochs=epochs, limit_train_batches=1, limit_val_batches=1)
    assert any("'fine-tune' never begins: it would in epoch 4" in str(w.message) for w in caught) == warns


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"monitor": "val_loss"}, "monitor 'val_loss' make no difference"),
        ({"epochs": 1}, "1 epochs make no difference"),
        ({"epochs": 2}, ""),
        ({"epochs": 2, "start": 1}, ""),
    ],
)
def test_warns_of_an_end_after_which_nothing_comes(last: dict[str, Any], message: str, tmp_path: Path) -> None:
    tip = TransferLearningCallback([{"epochs": 1}, {"name": "b", "train": "all"} | last])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tip, folder=tmp_path, max_epochs=3, limit_train_batches=1, limit_val_batches=1)
    said = [str(w.message) for w in caught if "The last phase" in str(w.message)]
    assert len(said) == bool(message)
    assert not said or message in said[0]


def test_warns_of_arguments_that_are_not_read() -> None:
    with pytest.warns(UserWarning, match="'head_only' does not look at monitor, fine_tune_lr, layer_decay"):
        TransferLearningCallback("head_only", monitor="val_loss", fine_tune_lr=0.1, layer_decay=0.5, probe_l2=0.1)
    with pytest.warns(UserWarning, match="does not look at patience"):
        TransferLearningCallback([Phase()], patience=7)
