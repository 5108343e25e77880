"""The study of learning curves in its smallest form, and what it committed."""

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "benchmarks/data"


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(f"data_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_in_its_smallest_form(tmp_path: Path) -> None:
    scores = load("curve_scores")
    arguments = ["--smoke", "--steps=20", "--epochs=1", "--seeds", "0", "1", f"--out={tmp_path / 'scores.csv'}"]
    rows = scores.main(arguments)
    assert len(rows) == 2 * len({row["n"] for row in rows})
    written = (tmp_path / "scores.csv").read_text()
    assert scores.main(arguments) == rows  # what is done is not run again
    assert (tmp_path / "scores.csv").read_text() == written
    result = load("curve").main([f"--scores={tmp_path / 'scores.csv'}", f"--out={tmp_path / 'curve.csv'}"])
    assert json.loads((tmp_path / "curve.json").read_text()) == result
    assert result["all"]["curves"] == 2


def test_committed_numbers() -> None:
    committed = json.loads((FOLDER / "curve.json").read_text())
    with (FOLDER / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    accuracy = [row for row in rows if row["metric"] == "accuracy"]
    assert len(accuracy) >= 10
    assert committed["all"]["band_holds"] >= 0.8
    for split in ("test", "development"):
        told = committed[f"{split} accuracy"]
        assert told["mean_error"]["curve"] <= 1.0
        assert told["mean_error"]["curve"] < told["mean_error"]["log_linear"]
