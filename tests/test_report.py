"""What remains of a run: events in every logger and in the summary, and the report in its folder."""

import csv
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from torch.optim.lr_scheduler import ConstantLR

from lightning_tips import BatchAugmentationCallback, RunReportCallback
from lightning_tips import OptimizerSwitchCallback as Switch
from lightning_tips.core.events import Event
from lightning_tips.core.plot import plot_run

from harness import PlainData, assert_same, build, every_epoch, fit
from switching import Gan, Scripted, sgd

EXPECTED = {"tips/optimizer": 1.0, "tips/optimizer/lr": 0.05, "tips/optimizer/from_lr": 0.001}


def switch(**arguments: Any) -> Switch:
    return Switch(sgd, **{"trigger": "epoch", "at": 2} | arguments)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, from W&B's offline file: LevelDB's log format (7 bytes of header, blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    def records() -> Iterator[bytes]:
        data, position, whole = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            length, kind = struct.unpack_from("<HB", data, position + 4)
            whole += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a full record, or the last piece of one
                yield whole
                whole = b""

    rows = []
    for raw in records():
        record = Record.FromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def whole_history(file: Path, seconds: float = 60) -> list[dict[str, Any]]:
    """The history once W&B has written it: its process may still be at it when `finish` returns."""
    from google.protobuf.message import DecodeError

    deadline = time.monotonic() + seconds
    while True:
        try:
            rows = history(file)
        except DecodeError:  # the last record is half written
            rows = []
        if any(key.startswith("tips/run") for row in rows for key in row) or time.monotonic() > deadline:
            return rows
        time.sleep(0.1)


def test_an_event_is_recorded_and_printed_once_and_listed_in_the_summary(tmp_path, capsys):
    tip = switch()
    fit(tip, folder=tmp_path)
    printed = capsys.readouterr().out
    assert [(e.what, e.epoch, e.step) for e in tip.events] == [("Adam -> SGD", 2, 8)]
    assert printed.count("[optimizer] epoch 2, step 8: Adam -> SGD (lr 0.05, from_lr 0.001") == 1
    summary = printed[printed.index("What the tips did") :]
    assert summary.count("Adam -> SGD") == 1


def test_events_in_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(switch(), folder=tmp_path, logger=logger, log_every_n_steps=1)
    rows = rows_of(Path(logger.log_dir, "metrics.csv"))
    (event,) = [row for row in rows if row["tips/optimizer"]]
    assert event["step"] == "8"
    assert {key: float(event[key]) for key in EXPECTED} == EXPECTED


def test_events_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(switch(), RunReportCallback(), folder=tmp_path, logger=logger, log_every_n_steps=1)
    written = EventAccumulator(logger.log_dir).Reload()
    for key, value in EXPECTED.items():
        assert [(e.step, e.value) for e in written.Scalars(key)] == [(8, pytest.approx(value))]
    assert len(written.Images("tips/run")) == 1


@pytest.mark.parametrize("module", [Scripted, lambda: Gan(scheduler=lambda o: ConstantLR(o, 1.0))])
def test_events_in_wandb(module, tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.experiment  # noqa: B018  makes the run
    tips = [switch(), BatchAugmentationCallback("light"), RunReportCallback()]
    fit(*tips, folder=tmp_path, logger=logger, log_every_n_steps=1, module=module())
    logger.experiment.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = whole_history(file)
    (event,) = [row for row in rows if "tips/optimizer" in row]
    assert {key: pytest.approx(event[key]) for key in EXPECTED} == EXPECTED
    assert event["trainer/global_step"] == 8  # Lightning logs by batches; global_step is 16 with two optimizers
    steps = [row["trainer/global_step"] for row in rows if "trainer/global_step" in row]
    assert steps == sorted(steps)
    assert steps[-1] >= 23
    assert len([row for row in rows if "tips/events" in row or "tips/events/_type" in row]) == 1
    assert any(key.startswith("tips/run") for row in rows for key in row)
    (sheet,) = [row for row in rows if any(key.startswith("tips/augmentation/preview") for key in row)]
    assert sheet["trainer/global_step"] == 0  # before the first step
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/tips/augmentation/preview*.png")
    assert imread(picture)[..., :3].std() > 0.05, "an empty picture"


def test_report_leaves_a_plot_the_metrics_and_the_events(tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    tip = switch()
    fit(RunReportCallback(), tip, folder=tmp_path, logger=logger)
    folder = Path(logger.log_dir, "tips")
    assert sorted(path.name for path in folder.iterdir()) == ["events.json", "metrics.csv", "run.png"]
    picture = imread(folder / "run.png")[..., :3]
    assert picture.std() > 0.05, "an empty picture"
    assert json.loads((folder / "events.json").read_text()) == [event.to_dict() for event in tip.events]
    rows = rows_of(folder / "metrics.csv")
    assert [float(row["epoch"]) for row in rows] == list(range(6))
    assert [float(row["step"]) for row in rows] == [4.0 * epoch for epoch in range(1, 7)]
    assert {"train_loss", "val_loss", "val_acc", "lr/0"} <= rows[0].keys()
    assert [float(row["lr/0"]) for row in rows[:3]] == [0.001, 0.001, 0.025]  # PlainModule halves it after 3 epochs
    assert "The run's report is in" in capsys.readouterr().out


def test_report_without_a_plot_and_without_a_logger(tmp_path):
    fit(RunReportCallback(plot=False), switch(), folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "tips").iterdir()) == ["events.json", "metrics.csv"]


def test_report_of_a_run_whose_metric_is_nan(tmp_path):
    fit(RunReportCallback(), switch(), folder=tmp_path, module=Scripted(lambda step: float("nan")))
    assert (tmp_path / "tips" / "run.png").exists()


def test_report_of_an_interrupted_run(tmp_path):
    class Interrupts(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyboardInterrupt

    trainer, module = build(switch(), RunReportCallback(), Interrupts(), folder=tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, datamodule=PlainData())
    assert len(rows_of(tmp_path / "tips" / "metrics.csv")) == 3
    assert len(json.loads((tmp_path / "tips" / "events.json").read_text())) == 1


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_the_report_of_a_resumed_run_shows_all_of_it(epoch, tmp_path):
    def run(folder: str, ckpt_path: Path | None = None) -> list[dict[str, str]]:
        callbacks = [switch(), RunReportCallback(), every_epoch(tmp_path / "kept")]
        fit(*callbacks, folder=tmp_path / folder, ckpt_path=ckpt_path)
        return rows_of(tmp_path / folder / "tips" / "metrics.csv")

    whole = run("whole")
    resumed = run("resumed", tmp_path / "kept" / f"epoch-epoch={epoch}.ckpt")
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    assert_same([row["val_loss"] for row in resumed], [row["val_loss"] for row in whole])
    assert_same([row["train_loss"] for row in resumed[epoch + 1 :]], [row["train_loss"] for row in whole[epoch + 1 :]])
    events = [(tmp_path / folder / "tips" / "events.json").read_text() for folder in ("whole", "resumed")]
    assert events[0] == events[1]


def test_runs_without_a_folder_of_their_own_do_not_overwrite_each_other(tmp_path):
    for name in ("tips", "tips-v1"):
        trainer = fit(RunReportCallback(), switch(at=1), folder=tmp_path)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["events.json", "metrics.csv", "run.png"]
    trainer.fit_loop.max_epochs = 7
    trainer.fit(trainer.lightning_module, datamodule=PlainData())  # the same run goes on
    assert not (tmp_path / "tips-v2").exists()


def test_two_wandb_runs_have_a_folder_each(tmp_path):
    for _ in range(2):
        logger = WandbLogger(save_dir=tmp_path, offline=True, project="shared")
        fit(RunReportCallback(), switch(at=1), folder=tmp_path, logger=logger)
        wandb.finish()
    assert len(list(tmp_path.glob("shared/*/tips/run.png"))) == 2


def test_many_events_are_listed_below_the_plot(tmp_path: Path) -> None:
    rows = [{"epoch": float(e), "step": 4.0 * (e + 1), "val_loss": 1 / (e + 1)} for e in range(6)]
    few = [Event("optimizer", "Adam -> SGD", 8, 2, {})]
    many = [Event("pruning", f"{n} filters taken out", 4 * (n // 2), n // 2, {}) for n in range(8)]
    for name, events in (("few", few), ("many", many)):
        plot_run(rows, events, tmp_path / f"{name}.png")
    heights = [imread(tmp_path / f"{name}.png").shape[0] for name in ("few", "many")]
    assert heights[1] > heights[0] + 80  # four lines of text
