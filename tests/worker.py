"""Trains with tips, in processes that `processes.py` starts: to be killed, or as ranks of DDP and FSDP2.

``tips`` is a list of ``[name of a tip in the settings table, changed arguments]``. ``arguments`` go to the Trainer, but
for:

* ``module``: name of a module in `harness.py`, instead of the one that the rows ask for
* ``callbacks``: names of callbacks there
* ``strategy``: a name, or ``{"class": "DDPStrategy", ...}`` with the class's arguments
* ``keep``: every how many steps to write a checkpoint; or ``"epoch"``
"""

from pathlib import Path
from typing import Any

import lightning.pytorch.strategies

from lightning_tips.core import find_tips, parameter_hash

import harness
from settings import SETTINGS, make


def run_all(folder: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs, one after the other; their results by name.

    Args:
        folder: Gets a folder for each.
        runs: A list of ``{"name", "tips", "arguments"}``, perhaps with more that `run` takes. Checkpoints, ``resume``
            and ``validate``, are relative to the folder.
    """
    results: dict[str, Any] = {}
    for wanted in runs:
        options = dict(wanted)
        name, resume, validate = options.pop("name"), options.pop("resume", ""), options.pop("validate", "")
        options["ckpt_path"] = folder / resume if resume else None
        options["validate"] = folder / validate if validate else None
        results[name] = run(folder / name, **options)
        results[name].pop("rank")
    return results


def run(
    folder: Path,
    tips: list[list],
    arguments: dict[str, Any],
    ckpt_path: Path | None = None,
    raises: bool = False,
    more: int = 0,
    validate: Path | None = None,
) -> dict[str, Any]:
    """One run; what this rank has to say of it.

    Args:
        folder: Of the run.
        tips: See above.
        arguments: See above.
        ckpt_path: Where to go on from.
        raises: Whether it may end with an error, which is told.
        more: Epochs to go on afterwards with the same Trainer.
        validate: A checkpoint to validate afterwards.
    """
    arguments = dict(arguments)
    rows = {setting.name: setting for setting in SETTINGS}
    parts, _ = make(*((rows[name], changes) for name, changes in tips))
    callbacks: list[Any] = [part for part in parts if isinstance(part, harness.Callback)]
    callbacks += [getattr(harness, name)() for name in arguments.pop("callbacks", [])]
    if keep := arguments.pop("keep", None):
        kept = folder / "checkpoints"
        callbacks.append(harness.every_epoch(kept) if keep == "epoch" else harness.every_step(kept, keep))
    if isinstance(strategy := arguments.get("strategy"), dict):
        options = {key: value for key, value in strategy.items() if key != "class"}
        arguments["strategy"] = getattr(lightning.pytorch.strategies, strategy["class"])(**options)
    harness.seed_everything(0, verbose=False)
    module = next(part for part in parts if isinstance(part, harness.LightningModule))
    if "module" in arguments:
        module = getattr(harness, arguments.pop("module"))()
    data = harness.data_in(*parts)

    trainer, _ = harness.build(*callbacks, folder=folder, module=module, **arguments)
    error = ""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        if more:
            trainer.fit_loop.max_epochs += more
            trainer.fit(module, datamodule=data)
        if validate is not None:
            trainer.validate(module, datamodule=data, ckpt_path=validate, verbose=False)
    except Exception as raised:
        if not raises:
            raise
        error = f"{type(raised).__name__}: {raised}"
    return {
        "hash": parameter_hash(module),
        "events": [[str(event) for event in tip.events] for tip in find_tips(trainer)],
        "optimizers": [type(o).__name__ for o in trainer.optimizers],
        "momenta": harness.momenta(trainer),
        "rates": [[float(group["lr"]) for group in o.param_groups] for o in trainer.optimizers],
        "steps": trainer.global_step,
        "seen": getattr(module, "seen", None),
        "rank": trainer.global_rank,
        "error": error,
    }
