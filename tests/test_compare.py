"""`lightning-tips compare`: its arms, its statistics, and its results as pages and tables."""

import csv
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_tips.compare import (
    Arm,
    arm_csv,
    as_page,
    as_terminal,
    collect,
    fit_csv,
    guess_mode,
    holm,
    hopeless,
    paired_difference,
    parse_overlay,
    plan_arms,
    score_of,
    summarize,
    verdict,
)
from lightning_tips.compare.wandb_run import wandb_arguments

TIPS = ("my.SwitchCallback", "my.Mix", "lightning_tips.EnsembleModule")


def config(*callbacks: str, model: Any = None) -> dict[str, Any]:
    named = [{"class_path": name, "init_args": {"number": i}} for i, name in enumerate(callbacks)]
    return {"trainer": {"callbacks": named, "max_epochs": 3}, "model": model or {"class_path": "my.Net"}}


def arms_of(given: dict[str, Any], plan: Any = "each", **more: Any) -> dict[str, list[str]]:
    planned = plan_arms(given, plan, TIPS.__contains__, **more)
    return {arm.name: [one["class_path"] for one in arm.config["trainer"]["callbacks"]] for arm in planned}


# ---- arms


def test_each_tip_alone_and_all_together_with_what_is_no_tip_in_every_arm() -> None:
    given = config("my.SwitchCallback", "my.Checkpoint", "my.Mix")
    before = json.dumps(given)
    assert arms_of(given) == {
        "baseline": ["my.Checkpoint"],
        "Switch": ["my.SwitchCallback", "my.Checkpoint"],
        "Mix": ["my.Checkpoint", "my.Mix"],
        "all": ["my.SwitchCallback", "my.Checkpoint", "my.Mix"],
    }
    assert list(arms_of(given, "minus_one").items()) == [
        ("all", ["my.SwitchCallback", "my.Checkpoint", "my.Mix"]),
        ("without_Switch", ["my.Checkpoint", "my.Mix"]),
        ("without_Mix", ["my.SwitchCallback", "my.Checkpoint"]),
        ("baseline", ["my.Checkpoint"]),
    ]
    assert json.dumps(given) == before


def test_one_tip_makes_two_arms() -> None:
    given = config("my.Mix")
    given["trainer"]["callbacks"] = given["trainer"]["callbacks"][0]  # a yaml need not make a list of one
    assert arms_of(given) == {"baseline": [], "Mix": ["my.Mix"]}
    assert arms_of(given, "minus_one") == {"all": ["my.Mix"], "baseline": []}


def test_two_tips_of_one_class_have_names_of_their_own() -> None:
    first, second = plan_arms(config("my.Mix", "my.Mix"), "each", TIPS.__contains__)[1:3]
    assert (first.name, second.name) == ("Mix", "Mix_2")
    assert [arm.config["trainer"]["callbacks"][0]["init_args"]["number"] for arm in (first, second)] == [0, 1]


def test_an_ensemble_is_taken_apart_into_its_member() -> None:
    member = {"class_path": "my.Net", "init_args": {"width": 8}}
    whole = {"class_path": "lightning_tips.EnsembleModule", "init_args": {"member": member, "n": 3}}
    wrappers = {"lightning_tips.EnsembleModule": "member"}
    planned = {a.name: a for a in plan_arms(config("my.Mix", model=whole), "each", TIPS.__contains__, wrappers)}
    assert {name: (arm.config["model"] == whole, arm.tips) for name, arm in planned.items()} == {
        "baseline": (False, ()), "Ensemble": (True, ("Ensemble",)), "Mix": (False, ("Mix",)),
        "all": (True, ("Ensemble", "Mix")),
    }  # fmt: skip
    assert planned["baseline"].config["model"] == member


def test_what_cannot_be_planned_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no tip in the configuration.*--arms"):
        plan_arms(config("my.Checkpoint"), "each", TIPS.__contains__)
    with pytest.raises(ValueError, match="each and minus_one"):
        plan_arms(config("my.Mix"), "every", TIPS.__contains__)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("sgd: --model.lr=0.1 --trainer.max_epochs 5", "sgd", ("--model.lr=0.1", "--trainer.max_epochs", "5")),
        ("folder/sgd.yaml", "sgd", ("--config=folder/sgd.yaml",)),
        ("x: more.yaml '--data.names=[a b]'", "x", ("--config=more.yaml", "--data.names=[a b]")),
        ("sgd:", None, None),
        ("sgd", None, None),
        ("a/b: --x=1", None, None),
        ("sgd: lr=0.1", None, None),
    ],
)
def test_an_arm_of_a_user(text: str, name: str | None, arguments: tuple[str, ...] | None) -> None:
    if arguments is None:
        with pytest.raises(ValueError, match=r"an arm is|names a folder"):
            parse_overlay(text)
    else:
        assert (parse_overlay(text).name, parse_overlay(text).arguments) == (name, arguments)


