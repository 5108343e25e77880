"""`lightning-tips quality`: duplicates, leakage and label errors in the data of a yaml."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

from lightning_tips.cli.run import BuildCLI, check_checkpoint
from lightning_tips.cli.sweep_bar import SweepBar
from lightning_tips.core import Fit, callbacks_of, devices, loggers_of_fit, reason_of, run_fits
from lightning_tips.data import find_label_errors, stratified_folds
from lightning_tips.data.duplicates import groups_of_copies, match
from lightning_tips.data.held_out import LogitRecord
from lightning_tips.data.part import PartCallback, print_of_part
from lightning_tips.data.quality_report import (
    Copies,
    Suspects,
    draw_duplicates,
    draw_suspects,
    duplicate_table,
    suspect_table,
    write_csv,
)
from lightning_tips.data.reading import Reading, class_names, read_dataset
from lightning_tips.data.sweep import write_json
from lightning_tips.ensemble.checkpoints import load_member
from lightning_tips.ensemble.outputs import find_kind, to_probabilities

Loaders = dict[str, DataLoader[Any]]


def check_quality(arguments: list[str]) -> int:
    """Looks for duplicates and label errors in the data of a yaml: ``lightning-tips quality --config run.yaml``.

    Takes what ``fit`` takes. Duplicates within the training data, and between it, the validation and the test data, are
    always looked for. With ``--ckpt_path`` the labels of validation and test data are judged by that network, with
    ``--folds K`` those of the training data by K fits, each an ordinary fit without one fold of it, in a process and a
    folder of its own: what is done is skipped, what was interrupted goes on.
    """
    chosen, rest = _parser().parse_known_args(arguments)
    if chosen.ckpt_path is not None:
        check_checkpoint(str(chosen.ckpt_path))
    sys.argv = [sys.argv[0], *rest]
    cli = BuildCLI(run=False, save_config_callback=None)  # a yaml that is wrong ends here
    if chosen.folds and (other := [c for c in callbacks_of(cli.trainer) if isinstance(c, PartCallback)]):
        sys.exit(f"error: the configuration has a {type(other[0]).__name__}; --folds adds a FoldCallback. Take it out.")
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        loaders = _loaders(cli)
        readings = _read(loaders, chosen)
        copies = _find_copies(readings, chosen)
        print(duplicate_table(copies))
        suspects, failed = _find_suspects(cli, loaders, readings, copies, rest, out, chosen)
    except (ValueError, TypeError, KeyError, FileNotFoundError, MisconfigurationException) as error:
        sys.exit(f"error: {reason_of(error)}")
    names = next((found for one in readings.values() if (found := class_names(one.dataset))), [])
    if suspects:
        print(suspect_table(suspects, names))
    notes = [note for one in readings.values() for note in one.notes]
    for group in suspects:
        if group.seen:
            notes.append(
                f"{len(group.seen):,} of the {group.judged:,} judged samples of the {group.reading.name} data have a"
                " copy in what their judge was trained on: of these it knows the label by heart."
            )
    notes += [f"{name} failed, and its samples are not judged: {why}" for name, why in failed.items()]
    if not suspects and not failed:
        notes.append(
            "Labels were not judged: --ckpt_path does that for the validation data, --folds 5 for the training data."
        )
    for note in notes:
        print(f"Note: {note}")
    pictures = [
        path
        for path, shown in (
            (out / "duplicates.png", draw_duplicates(copies, out / "duplicates.png", names)),
            (out / "label_errors.png", draw_suspects(suspects, out / "label_errors.png", names)),
        )
        if shown
    ]
    write_csv(out / "findings.csv", copies, suspects, names)
    written = {
        "duplicates": [one.summary() for one in copies],
        "labels": [one.summary(names) for one in suspects],
        "notes": notes,
        "failed": failed,
    }
    write_json(out / "quality.json", written)
    log_to_wandb(cli.loggers, out, pictures, written)
    print("\n".join(map(str, [*pictures, out / "findings.csv", out / "quality.json"])))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="lightning-tips quality",
        allow_abbrev=False,
        description="Looks for duplicates and label errors in the data of a yaml. Takes what fit takes.",
    )
    own.add_argument(
        "--ckpt_path", type=Path, help="a trained checkpoint: judges the labels of validation and test data"
    )
    own.add_argument("--folds", type=_folds, default=0, help="judge the labels of the training data by so many fits,"
                     " each without one fold of it (5 is usual; default: none)")  # fmt: skip
    own.add_argument("--threshold", type=float, help="similarity from which a pair counts (default: 0.998)")
    own.add_argument(
        "--ratio", type=float, help="how far a pair less similar must stand out; 0: not at all (default: 0.2)"
    )
    own.add_argument("--mirrored", action="store_true", help="look for mirror images too")
    own.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder (default: runs/quality)")
    own.add_argument("--workers", type=int, help="fits at once (default: one a GPU, or 1)")
    own.add_argument("--input_key", help="where batches are dicts: the key of the inputs, if it is none of the usual")
    own.add_argument("--target_key", help="likewise of the targets")
    own.add_argument("--seed_everything", type=int, help="seed of the folds and fits (default: that of the yaml, or 0)")
    return own


def _folds(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 2 or more")
    return int(text)


def _loaders(cli: BuildCLI) -> Loaders:
    """The loaders of all the data there is, by name; a second one of a kind is ``val_1``."""
    source = cli.model if cli.datamodule is None else cli.datamodule
    found: Loaders = {}
    source.prepare_data()
    for name, stage in (("train", "fit"), ("val", "fit"), ("test", "test")):
        if not is_overridden(f"{name}_dataloader", source):
            continue
        if name != "val":
            source.setup(stage)
        for number, loader in enumerate(CombinedLoader(getattr(source, f"{name}_dataloader")()).flattened):
            if not isinstance(loader, DataLoader):
                raise TypeError(
                    f"The {name} loader is a {type(loader).__name__}; a torch.utils.data.DataLoader is needed, whose"
                    " dataset can be read."
                )
            found[f"{name}_{number}" if number else name] = loader
    if "train" not in found:
        raise TypeError(f"{type(source).__name__} has no train_dataloader: there is no data to look at.")
    return found


def _read(loaders: Loaders, chosen: Any) -> dict[str, Reading]:
    keys = (chosen.input_key, chosen.target_key)
    still = next((loader.dataset for name, loader in loaders.items() if not name.startswith("train")), None)
    return {name: read_dataset(name, loader, *keys, like=still) for name, loader in loaders.items()}


def _find_copies(readings: dict[str, Reading], chosen: Any) -> list[Copies]:
    """Within each training set; of each other one in each that comes before it."""
    device = "cuda" if torch.cuda.is_available() else None
    how = (chosen.threshold, chosen.ratio)
    found = []
    order = list(readings.values())
    for number, second in enumerate(order):
        for first in order[: number + 1]:
            if first is second and not first.name.startswith("train"):
                continue
            other = None if first is second else second.prints
            mirrored = chosen.mirrored and first.has_images and second.has_images
            pairs = match(first.prints, other, *how, mirrored, device)
            found.append(Copies(first, second, pairs))
    return found


def _find_suspects(
    cli: BuildCLI,
    loaders: Loaders,
    readings: dict[str, Reading],
    copies: list[Copies],
    rest: list[str],
    out: Path,
    chosen: Any,
) -> tuple[list[Suspects], dict[str, str]]:
    found: list[Suspects] = []
    failed: dict[str, str] = {}
    # Samples that are held out go through the collation of the validation data: that of training may mix them.
    plain = next((loader for name, loader in loaders.items() if not name.startswith("train")), loaders["train"])
    if chosen.ckpt_path is not None:
        for name, reading in readings.items():
            if name.startswith("train") or reading.labels is None:
                continue
            probabilities = _probabilities(cli, reading.dataset, loaders[name], chosen.ckpt_path, chosen)
            trained = [one for one in copies if one.second is reading and one.first.name.startswith("train")]
            seen = set().union(*(one.places() for one in trained))
            found.append(_judge(reading, np.arange(len(reading)), probabilities, chosen.ckpt_path.name, seen))
    if chosen.folds:
        reading = readings["train"]
        if "train_1" in readings:
            raise ValueError("--folds is for one training loader; this data has several.")
        if reading.labels is None:
            raise ValueError(f"--folds judges labels. {reading.notes[0] if reading.notes else 'There are none.'}")
        within = next(one for one in copies if one.within)
        dealt = stratified_folds(reading.labels, chosen.folds, _seed(cli, chosen))
        fits, failed = _fit_folds(cli, rest, out, chosen, dealt)
        done = [number for number, fit in enumerate(fits) if fit.name not in failed]
        if not done:
            raise ValueError(f"No fold was trained; see the log.txt of each in {out}. {next(iter(failed.values()))}")
        parts = [np.flatnonzero(dealt == number) for number in done]
        results = [
            _probabilities(cli, Subset(reading.dataset, part.tolist()), plain, fits[number].checkpoint, chosen)
            for number, part in zip(done, parts, strict=True)
        ]
        places, probabilities = np.concatenate(parts), np.concatenate(results)
        groups = groups_of_copies(within.pairs, len(reading))
        seen = {place for group in groups if len(set(dealt[group])) > 1 for place in group}
        found.append(_judge(reading, places, probabilities, f"{len(done)} of {chosen.folds} folds", seen))
    return found, failed


def _seed(cli: BuildCLI, chosen: Any) -> int:
    given = cli.config.seed_everything
    return chosen.seed_everything if chosen.seed_everything is not None else int(given) if given else 0


def _fit_folds(
    cli: BuildCLI, rest: list[str], out: Path, chosen: Any, dealt: NDArray[np.int64]
) -> tuple[list[Fit], dict[str, str]]:
    """The fits, done; and those that failed."""
    seed = _seed(cli, chosen)
    fits = []
    for number in range(chosen.folds):
        arguments = [
            *rest,
            "--trainer.callbacks+=lightning_tips.data.FoldCallback",
            f"--trainer.callbacks.fold={number}",
            f"--trainer.callbacks.folds={chosen.folds}",
            f"--trainer.callbacks.seed={seed}",
            *([f"--trainer.callbacks.target_key={chosen.target_key}"] if chosen.target_key else []),
        ]
        fits.append(Fit.make(f"fold_{number}_of_{chosen.folds}", out, arguments, seed, cli.loggers))
    print(f"{len(fits)} fits, each without one of {chosen.folds} folds of {len(dealt):,} samples: {out}")
    places = devices()
    workers = chosen.workers or len(places)
    kept = [print_of_part(np.flatnonzero(dealt != number)) for number in range(chosen.folds)]

    def check(fit: Fit) -> None:
        state = torch.load(fit.checkpoint, map_location="cpu", weights_only=True)["callbacks"]["FoldCallback"]
        if state["chosen"] != [kept[fits.index(fit)]]:
            raise ValueError(
                f"{fit.name} was trained on other samples than those that were read here, so that what is held out is"
                " not known: a split without a seed does that. Give random_split a generator with one."
            )

    with SweepBar(fits, [1] * len(fits), workers, check) as bar:
        return fits, run_fits(fits, workers, places, bar)


def _probabilities(
    cli: BuildCLI, dataset: Any, like: DataLoader[Any], checkpoint: Path, chosen: Any
) -> NDArray[np.float64]:
    """(N, C) what a checkpoint says of a dataset, by a validation run of the module."""
    loader = DataLoader(
        dataset,
        like.batch_size or 64,
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
        worker_init_fn=like.worker_init_fn,
        multiprocessing_context=like.multiprocessing_context,
    )
    record = LogitRecord(chosen.target_key)
    trainer = pl.Trainer(
        accelerator=cli.trainer.accelerator,
        devices=1,
        precision=cli.trainer.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[record],
        default_root_dir=chosen.out,
    )
    try:
        module = load_member(checkpoint, lambda: copy.deepcopy(cli.model))
    except ValueError as error:
        raise ValueError(str(error).removeprefix("member 0: ")) from error
    if cli.datamodule is None:
        trainer.validate(module, dataloaders=loader, verbose=False)
    else:
        data = copy.copy(cli.datamodule)  # its hooks around a batch, with another loader
        data.val_dataloader = lambda: loader
        data.setup = lambda stage: None  # done
        trainer.validate(module, datamodule=data, verbose=False)
    assert record.logits is not None
    if len(record.logits) != len(dataset):
        raise ValueError(
            f"The network gave {len(record.logits)} outputs for {len(dataset)} samples: they cannot be told apart. Does"
            " the collate_fn leave out samples?"
        )
    return to_probabilities(record.logits, find_kind(record.logits, "multiclass")).double().numpy()


def _judge(
    reading: Reading, places: NDArray[np.int64], probabilities: NDArray[np.float64], judge: str, seen: set[int]
) -> Suspects:
    assert reading.labels is not None
    labels = reading.labels[places]
    found = [error.at(int(places[error.place])) for error in find_label_errors(probabilities, labels)]
    accuracy = float((probabilities.argmax(1) == labels).mean())
    return Suspects(reading, judge, len(places), found, seen & set(places.tolist()), accuracy)


def log_to_wandb(loggers: Any, out: Path, pictures: list[Path], written: dict[str, Any]) -> None:
    """A run of its own, beside those of the fits, where the yaml has a WandbLogger."""
    for one in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(one, dict) or not str(one["class_path"]).endswith("WandbLogger"):
            continue
        logger = WandbLogger(**loggers_of_fit(one, out, "quality")["init_args"])
        for picture in pictures:
            logger.log_image(f"tips/{picture.stem}", [str(picture)])
        for key in ("duplicates", "labels"):
            rows = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in written[key]]
            if rows:
                logger.log_table(f"tips/{key}_table", columns=list(rows[0]), data=[list(row.values()) for row in rows])
        logger.experiment.finish()
