"""What was measured of each tip, on one page, from the committed results.

    python benchmarks/index.py

Reads the CSV and JSON files beside it and writes `docs/measured.md`; a test does the same and compares, so the page
cannot say what no result says. A tip's rows come from one small function in SOURCES. A result file that none reads, and
a tip of which there is no result, stand on the page too.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "measured.md"
Scores = dict[str, dict[str, float]]
"""By arm and seed."""


@dataclass
class Study:
    """One comparison of arms over seeds.

    Attributes:
        file: The result, below ``benchmarks``.
        on: What it was measured on, in a few words.
        metric: Of the scores; higher is better.
        control: The arm without the tip.
        arm: The one that stands for the tip in the first table: what it does by default or what its card advises.
        scores: By arm and seed, in points.
        paired: Whether an arm and the control of the same seed belong together.
        costs: By arm and seed, seconds or the like, for their ratio to the control's.
        unit: Of the costs.
        cost: What to say of the cost instead.
    """

    file: str
    on: str
    metric: str
    control: str
    arm: str
    scores: Scores
    paired: bool = True
    costs: Scores = field(default_factory=dict)
    unit: str = "CPU time"
    cost: str = ""

    def gain(self, arm: str) -> str:
        """Mean, spread and number of the differences to the control."""
        if not {arm, self.control} <= set(self.scores):
            return "no result yet"
        mine, control = self.scores[arm], self.scores[self.control]
        if self.paired:
            found = [mine[seed] - control[seed] for seed in mine if seed in control]
            if len(found) > 1:
                return f"{statistics.fmean(found):+.2f} (sd {statistics.stdev(found):.2f}), {len(found)} seeds, paired"
            return f"{found[0]:+.2f}, one seed" if found else "no common seed"
        found = [statistics.fmean(mine.values()) - statistics.fmean(control.values())]
        return f"{found[0]:+.2f}, {len(mine)} and {len(control)} seeds, not paired"

    def mean_gain(self, arm: str) -> float | None:
        """The mean difference, if there is one."""
        if self.control not in self.scores:
            return None
        mine, control = self.scores[arm], self.scores[self.control]
        if not self.paired:
            return statistics.fmean(mine.values()) - statistics.fmean(control.values())
        found = [mine[seed] - control[seed] for seed in mine if seed in control]
        return statistics.fmean(found) if found else None

    def score(self, arm: str) -> str:
        """Mean and spread."""
        values = list(self.scores[arm].values())
        spread = f" (sd {statistics.stdev(values):.2f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    def cost_of(self, arm: str) -> str:
        """Its cost beside the control's."""
        if self.cost:
            return self.cost
        mine, control = self.costs.get(arm, {}), self.costs.get(self.control, {})
        ratios = [mine[seed] / control[seed] for seed in mine if control.get(seed)]
        return f"{statistics.median(ratios):.2f} times the {self.unit}" if ratios else "not measured"

    def others(self) -> str:
        """The range over the other arms."""
        found = {
            a: g for a in self.scores if a not in (self.control, self.arm) and (g := self.mean_gain(a)) is not None
        }
        if not found:
            return ""
        low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        if low == high:
            return f"{low} {found[low]:+.2f}"
        return f"{low} {found[low]:+.2f} to {high} {found[high]:+.2f}"


def rows_of(file: str) -> list[dict[str, str]] | None:
    """The lines of a CSV, or None if there is no such file yet."""
    path = HERE / file
    if not path.exists():
        return None
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def by_arm(rows: list[dict[str, str]], value: str, arm: str = "arm", seed: str = "seed") -> Scores:
    """A column by arm and seed."""
    found: Scores = {}
    for row in rows:
        if row[value]:
            found.setdefault(row[arm], {})[row[seed]] = float(row[value])
    return found


