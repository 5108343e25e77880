"""`lightning-tips compare`: does a tip help here? Arms of one yaml over seeds, paired, with what each costs."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar

import lightning_tips
from lightning_tips.cli.compare_cost import measure_arms
from lightning_tips.cli.run import ParseCLI, wandb_without_login
from lightning_tips.compare import (
    Arm,
    arm_csv,
    as_page,
    as_terminal,
    collect,
    fit_csv,
    guess_mode,
    hopeless,
    parse_overlay,
    plan_arms,
    plot_differences,
    score_of,
    summarize,
)
from lightning_tips.compare.arms import callbacks_in
from lightning_tips.compare.statistics import Mode
from lightning_tips.compare.wandb_run import log_to_wandb, wandb_arguments
from lightning_tips.core import Fit, TipCallback, TipMixin, devices, run_fits

WRAPPERS = {f"{path}.EnsembleModule": "member" for path in ("lightning_tips", "lightning_tips.ensemble.module")}
"""Models that are tips, and which of their arguments is the model without the tip."""


def _options() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="lightning-tips compare",
        allow_abbrev=False,
        description="Takes what fit takes, and beside it:",
        epilog="An arm is a tip of the yaml (each, minus_one), a yaml that is laid over it (sgd.yaml), or arguments as"
        " of fit ('sgd: --model.init_args.optimizer=torch.optim.SGD').",
    )
    own.add_argument("--arms", nargs="+", default=["each"], metavar="ARM", help="each, minus_one, and arms of your own")
    own.add_argument("--seeds", type=int, default=3, help="how many, the same for each arm (default: 3)")
    own.add_argument("--monitor", default="val_acc", help="the metric that decides (default: val_acc)")
    own.add_argument("--mode", choices=["min", "max"], help="what is better (default: by its name)")
    own.add_argument("--score", choices=["last", "best"], default="last", help="of which epoch (default: last)")
    own.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    own.add_argument("--stop_hopeless", action="store_true", help="no more seeds for an arm that is measurably worse")
    own.add_argument("--workers", type=int, help="fits at once (default: one a GPU, or 1)")
    own.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    own.add_argument("--seed_everything", type=int, help="the first seed (default: that of the yaml, or 0)")
    return own


@dataclass
class Comparison:
    """What is asked, and how far it has come."""

    arms: list[Arm]
    fits: dict[tuple[str, int], Fit]
    seeds: list[int]
    monitor: str
    mode: Mode
    score: Any
    level: float
    stop_hopeless: bool
    left_out: dict[str, str] = field(default_factory=dict)

    def scores(self, arm: str) -> dict[int, float]:
        """By seed, of the fits that have finished.

        Raises:
            ValueError: If the metric was not logged.
        """
        done = {seed: fit for (name, seed), fit in self.fits.items() if name == arm and fit.is_done}
        return {seed: score_of(fit.record, self.monitor, self.score, self.mode) for seed, fit in done.items()}

    def unwanted(self, fit: Fit, failed: Mapping[str, str]) -> str | None:
        """Why a fit is not run: its arm refuses to work, or is hopeless and that was asked for."""
        (arm,) = [name for (name, _), one in self.fits.items() if one is fit]
        for name, _ in self.fits:
            self.scores(name)  # a metric that is missing ends it after the first fit, not after the last
        for (name, _), other in self.fits.items():
            if name == arm and "MisconfigurationException" in failed.get(other.name, ""):
                return "its arm is refused"
        if self.stop_hopeless and arm != self.arms[0].name:
            looks = max(len(self.seeds) - 2, 1)  # after the second seed, the third ... but the last
            why = hopeless(self.scores(arm), self.scores(self.arms[0].name), self.mode, self.level, looks)
            if why:
                self.left_out[arm] = why
            return why
        return None


class _Progress:
    """Says what happens, and how long it will take."""

    def __init__(self, fits: Sequence[Fit]) -> None:
        self._left = sum(not fit.is_done for fit in fits)
        self._all, self._done, self._started = len(fits), 0, time.perf_counter()

    def __call__(self, text: str) -> None:
        if text.endswith("has finished") or " failed (" in text or " is left out: " in text:
            self._done += 1
            left = self._left - self._done
            if left:
                minutes = (time.perf_counter() - self._started) / self._done * left / 60
                text += f" ({self._all - left} of {self._all}; about {max(1, round(minutes))} min to go)"
        print(text, flush=True)


def compare(arguments: list[str]) -> int:
    """Compares: ``lightning-tips compare --config run.yaml --arms each --seeds 3``.

    Args:
        arguments: What stands behind ``compare``.
    """
    options = _options()
    chosen, rest = options.parse_known_args(arguments)
    mode = chosen.mode or guess_mode(chosen.monitor)
    if mode is None:
        options.error(f"the name {chosen.monitor} does not say what is better: give --mode max or --mode min.")
    if chosen.seeds < 1 or (chosen.workers is not None and chosen.workers < 1) or not 0 < chosen.level < 1:
        options.error("--seeds and --workers are at least 1, and --level is between 0 and 1.")
    sys.argv = [sys.argv[0], *rest]
    cli = ParseCLI(run=False, save_config_callback=None)  # a yaml that is wrong ends here
    out = chosen.out.resolve()
    try:
        arms = arms_asked_for(cli, chosen.arms, out)
        files = _write_arms(arms, out)
        seeds = [_first_seed(cli, chosen.seed_everything) + number for number in range(chosen.seeds)]
        # Seed by seed, so that an interrupted comparison has complete pairs.
        fits = {
            (arm.name, seed): Fit.make(
                f"{arm.name}-seed{seed}", out, [f"--config={files[arm.name]}"], seed, cli.loggers
            )
            for seed in seeds
            for arm in arms
        }
        asked = Comparison(arms, fits, seeds, chosen.monitor, mode, chosen.score, chosen.level, chosen.stop_hopeless)
        places = devices()
        workers = chosen.workers or len(places)
        failed = run_fits(list(fits.values()), workers, places, _Progress(list(fits.values())), asked.unwanted)
        records = {arm.name: {s: fits[arm.name, s].record for s in seeds if fits[arm.name, s].is_done} for arm in arms}
        if not any(records.values()):
            words = "\n".join(f"  {name}: {why}" for name, why in failed.items())
            sys.exit(f"error: no fit finished:\n{words}\nMore is in the log.txt of each, in {out}.")
        trained = {name: fits[name, min(done)].checkpoint for name, done in records.items() if done}
        spent = sum(record["seconds"] for done in records.values() for record in done.values())
        measured, device = measure_arms(cli, {name: files[name] for name in trained}, trained, spent)
        result = collect(
            arms,
            records,
            {a.name: {s: failed[fits[a.name, s].name] for s in seeds if fits[a.name, s].name in failed} for a in arms},
            asked.left_out,
            monitor=chosen.monitor,
            mode=mode,
            score=chosen.score,
            seeds=seeds,
            level=chosen.level,
            measured=measured,
        )
    except ValueError as error:
        sys.exit(f"error: {error}" + (f"\nWhat has finished is kept in {out}." if any(out.glob("*/done.json")) else ""))
    if workers > len(places):
        result["notes"].append(
            f"{workers} fits ran at once on {len(places)} device(s), so their times are not comparable."
        )
    result["notes"] += _brought_by_data(cli)
    result["machine"] = _machine(device, workers)
    _write(result, {arm.name: cli.short([f"--config={files[arm.name]}"]) for arm in arms}, out)
    if (logger := wandb_arguments(cli.loggers)) is not None:
        wandb_without_login()
        log_to_wandb(result, logger, out, {"differences": out / "differences.png"})
    print(as_terminal(result))
    print("\n".join([*summarize(result), *(f"Note: {note}" for note in result["notes"])]))
    print(f"{out / 'report.html'}, compare.json, arms.csv, fits.csv")
    return 1 if failed else 0


def _first_seed(cli: ParseCLI, given: int | None) -> int:
    if given is not None:
        return given
    found = cli.config.seed_everything
    return int(found) if found and found is not True else 0


# ---- the arms


def _class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_tip(class_path: str) -> bool:
    return issubclass(_class(class_path), TipCallback)


def arms_asked_for(cli: ParseCLI, asked: Sequence[str], out: Path) -> list[Arm]:
    """The arms that were asked for; the first is the reference, over which those of the user's own are laid."""
    whole = cli.plain(cli.config)
    if not any(_is_bar(one["class_path"]) for one in callbacks_in(whole)):
        whole["trainer"]["enable_progress_bar"] = False  # nobody looks; a bar in a log file is long
    plans = [text for text in asked if text in ("each", "minus_one")]
    if len(plans) > 1:
        raise ValueError("--arms each and --arms minus_one have different references. Take one of them.")
    if plans:
        arms = plan_arms(whole, plans[0], _is_tip, WRAPPERS)  # type: ignore[arg-type]
    else:
        arms = [Arm("baseline", whole, change="the configuration as it is")]
    overlays = [parse_overlay(text) for text in asked if text not in plans]
    if overlays:
        base = out / "arms" / f"{arms[0].name}.yaml"
        _write_arms(arms[:1], out)
        for overlay in overlays:
            config = cli.read([f"--config={base}", *overlay.arguments])
            arms.append(Arm(overlay.name, config, change=" ".join(overlay.arguments)))
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"There are two arms {twice[0]!r}. Give one of them another name.")
    return arms


