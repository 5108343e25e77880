"""A resumed run of every tip equals the uninterrupted one, row by row of the settings table."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule

from harness import EPOCHS, STEPS_A_EPOCH, assert_same, bits, every_epoch, every_step, fit
from settings import NAMES, SETTINGS, Setting

every_tip = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)


@every_tip
@pytest.mark.parametrize("keep", [every_step, every_epoch])
def test_resumed_run_equals_the_uninterrupted_one(setting: Setting, keep, tmp_path: Path) -> None:
    parts, tip = setting.make()
    uninterrupted = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path)
    setting.changed(uninterrupted, tip)
    expected = bits(uninterrupted)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[-1]))
    assert len(checkpoints) == (EPOCHS * STEPS_A_EPOCH if keep is every_step else EPOCHS)
    # A mixin brings a callback that is resumed from each step in a row of its own.
    for checkpoint in checkpoints[: -1 : 5 if setting.kind is LightningDataModule else 1]:
        torch.load(checkpoint, weights_only=True)
        parts, tip = setting.make()
        resumed = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path, ckpt_path=checkpoint)
        setting.changed(resumed, tip)
        assert_same(bits(resumed), expected, checkpoint.stem)