def data() -> list[Study]:
    studies = []
    for steps, arm in (("2400", "mixed_teacher"), ("800", "pseudo_labels")):
        if chosen := [row for row in rows_of("data/pseudo_labels.csv") or [] if row["steps"] == steps]:
            studies.append(
                Study(
                    "data/pseudo_labels.csv",
                    f"Fashion-MNIST, 500 labelled images and 9,500 without labels, {int(steps):,} steps",
                    "test accuracy %",
                    "supervised",
                    arm,
                    by_arm(chosen, "test_acc"),
                    costs=by_arm(chosen, "cpu_seconds"),
                )
            )
    if rows := rows_of("data/replay.csv"):
        studies.append(
            Study(
                "data/replay.csv",
                "Fashion-MNIST, two new classes for a network of eight",
                "test accuracy %, mean of old and new classes",
                "share_0",
                "share_0.5",
                by_arm(rows, "mean_after"),
                costs=by_arm(rows, "cpu_seconds"),
            )
        )
    return studies


def optimizer() -> list[Study]:
    studies = []
    for file, epochs in (("optimizer/arms.csv", 12), ("optimizer/arms_24_epochs.csv", 24)):
        if rows := rows_of(file):
            studies.append(
                Study(
                    file,
                    f"Fashion-MNIST, 12,000 images, ResNet-8, {epochs} epochs",
                    "test accuracy %",
                    "adam",
                    "adam_then_sgd",
                    by_arm(rows, "test_acc"),
                    costs=by_arm(rows, "cpu_seconds"),
                )
            )
    return studies


def imbalance() -> list[Study]:
    studies = []
    for file, on in (
        ("imbalance/long_tail.csv", "Fashion-MNIST, 3,000 to 30 images a class, ResNet-8, 500 steps"),
        ("imbalance/weapon.csv", "50 shirts among 1,000 clothes, ResNet-8, 400 steps"),
        ("imbalance/weapon_100_steps.csv", "50 shirts among 1,000 clothes, ResNet-8, 100 steps"),
    ):
        if rows := rows_of(file):
            scores, costs = by_arm(rows, "balanced_acc"), by_arm(rows, "cpu_seconds")
            studies.append(Study(file, on, "balanced accuracy %", "plain", "oversample", scores, costs=costs))
    return studies


def transfer() -> list[Study]:
    file, studies = "transfer/few_images.csv", []
    rows = rows_of(file) or []
    sizes = sorted({int(row["images"]) for row in rows}, reverse=True)
    for images in sizes:
        # Of one arm at several resolutions each is an arm of its own.
        chosen = [row | {"arm": f"{row['arm']}_{row['size']}px"} for row in rows if int(row["images"]) == images]
        arms = {row["arm"] for row in chosen}
        control = "scratch_small_ownpx"
        arm = max((a for a in arms if a.startswith("lp_ft_frozen")), key=lambda a: sum(r["arm"] == a for r in chosen))
        scores = {a.replace("_ownpx", ""): v for a, v in by_arm(chosen, "test_acc").items()}
        costs = {a.replace("_ownpx", ""): v for a, v in by_arm(chosen, "seconds").items()}
        on = f"Fashion-MNIST, {images} images, ImageNet's EfficientNet-Lite0"
        studies.append(
            Study(file, on, "test accuracy %", control.replace("_ownpx", ""), arm, scores, costs=costs, unit="time")
        )
    return studies


def augmentation() -> list[Study]:
    file, studies = "augmentation/accuracy.json", []
    path = HERE / file
    found: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for epochs in sorted((key for key in found if key.endswith(" epochs")), key=lambda k: -int(k.split()[0])):
        arms = found[epochs]
        scores = {arm: dict(zip(map(str, found["seeds"]), row["test"], strict=True)) for arm, row in arms.items()}
        on = f"Fashion-MNIST, {found['images']} images, two convolutions, {epochs}"
        step = " and ".join(f"{arms[arm]['ms_a_step']:.0f}" for arm in ("light", "none"))
        cost = f"{step} ms a step with and without"
        studies.append(Study(file, on, "test accuracy %", "none", "light", scores, cost=cost))
    return studies


