"""Fits as forks of one process that has imported what they need, so that not each of them imports it anew."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

__all__ = ["FitServer", "Running"]


class Running(Protocol):
    """What has been started: a ``subprocess.Popen``, or a fork of a server."""

    returncode: int | Any

    def poll(self) -> int | None:
        """The return code, or ``None`` while it runs."""

    def terminate(self) -> None:
        """Asks it to end."""

    def wait(self) -> int:
        """Waits for its end."""


class FitServer:
    """Runs ``python -m module arguments`` many times, and imports only once.

    A process imports ``preload`` and forks for each run, before it has done anything else: no thread has been started
    and no device been touched. To the run it is as if Python had started it: ``__main__``, ``sys.argv``, environment,
    exit code and what runs at exit. To import torch and Lightning takes seconds, which many short fits pay many times.
    When this process dies, also by a kill, the server ends its runs.

    Args:
        module: What is run.
        preload: What is imported before.
    """

    def __init__(self, module: str, preload: str) -> None:
        self._module, self._preload = module, preload
        self._process: subprocess.Popen[bytes] | None = None
        self._count = 0
        self._codes: dict[int, int] = {}
        self._rest = b""

    @staticmethod
    def works_here() -> bool:
        """Where there is a fork that is safe."""
        return sys.platform == "linux"

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Running:
        """Starts one.

        Args:
            arguments: Those of the module.
            environment: All of its environment variables.
            log: Gets what it prints, behind what the file holds.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                # Not -m: the module is imported by its package already, and runpy warns of that.
                [sys.executable, "-c", f"import {__name__} as s; s.main()", self._module, self._preload],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # By NVML: counting devices by CUDA itself would leave it unusable in a fork.
                env=dict(os.environ) | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            )
            os.set_blocking(self._stdout.fileno(), False)
        self._count += 1
        job = {"arguments": list(arguments), "environment": dict(environment), "log": str(log.resolve())}
        self._send({"id": self._count} | job)
        return _Fork(self, self._count)

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, which poll() tells

    def poll(self, number: int, wait: bool = False) -> int | None:
        """The return code of one run, if it has one; -1 if the server is gone."""
        while number not in self._codes:
            if self._process is None:
                return -1
            if not select.select([self._stdout], [], [], None if wait else 0)[0]:
                return None
            if not (read := os.read(self._stdout.fileno(), 65536)):
                return -1
            *lines, self._rest = (self._rest + read).split(b"\n")
            for line in lines:
                done = json.loads(line)
                self._codes[done["id"]] = done["code"]
        return self._codes[number]

    def end(self, number: int) -> None:
        """Asks one run to end."""
        self._send({"id": number, "signal": int(signal.SIGTERM)})

    def close(self) -> None:
        """Ends the server, and what still runs."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._stdout.close()
            self._process = None


class _Fork:
    """One run, as far as a ``Popen`` is needed here."""

    def __init__(self, server: FitServer, number: int) -> None:
        self._server, self._number = server, number
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.poll(self._number)
        return self.returncode

    def terminate(self) -> None:
        if self.returncode is None:
            self._server.end(self._number)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._server.poll(self._number, wait=True)
        assert self.returncode is not None
        return self.returncode


def _serve(answers: int) -> dict[str, Any] | None:
    """The server. Returns in each fork, with what to run; in the server itself at the end, with ``None``."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the runs get it too, and their owner decides
    children: dict[int, int] = {}  # process id -> number
    rest, open_ = b"", True
    while open_ or children:
        ready = select.select([0, woken] if open_ else [woken], [], [])[0]
        if woken in ready:
            os.read(woken, 65536)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            done = {"id": children.pop(pid), "code": os.waitstatus_to_exitcode(status)}
            if open_:
                os.write(answers, json.dumps(done).encode() + b"\n")
        if 0 not in ready:
            continue
        if not (read := os.read(0, 65536)):
            open_ = False
            for pid in children:
                os.kill(pid, signal.SIGTERM)
            continue
        *lines, rest = (rest + read).split(b"\n")
        for job in map(json.loads, lines):
            if "signal" in job:
                for pid in [pid for pid, number in children.items() if number == job["id"]]:
                    os.kill(pid, job["signal"])
            elif pid := os.fork():
                children[pid] = job["id"]
            else:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for descriptor in (answers, woken, wakes):
                    os.close(descriptor)
                return dict(job)
    return None


def _forget_exit_handlers() -> None:
    """What an import has registered is the server's: a fork must not remove its temporary folders when it ends."""
    atexit._clear()  # as multiprocessing does in its forks
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]


def _become(job: dict[str, Any], module: str) -> None:
    """In a fork: what Python does for ``-m module``."""
    _forget_exit_handlers()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(job["environment"])
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():  # an import has touched the device
        os.execve(sys.executable, [sys.executable, "-m", module, *job["arguments"]], dict(os.environ))
    sys.argv = [module, *job["arguments"]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """The server's process; ``sys.argv`` holds the module to run and what to import before."""
    module, preload = sys.argv[1:]
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    importlib.import_module(preload)
    gc.collect()
    gc.freeze()  # memory stays shared
    if (job := _serve(answers)) is not None:
        _become(job, module)
