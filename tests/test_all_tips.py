"""All tips in one run, as `configs/all_tips.yaml` has them: on two ranks, killed in the middle, resumed to the bit."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness import assert_same
from processes import finish, start_command

CONFIG = Path(__file__).parent.parent / "configs/all_tips.yaml"
TIPS = {"data", "optimizer", "imbalance", "transfer", "augmentation", "pruning"}


def small(folder: Path) -> dict[str, Any]:
    """The yaml on digits, with the tips' epochs moved together."""
    config = yaml.safe_load(CONFIG.read_text())
    trainer = config["trainer"]
    when = {
        "BatchAugmentationCallback": {"last_epochs_off": 1},
        # After two epochs a teacher may still favour a class, which is warned of.
        "PseudoLabelCallback": {"start_epoch": 2, "every_n_epochs": 2, "threshold": 0.0, "per_class": 4},
        "OptimizerSwitchCallback": {"at": 3},
        "FilterPruningCallback": {"steps": 2, "start_epoch": 3, "every_n_epochs": 1},
        "ModelCheckpoint": {"dirpath": str(folder / "kept"), "filename": "{epoch}", "save_top_k": -1},
    }
    for callback in trainer["callbacks"]:
        callback["init_args"] |= when.get(callback["class_path"], {})
    trainer |= {"max_epochs": 6, "logger": False, "enable_progress_bar": False, "default_root_dir": str(folder)}
    trainer |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "limit_val_batches": 2}
    config["data"] = {
        "class_path": "DigitsDataModule",
        "init_args": {"batch_size": 16, "train_size": 100, "unlabelled_size": 64},
    }
    return config


@pytest.mark.filterwarnings("ignore:.*")
def test_all_tips_on_two_ranks_killed_and_resumed(tmp_path: Path) -> None:
    def command(name: str, *more: str) -> tuple[Path, list[str]]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(small(folder)))
        return folder, ["fit", "--config", str(folder / "run.yaml"), *more]

    whole = start_command(*command("whole"))
    finish(*whole)
    killed = start_command(*command("killed"))
    kept, deadline = tmp_path / "killed/kept", time.monotonic() + 100
    while len(list(kept.glob("*.ckpt"))) < 5 and killed[0].process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    for run in killed:
        run.process.kill()
        run.process.join()
    newest = sorted(kept.glob("*.ckpt"))[-2]  # the newest may have been cut off
    finish(*start_command(*command("killed", f"--ckpt_path={newest}")))

    ends = [torch.load(tmp_path / name / "kept/epoch=5.ckpt", weights_only=True) for name in ("whole", "killed")]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ends[1][key], ends[0][key], key)
    events = [[event for state in end["callbacks"].values() for event in state.get("events", [])] for end in ends]
    assert events[0] == events[1]
    assert {event["tip"] for event in events[0]} == TIPS
    assert "SGD" in whole[0].printed


@pytest.mark.filterwarnings("ignore:.*")
def test_the_study_in_its_smallest_form(tmp_path: Path, capsys) -> None:
    config = small(tmp_path)
    config["trainer"] |= {"devices": 1, "strategy": "auto", "max_epochs": 5}
    config["trainer"]["callbacks"][-1] = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"][-1]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    spec = importlib.util.spec_from_file_location("all_tips", CONFIG.parent.parent / "benchmarks/all_tips.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    out = tmp_path / "all_tips.json"
    written = study.main(["--seeds=1", f"--config={tmp_path / 'run.yaml'}", f"--folder={tmp_path}/s", f"--out={out}"])
    assert json.loads(out.read_text()) == written
    assert list(written["mean"]) == ["all tips", "none", "all tips, vote"]
    assert written["mean"]["all tips"]["macs"] < 0.6 * written["mean"]["none"]["macs"]
    assert sum(written["weights"]) == pytest.approx(1, abs=1e-3)