def ensemble() -> list[Study]:
    studies, cost, path = [], "", HERE / "ensemble/cost.json"
    if path.exists():
        found = json.loads(path.read_text())
        members, ratio = found["members"], found["predict"]["ratio_of_medians"]
        cost = f"{members} networks; predict {ratio:.2f} times the sum of them"
    file = "ensemble/voting.csv"
    cases = {
        "five_equal": "five equal members",
        "two_weak": "three equal members, two weak",
        "strong_and_equal": "one strong member, four equal",
        "strong_and_weak": "one strong member, four weak",
    }
    votes = [row for row in rows_of(file) or [] if row["held_out"] == "5000"]
    for case in dict.fromkeys(row["case"] for row in votes):
        scores = by_arm([row for row in votes if row["case"] == case], "acc", seed="draw")
        on = f"Fashion-MNIST, 12,000 images, ResNet-8, {cases.get(case, case)}"
        studies.append(Study(file, on, "test accuracy %", "best_single", "best", scores, cost=cost))
    if rows := rows_of("ensemble/weapon.csv"):
        scores = {}
        for row in rows:
            for vote in ("single", "soft"):
                scores.setdefault(f"{row['arm']}, {vote}", {})[row["seed"]] = float(row[vote])
        on = "50 shirts among 1,000 clothes, five ResNet-8"
        studies.append(
            Study("ensemble/weapon.csv", on, "balanced accuracy %", "plain, single", "ratio_1, soft", scores, cost=cost)
        )
    return studies


