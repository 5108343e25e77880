import gc
import os
import sys
from pathlib import Path
from typing import Any

# Networks this small only wait for a second thread. Before torch is imported, and for what tests start: forks do not
# hear of a number that is set later, and two ranks of two threads each on two cores take five times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests

import allowed_warnings

torch.set_num_threads(1)  # where a plugin of pytest has imported it before


def pytest_configure(config: pytest.Config) -> None:
    for line in allowed_warnings.ini_lines():
        config.addinivalue_line("filterwarnings", line)


# Files of ten seconds and more, dearest first: what is left for the end is then short, and both workers end together.
DEAREST = [
    "test_every_tip_resumes",
    "test_readme_and_benchmarks",
    "test_switch_distributed",
    "test_every_tip_in_processes",
    "test_every_pair",
    "test_every_tip",
    "test_sampler_callback",
    "test_compare_command",
    "test_ensemble_together",
    "test_cli",
    "test_pruning_benchmarks",
    "test_ensemble_apart",
    "test_all_tips",
    "test_layer_pruning",
    "test_switch_resume",
    "test_filter_pruning",
    "test_prune_command",
    "test_report",
    "test_transfer_steps",
    "test_transfer_cache",
    "test_class_weights",
    "test_pruning_distributed",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(DEAREST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is there by now stays, and is not looked through again and again


@pytest.fixture(autouse=True)
def untouched_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each test runs in its own folder, leaves the environment as it found it, and never reaches for a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    before = dict(os.environ)
    yield
    if "wandb" in sys.modules:
        if sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish()  # the next test's logger would go on in this run
        sys.modules["wandb"].teardown()  # it remembers in which folder it was first used
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the files of pictures empty: to draw takes as long as to train, and other tests look at what is drawn."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).touch())


@pytest.fixture
def timm_weights(tmp_path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A timm network, and the arguments that make timm find its weights on disk rather than download them."""
    import timm

    source = timm.create_model("mobilenetv3_small_050")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    return source, {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
