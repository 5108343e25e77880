"""`lightning-tips curve`: what more data would bring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_tips.cli.run import BuildCLI
from lightning_tips.cli.sweep_bar import SweepBar
from lightning_tips.core import Fit, callbacks_of, devices, loggers_of_fit, run_fits
from lightning_tips.data import SubsetCallback, fit_learning_curve
from lightning_tips.data.curve_report import class_gains, class_table, curve_table, plot_curve, predictions
from lightning_tips.data.part import stratification
from lightning_tips.data.sweep import DivergedFitError, Point, choose_sizes, find_limits, read_point, write_json


def draw_curve(arguments: list[str]) -> int:
    """Trains a yaml on growing parts of its data and says what more would bring.

    ``lightning-tips curve --config run.yaml`` takes what ``fit`` takes. Each size and seed is an ordinary fit with a
    `SubsetCallback`, in a process and a folder of its own; what is done is skipped, what was interrupted goes on, and a
    failed fit stops no other. Validation data stays as it is.
    """
    chosen, rest = _parser().parse_known_args(arguments)
    sys.argv = [sys.argv[0], *rest]
    cli = BuildCLI(run=False, save_config_callback=None)  # a yaml that is wrong ends here
    mode: Literal["max", "min"] = chosen.mode or (
        "min" if any(w in chosen.monitor.lower() for w in ("loss", "err", "nll", "mse", "mae", "perplexity")) else "max"
    )
    try:
        groups, total = _training_data(cli, chosen)
        sizes = choose_sizes(groups, chosen.sizes or ())
    except (ValueError, TypeError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
    found = cli.config.seed_everything
    first = chosen.seed_everything if chosen.seed_everything is not None else int(found) if found else 0
    out = chosen.out.resolve()
    # One seed after the other, so that a sweep that is cut short has all sizes of some.
    plan = [(n, first + number) for number in range(chosen.seeds) for n in sizes]
    fits = [_make(n, seed, out, rest, cli.loggers, chosen) for n, seed in plan]

    def read(fit: Fit) -> Point:
        return read_point(fit, *plan[fits.index(fit)], chosen.monitor, mode, chosen.score)

    print(f"{len(fits)} fits, {len(sizes)} sizes from {sizes[0]:,} to {sizes[-1]:,} of {total:,} samples: {out}")
    places = devices()
    try:
        with SweepBar(fits, [n for n, _ in plan], chosen.workers or len(places), read) as bar:
            failed = run_fits(fits, chosen.workers or len(places), places, bar)
        points = []
        for fit in fits:
            if fit.name not in failed:
                try:
                    points.append(read(fit))
                except DivergedFitError as error:
                    failed[fit.name] = str(error)
        if not points:
            sys.exit(f"error: no fit finished; see the log.txt of each in {out}. {next(iter(failed.values()))}")
        curve = fit_learning_curve([p.n for p in points], [p.score for p in points], mode)
        if chosen.target is not None and not curve.abstains:
            curve.samples_for(chosen.target)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    for name, why in failed.items():
        print(f"{name} failed and is left out: {why}")
    print(curve_table(curve, points, total, chosen.monitor))
    if sizes[-1] < total / 2:
        print(
            f"Note: the largest size is {100 * sizes[-1] / total:.2g} % of the data, so 10 times the data lies"
            f" {10 * total / sizes[-1]:.0f} times beyond it."
        )
    for note in curve.notes:
        print(f"Note: {note}.")
    limits = find_limits(points, mode)
    for limit in limits:
        print(f"Warning: {limit}")
    needed = None
    if curve.abstains:
        print(f"Nothing can be told of more data: {curve.reason}.")
    else:
        off, (low, high) = curve.levels_off_at()
        print(f"{chosen.monitor} levels off at {off:.4g} ({low:.4g} to {high:.4g}, 90 %).")
        if chosen.target is not None:
            needed = curve.samples_for(chosen.target)
            print(f"For {chosen.monitor} {chosen.target:g}: {needed}.")
    gains = class_gains(points)
    if gains:
        print("Recall of each class, and what is expected of it when all classes double: the first gain most")
        print(class_table(gains))
    else:
        print(f"There are no curves of the classes: {points[-1].problem or 'no class has validation samples'}.")
    plot_curve(curve, points, out / "curve.png", chosen.monitor, total, chosen.target)
    written = {
        "monitor": chosen.monitor,
        "mode": mode,
        "total": total,
        "curve": curve.to_dict(),
        "predictions": predictions(curve, total),
        "target": None if needed is None else vars(needed) | {"says": str(needed)},
        "warnings": limits,
        "classes": [vars(gain) for gain in gains],
        "points": [point.to_dict() for point in points],
        "failed": failed,
    }
    write_json(out / "curve.json", written)
    _log_to_wandb(cli.loggers, out, chosen.monitor, written)
    print(f"{out / 'curve.png'}\n{out / 'curve.json'}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="lightning-tips curve",
        allow_abbrev=False,
        description="Trains a yaml on growing parts of its data and says what more would bring. Takes what fit takes.",
    )
    own.add_argument("--sizes", nargs="+", type=_size, help="samples, or shares such as 0.5 (default: all to 1/32)")
    own.add_argument("--seeds", type=_count, default=3, help="fits at each size, with other samples (default: 3)")
    own.add_argument("--monitor", default="val_acc", help="the metric, as the module logs it (default: val_acc)")
    own.add_argument("--mode", choices=["max", "min"], help="whether more is better (default: by the metric's name)")
    own.add_argument("--score", choices=["auto", "last", "best"], default="auto", help="of the last validation, or of"
                     " the best one (default: the best one where a fit was stopped early)")  # fmt: skip
    own.add_argument("--target", type=float, help="a score: how many samples does it take?")
    own.add_argument("--out", type=Path, default=Path("runs/curve"), help="folder (default: runs/curve)")
    own.add_argument("--workers", type=_count, help="fits at once (default: one a GPU, or 1)")
    own.add_argument("--no_stratify", action="store_true", help="do not look at the targets to choose samples")
    own.add_argument("--target_key", help="where batches are dicts: the key of the target, if it is none of the usual")
    own.add_argument("--seed_everything", type=int, help="the first seed (default: that of the yaml, or 0)")
    return own


def _size(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def _training_data(cli: BuildCLI, chosen: Any) -> tuple[Any, int]:
    """What a nested subset of the training data is chosen by, and how many samples there are."""
    source: Any = cli.model if cli.datamodule is None else cli.datamodule
    source.trainer = cli.trainer  # which a train_dataloader may ask for the number of ranks
    if any(isinstance(one, SubsetCallback) for one in callbacks_of(cli.trainer)):
        raise ValueError("the configuration has a SubsetCallback or SubsetMixin already; `curve` adds its own.")
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"A curve needs one training loader, a torch.utils.data.DataLoader, not {type(loader).__name__}."
        )
    tip = SubsetCallback(1.0, 0, not chosen.no_stratify, chosen.target_key)
    tip.check(loader)
    total = len(loader.dataset)  # type: ignore[arg-type]
    return stratification(loader.dataset, total, not chosen.no_stratify, chosen.target_key)[0], total


def _make(n: int, seed: int, out: Path, rest: list[str], loggers: Any, chosen: Any) -> Fit:
    arguments = [
        *rest,
        "--trainer.callbacks+=lightning_tips.data.SubsetCallback",
        f"--trainer.callbacks.size={n}",
        f"--trainer.callbacks.seed={seed}",
        f"--trainer.callbacks.stratify={'false' if chosen.no_stratify else 'true'}",
        *([f"--trainer.callbacks.target_key={chosen.target_key}"] if chosen.target_key else []),
        "--trainer.callbacks+=lightning_tips.data.ClassRecallRecord",
        *([f"--trainer.callbacks.target_key={chosen.target_key}"] if chosen.target_key else []),
    ]
    return Fit.make(f"n{n}_seed{seed}", out, arguments, seed, loggers)


def _log_to_wandb(loggers: Any, out: Path, monitor: str, written: dict[str, Any]) -> None:
    """A run of its own, beside those of the fits, where the yaml has a WandbLogger."""
    given = loggers if isinstance(loggers, list) else [loggers]
    for one in given:
        if not isinstance(one, dict) or not str(one["class_path"]).endswith("WandbLogger"):
            continue
        logger = WandbLogger(**loggers_of_fit(one, out, "curve")["init_args"])
        logger.log_image("tips/curve", [str(out / "curve.png")])
        rows = [[point["n"], point["seed"], point["score"]] for point in written["points"]]
        logger.log_table("tips/curve_points", columns=["samples", "seed", monitor], data=rows)
        expected = [[row["times"], row["n"], row["score"], *row["band"]] for row in written["predictions"]]
        if expected:
            logger.log_table("tips/curve_expected", columns=["times", "samples", monitor, "low", "high"], data=expected)
        logger.experiment.finish()
