"""What `lightning-tips compare` costs beside the fits that it runs.

    python benchmarks/compare/cost.py

The quickstart without and with its tip on scikit-learn's digits, two seeds: four fits, once by the command, once by
hand (`lightning-tips fit` four times, one after the other, with the yaml of each arm that the command wrote, and
without what the command adds to a fit). In turns; wall time and the CPU time of all processes that were started. The
command runs its fits as forks of one process that has imported Lightning, so it may take less than the sum.
`own_cpu_seconds` is what is left of its cost if that gain is not counted: its own imports and those of the process
that forks, reading the yaml, measuring latencies, the report, and what it adds to each fit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "quickstart.yaml"


def run(arguments: list[str]) -> dict[str, float]:
    """Runs a program to its end.

    Returns:
        ``wall`` and ``cpu``: seconds, those of its own children among them.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def command(out: Path, settings: list[str], seeds: int) -> dict[str, float]:
    """The command, from nothing."""
    shutil.rmtree(out, ignore_errors=True)
    lightning_tips = [sys.executable, "-m", "lightning_tips.cli", "compare", f"--config={CONFIG}", *settings]
    return run([*lightning_tips, f"--seeds={seeds}", f"--out={out}"])


def by_hand(out: Path, folder: Path, seeds: int) -> dict[str, float]:
    """The same fits, one after the other."""
    shutil.rmtree(folder, ignore_errors=True)
    total = {"wall": 0.0, "cpu": 0.0}
    for seed in range(seeds):
        for arm in ("baseline", "OptimizerSwitch"):
            logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
            fit = [sys.executable, "-m", "lightning_tips.cli", "fit", f"--config={out / 'arms' / arm}.yaml"]
            fit += [f"--seed_everything={seed}", f"--trainer.logger={json.dumps(logger)}"]
            spent = run([*fit, f"--trainer.default_root_dir={folder}"])
            total = {kind: total[kind] + spent[kind] for kind in total}
    return total


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--out", type=Path, default=HERE / "cost.json")
    parser.add_argument("--smoke", action="store_true", help="one round, one seed, few steps")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logger = '{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}'
    settings = [f"--trainer.max_epochs={args.epochs}", "--trainer.accelerator=cpu", f"--trainer.logger={logger}"]
    if args.smoke:
        args.rounds, args.seeds = 1, 1
        settings[0] = "--trainer.max_epochs=1"
        settings += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    rounds: list[dict[str, dict[str, float]]] = []
    imports: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(args.rounds):
            ours = command(folder / "compare", settings, args.seeds)
            hand = by_hand(folder / "compare", folder / "by_hand", args.seeds)
            imports.append(run([sys.executable, "-c", "import lightning_tips.cli.run"])["cpu"])
            rounds.append({"compare": ours, "by_hand": hand})
            print({k: {kind: round(v, 1) for kind, v in row.items()} for k, row in rounds[-1].items()}, flush=True)
    fits = 2 * args.seeds
    importing = statistics.median(imports)
    result: dict[str, Any] = {
        "fits": fits,
        "epochs": args.epochs,
        "rounds": args.rounds,
        "seconds": {
            who: {kind: [round(row[who][kind], 2) for row in rounds] for kind in ("wall", "cpu")}
            for who in ("compare", "by_hand")
        },
        "imports_cpu_seconds": round(importing, 2),
        "ratio_of_medians": {
            kind: round(_median(rounds, "compare", kind) / _median(rounds, "by_hand", kind), 4)
            for kind in ("wall", "cpu")
        },
        # Had the fits been started as the command starts them: what is left of its cost then.
        "own_cpu_seconds": round(
            _median(rounds, "compare", "cpu") - _median(rounds, "by_hand", "cpu") + fits * importing, 2
        ),
        "machine": f"{platform.machine()} {platform.system()}, {os.environ['OMP_NUM_THREADS']} thread,"
        f" torch {torch.__version__}",
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _median(rounds: list[dict[str, dict[str, float]]], who: str, kind: str) -> float:
    return statistics.median(row[who][kind] for row in rounds)


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
