"""`lightning-tips quality`: the command, on digits with planted errors, and its benchmark."""

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips.cli import main
from lightning_tips.cli.quality import log_to_wandb
from lightning_tips.core import Fit
from lightning_tips.data.reading import Reading, class_names, read_dataset

from harness import PlainModule
from noisy_digits import IMAGES, LABELS, noisy

# ---- the command


class PlantedDigits(LightningDataModule):
    """With a leak from training to validation, a copy of another label, and swapped labels in both."""

    leaks, swapped = ((10, 3), (20, 9)), (*range(0, 300, 25),)

    def __init__(self) -> None:
        super().__init__()
        images, labels = IMAGES[:420].clone(), LABELS[:420].clone()
        train, val = images[:320], images[320:]
        for original, copy in self.leaks:
            val[copy] = noisy(train[[original]])[0]
            labels[320 + copy] = labels[original]
        train[100] = train[101]  # identical, mostly of another label
        for place in self.swapped:
            labels[place] = (labels[place] + 5) % 10
        self.train = TensorDataset(train.float() / 255, labels[:320])
        self.val = TensorDataset(val.float() / 255, labels[320:])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 32)


class QuickModule(PlainModule):
    """Linear, for it must learn in a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Flatten()  # type: ignore[assignment]
        self.head = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def in_this_process(fits: list[Fit], workers: int, places: list, say: Any) -> dict[str, str]:
    """What `run_fits` does, without processes, which take long to start."""
    for one in fits:
        if one.is_done:
            say(f"{one.name} is done already: {one.checkpoint}")
            continue
        say(f"{one.name} starts: {one.folder}")
        one.folder.mkdir(parents=True, exist_ok=True)
        (one.folder / "fingerprint.txt").write_text(one.fingerprint)
        sys.argv = ["lightning-tips", *one.command[3:]]
        main()
        one.finish()
        say(f"{one.name} has finished")
    return {}


def test_the_command_finds_what_was_planted_and_goes_on_where_it_was(tmp_path: Path, monkeypatch, capfd) -> None:
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 8, "enable_progress_bar": False, "logger": False},
        "model": {"class_path": "test_quality_command.QuickModule"},
        "data": {"class_path": "test_quality_command.PlantedDigits"},
    }
    monkeypatch.setattr("lightning_tips.cli.quality.run_fits", in_this_process)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def quality(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-tips", "quality", *arguments])
        assert main() == 0, capfd.readouterr()
        return capfd.readouterr().out

    printed = quality("--config=run.yaml", "--folds=2", "--workers=2", "--out=out")
    written = json.loads((tmp_path / "out/quality.json").read_text())
    within, across = written["duplicates"]
    assert (within["looked_for"], across["looked_for"], across["in"]) == ("train", "val", "train")
    assert within["identical_pairs"] == 1
    assert across["with_a_copy"] == 2
    (labels,) = written["labels"]
    assert labels["judged"] == 320
    assert labels["agrees_with_the_labels"] > 0.8
    with (tmp_path / "out/findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    leaks = {(int(row["other_place"]), int(row["place"])) for row in rows if row["data"] == "val"}
    assert leaks == set(PlantedDigits.leaks)
    suspects = [int(row["place"]) for row in rows if row["finding"] == "label"]
    assert len(set(suspects) & set(PlantedDigits.swapped)) >= 8
    assert len(set(suspects[:10]) & set(PlantedDigits.swapped)) >= 6
    assert (tmp_path / "out/duplicates.png").stat().st_size > 5000
    assert (tmp_path / "out/label_errors.png").stat().st_size > 5000
    for word in ("val in train", "2.00 %", "2 of 2 folds"):
        assert word in printed, printed

    # The folds are done; a checkpoint judges the validation data beside them.
    before = (tmp_path / "out/fold_0_of_2/last.ckpt").stat().st_mtime_ns
    arguments = ["--config=run.yaml", "--folds=2", "--out=out", "--ckpt_path=out/fold_1_of_2/last.ckpt"]
    printed = quality(*arguments)
    assert (tmp_path / "out/fold_0_of_2/last.ckpt").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "out/quality.json").read_text())
    assert [one["data"] for one in again["labels"]] == ["val", "train"]
    assert again["labels"][1] == labels
    assert again["labels"][0]["judged_but_seen_in_training"] == 2
    assert "2 of the 100 judged samples of the val data have a copy" in printed

    with pytest.raises(SystemExit, match="has a SubsetCallback"):
        quality("--config=run.yaml", "--folds=2", "--trainer.callbacks+=SubsetCallback", "--trainer.callbacks.size=50")


def test_what_the_command_cannot_read_ends_it(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(TypeError, match="no samples by number"):
        read_dataset("train", DataLoader(Stream()))
    with pytest.raises(TypeError, match="makes itself"):
        read_dataset("train", DataLoader(TensorDataset(torch.rand(3, 2)), batch_size=None))
    empty = Reading("val", [], None, None)  # type: ignore[arg-type]
    assert class_names(empty.dataset) == []


def test_pictures_and_tables_go_to_wandb_where_the_yaml_has_it(tmp_path: Path, monkeypatch) -> None:
    logged: list[Any] = []

    class Recorder:
        def __init__(self, **arguments: Any) -> None:
            logged.append(arguments["name"])
            self.experiment = self

        def log_image(self, key: str, images: list[str]) -> None:
            logged.append(key)

        def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
            logged.append((key, columns, data))

        def finish(self) -> None:
            logged.append("finished")

    monkeypatch.setattr("lightning_tips.cli.quality.WandbLogger", Recorder)
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"name": "mine"}}
    written = {"duplicates": [{"in": "train", "pairs": 2, "commonest": []}], "labels": []}
    log_to_wandb([wandb, {"class_path": "CSVLogger"}], tmp_path, [tmp_path / "duplicates.png"], written)
    table = ("tips/duplicates_table", ["in", "pairs"], [["train", 2]])
    assert logged == ["mine-quality", "tips/duplicates", table, "finished"]


# ---- the benchmark


def test_the_benchmark_in_its_smallest_form_and_what_it_committed(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "benchmarks/data"
    spec = spec_from_file_location("data_quality", folder / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = benchmark.main(["--smoke", f"--out={tmp_path / 'quality.json'}"])
    assert json.loads((tmp_path / "quality.json").read_text()) == result
    (row,) = result["duplicates"]
    assert row["recall"]["identical"] == 1
    assert row["recall"]["JPEG 75"] > 0.9
    assert row["found_without_a_copy"] < 0.05
    committed = json.loads((folder / "quality.json").read_text())
    assert {(row["data"], row["seed"]) for row in committed["duplicates"]} == {
        (data, seed) for data in ("digits", "fashion") for seed in range(3)
    }
    for row in committed["duplicates"]:
        assert row["recall"]["identical"] == 1
        assert row["recall"]["JPEG 75"] > 0.95
        assert row["found_without_a_copy"] < 0.02
    for row in committed["labels"]:
        if row["planted"]:
            assert row["precision_of_first_100"] > 5 * row["share"]
