"""Limits of time and memory while a network is analysed and tried."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LOW_MEMORY = 256 * 2**20
"""With less than so many bytes left, the analysis ends, before the system ends the process."""
_LOOK_EVERY = 0.25
_last_look = 0.0


class LimitReached(RuntimeError):
    """Time is up, or memory nearly so."""


def check_limits(deadline: float, doing: str) -> None:
    """Looks at the clock, and now and then at the memory that is left. Cheap enough for every operation.

    Args:
        deadline: ``time.monotonic()`` at which to stop.
        doing: What is going on, for the message.

    Raises:
        LimitReached: If it is time to stop.
    """
    global _last_look
    now = time.monotonic()
    if now > deadline:
        raise LimitReached(f"the time limit was reached while {doing}; pass a larger time_limit")
    if now - _last_look > _LOOK_EVERY:
        _last_look = now
        left = available_memory()
        if left is not None and left < LOW_MEMORY:
            raise LimitReached(
                f"only {left / 2**20:.0f} MiB of memory are left while {doing}; pass smaller example inputs"
            )


def available_memory() -> int | None:
    """Bytes of main memory that this process may still get, as Linux says; ``None`` where nothing is known."""
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        return None  # another system
    try:  # a container's own limit; files that were read count as used but can be given back
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            files = Path("/sys/fs/cgroup/memory.stat").read_text().split()
            found.append(int(limit) - used + int(files[files.index("inactive_file") + 1]))
    except (OSError, ValueError):
        pass  # no such limit
    return min(found, default=None)


class WithinLimits:
    """Batches, with a look at the clock before each."""

    def __init__(self, batches: Iterable[Any], deadline: float) -> None:
        self._batches, self._deadline = batches, deadline

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            try:
                check_limits(self._deadline, "channels were scored")
            except LimitReached as error:
                raise ValueError(f"The network is untouched: {error}, or fewer batches.") from error
            yield batch