# ---- statistics


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (3, 0.95), (5, 0.9), (30, 0.99)])
def test_paired_differences_are_those_of_scipy(n: int, level: float) -> None:
    mine, reference = np.random.default_rng(n).normal([[0.3], [0.0]], size=(2, n))
    found = paired_difference(mine.tolist(), reference.tolist(), level)
    expected = stats.ttest_rel(mine, reference)
    interval = expected.confidence_interval(level)
    assert found.n == n
    assert found.mean == pytest.approx((mine - reference).mean())
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(500):
        shared = generator.normal(size=3)  # what a seed does to both arms
        found = paired_difference((shared + 0.5 + generator.normal(size=3)).tolist(), shared.tolist())
        held += found.low <= 0.5 <= found.high
    assert held / 500 == pytest.approx(0.95, abs=0.03)


def test_few_or_equal_pairs() -> None:
    one = paired_difference([0.9], [0.8])
    assert (one.n, one.mean) == (1, pytest.approx(0.1))
    assert math.isnan(one.low)
    assert verdict(one, one.p, "max") == "one seed: no telling"
    assert verdict(paired_difference([], []), math.nan, "max") == "no pair"
    equal = paired_difference([0.9, 0.8], [0.9, 0.8])
    assert (equal.low, equal.high, equal.p) == (0, 0, 1)
    assert verdict(equal, 1.0, "max") == "no measurable effect"
    coarse = paired_difference([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    assert verdict(coarse, coarse.p, "max") == "better, by the same in each seed"
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1.0], [])


def test_verdicts_know_what_is_better_and_how_many_arms_were_tried() -> None:
    sure = paired_difference([1.0, 1.1, 1.05], [0.0, 0.11, 0.04])
    assert verdict(sure, 0.001, "max") == "better"
    assert verdict(sure, 0.001, "min") == "worse"
    assert verdict(sure, 0.06, "max") == "better, but uncertain"
    noisy = paired_difference([1.0, -1.1, 0.2], [0.0, 0.0, 0.0])
    assert verdict(noisy, noisy.p, "max") == "no measurable effect"


def test_holm_is_as_in_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([math.nan, 0.04])[1] == 0.04


def test_an_arm_is_hopeless_only_if_it_is_measurably_worse() -> None:
    reference = {0: 0.90, 1: 0.91, 2: 0.90}
    assert "measurably worse after 3 seeds" in str(
        hopeless({0: 0.50, 1: 0.512, 2: 0.501}, reference, "max", 0.95, looks=3)
    )
    assert hopeless({0: 0.50, 1: 0.512, 2: 0.501}, reference, "min", 0.95, looks=3) is None  # lower is better there
    assert hopeless({0: 0.5}, reference, "max", 0.95, looks=3) is None  # one seed says nothing
    assert hopeless({0: 0.89, 1: 0.92, 2: 0.9}, reference, "max", 0.95, looks=3) is None


# ---- results


def record(scores: list[float | None], seconds: float = 10.0, early: bool = False, name: str = "val_acc") -> dict:
    rows = [{"epoch": float(i), "step": 4.0 * i + 4, name: score} for i, score in enumerate(scores)]
    return {
        "rows": rows, "seconds": seconds, "step_seconds": 0.01, "parameters": 100, "peak_megabytes": 500.0,
        "stopped_early": early, "epochs": len(scores),
    }  # fmt: skip


def result(**more: Any) -> dict[str, Any]:
    arms = [
        Arm("baseline", {}, change="no tip"),
        Arm("Mix", {}, ("Mix",), "Mix <alone>"),
        Arm("Same", {}, ("Same",)),
        Arm("Bad", {}, ("Bad",)),
    ]
    records = {
        "baseline": {s: record([0.5, 0.80 + s / 100]) for s in range(3)},
        "Mix": {s: record([0.6, 0.95, 0.90 + s / 100 + s * s / 1000], 12.0, early=s == 0) for s in range(3)},
        "Same": {0: record([0.801]), 1: record([0.805]), 2: record([None])},
    }
    settings: dict[str, Any] = {"monitor": "val_acc", "mode": "max", "seeds": [0, 1, 2]} | more
    failed = {"Bad": {0: "MisconfigurationException: A and B cannot work together"}}
    measured = {"baseline": {"macs": 1000, "latency_seconds": 0.002}, "Mix": {"macs": 500, "latency_seconds": 0.001}}
    return collect(arms, records, failed, {}, measured=measured, **settings)


