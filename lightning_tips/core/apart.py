"""Looking into a dataset so that nothing of it stays: no file that a sample has opened, no random number drawn."""

from __future__ import annotations

import copy
import multiprocessing
import random
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch

from lightning_tips.core.untouched import same_random_numbers

__all__ = ["look_apart"]

T = TypeVar("T")


def look_apart(look: Callable[[Any], T], dataset: Any, seconds: float | None = None) -> T:
    """What ``look(dataset)`` returns, without a trace in the dataset.

    Files that are opened with the first sample must be opened in each worker anew: workers that share one of this
    process read each other's places in it. So on Linux a process of its own looks, as a worker would. Elsewhere, where
    a fork is not safe, and where none can be had, it is a copy that is looked at and dropped.

    Args:
        look: Returns what can be pickled.
        dataset: Is not changed.
        seconds: How long that may take in a process; None: any time.

    Raises:
        Exception: Whatever ``look`` raises; where neither a process nor a copy can be had; where it takes too long.
    """
    if sys.platform == "linux":
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_look_and_tell, args=(look, dataset, sender, random.getstate()), daemon=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads: as with every worker
                process.start()
        except (AssertionError, OSError):  # a daemon may have no children; no memory
            receiver.close()
        else:
            return _told(process, receiver, seconds)
        finally:
            sender.close()
    if _ends_with_a_deed(dataset, set()):
        raise TypeError(f"a copy of {type(dataset).__name__} could close what the two share")
    with same_random_numbers():
        return look(copy.deepcopy(dataset))


def _told(process: Any, receiver: Connection, seconds: float | None) -> Any:
    try:
        if not wait([receiver, process.sentinel], seconds):
            raise TimeoutError(f"no answer came within {seconds} seconds")
        if not receiver.poll():
            raise RuntimeError("the process that read samples ended before it was done")
        result, error = receiver.recv()
        process.join(1)
    finally:
        process.kill()  # it has told what it had to, or never will
        process.join()
        receiver.close()
    if error is not None:
        raise error
    return result


def _look_and_tell(look: Callable[[Any], Any], dataset: Any, sender: Connection, python: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # threads of a pool do not live on in a fork
    random.setstate(python)  # Python seeds a fork anew, but all ranks should see the same
    try:
        answer: tuple[Any, Exception | None] = look(dataset), None
    except Exception as error:
        answer = None, error
    try:
        sender.send(answer)
    except Exception as error:  # what cannot be pickled
        sender.send((None, RuntimeError(f"{type(answer[1] or error).__name__}: {answer[1] or error}")))


def _ends_with_a_deed(part: Any, seen: set[int]) -> bool:
    """Whether something in it has a ``__del__``, which may close a file by its number, that of the original too."""
    if id(part) in seen or isinstance(part, type | ModuleType | torch.Tensor | np.ndarray):
        return False
    seen.add(id(part))
    return hasattr(type(part), "__del__") or any(
        _ends_with_a_deed(inner, seen) for inner in getattr(part, "__dict__", {}).values()
    )
