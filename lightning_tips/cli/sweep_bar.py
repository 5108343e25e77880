"""The progress bar of a sweep, with its expected end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import Self

from lightning_tips.core import Fit
from lightning_tips.data.sweep import DivergedFitError, expected_seconds


class SweepBar:
    """Shows how far a sweep is and when it will end; `run_fits` tells it of each start and end.

    Args:
        fits: All of them.
        sizes: Of each; what a fit takes grows with it.
        workers: Fits at once.
        check: Called with each fit that has finished; what it raises ends the sweep.
    """

    def __init__(self, fits: Sequence[Fit], sizes: Sequence[int], workers: int, check: Callable[[Fit], Any]) -> None:
        self._fits = {fit.name: fit for fit in fits}
        self._sizes = dict(zip(self._fits, sizes, strict=True))
        self._workers, self._check = workers, check
        self._began: dict[str, float] = {}
        self._took: list[tuple[int, float]] = []
        self._ended: set[str] = set()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[end]}"), TimeElapsedColumn())
        self._progress = Progress(*columns)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        self._task = self._progress.add_task("", total=sum(self._sizes.values()), end="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, text: str) -> None:
        """Takes what `run_fits` says of a fit: the first time that it has started or is done, the second that it ended.

        Raises:
            ValueError: What ``check`` has to say.
        """
        name = text.partition(" ")[0]
        fit = self._fits[name]
        done = fit.is_done
        if name not in self._began and not done:
            self._began[name] = time.monotonic()
        else:
            if name in self._began and done:
                self._took.append((self._sizes[name], time.monotonic() - self._began[name]))
            self._ended.add(name)
        if not text.startswith((f"{name} starts", f"{name} is done already")):
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._show()
        if done and name in self._ended:
            with suppress(DivergedFitError):  # it is left out later
                self._check(fit)

    def _show(self) -> None:
        assert self._task is not None
        waiting = [size for name, size in self._sizes.items() if name not in self._ended]
        seconds = expected_seconds(self._took, waiting, self._workers)
        end = ""
        if seconds is not None and waiting:
            at = datetime.now() + timedelta(seconds=seconds)
            end = f"ends about {at:%H:%M}" if seconds < 43200 else f"ends about {at:%a %H:%M}"
        self._progress.update(
            self._task,
            completed=sum(self._sizes[name] for name in self._ended),
            description=f"{len(self._ended)} of {len(self._fits)} fits",
            end=end,
        )
