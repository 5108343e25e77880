"""Many fits of one yaml, in processes of their own: each resumable by itself, several at once, done ones skipped."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning_tips.core.fit_server import FitServer, Running

__all__ = ["Fit", "devices", "loggers_of_fit", "run_fits"]

MODULE, PRELOAD = "lightning_tips.cli", "lightning_tips.cli.run"
DONE, LOG, LAST, RECORD = "done.json", "log.txt", "last.ckpt", "record.json"


@dataclass(frozen=True)
class Fit:
    """One fit.

    Attributes:
        name: Its name, for people, and for W&B.
        folder: All that it leaves: ``last.ckpt``, ``log.txt``, ``record.json`` (see :class:`FitRecord`), and
            ``done.json`` when it has finished.
        command: What is run, without what tells it to resume.
        fingerprint: Of what decides the result: the arguments, the files that they name, and options from the
            environment.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    fingerprint: str

    @staticmethod
    def make(name: str, out: Path, arguments: Sequence[str], seed: int, loggers: Any = True) -> Fit:
        """A fit of a yaml.

        Args:
            name: Of the fit, and of its folder in ``out``.
            out: Holds a folder for each fit.
            arguments: What ``lightning-tips fit`` would get.
            seed: Its ``seed_everything``.
            loggers: What the configuration says under ``trainer.logger``, see :func:`loggers_of_fit`.
        """
        folder = out / name
        own = [
            *arguments,
            f"--seed_everything={seed}",
            f"--trainer.default_root_dir={folder}",
            f"--trainer.logger={json.dumps(loggers_of_fit(loggers, folder, name))}",
            "--trainer.callbacks+=lightning_tips.core.FitRecord",
            f"--trainer.callbacks.path={folder / RECORD}",
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            f"--trainer.callbacks.dirpath={folder}",
            # Not save_last with save_top_k=0, which writes nothing before the end.
            f"--trainer.callbacks.filename={LAST.removesuffix('.ckpt')}",
            "--trainer.callbacks.enable_version_counter=false",
            "--trainer.callbacks.mode=max",  # tells its state from that of a plain one
        ]
        digest = hashlib.blake2b(json.dumps([list(arguments), seed, name]).encode(), digest_size=16)
        for argument in arguments:
            file = Path(argument.partition("=")[2] or argument)
            if file.suffix in (".yaml", ".yml") and file.is_file():
                digest.update(file.read_bytes())
        options = sorted((k, v) for k, v in os.environ.items() if k.startswith("LIGHTNING_TIPS_FIT__"))
        digest.update(json.dumps(options).encode() if options else b"")
        command = (sys.executable, "-m", MODULE, "fit", *own)
        return Fit(name, folder, command, digest.hexdigest())

    @property
    def checkpoint(self) -> Path:
        """Of its end."""
        return self.folder / LAST

    @property
    def is_done(self) -> bool:
        """Whether it has finished.

        Raises:
            ValueError: If it has, but with other arguments.
        """
        marker = self.folder / "fingerprint.txt"
        if marker.exists() and marker.read_text() != self.fingerprint:
            raise ValueError(
                f"{self.folder} holds a fit of another configuration or seed. Give another --out, or remove it."
            )
        return (self.folder / DONE).exists() and self.checkpoint.exists()

    @property
    def record(self) -> dict[str, Any]:
        """What :class:`FitRecord` wrote."""
        return dict(json.loads((self.folder / RECORD).read_text()))

    def start(self, device: str | None, server: FitServer | None = None) -> Running:
        """Starts it, or lets it go on from its last checkpoint.

        Args:
            device: A GPU, as in ``CUDA_VISIBLE_DEVICES``; None leaves the choice to it.
            server: Forks it, if it is one of :data:`MODULE`; otherwise Python is started anew.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "fingerprint.txt").write_text(self.fingerprint)
        resume = [f"--ckpt_path={self.checkpoint}"] if self.checkpoint.exists() else []
        command = [*self.command, *resume]
        environment = dict(os.environ) | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        if server is not None and command[:3] == [sys.executable, "-m", MODULE]:
            return server.run(command[3:], environment, self.folder / LOG)
        with (self.folder / LOG).open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def finish(self) -> None:
        """Marks it as done."""
        (self.folder / DONE).write_text(json.dumps({"name": self.name, "fingerprint": self.fingerprint}))

    def last_words(self) -> str:
        """The message of the exception that ended it, or the last line that it printed."""
        log = self.folder / LOG
        lines = log.read_text(errors="replace").rstrip().splitlines() if log.exists() else []
        begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last):")]
        for i in range(begins[-1] + 1 if begins else len(lines), len(lines)):
            if not lines[i].startswith(" "):  # behind the frames: the message, which may have several lines
                return "\n".join(takewhile(lambda line: line and not line.startswith("\033"), lines[i:]))
        return lines[-1] if lines else "it printed nothing"


def loggers_of_fit(loggers: Any, folder: Path, name: str) -> Any:
    """The loggers of a configuration, with all that they write in the folder of a fit.

    Of several fits at once in one folder, runs would mix. For W&B each fit is a run of its own, in a group.

    Args:
        loggers: ``class_path`` and ``init_args``, a list of such, a boolean, or None.
        folder: The fit's.
        name: The fit's.

    Returns:
        The same, as plain data. For True and None, a CSVLogger.
    """
    if loggers is False:
        return False
    if loggers is None or loggers is True:
        loggers = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"name": "logs"}}
    if isinstance(loggers, list):
        return [loggers_of_fit(one, folder, name) for one in loggers]
    module, _, kind = loggers["class_path"].rpartition(".")
    takes = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
    arguments = {key: value for key, value in (loggers.get("init_args") or {}).items() if value is not None}
    if "save_dir" in takes:
        arguments["save_dir"] = str(folder)
    if kind == "WandbLogger":
        arguments.setdefault("group", arguments.get("name") or folder.parent.name)
        arguments["name"] = f"{arguments.get('name') or folder.parent.name}-{name}"
        for key in ("id", "version"):
            if key in arguments:
                arguments[key] = f"{arguments[key]}-{name}"
    return {"class_path": loggers["class_path"], "init_args": arguments}


def devices() -> list[str | None]:
    """One entry for each fit that can run at once: a GPU each, as in ``CUDA_VISIBLE_DEVICES``; without a GPU one."""
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return list(visible.split(",") if visible else map(str, range(count)))


def run_fits(
    fits: Sequence[Fit],
    workers: int,
    places: Sequence[str | None],
    say: Callable[[str], None] = print,
    unwanted: Callable[[Fit, Mapping[str, str]], str | None] = lambda fit, failed: None,
) -> dict[str, str]:
    """Runs fits, so many at once; those that are done are left alone, and a failed one stops no other.

    On Linux each is a fork of one process that has imported Lightning, see :class:`FitServer`.

    Args:
        fits: What to run.
        workers: How many at once.
        places: GPUs that they take turns on; None: leave the choice to the fit.
        say: Told of each start and end.
        unwanted: Asked before each start, with the fit and what has failed so far: why it is not run, or None.

    Returns:
        Of those that failed, the name and :meth:`Fit.last_words`.

    Raises:
        ValueError: If a folder holds a fit of another configuration. Nothing is started then.
    """
    waiting = [fit for fit in fits if not fit.is_done]
    for fit in fits:
        if fit not in waiting:
            say(f"{fit.name} is done already: {fit.checkpoint}")
    free = [places[number % len(places)] for number in range(workers)]
    running: dict[Running, tuple[Fit, str | None]] = {}
    server = FitServer(MODULE, PRELOAD) if FitServer.works_here() else None
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and free:
                fit = waiting.pop(0)
                if reason := unwanted(fit, failed):
                    say(f"{fit.name} is left out: {reason}")
                    continue
                device = free.pop(0)
                say(f"{fit.name} {'goes on' if fit.checkpoint.exists() else 'starts'}: {fit.folder / LOG}")
                running[fit.start(device, server)] = (fit, device)
            for process in [process for process in running if process.poll() is not None]:
                fit, device = running.pop(process)
                free.append(device)
                if process.returncode == 0 and fit.checkpoint.exists():
                    fit.finish()
                    say(f"{fit.name} has finished")
                else:
                    failed[fit.name] = fit.last_words()
                    say(f"{fit.name} failed ({process.returncode}): {failed[fit.name]}")
            time.sleep(0.05)
    finally:
        for process in running:  # when this one is interrupted
            process.terminate()
        for process in running:
            process.wait()
        if server is not None:
            server.close()
    return failed