def _is_bar(class_path: str) -> bool:
    return issubclass(_class(class_path), ProgressBar)


def _write_arms(arms: Sequence[Arm], out: Path) -> dict[str, Path]:
    """The yaml of each arm, in ``arms``.

    Raises:
        ValueError: If there is one already, which says something else.
    """
    paths = {arm.name: out / "arms" / f"{arm.name}.yaml" for arm in arms}
    texts = {arm.name: yaml.safe_dump(arm.config, sort_keys=False) for arm in arms}
    kept = set()
    for name, path in paths.items():
        if path.exists():
            old, new = yaml.safe_load(path.read_text()), yaml.safe_load(texts[name])
            if _given(old) != _given(new):
                raise ValueError(
                    f"{out} holds a comparison of another configuration: in arm {name}"
                    f" {_first_change(_given(old), _given(new))}. Give another --out, the arm another name, or remove"
                    " the folder."
                )
            kept.add(name)
    for name, path in paths.items():
        if name not in kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[name])
    return paths


def _given(config: Any) -> Any:
    """A configuration without what is null: an argument that a newer version has, at its default, is no change."""
    if isinstance(config, dict):
        return {key: _given(value) for key, value in config.items() if value is not None}
    return [_given(value) for value in config] if isinstance(config, list) else config


