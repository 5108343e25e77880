"""What holds for every tip, row by row of the settings table."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from harness import STEPS_A_EPOCH, assert_same, bits, build, data_in, every_epoch, every_step, fit
from settings import NAMES, SETTINGS, Setting, make

HERE = Path(__file__).parent
EPOCHS = 6

every_tip = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)


def start(folder: Path, tips: list, arguments: dict, *more: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "worker.py"), str(folder), json.dumps(tips), json.dumps(arguments), *more]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command,
        env=environment | {"LIGHTNING_TIPS_DEBUG": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    return output


def module_in(parts: list) -> LightningModule:
    return next(part for part in parts if isinstance(part, LightningModule))


@every_tip
def test_trains_a_plain_module_and_changes_what_it_should(setting: Setting, tmp_path: Path) -> None:
    parts, tip = setting.make()
    trainer = fit(*parts, folder=tmp_path)
    setting.changed(trainer, tip)
    assert trainer.global_step == EPOCHS * STEPS_A_EPOCH


@every_tip
def test_trains_again_with_the_same_tip(setting: Setting, tmp_path: Path) -> None:
    parts, tip = setting.make()
    untrained = {k: v.clone() for k, v in module_in(parts).state_dict().items()}
    first = bits(fit(*parts, folder=tmp_path))
    module_in(parts).load_state_dict(untrained)
    trainer = fit(*parts, folder=tmp_path)
    setting.changed(trainer, tip)
    assert_same(bits(trainer), first)


@every_tip
def test_same_trainer_goes_on(setting: Setting, tmp_path: Path) -> None:
    parts, tip = setting.make()
    trainer, module = build(*parts, folder=tmp_path)
    trainer.fit(module, datamodule=data_in(*parts))
    trainer.fit_loop.max_epochs = EPOCHS + 2
    trainer.fit(module, datamodule=data_in(*parts))
    setting.changed(trainer, tip)


@every_tip
@pytest.mark.parametrize("keep", [every_step, every_epoch])
def test_resumed_run_equals_the_uninterrupted_one(setting: Setting, keep, tmp_path: Path) -> None:
    parts, tip = setting.make()
    uninterrupted = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path)
    setting.changed(uninterrupted, tip)
    expected = bits(uninterrupted)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[-1]))
    assert len(checkpoints) == (EPOCHS * STEPS_A_EPOCH if keep is every_step else EPOCHS)
    for checkpoint in checkpoints[:-1]:
        torch.load(checkpoint, weights_only=True)
        parts, tip = setting.make()
        resumed = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path, ckpt_path=checkpoint)
        setting.changed(resumed, tip)
        assert_same(bits(resumed), expected, checkpoint.stem)


@every_tip
def test_killed_run_resumes_from_what_lies_on_disk(setting: Setting, tmp_path: Path) -> None:
    tip = [[setting.name, {}]]
    finish(start(tmp_path / "whole", tip, {"max_epochs": EPOCHS}))
    process = start(tmp_path / "killed", tip, {"max_epochs": EPOCHS, "keep": "epoch"})
    kept = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 100
    while len(list(kept.glob("*.ckpt"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = sorted(kept.glob("*.ckpt"))[-2]  # the newest may have been cut off
    finish(start(tmp_path / "killed", tip, {"max_epochs": EPOCHS, "keep": "epoch"}, str(newest)))
    results = [json.loads((tmp_path / run / "rank-0.json").read_text()) for run in ("whole", "killed")]
    assert results[0] == results[1]


@every_tip
def test_two_ranks_stay_equal(setting: Setting, tmp_path: Path) -> None:
    tip = [[setting.name, {}]]
    finish(start(tmp_path, tip, {"max_epochs": EPOCHS, "devices": 2, "strategy": "ddp"}))
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["events"][0]


@every_tip
def test_yaml_round_trip(setting: Setting, tmp_path: Path, monkeypatch, capsys) -> None:
    from lightning_tips.cli import main

    config = setting.config()
    config["seed_everything"] = 1
    config["trainer"] |= {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": EPOCHS,
        "limit_train_batches": STEPS_A_EPOCH,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["lightning-tips", "fit", "--config", "config.yaml", "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)

    monkeypatch.setattr(sys, "argv", ["lightning-tips", "fit", "--config", "printed.yaml", "--print_config"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == printed

    monkeypatch.setattr(sys, "argv", ["lightning-tips", "fit", "--config", "printed.yaml"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "What the tips did" in shown
    assert setting.shown in shown


PAIRS = [
    (one, other)
    for one, other in combinations_with_replacement(SETTINGS, 2)
    if (one is not other and not one.kind is other.kind is LightningModule) or one.second
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[f"{a.name}+{b.name}" for a, b in PAIRS])
@pytest.mark.parametrize("swap", [False, True])
def test_every_pair_works_or_refuses_before_the_first_step(one: Setting, other: Setting, swap, tmp_path: Path) -> None:
    wanted = [(one, {}), (other, other.second if other is one else {})]
    parts, tips = make(*(reversed(wanted) if swap else wanted))
    before = {k: v.clone() for k, v in module_in(parts).state_dict().items()}
    for setting in (one, other):
        if setting.warns:
            warnings.filterwarnings("ignore", setting.warns)
    try:
        trainer = fit(*parts, folder=tmp_path)
    except MisconfigurationException as error:
        assert_same(dict(module_in(parts).state_dict()), before)
        assert len(str(error)) > 40  # noqa: PT017  says what to do
        return
    for tip in tips:
        assert tip.events
    assert trainer.global_step == EPOCHS * STEPS_A_EPOCH
