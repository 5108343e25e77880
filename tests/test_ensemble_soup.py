"""Weight averaging of members of one initialisation, on real digits; and the study of votes in its smallest form."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_tips.ensemble import average_weights, greedy_soup, weight_barrier, weight_cosine

FOLDER = Path(__file__).parent.parent / "benchmarks/ensemble"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def build(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def train(network: nn.Module, images: Tensor, labels: Tensor, seed: int, steps: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(1200, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def accuracy(digits):
    images, labels = digits[0][1200:], digits[1][1200:]
    network = build(0)

    def evaluate(state: State) -> float:
        network.load_state_dict(state)
        with torch.no_grad():
            return float((network(images).argmax(1) == labels).float().mean())

    return evaluate


@pytest.fixture(scope="module")
def forks(digits) -> list[State]:
    start = train(build(0), *digits, seed=0, steps=150)
    states = []
    for seed in (1, 2, 3):
        network = build(0)
        network.load_state_dict(start)
        states.append(train(network, *digits, seed=seed, steps=60))
    return states


@pytest.fixture(scope="module")
def strangers(digits) -> list[State]:
    return [train(build(seed), *digits, seed=seed, steps=200) for seed in (11, 12)]


def test_soup_of_forks_is_at_least_as_good_as_the_best(forks: list[State], accuracy) -> None:
    before = [{name: value.clone() for name, value in state.items()} for state in forks]
    soup, chosen = greedy_soup(forks, accuracy)
    scores = [accuracy(state) for state in forks]
    assert chosen[0] == scores.index(max(scores))
    assert len(set(chosen)) == len(chosen)
    assert accuracy(soup) >= max(scores) > 0.85
    expected = average_weights([forks[i] for i in chosen])
    assert all(torch.equal(soup[name], expected[name]) for name in soup)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(forks, before, strict=True) for name in a)
    assert soup["0.weight"].data_ptr() != forks[chosen[0]]["0.weight"].data_ptr()


def test_a_bad_fork_stays_out(forks: list[State], accuracy) -> None:
    noise = torch.Generator().manual_seed(0)
    bad = {name: value + 0.3 * torch.randn(value.shape, generator=noise) for name, value in forks[0].items()}
    _, chosen = greedy_soup([bad, *forks], accuracy, check=False)
    assert 0 not in chosen


def test_different_initialisations_are_refused_and_told_why(strangers: list[State], forks, accuracy) -> None:
    barrier = weight_barrier(*strangers, accuracy)
    assert barrier.height > 0.2
    assert barrier.cosine < 0.3
    assert weight_barrier(forks[0], forks[1], accuracy).height < 0.02
    with pytest.raises(ValueError, match=r"\(b\).*same initialisation: the cosine .* let them vote"):
        greedy_soup(strangers, accuracy, names=["a", "b"])
    _, chosen = greedy_soup(strangers, accuracy, check=False)
    assert len(chosen) == 1
    # A low cosine alone is no reason: with a score that does not mind, nothing is refused.
    assert greedy_soup(strangers, lambda state: 1.0)[1] == [0, 1]


def test_mean_of_weights() -> None:
    first = {"w": torch.zeros(2, 2, dtype=torch.float16), "n": torch.tensor(3)}
    second = {"w": torch.ones(2, 2, dtype=torch.float16), "n": torch.tensor(5)}
    mean = average_weights([first, second], [1.0, 3.0])
    assert mean["w"].dtype == torch.float16
    assert mean["w"].tolist() == [[0.75, 0.75]] * 2
    assert mean["n"] == 3
    assert weight_cosine(second, second) == pytest.approx(1.0)
    assert weight_cosine(first, second) == 0.0


def test_members_that_have_no_mean_are_refused() -> None:
    states = [build(0).state_dict(), build(1).state_dict()]
    with pytest.raises(ValueError, match=r"member 1 has other entries than member 0, such as '4\.bias'"):
        average_weights([states[0], {name: v for name, v in states[1].items() if name != "4.bias"}])
    with pytest.raises(ValueError, match=r"'0.bias' of member 1 \(cut\) has the shape \(3,\)"):
        average_weights([states[0], states[1] | {"0.bias": torch.ones(3)}], names=["whole", "cut"])
    with pytest.raises(ValueError, match=r"'0\.bias' of member 1 has entries that are not finite"):
        greedy_soup([states[0], states[1] | {"0.bias": states[1]["0.bias"] * math.nan}], lambda state: 1.0)
    with pytest.raises(ValueError, match="score of member 0 is NaN"):
        greedy_soup(states, lambda state: math.nan)
    with pytest.raises(ValueError, match="no members"):
        greedy_soup([], lambda state: 1.0)
    with pytest.raises(ValueError, match="no weights of 2 dimensions"):
        weight_cosine({"b": torch.ones(2)}, {"b": torch.ones(2)})


# ---- the study


@pytest.fixture(scope="module")
def voting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("voting", FOLDER / "voting.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["voting"] = module
    spec.loader.exec_module(module)
    return module


def test_study_in_its_smallest_form(voting: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--draws", "0", f"--cache={tmp_path / 'cache'}", f"--out={tmp_path}"]
    voting.main(arguments)
    first = (tmp_path / "voting.csv").read_text()
    (tmp_path / "voting.csv").unlink()
    (tmp_path / "cache/draw0/weak1.pt").unlink()
    voting.main(arguments)  # trains the one that is missing, and comes to the same
    assert (tmp_path / "voting.csv").read_text() == first
    rows = list(csv.DictReader(first.splitlines()))
    assert len(rows) == 2 * len(voting.CASES) * len(voting.ARMS)
    assert "minus mean single" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        voting.main(["--smoke", "--cache=x"])


def test_committed_tables(voting: ModuleType) -> None:
    rows = list(csv.DictReader((FOLDER / "voting.csv").read_text().splitlines()))
    draws = {row["draw"] for row in rows}
    assert len(draws) >= 3
    assert len(rows) == 2 * len(draws) * len(voting.CASES) * len(voting.ARMS)
    mean = {}
    for case in voting.CASES:
        for arm in voting.ARMS:
            found = [row for row in rows if (row["case"], row["arm"], row["held_out"]) == (case, arm, "5000")]
            assert {row["draw"] for row in found} == draws
            mean[case, arm] = {
                key: sum(float(row[key]) for row in found) / len(found)
                for key in ("acc", "ece", "ece_t")
                if found[0][key]
            }
    assert mean["five_equal", "best"]["acc"] >= mean["five_equal", "mean_single"]["acc"] + 0.5
    # The vote needs its temperature: without it is worse calibrated than a member.
    assert mean["five_equal", "best"]["ece_t"] < mean["five_equal", "mean_single"]["ece"]
    assert mean["five_equal", "best"]["ece"] > mean["five_equal", "mean_single"]["ece"]
    assert mean["two_weak", "best"]["acc"] >= mean["two_weak", "best_single_on_test"]["acc"] - 0.1
    assert mean["two_weak", "best"]["acc"] > mean["two_weak", "uniform"]["acc"]
    soup = json.loads((FOLDER / "soup.json").read_text())
    assert set(soup) == draws
    assert all("cosine similarity" in draw["refusal_of_equal"] for draw in soup.values())
