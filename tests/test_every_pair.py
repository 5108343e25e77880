"""Every pair of tips works or is refused, and docs/pairs.md says which."""

import json
from pathlib import Path

import pytest

from harness import EPOCHS, STEPS_A_EPOCH
from pairs import PAIRS, RECORDED, SHOWN, name_of, run, table
from settings import Setting

pytestmark = pytest.mark.usefixtures("no_pictures")

# Two of one tip are a chain, whose order is the user's to say.
BOTH_WAYS = [(one, other, swap) for one, other in PAIRS for swap in (False, True) if not (swap and one is other)]


@pytest.mark.parametrize(
    ("one", "other", "swap"), BOTH_WAYS, ids=[f"{name_of(one, other)}{'-' * swap}" for one, other, swap in BOTH_WAYS]
)
def test_every_pair_works_or_refuses_before_the_first_step(
    one: Setting, other: Setting, swap: bool, tmp_path: Path
) -> None:
    trainer, tips, reason = run(one, other, swap, tmp_path)
    recorded = json.loads(RECORDED.read_text())[name_of(one, other)]
    assert bool(reason) == bool(recorded), f"docs/pairs.md is out of date, run tests/pairs.py: {reason or 'it works'}"
    if trainer is None:
        assert len(reason) > 40  # says what to do
        return
    for tip in tips:
        assert tip.events
    assert trainer.global_step == EPOCHS * STEPS_A_EPOCH


def test_the_page_of_pairs_shows_what_is_recorded() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert set(recorded) == {name_of(*pair) for pair in PAIRS}, "run tests/pairs.py"
    assert SHOWN.read_text() == table(recorded)