def _first_change(old: Any, new: Any, way: str = "") -> str:
    """Where two configurations differ first."""
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(index, one, other) for index, (one, other) in enumerate(zip(old, new, strict=True))]
    for key, one, other in pairs:
        if one != other:
            return _first_change(one, other, f"{way}.{key}".lstrip("."))
    return f"{way or 'it'} is {new!r}, and was {old!r}"


def _brought_by_data(cli: ParseCLI) -> list[str]:
    data = cli.config.get("data")
    path = None if data is None else data.get("class_path")
    if path and issubclass(_class(path), TipMixin):
        return [f"{path} brings tips of its own, which are in every arm. To compare those, name arms: 'x: --data...'."]
    return []


# ---- what is left


def _write(result: dict[str, Any], yamls: Mapping[str, str], out: Path) -> None:
    (out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "arms.csv").write_text(arm_csv(result))
    (out / "fits.csv").write_text(fit_csv(result))
    plot_differences(result).savefig(out / "differences.png", dpi=120)
    (out / "report.html").write_text(as_page(result, yamls, result["machine"]), encoding="utf-8")


def _machine(device: str, workers: int) -> dict[str, str]:
    name = f" ({torch.cuda.get_device_name()})" if device.startswith("cuda") else ""
    return {
        "device": f"{device}{name}",
        "fits at once": str(workers),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "lightning_tips": getattr(lightning_tips, "__version__", "unknown"),
    }
