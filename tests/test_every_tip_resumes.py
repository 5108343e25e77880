"""A resumed run of every tip equals the uninterrupted one, row by row of the settings table."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import EPOCHS, STEPS_A_EPOCH, assert_same, bits, every_epoch, every_step, fit
from settings import NAMES, SETTINGS, Setting

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = EPOCHS * STEPS_A_EPOCH
EVERYWHERE = range(1, STEPS, 5)  # each place in an epoch of 4 steps, from the first epoch to the last


def places(keep, tip: Any) -> list[str]:
    """Checkpoints to resume from: of each epoch, or of steps everywhere and of all in the epochs in which it acted."""
    if keep is every_epoch:
        return [f"epoch-epoch={epoch}.ckpt" for epoch in range(EPOCHS - 1)]
    acted = {STEPS_A_EPOCH * event.epoch + place for event in tip.events for place in range(STEPS_A_EPOCH + 1)}
    return [f"step-step={step}.ckpt" for step in sorted({*EVERYWHERE, *acted} & {*range(1, STEPS)})]


every_tip = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)


@every_tip
@pytest.mark.parametrize("keep", [every_step, every_epoch])
def test_resumed_run_equals_the_uninterrupted_one(setting: Setting, keep, tmp_path: Path) -> None:
    parts, tip = setting.make()
    uninterrupted = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path)
    setting.changed(uninterrupted, tip)
    expected = bits(uninterrupted)
    assert len(list((tmp_path / "kept").iterdir())) == (STEPS if keep is every_step else EPOCHS)
    for checkpoint in [tmp_path / "kept" / name for name in places(keep, tip)]:
        torch.load(checkpoint, weights_only=True)
        parts, tip = setting.make()
        resumed = fit(*parts, keep(tmp_path / "kept"), folder=tmp_path, ckpt_path=checkpoint)
        setting.changed(resumed, tip)
        assert_same(bits(resumed), expected, checkpoint.stem)
