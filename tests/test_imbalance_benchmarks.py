"""The accuracy study runs in its smallest form, and its committed tables are complete."""

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks/imbalance"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy", FOLDER / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accuracy"] = module
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("study", ["long_tail", "weapon"])
def test_smallest_form(accuracy: ModuleType, study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--studies", study, f"--out={tmp_path}"]
    accuracy.main([*arguments, "--arms", "plain"])
    first = (tmp_path / f"{study}.csv").read_text()
    accuracy.main(arguments)  # takes up where it stopped
    assert (tmp_path / f"{study}.csv").read_text().startswith(first)
    rows = read(tmp_path / f"{study}.csv")
    assert [row["arm"] for row in rows] == list(accuracy.ARMS[study])
    check(rows, accuracy.COLUMNS[study])
    assert "minus plain" in capsys.readouterr().out


@pytest.mark.parametrize(("study", "steps"), [("long_tail", None), ("weapon", None), ("weapon", 100)])
def test_committed_tables(accuracy: ModuleType, study: str, steps: int | None) -> None:
    rows = read(FOLDER / (f"{study}_{steps}_steps.csv" if steps else f"{study}.csv"))
    check(rows, accuracy.COLUMNS[study])
    seeds = {arm: [row["seed"] for row in rows if row["arm"] == arm] for arm in accuracy.ARMS[study]}
    assert sum(map(len, seeds.values())) == len(rows)
    for arm, found in seeds.items():
        assert len(set(found)) == len(found) >= 3, arm
        assert found == seeds["plain"], arm  # paired
    assert {row["steps"] for row in rows} == {str(steps or accuracy.FASHION.steps[study])}


def check(rows: list[dict[str, str]], columns: list[str]) -> None:
    for row in rows:
        assert list(row) == columns
        numbers = {name: float(row[name]) for name in columns if name not in ("arm", "order", "machine")}
        assert all(map(math.isfinite, numbers.values())), row
        assert 0 <= numbers["balanced_acc"] <= 100
        assert "/" not in row["machine"]


def test_smoke_leaves_the_tables_alone(accuracy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--smoke"])
    assert "--out" in capsys.readouterr().err


def test_only_the_chosen_classes_are_augmented(accuracy: ModuleType) -> None:
    source = accuracy.DigitsDataModule()
    source.setup()
    data = accuracy.Augmented(source.train_set, lambda image: image + 1, [3])
    assert len(data) == len(source.train_set)
    for index in range(50):
        (image, label), (plain, same) = data[index], source.train_set[index]
        assert label == same
        assert ((image - plain) == float(label == 3)).all()


def test_choice_of_images(accuracy: ModuleType) -> None:
    source = accuracy.DigitsDataModule()
    source.setup()
    data = accuracy.choose(source.train_set, {8: 5, 1: 20, 3: 20}, seed=0, binary=8)
    assert data.targets.tolist() == [1] * 5 + [0] * 40
    assert len(set(data.indices.tolist())) == 45
    assert (source.train_set.labels[data.indices[:5]] == 8).all()
