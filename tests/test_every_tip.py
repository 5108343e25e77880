"""What holds for every tip, row by row of the settings table."""

import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningModule

from lightning_tips.core import resize_to

from harness import EPOCHS, STEPS_A_EPOCH, assert_same, bits, build, data_in, fit
from settings import NAMES, SETTINGS, Setting

every_tip = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)


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
    resize_to(module_in(parts), untrained)  # it may have become smaller
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
