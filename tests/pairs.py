"""Which tips work together: `python tests/pairs.py` tries every pair and writes what `docs/pairs.md` shows.

`test_every_pair.py` tries them again and compares, so the table cannot say what is not so.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from harness import assert_same, fit
from settings import SETTINGS, Setting, make

DOCS = Path(__file__).parent.parent / "docs"
RECORDED, SHOWN = DOCS / "pairs.json", DOCS / "pairs.md"


def _is_pair(one: Setting, other: Setting) -> bool:
    if one is other:
        return bool(one.second)
    if one.kind is other.kind is LightningModule:
        return False
    # A mixin brings a callback that is in the table itself: what is its own are other mixins in the same DataModule.
    return one.kind is other.kind or LightningDataModule not in (one.kind, other.kind)


PAIRS = [pair for pair in combinations_with_replacement(SETTINGS, 2) if _is_pair(*pair)]


def name_of(one: Setting, other: Setting) -> str:
    return f"{one.name}+{other.name}"


def run(one: Setting, other: Setting, swap: bool, folder: Path) -> tuple[Trainer | None, list[Any], str]:
    """Trains with both.

    Returns:
        The trainer, the tips, and "". Where the pair is refused no trainer, and why; the module is then as it was.
    """
    wanted: list[tuple[Setting, dict[str, Any]]] = [(one, {}), (other, other.second if other is one else {})]
    parts, tips = make(*(reversed(wanted) if swap else wanted))
    module = next(part for part in parts if isinstance(part, LightningModule))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    for setting in (one, other):
        if setting.warns:
            warnings.filterwarnings("ignore", setting.warns)
    try:
        return fit(*parts, folder=folder), tips, ""
    except MisconfigurationException as error:
        assert_same(dict(module.state_dict()), before)
        return None, tips, str(error)


def table(recorded: dict[str, str]) -> str:
    """The page, in Markdown."""
    names = [setting.name for setting in SETTINGS]
    reasons: list[str] = []
    lines = [
        "# Which tips work together",
        "",
        "Every pair of tips either trains together or is refused before the first step, in whatever order they stand in"
        " the yaml. `python tests/pairs.py` writes this page from what happens; the tests try each pair again, both"
        " ways round. Each was tried as it stands in `tests/settings.py`: other arguments may bring other refusals.",
        "",
        "| | " + " | ".join(f"{number}" for number in range(1, len(names) + 1)) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row, name in enumerate(names):
        cells = []
        for other in names[: row + 1]:
            found = recorded.get(f"{other}+{name}")
            if found is None:
                cells.append("·")
            elif not found:
                cells.append("yes")
            else:
                if found not in reasons:
                    reasons.append(found)
                cells.append(f"[{reasons.index(found) + 1}]")
        lines.append(f"| {row + 1} {name} | " + " | ".join(cells + [""] * (len(names) - row - 1)) + " |")
    lines += [
        "",
        "· cannot be given twice, or both are the model; a mixin brings the callback of its name, is tried with other"
        " mixins.",
        "",
    ]
    lines += [f"[{number}] {reason}\n" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    recorded = {}
    for one, other in PAIRS:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded[name_of(one, other)] = run(one, other, False, Path(folder))[2]
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    SHOWN.write_text(table(recorded))


if __name__ == "__main__":
    main()
