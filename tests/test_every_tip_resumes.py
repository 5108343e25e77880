"""A resumed run of every tip equals the uninterrupted one, row by row of the settings table."""

from pathlib import Path

import pytest
import torch

from harness import EPOCHS, STEPS_A_EPOCH, assert_same, bits, every_epoch, every_step, fit
from settings import NAMES, SETTINGS, Setting

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = EPOCHS * STEPS_A_EPOCH
# Each place in an epoch of 4 steps, from the first epoch to the last; and every step of epoch 2, before which or in
# which most tips act, with the ends of both.
MID_EPOCH = sorted({*range(1, STEPS, 5), *range(2 * STEPS_A_EPOCH, 3 * STEPS_A_EPOCH + 1)})
FROM = {
    every_step: [f"step-step={step}.ckpt" for step in MID_EPOCH],
    every_epoch: [f"epoch-epoch={epoch}.ckpt" for epoch in range(EPOCHS - 1)],
}

every_tip = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)


@every_tip
@pytest.mark.parametrize("keep", FROM)
def test_resumed_run_equals_the_uninterrupted_one(setting: Setting, keep, tmp_path: Path) -> None:
    parts, tip = setting.make()
    uninterrupted = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path)
    setting.changed(uninterrupted, tip)
    expected = bits(uninterrupted)
    assert len(list((tmp_path / "kept").iterdir())) == (STEPS if keep is every_step else EPOCHS)
    for checkpoint in (tmp_path / "kept" / name for name in FROM[keep]):
        torch.load(checkpoint, weights_only=True)
        parts, tip = setting.make()
        resumed = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path, ckpt_path=checkpoint)
        setting.changed(resumed, tip)
        assert_same(bits(resumed), expected, checkpoint.stem)
