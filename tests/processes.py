"""Processes that train: to be killed, the ranks of one run, or a script.

They are forks of one process that has imported everything, which takes far longer than such a run. That process has
trained nothing, so they start as clean as a script does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

TESTS = str(Path(__file__).parent)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["lightning_tips.cli.run", "allowed_warnings", "harness", "worker", "preloaded"])

_OF_RANKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")


class Run(NamedTuple):
    """A process and the folder where it leaves `rank-<n>.json` and what it prints."""

    process: BaseProcess
    folder: Path

    @property
    def printed(self) -> str:
        return (self.folder / f"printed-{self.process.pid}.txt").read_text()


def start(
    folder: Path, tips: list[Any], arguments: dict[str, Any], ckpt_path: Path | None = None, **environment: str
) -> Run:
    """Starts `worker.run` for one run; see there for the arguments."""
    return _start(folder, _train, (folder, tips, arguments, ckpt_path), environment)


def start_ranks(folder: Path, tips: list[Any], arguments: dict[str, Any], count: int = 2) -> list[Run]:
    """Starts ``count`` ranks of one DDP run of `worker.run`."""
    arguments = arguments | {"devices": count, "strategy": "ddp"}
    return [start(folder, tips, arguments, **environment) for environment in _of_ranks(count)]


def start_command(folder: Path, arguments: list[str], count: int = 2) -> list[Run]:
    """Starts ``count`` ranks of ``lightning-tips`` with these arguments, which have to ask for as many devices."""
    return [_start(folder, _command, (arguments,), environment) for environment in _of_ranks(count)]


def start_script(folder: Path, script: Path, *arguments: str) -> Run:
    """Starts ``python script arguments`` in a folder; warnings are those that a user sees."""
    return _start(folder, _script, (script, arguments), {})


class Fits:
    """In place of `FitServer`: the fits of a command are forks of the process that is there already."""

    def __init__(self, module: str, preload: str) -> None:
        self.module = module
        self.running: list[Fork] = []

    @staticmethod
    def works_here() -> bool:
        return True

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Fork:
        self.running.append(Fork(_start(Path.cwd(), _module, (self.module, arguments, log), dict(environment))))
        return self.running[-1]

    def close(self) -> None:
        for fit in self.running:
            fit.terminate()


class Fork:
    """One of them, as far as a ``Popen`` is needed."""

    def __init__(self, run: Run) -> None:
        self.process = run.process
        self.terminate = run.process.terminate

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def on_two_ranks(folder: Path, train: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``train(folder, *arguments)``, a function of a module, returns on each of two ranks: what fits into JSON."""
    runs = [_start(folder, _call, (folder, train, arguments), environment) for environment in _of_ranks(2)]
    finish(*runs, timeout=400)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def _of_ranks(count: int) -> list[dict[str, str]]:
    """What a launcher such as torchrun tells each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    return [where | {"LOCAL_RANK": str(rank)} for rank in range(count)]


def _start(folder: Path, what: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    # The environment is that of the test, but for what makes it a rank.
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS} | environment
    process = _server.Process(target=_enter, args=(folder, what, arguments, environment))
    # The server is started with the first one; it looks for what to import in sys.path as Python makes it.
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, path]))
    process.start()
    os.environ["PYTHONPATH"] = path
    return Run(process, folder)


def finish(*runs: Run, timeout: float = 120) -> None:
    """Waits for them; fails with what they printed if one did not end well."""
    for run in runs:
        run.process.join(timeout)
    failed = [run for run in runs if run.process.exitcode != 0]
    for run in runs:
        if run.process.is_alive():
            run.process.kill()
    # One rank's error is another's lost connection: both are shown.
    assert not failed, "\n".join(f"{run.folder}:\n{run.printed[-4000:]}" for run in failed)


def _enter(folder: Path, what: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    with (folder / f"printed-{os.getpid()}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if what not in (_script, _module):  # there, warnings are those that a user sees
        import allowed_warnings

        os.environ["LIGHTNING_TIPS_DEBUG"] = "1"
        allowed_warnings.apply()
    what(*arguments)


def _train(folder: Path, tips: list[Any], arguments: dict[str, Any], ckpt_path: Path | None) -> None:
    import worker

    result = worker.run(folder, tips, arguments, ckpt_path)
    (folder / f"rank-{result.pop('rank')}.json").write_text(json.dumps(result))


def _call(folder: Path, train: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    result = train(folder, *arguments)
    (folder / f"rank-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(result))


def _command(arguments: list[str]) -> None:
    from lightning_tips.cli import main

    sys.argv = ["lightning-tips", *arguments]
    if code := main():
        sys.exit(code)


def _script(script: Path, arguments: tuple[str, ...]) -> None:
    for name, module in list(sys.modules.items()):  # a script has no tests to import
        if str(getattr(module, "__file__", "")).startswith(TESTS):
            del sys.modules[name]
    sys.argv = [str(script), *arguments]
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path != TESTS)]
    runpy.run_path(str(script), run_name="__main__")


def _module(module: str, arguments: Sequence[str], log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
