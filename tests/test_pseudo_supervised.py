"""The guard of pseudo-labels beside a supervised run that was there before."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import PseudoLabelCallback, RunReportCallback
from lightning_tips.data.pseudo_guard import SupervisedGuard, read_curve

from harness import LoaderData, PlainModule, fit
from processes import on_two_ranks


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_each_value_is_compared_with_that_of_the_same_step() -> None:
    guard = SupervisedGuard(0.02, patience=2)
    guard.follow([(10, 0.5), (20, 0.7), (30, 0.8)])
    for step in (2, 5, 9):
        guard.update(0.1, mixed=True, step=step)  # the supervised run has no value yet
    assert not guard.hurts
    assert not guard.waits
    guard.update(0.4, mixed=False, step=10)  # its own supervised epochs do not count
    guard.update(0.69, mixed=True, step=20)
    guard.update(0.79, mixed=True, step=29)
    assert not guard.hurts
    guard.update(0.77, mixed=True, step=30)
    guard.update(0.75, mixed=True, step=500)  # beyond the supervised run: its end
    assert guard.hurts
    assert (guard.reference, guard.best) == (0.8, 0.77)
    again = SupervisedGuard(0.02, patience=2)
    again.load_state_dict(guard.state_dict())
    assert again.hurts


def test_curves_of_both_writers_are_read(tmp_path: Path) -> None:
    fit(
        RunReportCallback(),
        folder=tmp_path,
        module=PlainModule(),
        data=LoaderData(),
        max_epochs=3,
        logger=CSVLogger(tmp_path, name="logs"),
    )
    ours = read_curve(next(tmp_path.rglob("tips/metrics.csv")), "val_acc")
    lightnings = read_curve(next(p for p in tmp_path.rglob("metrics.csv") if p.parent.name != "tips"), "val_acc")
    assert [value for _, value in ours] == pytest.approx([value for _, value in lightnings], abs=1e-6)
    assert len(ours) == 3
    for (step, _), (logged, _) in zip(ours, lightnings, strict=True):
        assert logged in (step, step - 1)  # CSVLogger counts from 0


def test_of_two_values_of_a_step_the_later_one_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.csv", "epoch,step,val_acc\n1,20,0.9\n0,10,0.95\n0,10,0.8\n")
    assert read_curve(path, "val_acc") == [(10, 0.8), (20, 0.9)]


class Liar(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.arange(len(images)) % 10, 10).float()


@pytest.mark.filterwarnings("ignore:.*tells nothing")
@pytest.mark.parametrize(("reached", "given_up"), [(1.1, True), (0.0, False)])
def test_a_run_gives_up_where_supervised_training_is_better(reached: float, given_up: bool, tmp_path: Path) -> None:
    curve = "".join(f"{epoch},{4 * epoch + 3},{reached}\n" for epoch in range(5))
    path = written(tmp_path / "metrics.csv", "epoch,step,val_acc\n" + curve)
    tip = PseudoLabelCallback(
        teacher=Liar(), start_epoch=0, every_n_epochs=5, max_drop=0.0, reference=path, patience=2, epoch_size=128
    )
    fit(tip, folder=tmp_path, module=PlainModule(), data=LoaderData(), max_epochs=5)
    assert "stays worse than in the supervised run" in tip.describe()
    assert [event.what for event in tip.events[1:]] == (["pseudo-labels hurt: given up"] if given_up else [])
    if given_up:
        assert tip.events[1].epoch == 2
        assert tip.events[1].details["supervised"] == 1.1


def with_a_file_on_rank_0(folder: Path) -> list[str]:
    """A run of which rank 1 has no file of the supervised one, and then one of which nobody has."""
    path = folder / f"metrics-{os.environ['LOCAL_RANK']}.csv"
    if os.environ["LOCAL_RANK"] == "0":
        written(path, "epoch,step,val_acc\n0,1,1.1\n")
    arguments = {"start_epoch": 0, "every_n_epochs": 5, "max_drop": 0.0, "patience": 2, "epoch_size": 128}
    ranks = {"devices": 2, "strategy": "ddp", "accelerator": "cpu"}
    warnings.filterwarnings("ignore", ".*tells nothing|.*sync_dist")
    tip = PseudoLabelCallback(teacher=Liar(), reference=path, **arguments)
    fit(tip, folder=folder, module=PlainModule(), data=LoaderData(), max_epochs=4, **ranks)
    said = [event.what for event in tip.events]
    path.unlink(missing_ok=True)
    try:
        fit(tip, folder=folder, module=PlainModule(), data=LoaderData(), max_epochs=4, **ranks)
    except MisconfigurationException as error:
        said.append(str(error))
    return said


def test_ranks_follow_the_file_of_rank_0(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, with_a_file_on_rank_0)
    assert first == second
    assert first[1] == "pseudo-labels hurt: given up"
    assert "no file" in first[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file"),
        ("epoch,step,valid_acc\n0,3,0.5\n", "no column 'val_acc'. Did you mean 'valid_acc'"),
        ("epoch,val_acc\n0,0.5\n", "no column 'step'"),
        ("epoch,step,val_acc\n0,3,\n1,7,nan\n", "no value of 'val_acc'"),
    ],
)
def test_a_curve_that_is_none_is_refused_before_training(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    if text is not None:
        written(path, text)
    tip = PseudoLabelCallback(reference=str(path), epoch_size=128)
    module = PlainModule()
    before = module.state_dict()["head.weight"].clone()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tip, folder=tmp_path, module=module, data=LoaderData())
    assert torch.equal(module.state_dict()["head.weight"], before)


def test_a_reference_without_the_guard_is_refused() -> None:
    with pytest.raises(ValueError, match="is for the guard"):
        PseudoLabelCallback(reference="metrics.csv", max_drop=None)
