"""`lightning-tips compare`: the command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from processes import Fits

QUICK = {
    "accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 2, "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}  # fmt: skip
WEIGHTS = [
    {"class_path": "ClassWeightCallback"},
    {"class_path": "ClassWeightCallback", "init_args": {"scheme": "sqrt"}},
]
WANDB = {"class_path": "WandbLogger", "init_args": {"project": "tips", "name": "digits"}}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Writes a yaml and runs `lightning-tips compare` on it; returns exit code and what was printed."""
    from lightning_tips.cli import main

    monkeypatch.setattr("lightning_tips.core.fits.FitServer", Fits)

    def run(callbacks: list[Any], *arguments: str) -> tuple[Any, str]:
        trainer = QUICK | {"callbacks": callbacks, "logger": WANDB}
        model = {"class_path": "ImageClassifier", "init_args": {"network": "resnet8", "in_channels": 1}}
        whole = {"trainer": trainer, "model": model, "data": {"class_path": "DigitsDataModule"}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
        monkeypatch.setattr(sys, "argv", ["lightning-tips", "compare", "--config=run.yaml", *arguments])
        code: Any = None
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_command_compares_keeps_what_is_done_and_tells_of_a_pair_that_refuses(command, tmp_path: Path) -> None:
    code, printed = command(WEIGHTS, "--seeds=2", "--out=out")
    assert code == 1, printed
    out = tmp_path / "out"
    found = json.loads((out / "compare.json").read_text())
    by_name = {row["name"]: row for row in found["arms"]}
    assert list(by_name) == ["baseline", "ClassWeight", "ClassWeight_2", "all"]
    assert [by_name[name]["n"] for name in by_name] == [2, 2, 2, 0]
    assert "both would weight the same loss" in by_name["all"]["failed"]["0"]
    assert "all-seed1 is left out: its arm is refused" in printed
    # Digits are balanced but for a few, so that weights change next to nothing; scores are those of the fits.
    record = json.loads((out / "ClassWeight-seed1" / "record.json").read_text())
    assert by_name["ClassWeight"]["scores"]["1"] == record["metrics"]["val_acc"]
    assert record["metrics"]["epoch"] == 1
    costs = by_name["ClassWeight"]["cost"]
    assert costs["macs"]["mean"] > 1e5
    assert costs["macs"]["ratio"] == 1
    assert costs["latency_seconds"]["mean"] > 0
    assert costs["parameters"]["mean"] == record["parameters"]
    assert "Two seeds are very little" in printed
    for name in ("report.html", "arms.csv", "fits.csv", "differences.png", "arms/all.yaml"):
        assert (out / name).stat().st_size > 100
    assert "class_path: lightning_tips.ClassWeightCallback" in (out / "report.html").read_text()

    from test_report import history

    wandb.finish()  # else all of it need not be in the file yet
    (file,) = out.glob("wandb/offline-run-*/*.wandb")  # those of the fits are in their folders
    rows = history(file)
    assert any("compare/arms" in row or "compare/arms/_type" in row for row in rows)

    kept = (out / "baseline-seed0" / "last.ckpt").stat().st_mtime_ns
    code, printed = command(WEIGHTS, "--seeds=2", "--out=out", "--monitor=val_accuracy", "--mode=max")
    assert "No fit logs 'val_accuracy'" in code
    assert "val_acc" in code
    assert "kept" in code
    code, printed = command(WEIGHTS, "--seeds=2", "--out=out", "--trainer.max_epochs=3")
    assert "trainer.max_epochs is 3, and was 2" in code
    assert (out / "baseline-seed0" / "last.ckpt").stat().st_mtime_ns == kept


def test_arms_of_an_ensemble_and_of_a_users_own_can_be_read_by_fit(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.cli.compare import arms_asked_for
    from lightning_tips.cli.run import ParseCLI

    yaml_of = Path(__file__).parent.parent / "configs" / "ensemble.yaml"
    monkeypatch.setattr(sys, "argv", ["compare", f"--config={yaml_of}", "--trainer.accelerator=cpu"])
    cli = ParseCLI(run=False, save_config_callback=None)
    small = "small: --model.init_args.n=2 --trainer.callbacks+=ClassWeightCallback"
    arms = {arm.name: arm for arm in arms_asked_for(cli, [small], tmp_path / "own")}
    assert list(arms) == ["baseline", "small"]
    assert [arm.config["model"]["init_args"]["n"] for arm in arms.values()] == [5, 2]
    assert len(arms["small"].config["trainer"]["callbacks"]) == len(arms["baseline"].config["trainer"]["callbacks"]) + 1
    planned = arms_asked_for(cli, ["each"], tmp_path / "each")
    assert [(arm.name, arm.tips) for arm in planned] == [("baseline", ()), ("Ensemble", ("Ensemble",))]
    for arm, kind in zip(planned, ("vision.ImageClassifier", "EnsembleModule"), strict=True):
        (tmp_path / "arm.yaml").write_text(yaml.safe_dump(arm.config))
        read = cli.read([f"--config={tmp_path / 'arm.yaml'}"])
        assert read == arm.config
        assert read["model"]["class_path"] == f"lightning_tips.{kind}"
        assert read["trainer"]["enable_progress_bar"] is False


def test_a_callback_alone_in_the_yaml_is_a_list_of_one(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.cli.compare import arms_asked_for
    from lightning_tips.cli.run import ParseCLI

    alone = {"class_path": "SubsetCallback", "init_args": {"size": 0.5}}
    model = {"class_path": "ImageClassifier", "init_args": {"in_channels": 1}}
    whole = {"trainer": {"callbacks": alone}, "model": model, "data": {"class_path": "DigitsDataModule"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    monkeypatch.setattr(sys, "argv", ["compare", "--config=run.yaml"])
    arms = arms_asked_for(ParseCLI(run=False, save_config_callback=None), ["each"], tmp_path / "out")
    assert [(arm.name, arm.tips) for arm in arms] == [("baseline", ()), ("Subset", ("Subset",))]


def test_what_is_wrong_ends_the_command_before_any_training(command, tmp_path: Path) -> None:
    weights = WEIGHTS[:1]
    assert "no tip in the configuration" in command([], "--out=out")[0]
    assert "neither an argument" in command(weights, "--out=out", "--arms", "x: y")[0]
    assert "Take one of them" in command(weights, "--out=out", "--arms", "each", "minus_one")[0]
    assert "two arms 'baseline'" in command(weights, "--out=out", "--arms", "baseline: --trainer.max_epochs=3")[0]
    code, printed = command(weights, "--out=out2", "--arms", "x: --trainer.max_epocks=3")
    assert code == 2
    assert "Did you mean" in printed
    code, printed = command(weights, "--out=out", "--monitor=val_reward")
    assert code == 2
    assert "give --mode max or --mode min" in printed
    assert command(weights, "--out=out", "--seeds=0")[0] == 2
    assert not list(tmp_path.glob("out*/*/log.txt"))
