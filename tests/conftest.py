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
def timm_weights(tmp_path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A timm network, and the arguments that make timm find its weights on disk rather than download them."""
    import timm

    source = timm.create_model("mobilenetv3_small_050")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    return source, {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
