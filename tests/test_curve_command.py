"""`lightning-tips curve`: the sweep, what it refuses and leaves. Fits run in this process: to start one takes long."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from lightning_tips.cli import main
from lightning_tips.cli.sweep_bar import SweepBar
from lightning_tips.core import Fit
from lightning_tips.data import ClassRecallRecord
from lightning_tips.data.curve_report import class_gains, class_table, curve_table, plot_curve
from lightning_tips.data.learning_curve import fit_learning_curve
from lightning_tips.data.sweep import DivergedFitError, Point, choose_sizes, expected_seconds, find_limits, read_point

from harness import LoaderData, PlainModule, fit

FAST = {
    "accelerator": "cpu",
    "logger": False,
    "max_epochs": 3,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": FAST | {"callbacks": []},
    "model": {"class_path": "harness.PlainModule"},
    "data": {"class_path": "harness.LoaderData"},
}
PART = {"class_path": "SubsetCallback", "init_args": {"size": 9}}
SIZES = ["--sizes", "20", "40", "80", "0.4"]


def in_this_process(fits: list[Fit], workers: int, places: list, say: Any) -> dict[str, str]:
    """What `run_fits` does, without processes; to be cut short with `in_this_process.left`."""
    failed = {}
    waiting = [one for one in fits if not one.is_done]
    for one in fits:
        if one not in waiting:
            say(f"{one.name} is done already: {one.checkpoint}")
    for one in waiting:
        if in_this_process.left == 0:
            raise KeyboardInterrupt
        in_this_process.left -= 1
        say(f"{one.name} starts: {one.folder}")
        one.folder.mkdir(parents=True, exist_ok=True)
        (one.folder / "fingerprint.txt").write_text(one.fingerprint)
        sys.argv = ["lightning-tips", *one.command[3:]]
        try:
            main()
        except Exception as error:
            failed[one.name] = str(error)
            say(f"{one.name} failed (1): {error}")
            continue
        one.finish()
        say(f"{one.name} has finished")
    return failed


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path):
    """Runs `lightning-tips curve` on CONFIG, or another; returns exit code and what was printed."""
    monkeypatch.setattr("lightning_tips.cli.curve.run_fits", in_this_process)
    monkeypatch.setattr(in_this_process, "left", 100, raising=False)

    def run(*arguments: str, config: dict[str, Any] = CONFIG) -> tuple[int, str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["lightning-tips", "curve", "--config", "config.yaml", *arguments])
        try:
            code = main()
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
            code = 1
        out, err = capfd.readouterr()
        return code, out + err

    return run


def test_a_sweep_is_cut_short_goes_on_and_answers(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(in_this_process, "left", 2)
    with pytest.raises(KeyboardInterrupt):
        run(*SIZES, "--seeds", "1")
    assert not (tmp_path / "runs/curve/curve.json").exists()
    monkeypatch.setattr(in_this_process, "left", 2)  # so many are left, and no more are run
    code, printed = run(*SIZES, "--seeds", "1", "--target", "0.7")
    assert code == 0, printed
    assert "4 fits, 4 sizes from 20 to 190 of 475 samples" in printed
    written = json.loads((tmp_path / "runs/curve/curve.json").read_text())
    assert [(p["n"], p["seed"]) for p in written["points"]] == [(n, s) for s in (1,) for n in (20, 40, 80, 190)]
    assert [p["steps"] for p in written["points"][:4]] == [3, 6, 9, 18]
    for point in written["points"]:
        assert point["epochs"] == 3
        record = json.loads((tmp_path / f"runs/curve/n{point['n']}_seed{point['seed']}/record.json").read_text())
        assert point["score"] == record["rows"][-1]["val_acc"]
        assert len(point["recalls"]) == 10
    assert (tmp_path / "runs/curve/curve.png").stat().st_size > 5000
    if written["curve"]["abstains"]:  # so few steps may not make a curve
        assert "Nothing can be told" in printed
    else:
        assert [row["n"] for row in written["predictions"]] == [950, 2375, 4750]
    # Another metric of the same fits; then another configuration, which is not mixed in.
    code, printed = run(*SIZES, "--seeds", "1", "--monitor", "val_lss")
    assert code == 1
    assert "logged no finite 'val_lss'. Did you mean 'val_loss'" in printed
    code, printed = run(*SIZES, "--seeds", "1", "--monitor", "val_loss")
    assert code == 0, printed
    assert json.loads((tmp_path / "runs/curve/curve.json").read_text())["mode"] == "min"
    code, printed = run(*SIZES, "--seeds", "1", "--trainer.max_epochs", "2")
    assert code == 1
    assert "another configuration" in printed
    assert (tmp_path / "runs/curve/n20_seed1/done.json").exists()


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        (["--sizes", "100"], {}, "1 size \\(100\\): a curve needs 4 or more"),
        (["--sizes", "5", "40", "80", "160"], {}, "cannot hold each of 10 classes"),
        (["--sizes", "100", "110", "120", "130"], {}, "must be 4 times the smallest"),
        (["--sizes", "20", "40", "80", "1000"], {}, "only 475 training samples"),
        (["--seeds", "0"], {}, "not a number of 1 or more|2"),
        ([], {"data": {"class_path": "harness.PlainData"}}, "one training loader.*ResumableLoader"),
        (
            [],
            {"trainer": FAST | {"callbacks": [{"class_path": "SubsetCallback", "init_args": {"size": 9}}]}},
            "already",
        ),
    ],
)
def test_refuses_before_anything_is_trained(run, arguments, changes, says: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(in_this_process, "left", 0)
    code, printed = run(*arguments, config=CONFIG | changes)
    assert code == 1
    assert re.search(says, printed), printed
    assert not (tmp_path / "runs/curve").exists()


def test_sizes() -> None:
    assert choose_sizes(60_000) == [1875, 3750, 7500, 15_000, 30_000, 60_000]
    labels = torch.arange(500) % 10
    assert choose_sizes(labels.numpy()) == [31, 62, 125, 250, 500]
    assert choose_sizes(1000, [0.1, 200, 0.4, 1.0]) == [100, 200, 400, 1000]
    with pytest.raises(ValueError, match="too few for a curve"):
        choose_sizes(100)


def point(n: int, seed: int, history: list[float], **changes: Any) -> Point:
    given: dict[str, Any] = {"epochs": len(history), "steps": n, "seconds": 1.0, "stopped_early": False}
    return Point(n, seed, history[-1], tuple(history), **given | changes)


def test_compute_that_limits_a_curve_is_told_of() -> None:
    flat = [0.5, 0.6, 0.65, 0.66, 0.66, 0.66, 0.661, 0.66, 0.66, 0.661]
    fine = [point(n, s, [v + n / 2000 for v in flat]) for n in (100, 200, 400) for s in (0, 1)]
    assert find_limits(fine, "max") == []
    rising = [p for p in fine if p.n < 400] + [point(400, s, [0.1 * i for i in range(10)]) for s in (0, 1)]
    (told,) = find_limits(rising, "max")
    assert told.startswith("At 400 samples the score was still getting better")
    falling = [point(p.n, p.seed, [1 - v for v in p.history]) for p in rising]
    assert find_limits(falling, "min") == [told]
    (told,) = find_limits([point(p.n, p.seed, list(p.history), steps=500) for p in fine], "max")
    assert "same number of steps" in told
    some = [point(p.n, p.seed, list(p.history), stopped_early=p.n < 400) for p in fine]
    (told,) = find_limits(some, "max")
    assert told.startswith("Early stopping did not come in at 400 samples")
    others = [point(p.n, p.seed, list(p.history), validation=str(p.seed)) for p in fine]
    assert "validation data was not the same" in find_limits(others, "max")[0]


def test_the_expected_end_grows_with_the_size() -> None:
    assert expected_seconds([], [100], 1) is None
    assert expected_seconds([(100, 12.0), (200, 14.0)], [400, 400], 1) == pytest.approx(36)
    assert expected_seconds([(100, 12.0), (200, 14.0)], [400, 400], 2) == pytest.approx(18)
    assert expected_seconds([(100, 12.0)], [400], 1) == 12.0
    assert expected_seconds([(100, 14.0), (200, 12.0)], [400], 1) == pytest.approx(13)  # noise


def test_the_bar_counts_ends_and_checks_each_finished_fit(tmp_path: Path) -> None:
    fits = [Fit(f"n{n}_seed0", tmp_path / f"n{n}_seed0", (), "print") for n in (10, 20, 30)]
    checked: list[str] = []

    def done(fit: Fit) -> None:
        fit.folder.mkdir(exist_ok=True)
        fit.checkpoint.write_text("")
        fit.finish()

    done(fits[0])
    with SweepBar(fits, [10, 20, 30], 1, lambda fit: checked.append(fit.name)) as bar:
        bar("n10_seed0 is done already: x")
        bar("n20_seed0 starts: x")
        done(fits[1])
        bar("n20_seed0 has finished")
        bar("n30_seed0 starts: x")
        bar("n30_seed0 failed (1): no memory")
        assert bar._ended == {"n10_seed0", "n20_seed0", "n30_seed0"}
    assert checked == ["n10_seed0", "n20_seed0"]


def test_the_class_to_collect_comes_first(tmp_path: Path) -> None:
    points = []
    for n in (100, 200, 400, 800, 1600):
        for seed in range(3):
            stray = 0.002 * (seed - 1)
            recalls = (0.99 + stray, 0.95 - 4 * n**-0.5 + stray, 0.9 - 1.5 * n**-0.5 + stray, None)
            points.append(point(n, seed, [0.9 - n**-0.5 + stray], recalls=recalls, names=("bag", "shirt", "coat", "x")))
    gains = class_gains(points)
    assert [one.name for one in gains] == ["shirt", "coat", "bag"]
    assert gains[0].gain == pytest.approx(4 * (1600**-0.5 - 3200**-0.5), abs=0.01)
    assert gains[0].interval[0] < gains[0].gain < gains[0].interval[1]
    assert gains[2].gain is None
    table = class_table(gains)
    assert table.index("shirt") < table.index("coat") < table.index("bag")
    assert class_gains([point(100, 0, [0.5])]) == []
    curve = fit_learning_curve([p.n for p in points], [p.score for p in points])
    shown = curve_table(curve, points, 1600, "val_acc")
    assert "10 times" in shown
    assert "16,000" in shown
    plot_curve(curve, points, tmp_path / "curve.png", "val_acc", 1600, target=0.9)
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_recalls_of_any_classifier_are_recorded(tmp_path: Path) -> None:
    module = PlainModule()
    record = ClassRecallRecord(path=str(tmp_path / "recalls.json"))
    fit(record, folder=tmp_path, module=module, max_epochs=2, data=LoaderData())
    found = json.loads((tmp_path / "recalls.json").read_text())
    assert found["problem"] is None
    assert [row["step"] for row in found["rows"]] == [15, 30]
    images, labels = LoaderData().val_dataloader().dataset.tensors
    module.eval()
    right = module(images).argmax(1) == labels
    expected = [float(right[labels == c].float().mean()) for c in range(10)]
    assert found["rows"][-1]["recalls"] == pytest.approx(expected, abs=1e-5)
    assert found["samples"] == labels.bincount(minlength=10).tolist()
    assert "forward" not in vars(module)


class Bypasses(PlainModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.5 + 0 * self.head(self.features(batch[0]).mean((2, 3))).sum())


class ReturnsDict(PlainModule):
    def forward(self, images: Any) -> Any:
        return {"logits": super().forward(images)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])["logits"].square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.5 + 0 * self(batch[0])["logits"].sum())


class Regression(PlainModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())


@pytest.mark.parametrize(
    ("module", "says"),
    [(Bypasses, "does not call self"), (ReturnsDict, "returns no tensor"), (Regression, "class indices")],
)
def test_where_recalls_cannot_be_seen_the_run_goes_on_and_it_is_said(
    module: type[LightningModule], says: str, tmp_path: Path
) -> None:
    data = LoaderData()
    if module is Regression:
        images, labels = data.val_dataloader().dataset.tensors
        data.val_dataloader = lambda: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images, labels / 7), 64
        )
    fit(ClassRecallRecord(), folder=tmp_path, module=module(), max_epochs=1, data=data)
    assert says in json.loads((tmp_path / "recalls.json").read_text())["problem"]


def test_a_fit_that_diverged_is_told_from_one_without_the_metric(tmp_path: Path) -> None:
    made = Fit("n10_seed0", tmp_path, (), "print")
    record = {"epochs": 2, "steps": 4, "seconds": 1.0, "stopped_early": False}

    def rows(*losses: float | None) -> None:
        kept = [{"epoch": i, "step": 2 * i + 2, "val_loss": loss} for i, loss in enumerate(losses)]
        (tmp_path / "record.json").write_text(json.dumps(record | {"rows": kept}))

    rows(0.5, 0.25, 0.75)
    assert read_point(made, 10, 0, "val_loss", "min", "auto").score == 0.75
    assert read_point(made, 10, 0, "val_loss", "min", "best").score == 0.25
    rows(0.5, None)
    with pytest.raises(DivergedFitError, match="no number at its end"):
        read_point(made, 10, 0, "val_loss", "min", "auto")
    with pytest.raises(ValueError, match="logged no finite 'val_acc'"):
        read_point(made, 10, 0, "val_acc", "max", "auto")
