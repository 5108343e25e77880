"""The command `lightning-tips`: what a user types, and what comes back."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule

from lightning_tips import RunReportCallback
from lightning_tips.cli import BuildCLI, main

CONFIGS = Path(__file__).parent.parent / "configs"
QUICK = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Runs `lightning-tips` with these arguments; returns exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lightning-tips", *arguments])
        try:
            code = main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capfd.readouterr()
        return code, out + err

    return run


short = pytest.mark.filterwarnings("ignore:There will be no switch")  # QUICK is too short for the plateau


@short
def test_quickstart_leaves_report_checkpoints_metrics_and_a_wandb_run(run, tmp_path: Path) -> None:
    code, printed = run("fit", f"--config={CONFIGS / 'quickstart.yaml'}", *QUICK)
    assert code == 0, printed
    folder = tmp_path / "runs" / "quickstart" / "version_0"
    assert {p.name for p in (folder / "tips").iterdir()} == {"run.png", "metrics.csv", "events.json"}
    assert (folder / "metrics.csv").exists()
    assert (folder / "config.yaml").exists()
    assert list((folder / "checkpoints").glob("best-*.ckpt"))
    assert list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))
    assert "What the tips did" in printed


def test_every_config_is_valid(run) -> None:
    for config in CONFIGS.glob("*.yaml"):
        code, printed = run("fit", f"--config={config}", "--print_config")
        assert code == 0, f"{config}: {printed}"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_all_that_a_config_names_is_built(config: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"--config={config}", "--trainer.accelerator=cpu"]
    if config.stem == "transfer":
        arguments.append("--model.pretrained=false")
    monkeypatch.setattr(sys, "argv", ["lightning-tips", *arguments])
    built = BuildCLI(run=False, save_config_callback=None)
    assert isinstance(built.datamodule, LightningDataModule)
    assert sum(isinstance(c, RunReportCallback) for c in built.trainer.callbacks) == 1


def test_a_run_report_of_the_yaml_takes_the_place_of_ours(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"--config={CONFIGS / 'quickstart.yaml'}", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.callbacks+=RunReportCallback", "--trainer.callbacks.plot=false"]
    monkeypatch.setattr(sys, "argv", ["lightning-tips", *arguments])
    built = BuildCLI(run=False, save_config_callback=None)
    (report,) = [c for c in built.trainer.callbacks if isinstance(c, RunReportCallback)]
    assert not report.plot


@pytest.mark.filterwarnings("ignore:The phase 'top' never begins", "ignore:.*does not have many workers")
def test_transfer_config_runs_without_weights(run, tmp_path: Path) -> None:
    small = ["--data=DigitsDataModule", "--model.pretrained=false", "--trainer.logger=false", "--data.batch_size=8"]
    small += ["--trainer.limit_train_batches=2", "--trainer.num_sanity_val_steps=0"]
    code, printed = run("fit", f"--config={CONFIGS / 'transfer.yaml'}", *QUICK, *small)
    assert code == 0, printed
    assert "[transfer] epoch 0, step 0: head: head train (trainable 12810" in printed
    assert re.search(r"kept \d+ samples' features", printed)


@short
@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_logger_is_switched_without_touching_code(run, tmp_path: Path, logger: str) -> None:
    config = f"--config={CONFIGS / 'quickstart.yaml'}"
    code, printed = run("fit", config, *QUICK, f"--trainer.logger={logger}", "--trainer.logger.save_dir=logs")
    assert code == 0, printed
    assert list((tmp_path / "logs").rglob("run.png"))


@short
def test_validate_test_and_predict_take_the_checkpoint(run, tmp_path: Path) -> None:
    config = f"--config={CONFIGS / 'quickstart.yaml'}"
    assert run("fit", config, *QUICK, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs")[0] == 0
    (checkpoint,) = (tmp_path / "logs").rglob("last.ckpt")
    for command in ("validate", "test", "predict"):
        code, printed = run(command, config, "--trainer.logger=false", f"--ckpt_path={checkpoint}")
        assert code == 0, printed


def test_callbacks_are_appended_from_the_command_line(run) -> None:
    code, printed = run(
        "fit",
        f"--config={CONFIGS / 'quickstart.yaml'}",
        "--trainer.callbacks+=OptimizerSwitchCallback",
        "--trainer.callbacks.trigger=epoch",
        "--trainer.callbacks.at=20",
        "--print_config",
    )
    assert code == 0
    classes = [c["class_path"].split(".")[-1] for c in yaml.safe_load(printed)["trainer"]["callbacks"]]
    assert classes == ["OptimizerSwitchCallback", "ModelCheckpoint", "OptimizerSwitchCallback"]


def test_environment_variables_set_options(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_TIPS_FIT__TRAINER__MAX_EPOCHS", "7")
    code, printed = run("fit", "--model=ImageClassifier", "--data=DigitsDataModule", "--print_config")
    assert code == 0
    assert yaml.safe_load(printed)["trainer"]["max_epochs"] == 7


def test_help_names_our_own_subcommands(run) -> None:
    code, printed = run("--help")
    assert code == 0
    assert "fit" in printed
    assert "tips" in printed


def test_tips_are_listed(run) -> None:
    code, printed = run("tips")
    assert code == 0
    assert "OptimizerSwitchCallback\n    Replaces the module's optimizer" in printed


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["fti"], "fit"),
        (["fit", "--modle=ImageClassifier"], "--model"),
        (["fit", "--model=ImageClasifier"], "ImageClassifier"),
        (["fit", "--model=ImageClassifier", "--data=DigitDataModule"], "DigitsDataModule"),
        (["fit", "--model=ImageClassifier", "--trainer.callbacks+=OptimizerSwichCallback"], "OptimizerSwitchCallback"),
        (["fit", "--model=ImageClassifier", "--model.netwrk=resnet8"], "network"),
    ],
)
def test_wrong_name_answers_with_the_nearest(run, arguments: list[str], right: str) -> None:
    code, printed = run(*arguments)
    assert code == 2
    assert f"Did you mean '{right}'?" in printed


def test_wrong_argument_in_a_yaml_answers_with_the_nearest(run, tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"]["patienc"] = 3
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    code, printed = run("fit", "--config=wrong.yaml")
    assert code == 2
    assert "Did you mean 'patience'?" in printed


def test_unreadable_checkpoint_is_named_before_anything_is_built(run, tmp_path: Path) -> None:
    config = f"--config={CONFIGS / 'quickstart.yaml'}"
    whole = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}}, whole)
    (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:300])
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    for name, words in [
        ("lst.ckpt", "did you mean"),
        ("cut.ckpt", "damaged"),
        ("other.ckpt", "no Lightning checkpoint"),
    ]:
        code, printed = run("fit", config, f"--ckpt_path={tmp_path / name}")
        assert code == 1
        assert words in printed
    assert not (tmp_path / "runs").exists()


def test_ddp_from_the_command_line(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lightning-tips")), "fit", f"--config={CONFIGS / 'quickstart.yaml'}"]
    command += [*QUICK, "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("What the tips did") == 1
    assert len(list((tmp_path / "runs" / "quickstart").iterdir())) == 1
