"""What the README and the method cards show works as printed; the benchmarks run, in their smallest form."""

import doctest
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_tips

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


@pytest.mark.parametrize("page", [ROOT / "README.md", *CARDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_tip_has_a_card_with_the_usual_headings() -> None:
    tips = {getattr(lightning_tips, name).__module__.split(".")[1] for name in lightning_tips.__all__} - {"core"}
    assert {card.parent.name for card in CARDS} == tips
    for card in CARDS:
        headings = re.findall(r"^## (.+)$", card.read_text(), re.M)
        assert headings == ["Use", "Hyper-parameters", "How it works", "Together with", "Measured", "Sources"], card


def test_first_two_shell_blocks_of_the_readme_are_one_line_each() -> None:
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert [block.count("\n") for block in blocks[:2]] == [1, 1]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(example), "--epochs=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
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


def test_examples_in_docstrings() -> None:
    attempted = 0
    for found in pkgutil.walk_packages(lightning_tips.__path__, "lightning_tips."):
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
    # Of the committed numbers; two rounds on a busy machine tell little more than the direction.
    assert result["chain"]["torchvision v2, per sample"]["ours_times_faster"] > 3
    accuracy = load(ROOT / "benchmarks/augmentation/accuracy.py")
    result = accuracy.main(["--smoke", f"--out={tmp_path / 'accuracy.json'}"])
    assert set(result["1 epochs"]) == {"none", "standard"}
