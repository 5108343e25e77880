"""Trains with the tips named on the command line, as a script of its own: for DDP, which starts it again for each rank.

    python worker.py FOLDER TIPS_AS_JSON TRAINER_ARGUMENTS_AS_JSON [CHECKPOINT]

Each rank writes ``rank-<n>.json`` with its parameter hash and the tips' events.
"""

import json
import sys
from pathlib import Path

import allowed_warnings

allowed_warnings.apply()

if __name__ == "__main__":
    from harness import build, every_epoch, every_step, PlainData
    from lightning_tips.core import find_tips, parameter_hash
    from settings import SETTINGS

    folder = Path(sys.argv[1])
    wanted: list[list] = json.loads(sys.argv[2])
    arguments = json.loads(sys.argv[3])
    ckpt_path = sys.argv[4] if len(sys.argv) > 4 else None
    tips = [SETTINGS[index].make(**changes) for index, changes in wanted]
    keep = {"step": every_step, "epoch": every_epoch}.get(arguments.pop("keep", ""))
    if keep is not None:
        tips.append(keep(folder / "checkpoints"))
    trainer, module = build(*tips, folder=folder, **arguments)
    trainer.fit(module, datamodule=PlainData(), ckpt_path=ckpt_path)
    result = {
        "hash": parameter_hash(module),
        "events": [[str(event) for event in tip.events] for tip in find_tips(trainer)],
        "optimizers": [type(o).__name__ for o in trainer.optimizers],
    }
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(result))
