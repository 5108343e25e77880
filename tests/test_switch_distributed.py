"""The optimizer switch on two ranks: DDP, its variants, and FSDP2 on CPU.

Importing takes most of the time of a process, so each of the groups below is trained in one go by `worker.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parent / "worker.py"
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
AUTO = {"trigger": "step", "at": 14, "lr": "auto"}  # in the middle of epoch 3
CHAIN = [
    {"trigger": "step", "at": 6},
    {"trigger": "epoch", "at": 4, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}}},
]
NEW_SCHEDULER = {
    "trigger": "epoch",
    "at": 2,
    "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9}},
    "warmup_steps": 5,
}

Results = dict[str, Any]


def plan(name: str, *switches: dict, resume: str = "", raises: bool = False, then: dict | None = None, **arguments) -> dict:
    """One run for the worker; `switches` are changes to the settings table's first row."""
    tips = [[0, {"trigger": "epoch", "at": None, **switch}] for switch in switches]
    arguments = {"max_epochs": 6, "devices": 2, "strategy": "ddp"} | arguments
    return {"name": name, "tips": tips, "arguments": arguments, "resume": resume, "raises": raises, **(then or {})}


def resumed(original: dict, *steps: int, validate: str = "") -> list[dict]:
    """The same run again from its checkpoints of these steps."""
    return [
        original | {"name": f"{original['name']}-from-{step}", "resume": checkpoint(original["name"], step)}
        for step in steps
    ]


def checkpoint(name: str, step: int) -> str:
    return f"{name}/checkpoints/step-step={step}.ckpt"


def train(folder: Path, runs: list[dict]) -> list[Results]:
    """Runs the worker and returns each rank's results."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), json.dumps(runs)],
        env=environment | {"LIGHTNING_TIPS_DEBUG": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    (folder / "output.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