def pruning() -> list[Study]:
    studies = []
    pruned = rows_of("pruning/accuracy.csv") or []
    for network in dict.fromkeys(row["network"] for row in pruned):
        chosen = [row for row in pruned if row["network"] == network]
        on = f"Fashion-MNIST, {int(chosen[0]['images']):,} images, {network}, half of its MACs (`_30`: 30 %)"
        scores, costs = by_arm(chosen, "test_acc"), by_arm(chosen, "cpu_seconds")
        arm = "l1_distilled" if "l1_distilled" in scores else "l1"
        studies.append(Study("pruning/accuracy.csv", on, "test accuracy %", "unpruned", arm, scores, costs=costs))
    rows = rows_of("pruning/veit.csv") or []
    for network, images in dict.fromkeys((row["network"], row["train_images"]) for row in rows):
        chosen = [row for row in rows if (row["network"], row["train_images"]) == (network, images)]
        scores = {"whole": {row["seed"]: float(row["base"]) for row in chosen}}
        scores |= {f"without {row['deleted']}": {row["seed"]: float(row["recalibrated"])} for row in chosen}
        on = f"Fashion-MNIST, {int(images):,} images, {network}, one {chosen[0]['unit']} out, no fine-tuning"
        blocks = sorted((a for a in scores if a != "whole"), key=lambda a: statistics.fmean(scores[a].values()))
        middle = blocks[len(blocks) // 2]  # not the best one, which one knows afterwards only
        left = {f"without {row['deleted']}": float(row["macs_left"]) for row in chosen}[middle]
        cost = f"{left:.0%} of the MACs left"
        studies.append(Study("pruning/veit.csv", on, "test accuracy %", "whole", middle, scores, cost=cost))
    return studies


# Tip: its number, its card, and what reads its results.
SOURCES: dict[str, tuple[int, Callable[[], list[Study]]]] = {
    "data": (1, data),
    "optimizer": (2, optimizer),
    "imbalance": (3, imbalance),
    "transfer": (4, transfer),
    "augmentation": (5, augmentation),
    "ensemble": (6, ensemble),
    "pruning": (7, pruning),
}

# What other result files are about. One that is neither here nor in a study is called unread on the page.
ELSEWHERE = {
    "augmentation/guard.csv": "which operations change what a class is taken for",
    "augmentation/throughput.json": "images a second, against torchvision and kornia",
    "compare/cost.json": "what `lightning-tips compare` costs beside its fits",
    "compare/digits_arms.csv": "three tips on digits: a comparison as `compare` writes it",
    "compare/digits_fits.csv": "the same, fit by fit",
    "data/curve.csv": "what learning curves say of ten times the data, against the truth",
    "data/curve.json": "the same, in short",
    "data/curve_scores.csv": "the scores behind the learning curves",
    "ensemble/cost.json": "time of an ensemble against its members",
    "ensemble/soup.json": "weights averaged into one network",
    "ensemble/stacked.json": "members run as one stacked network, against a loop",
    "imbalance/draw.json": "time to draw an epoch",
    "imbalance/ratio.json": "whether class weights keep their ratio",
    "optimizer/arms_10k_batch64.csv": "one seed of a shorter protocol",
    "optimizer/idle_cost.json": "cost of a switch that waits",
    "optimizer/resume.json": "resumed runs against uninterrupted ones",
    "optimizer/triggers.json": "false and missed alarms of the triggers",
    "pruning/criteria.json": "what the criteria find, one seed",
    "pruning/dropped.csv": "three and four blocks out, fine-tuned for an epoch",
    "pruning/foreign.csv": "63 networks of other libraries",
    "pruning/latency.json": "speed-up by filters and blocks, against what the operations promise",
    "pruning/plan_time.json": "time to plan",
    "pruning/temperature.csv": "the temperature of distillation, one seed",
    "transfer/cached_features.json": "time with cached features",
    "transfer/speed.json": "time of a step with frozen layers",
}


def page() -> str:
    """The page, in Markdown."""
    found = {tip: read() for tip, (_, read) in SOURCES.items()}
    lines = [
        "# What was measured",
        "",
        "`python benchmarks/index.py` writes this page from the committed results; a test does so again and compares."
        " First one row a tip: an arm as its card advises it against the same without the tip. Gains are differences in"
        " points, with the standard deviation over seeds; differences under half a point are mostly noise, and losses"
        " are losses. Then all arms. What to make of them say the cards.",
        "",
        "| | tip | measured on | gain | cost | other arms | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for tip, (number, _) in SOURCES.items():
        card = HERE.parent / "lightning_tips" / tip / "README.md"
        name = f"[{tip}](../lightning_tips/{tip}/README.md)" if card.exists() else tip
        if not found[tip]:
            lines.append(f"| {number} | {name} | no result yet | | | | |")
            continue
        study = found[tip][0]
        cells = [
            f"{study.on}; {study.metric}",
            f"**{study.arm}** {study.gain(study.arm)}, against {study.control}",
            study.cost_of(study.arm) if study.arm in study.scores else "",
            study.others(),
            _link(study.file),
        ]
        lines.append(f"| {number} | {name} | {' | '.join(cells)} |")
    for tip, (number, _) in SOURCES.items():
        for study in found[tip]:
            lines += ["", f"## Tip {number}, {tip}: {study.on}", ""]
            lines += [f"{study.metric[0].upper()}{study.metric[1:]}, {_link(study.file)}.", ""]
            cost = not study.cost
            lines += [f"| arm | {study.metric} | gain |" + (" cost |" if cost else ""), "|---|---|---|" + "---|" * cost]
            for arm in study.scores:
                gain = "" if arm == study.control else study.gain(arm)
                shown = f"| {arm} | {study.score(arm)} | {gain} |"
                lines.append(shown + (f" {study.cost_of(arm) if arm != study.control else ''} |" if cost else ""))
    read = {study.file for studies in found.values() for study in studies}
    files = sorted(str(p.relative_to(HERE).as_posix()) for p in [*HERE.glob("*/*.csv"), *HERE.glob("*/*.json")])
    lines += ["", "## Other results", ""]
    lines += [f"- {_link(f)}: {ELSEWHERE.get(f, '**not read by this page yet**')}" for f in files if f not in read]
    return "\n".join(lines) + "\n"


def _link(file: str) -> str:
    return f"[{file}](../benchmarks/{file})"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
