"""What was measured before a pruning step says nothing of the network after it: files, patience and rates wait."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_tips import LayerPruningCallback, OptimizerSwitchCallback

from harness import PlainModule, ResidualModule, assert_same, bits, every_step, fit
from prunable import Scripted, pruning

pytestmark = pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")  # before the first

SCORES = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15]  # by epoch: a score says when it was measured


def kept(folder: Path, **arguments: Any) -> ModelCheckpoint:
    given: dict[str, Any] = {"filename": "{step}-{val_acc:.2f}", "monitor": "val_acc", "mode": "max", "save_top_k": -1}
    return ModelCheckpoint(folder, **given | arguments)


def files(folder: Path) -> dict[str, int]:
    """By name, the filters that the first layer has in the file."""
    found = {path.stem: torch.load(path, weights_only=True)["state_dict"] for path in folder.glob("*.ckpt")}
    return {name: len(state["features.0.weight"]) for name, state in sorted(found.items())}


class ByStep(PlainModule):
    """Logs scores that say at which step they were measured."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("train_score", self.global_step / 100, on_step=True, on_epoch=True)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.global_step / 100)


class Plateau(Scripted):
    """Lowers its rate as soon as a score is no better than the best; without any it goes on."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_acc", "strict": False}}


def test_no_file_of_an_epoch_without_validation_has_the_score_of_the_network_before(tmp_path: Path) -> None:
    keep = kept(tmp_path / "kept", save_on_train_epoch_end=True, save_last=True)
    named = kept(tmp_path / "named", monitor=None, save_on_train_epoch_end=True)
    last_only = kept(tmp_path / "last", mode="min", save_on_train_epoch_end=True, save_last=True, save_top_k=0)
    lasts: list[int] = []
    save = keep._save_last_checkpoint

    def noting(trainer: Trainer, candidates: Any) -> None:
        lasts.append(trainer.current_epoch)
        save(trainer, candidates)

    keep._save_last_checkpoint = noting  # type: ignore[method-assign]
    tip = pruning(schedule="one_shot", start_epoch=2)
    parts = tip, Scripted(SCORES), keep, named, last_only
    fit(*parts, folder=tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    found = files(tmp_path / "kept")
    last = found.pop("last")
    assert list(found) == ["step=16-val_acc=0.13", "step=8-val_acc=0.11"]
    assert found["step=8-val_acc=0.11"] == 8 > found["step=16-val_acc=0.13"] == last
    assert Path(keep.best_model_path).stem == "step=16-val_acc=0.13"
    assert lasts == [1, 2, 3]  # which has no score in its name, and is to be of the network as it is
    assert "step=12-val_acc=nan" in files(tmp_path / "named")  # a name only
    # Lightning writes it at the end of the fit where it has not before.
    assert torch.load(tmp_path / "last" / "last.ckpt", weights_only=True)["global_step"] == 16
    for callback in (keep, named, last_only):
        assert not {"_monitor_candidates", "_save_topk_checkpoint", "on_train_epoch_end"} & vars(callback).keys()


@pytest.mark.parametrize("at_epoch_end", [None, False])  # where Lightning itself saves what waits for a validation
def test_no_file_in_the_middle_of_an_epoch_has_it(at_epoch_end: bool | None, tmp_path: Path) -> None:
    keep = kept(tmp_path / "kept", every_n_train_steps=2, save_on_train_epoch_end=at_epoch_end)
    fit(pruning(schedule="one_shot", start_epoch=2), Scripted(SCORES), keep, folder=tmp_path, max_epochs=4)
    found = files(tmp_path / "kept")
    small = {name for name, filters in found.items() if filters < 8}
    assert len(found) > len(small) > 2
    assert min(name.split("=")[-1] for name in small) == "0.12"  # measured in the epoch of the step, after it
    assert "step=12-val_acc=0.12" in small  # saved as soon as it is
    assert "step=14-val_acc=0.12" in small  # and then at every second step again


def test_what_comes_back_is_measured_anew_too(tmp_path: Path) -> None:
    keep = kept(tmp_path / "kept", save_on_train_epoch_end=True)
    tip = pruning(start_epoch=2, every_n_epochs=2, max_drop=0.05)
    more = {"max_epochs": 6, "check_val_every_n_epoch": 2}
    fit(tip, Scripted([0.9, 0.9, 0.9, 0.7, 0.9, 0.8]), keep, folder=tmp_path, **more)
    assert [event.epoch for event in tip.events] == [2, 4]
    assert files(tmp_path / "kept").keys() == {"step=8-val_acc=0.90", "step=16-val_acc=0.70", "step=24-val_acc=0.80"}
    assert Path(keep.best_model_path).stem == "step=8-val_acc=0.90"


def test_blocks_taken_out_leave_no_old_score(tmp_path: Path) -> None:
    keep = kept(tmp_path / "kept", monitor="val_loss", mode="min", save_on_train_epoch_end=True)
    tip = LayerPruningCallback(target={"macs": 0.7}, steps=1, start_epoch=2, samples=64)
    fit(tip, ResidualModule(), keep, folder=tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    assert {name.split("-")[0] for name in files(tmp_path / "kept")} == {"step=8", "step=16"}


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_acc:RuntimeWarning")
def test_patience_and_rates_wait_for_a_validation(tmp_path: Path) -> None:
    def run(**more: Any) -> tuple[dict[str, Any], dict[str, Any], ModelCheckpoint]:
        stop = EarlyStopping("val_acc", mode="max", patience=10, check_on_train_epoch_end=True, strict=False)
        keep = kept(tmp_path / "kept", every_n_train_steps=3, enable_version_counter=False)
        parts = pruning(schedule="one_shot", start_epoch=2), stop, keep, every_step(tmp_path / "steps")
        # 0.9 once more after the step would be the score to beat, for what comes to 0.8.
        module = Plateau([0.9, 0.9, 0.9, 0.8, 0.8, 0.8])
        trainer = fit(*parts, module, folder=tmp_path, max_epochs=4, check_val_every_n_epoch=2, **more)
        return bits(trainer), stop.state_dict(), keep

    result, stop, keep = run()
    assert float(stop["best_score"]) == pytest.approx(0.8)
    assert stop["wait_count"] == 0
    assert result["optimizers"][0]["param_groups"][0]["lr"] == 0.1
    found = files(tmp_path / "kept")
    assert found.keys() == {"step=8-val_acc=0.90", "step=16-val_acc=0.80"}
    for step in (9, 10, 11):  # after the step, before the next validation
        again, stopped, kept_again = run(ckpt_path=tmp_path / "steps" / f"step-step={step}.ckpt")
        assert_same(again, result, str(step))
        assert_same(stopped, stop, str(step))
        assert kept_again.best_model_path == keep.best_model_path
        assert_same(kept_again.best_model_score, keep.best_model_score)
        assert files(tmp_path / "kept") == found


def test_a_save_that_is_due_stays_so_across_a_resume(tmp_path: Path) -> None:
    def run(**more: Any) -> set[str]:
        arguments = {"every_n_train_steps": 3, "save_on_train_epoch_end": True, "enable_version_counter": False}
        keep = kept(tmp_path / "kept", **arguments)
        ends = ModelCheckpoint(tmp_path / "ends", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
        parts = pruning(schedule="one_shot"), ByStep(), keep, ends, every_step(tmp_path / "steps")
        fit(*parts, folder=tmp_path, max_epochs=3, val_check_interval=2, **more)
        return {Path(path).stem for path in keep.best_k_models}

    whole = run()
    # At step 6, two after the pruning, it could not be; it is due until the end of that epoch.
    assert whole == {"step=8-val_acc=0.08", "step=9-val_acc=0.08", "step=12-val_acc=0.10"}
    for step in (5, 6, 7):  # from 6 on all is measured anew
        assert run(ckpt_path=tmp_path / "steps" / f"step-step={step}.ckpt") == whole, step
    # From before the pruning, which the scores of the first epoch do not outlive there either.
    assert run(ckpt_path=tmp_path / "ends" / "step=4.ckpt") == whole


def test_a_save_is_due_once(tmp_path: Path) -> None:
    keep = kept(tmp_path / "kept", filename="{step}", monitor="train_score", every_n_train_steps=2)
    fit(pruning(schedule="one_shot"), ByStep(), keep, folder=tmp_path, max_epochs=3)
    found = files(tmp_path / "kept")  # at the end of epoch 1 nothing more: it is measured, and saved, at step 6
    assert found == {f"step={step}": 8 if step < 6 else 6 for step in (2, 4, 6, 8, 10, 12)}


def test_last_ckpt_stands_in_no_other_files_way(tmp_path: Path) -> None:
    found = {}
    for last in (None, True):
        keep = kept(tmp_path / str(last), every_n_train_steps=2, save_last=last)
        fit(pruning(schedule="one_shot"), ByStep(), keep, folder=tmp_path, max_epochs=3, val_check_interval=2)
        found[last] = files(tmp_path / str(last))
    assert found[True].pop("last") == 6
    assert found[True] == found[None]
    assert found[True]["step=6-val_acc=0.06"] == 6


def test_only_who_saves_by_steps_or_by_time_owes_a_save(tmp_path: Path) -> None:
    off = kept(tmp_path / "off", every_n_epochs=0, every_n_train_steps=0, save_on_exception=True)
    timed = kept(tmp_path / "timed", train_time_interval=timedelta(hours=1))
    fit(pruning(schedule="one_shot"), ByStep(), off, timed, folder=tmp_path, max_epochs=3)
    assert not files(tmp_path / "off")
    assert files(tmp_path / "timed") == {"step=8-val_acc=0.08": 6}


def test_rates_that_another_optimizer_brings_wait_too(tmp_path: Path) -> None:
    rates: list[float] = []

    class Noting(Scripted):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                rates.append(self.optimizers().param_groups[0]["lr"])

    switch = OptimizerSwitchCallback(
        partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0),
        trigger="epoch",
        at=2,
        monitor="val_acc",
    )
    tip = pruning(start_epoch=1, every_n_epochs=3)
    # 0.9 is of before the second step, in epoch 4: once more after it, it would be the score to beat.
    module = Noting([0.9, 0.9, 0.9, 0.9, 0.9, 0.8])
    parts = tip, module, switch, kept(tmp_path / "kept")
    fit(*parts, folder=tmp_path, max_epochs=7, check_val_every_n_epoch=2)
    assert [event.epoch for event in tip.events] == [1, 4]
    assert rates[2] == 0.1
    assert rates[4] == rates[5] == rates[6]
