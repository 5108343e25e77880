"""The benchmarks of pruning run, in their smallest form."""

import csv
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
from torch import Tensor, nn

from lightning_tips.core import keep_indices

FOLDER = Path(__file__).parent.parent / "benchmarks/pruning"


def test_criteria_study_in_its_smallest_form(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("criteria_study", FOLDER / "criteria.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    arguments = ["--smoke", "--seeds", "0", f"--out={tmp_path / 'criteria.json'}"]
    result = study.main(arguments)
    assert json.loads((tmp_path / "criteria.json").read_text()) == result
    study.one_seed = None  # takes up where it stopped: this seed is not run again
    assert study.main(arguments)["seeds"] == result["seeds"]
    found = result["seeds"]["0"]["found"]
    assert all(found["silent"][name] == 1 for name in study.CRITERIA if name != "random")
    assert found["closed"]["apoz"] == found["closed"]["mean_activation"] == found["closed"]["taylor"] == 1
    assert found["ignored"]["taylor"] == 1  # the only one that looks beyond the layer
    assert found["small"]["l1"] == 1  # a mistake of norms, since BatchNorm makes up for the scale
    assert found["small"]["apoz"] < 1
    assert "| apoz |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study.main(["--smoke"])


def test_block_studies_in_their_smallest_form(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("veit_study", FOLDER / "veit.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    common = ["--smoke", "--epochs=1", f"--cache={tmp_path / 'cache'}", "--train-images=256", "--test-images=100"]
    deleted = [*common, f"--out={tmp_path / 'veit.csv'}", f"--picture={tmp_path / 'veit.png'}", "--networks"]
    rows = study.main([*deleted, "resnet20"])
    assert [row["deleted"] for row in rows][:2] == ["stages.0.0", "stages.0.1"]
    assert len(rows) == 7
    capsys.readouterr()
    assert study.main([*deleted, "resnet20"]) == rows  # takes up where it stopped
    assert capsys.readouterr().out == ""
    rows = study.main([*deleted, "vgg11_bn"])
    assert [row["deleted"] for row in rows[7:]] == ["conv4", "conv6", "conv7", "conv8"]
    assert (tmp_path / "veit.png").stat().st_size > 5000
    assert {unit for unit, _, _ in study.deletions("plain20", sys.modules["base_networks"].build("plain20"), None)} == {
        "block",
        "layer",
    }
    (row,) = study.main([*common, "--drop", "--counts=4", "--repeats=2", f"--out={tmp_path / 'dropped.csv'}"])
    assert len(row["removed"].split()) == 4
    assert float(row["macs_left"]) < 0.6


def test_accuracy_study_in_its_smallest_form(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("accuracy_study", FOLDER / "accuracy.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    arguments = ["--smoke", "--networks", "resnet20", "--seeds", "0", f"--out={tmp_path / 'accuracy.csv'}"]
    arms = ["unpruned", "l1", "l1_distilled", "scratch", "l1_30", "l1_later", "taylor", "apoz"]
    arguments += [f"--cache={tmp_path}", "--arms", *arms]
    rows = {row["arm"]: row for row in study.main(arguments)}
    assert list(rows) == arms
    whole = rows["unpruned"]["macs"]
    assert rows["scratch"]["macs"] == rows["l1"]["macs"]
    assert all(0.45 < row["macs"] / whole <= 0.5 for arm, row in rows.items() if arm[-2:] != "30" and arm != "unpruned")
    assert 0.25 < rows["l1_30"]["macs"] / whole <= 0.3
    assert rows["taylor"]["parameters"] != rows["l1_later"]["parameters"]  # other filters
    capsys.readouterr()
    study.Study = None  # takes up where it stopped
    assert [row["arm"] for row in study.main(arguments)] == arms
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(arms)


def test_benchmark_of_foreign_networks_runs(tmp_path, monkeypatch, capsys):
    foreign = _benchmark("foreign")
    tiny = {"timm/test_resnet": ("residual", 32), "timm/test_efficientnet": ("inverted residual", 32)}
    monkeypatch.setattr(foreign, "NETWORKS", tiny)
    out = tmp_path / "foreign.csv"
    foreign.main([f"--out={out}"])
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["tool"], row["name"]) for row in rows] == [(tool, name) for tool in foreign.TOOLS for name in tiny]
    assert all(row["result"] == "pruned" and float(row["macs"]) <= 0.5 for row in rows[:2])
    assert {row["result"] for row in rows[2:]} <= {"pruned", "refused"}
    capsys.readouterr()
    monkeypatch.setattr(foreign, "run_apart", None)  # takes up where it stopped: none of them is run again
    foreign.main([f"--out={out}"])
    assert "| ours | 2 convolutional | 2 | 0 | 0 | 0 |" in capsys.readouterr().out


def test_benchmark_of_foreign_networks_sees_what_is_broken(monkeypatch):
    foreign = _benchmark("foreign")
    monkeypatch.setattr(foreign, "NETWORKS", {"timm/test_resnet": ("residual", 32)})

    def head_too(model: nn.Module, images: Tensor, **_: object) -> object:
        classifier = model.get_submodule("fc")
        assert isinstance(classifier, nn.Linear)
        keep_indices(model, {"fc.weight": [[0, 1], None], "fc.bias": [[0, 1]]})
        return types.SimpleNamespace(ratios={"macs": 0.5})

    monkeypatch.setattr(foreign, "prune_filters", head_too)
    row = foreign.run_one("ours", "timm/test_resnet")
    assert row["result"] == "broken"
    assert "shapes [(2, 2)] instead of [(2, 10)]" in row["message"]


def test_benchmark_of_the_time_of_a_step_runs(tmp_path):
    result = _benchmark("plan_time").main(["--smoke", f"--out={tmp_path / 'time.json'}"])
    assert result["resnet20"]["ours"]["median"] < 1  # CPU seconds


def _benchmark(name: str) -> types.ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "pruning" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_latency_study_in_its_smallest_form(tmp_path):
    latency = _benchmark("latency")
    result = latency.main(["--smoke", f"--out={tmp_path / 'latency.json'}"])
    assert json.loads((tmp_path / "latency.json").read_text()) == result
    rows = result["resnet20"]["batch 1"]["channels_last"]
    assert rows.keys() == {"whole", *latency.FILTERS, *latency.BLOCKS}
    assert rows["whole"]["macs_left"] == 1
    assert all(0 < rows[name]["macs_left"] <= 0.5 for name in latency.FILTERS)
    assert all(row["speedup"] > 0 for row in rows.values())