def test_a_result_tells_means_differences_costs_and_what_went_wrong() -> None:
    found = result()
    json.dumps(found, allow_nan=False)
    baseline, mix, same, bad = found["arms"]
    assert baseline["verdict"] == "reference"
    assert baseline["mean"] == pytest.approx(0.81)
    assert mix["verdict"] == "better"
    assert mix["difference"]["mean"] == pytest.approx(0.1 + 5 / 3000)
    assert mix["difference"]["p_holm"] >= mix["difference"]["p"]
    assert mix["cost"]["seconds"]["ratio"] == pytest.approx(1.2)
    assert mix["cost"]["macs"] == {"mean": 500, "ratio": 0.5}
    assert mix["stopped_early"] == 1
    assert (same["n"], same["without_number"], same["verdict"]) == (2, 1, "no measurable effect")
    assert bad["verdict"] == "failed"
    assert any("A and B cannot work together" in note for note in found["notes"])
    assert any("no number" in note for note in found["notes"])
    assert any("Holm" in note for note in found["notes"])
    answer = summarize(found)
    assert answer[0].startswith("Better: Mix (+0.1017 [")
    assert "No measurable effect: Same" in answer[1]


def test_best_and_last_epoch() -> None:
    fit = record([0.5, 0.9, None, 0.7])
    assert score_of(fit, "val_acc", "last", "max") == 0.7
    assert score_of(fit, "val_acc", "best", "max") == 0.9
    assert score_of(fit, "val_acc", "best", "min") == 0.5
    assert math.isnan(score_of(record([0.5, None]), "val_acc", "last", "max"))
    with pytest.raises(ValueError, match=r"'val_accuracy'.*val_acc"):
        score_of(fit, "val_accuracy", "last", "max")
    assert any("best epoch" in note for note in result(score="best")["notes"])


def test_two_seeds_are_said_to_be_few() -> None:
    arms, records = [Arm("a", {}), Arm("b", {})], {n: {s: record([0.5 + s / 10]) for s in (0, 1)} for n in "ab"}
    found = collect(arms, records, {}, {}, monitor="val_acc", mode="max", seeds=[0, 1])
    assert found["arms"][1]["verdict"] == "no measurable effect"
    assert any("Two seeds are very little" in note for note in found["notes"])


def test_the_page_needs_nothing_else_and_hides_nothing() -> None:
    found = result()
    yamls = {arm["name"]: f"trainer: <{arm['name']}>" for arm in found["arms"]}
    page = as_page(found, yamls, {"torch": "2.x"})
    assert "http" not in page.replace("http://www.w3.org", "")
    for forbidden in ("<script", "<link", "url(", 'src="/', "@import"):
        assert forbidden not in page
    assert page.count("data:image/svg+xml;base64,") == 2
    for name in yamls:
        assert f"trainer: &lt;{name}&gt;" in page
    assert "Mix &lt;alone&gt;" in page
    for words in ("no measurable effect", "cannot work together", "1 of 3", "torch: 2.x", "seed 2", "500"):
        assert words in page


def test_terminal_and_csv_hold_the_same_numbers() -> None:
    found = result()
    shown = as_terminal(found)
    assert "0.8100" in shown
    assert "+0.1017" in shown
    assert "12 s x1.20" in shown
    assert "The same in all arms: step 10 ms, parameters 100, peak memory 500 MB." in shown
    rows = list(csv.DictReader(io.StringIO(arm_csv(found))))
    assert [row["arm"] for row in rows] == ["baseline", "Mix", "Same", "Bad"]
    assert float(rows[1]["difference"]) == found["arms"][1]["difference"]["mean"]
    assert float(rows[1]["seconds_ratio"]) == 1.2
    fits = list(csv.DictReader(io.StringIO(fit_csv(found))))
    assert len(fits) == 9
    assert fits[-1]["val_acc"] == ""  # the one that diverged


@pytest.mark.parametrize(
    ("name", "mode"),
    [("val_loss", "min"), ("val_acc", "max"), ("valid/F1", "max"), ("valLoss", "min"), ("val_reward", None),
     ("acc_loss", None), ("MulticlassAUROC", "max"), ("val_ece", "min")],
)  # fmt: skip
def test_what_is_better_is_guessed_only_where_the_name_says_so(name: str, mode: str | None) -> None:
    assert guess_mode(name) == mode


def test_wandb_is_found_among_the_loggers() -> None:
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "p", "id": None}}
    assert wandb_arguments([{"class_path": "x.CSVLogger"}, wandb]) == {"project": "p"}
    assert wandb_arguments(wandb) == {"project": "p"}
    assert wandb_arguments(False) is None
    assert wandb_arguments(None) is None
