"""Trains with tips as a script of its own: for DDP and FSDP2, which start it again for each rank, and to be killed.

    python worker.py FOLDER TIPS ARGUMENTS [CHECKPOINT]   one run
    python worker.py FOLDER RUNS                          several, one after the other: imports take longest

All but the folder are JSON. TIPS is a list of ``[name of a tip in the settings table, changed arguments]``. ARGUMENTS
go to the Trainer, but for:

* ``module``: name of a module in `harness.py`, instead of the one that the rows ask for
* ``callbacks``: names of callbacks there
* ``strategy``: a name, or ``{"class": "DDPStrategy", ...}`` with the class's arguments
* ``keep``: ``"step"`` or ``"epoch"``, how often to write a checkpoint

RUNS is a list of ``{"name", "tips", "arguments"}``, each with a folder ``name`` of its own, and perhaps

* ``resume``: a checkpoint, relative to the folder
* ``raises``: true, when the run must end with an error
* ``more``: epochs to go on afterwards with the same Trainer; ``validate``: a checkpoint to validate afterwards

Each rank writes ``rank-<n>.json``: for one run its result, for several a dict of results by name.
"""

import json
import sys
from pathlib import Path
from typing import Any

import allowed_warnings

allowed_warnings.apply()


def run(
    folder: Path,
    tips: list[list],
    arguments: dict[str, Any],
    ckpt_path: Path | None = None,
    raises: bool = False,
    more: int = 0,
    validate: Path | None = None,
) -> dict[str, Any]:
    """One run; what this rank has to say of it."""
    import lightning.pytorch.strategies

    from lightning_tips.core import find_tips, parameter_hash

    import harness
    from settings import SETTINGS, make

    arguments = dict(arguments)
    rows = {setting.name: setting for setting in SETTINGS}
    parts, _ = make(*((rows[name], changes) for name, changes in tips))
    callbacks: list[Any] = [part for part in parts if isinstance(part, harness.Callback)]
    callbacks += [getattr(harness, name)() for name in arguments.pop("callbacks", [])]
    keep = {"step": harness.every_step, "epoch": harness.every_epoch}.get(arguments.pop("keep", ""))
    if keep is not None:
        callbacks.append(keep(folder / "checkpoints"))
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


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    if len(rest) == 1:
        results: dict[str, Any] = {}
        for wanted in json.loads(rest[0]):
            name, resume, validate = wanted.pop("name"), wanted.pop("resume", None), wanted.pop("validate", None)
            results[name] = run(
                Path(folder, name),
                ckpt_path=Path(folder, resume) if resume else None,
                validate=Path(folder, validate) if validate else None,
                **wanted,
            )
            rank = results[name].pop("rank")
    else:
        results = run(Path(folder), json.loads(rest[0]), json.loads(rest[1]), Path(rest[2]) if rest[2:] else None)
        rank = results.pop("rank")
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
