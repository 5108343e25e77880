"""Every tip in processes of its own: killed and resumed, and on two ranks, row by row of the settings table."""

import json
import time
from pathlib import Path

import pytest

from harness import EPOCHS
from processes import finish, start, start_ranks
from settings import NAMES, SETTINGS, Setting

every_tip = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)


@every_tip
def test_killed_run_resumes_from_what_lies_on_disk(setting: Setting, tmp_path: Path) -> None:
    tip = [[setting.name, {}]]
    finish(start(tmp_path / "whole", tip, {"max_epochs": EPOCHS}))
    run = start(tmp_path / "killed", tip, {"max_epochs": EPOCHS, "keep": "epoch"})
    kept = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 100
    while len(list(kept.glob("*.ckpt"))) < 3 and run.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    run.process.kill()
    run.process.join()
    newest = sorted(kept.glob("*.ckpt"))[-2]  # the newest may have been cut off
    finish(start(tmp_path / "killed", tip, {"max_epochs": EPOCHS, "keep": "epoch"}, newest))
    results = [json.loads((tmp_path / name / "rank-0.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1]


@every_tip
def test_two_ranks_stay_equal(setting: Setting, tmp_path: Path) -> None:
    tip = [[setting.name, {}]]
    finish(*start_ranks(tmp_path, tip, {"max_epochs": EPOCHS}))
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["events"][0]
