"""Learning rates that are lower for one step at a time: linear warm-up in the middle of training, and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

Share = Callable[[Optimizer], Sequence[float] | None]

# One pair of hooks for each optimizer, however many tips lower its rate: torch calls the hooks after a step in the
# order of those before it, and pairs that are nested the wrong way round would put back each other's lowered rates.
_shares: WeakKeyDictionary[Optimizer, list[Share]] = WeakKeyDictionary()


class ScaledSteps:
    """Takes a share off again."""

    def __init__(self, optimizer: Optimizer, share: Share) -> None:
        self._shares, self._share = _shares[optimizer], share

    def remove(self) -> None:
        """Steps are taken without this share from now on."""
        if self._share in self._shares:
            self._shares.remove(self._share)


def scale_steps(optimizer: Optimizer, share: Share) -> ScaledSteps:
    """Lets each step of ``optimizer`` be taken with a share of the learning rate.

    The rate is changed just before each step and put back, to the bit, just after it. So it composes with every
    scheduler, which go on computing from the full rate, and there is nothing to restore on resume. (A rate monitor
    shows the full rate.)

    Args:
        optimizer: The optimizer; gets two step hooks, which do nothing where there are no shares.
        share: Called before each step; says the share of each parameter group, or ``None`` for all of it.

    Returns:
        What takes it off again.
    """
    if optimizer not in _shares:
        _shares[optimizer] = []
        full: list[Any] = []
        optimizer.register_step_pre_hook(partial(_lower, full))
        optimizer.register_step_post_hook(partial(_restore, full))
    _shares[optimizer].append(share)
    return ScaledSteps(optimizer, share)


def _lower(full: list[Any], optimizer: Optimizer, *_: Any) -> None:
    if full:  # `step` of a subclass calls that of its base, and torch the hooks with each
        return
    found = [shares for share in _shares[optimizer] if (shares := share(optimizer)) is not None]
    if found:
        full[:] = [group["lr"] for group in optimizer.param_groups]
        for shares in found:
            for group, part in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = group["lr"] * part


def _restore(full: list[Any], optimizer: Optimizer, *_: Any) -> None:
    for group, rate in zip(optimizer.param_groups, full, strict=False):
        group["lr"] = rate
    full.clear()


def warm_up(optimizer: Optimizer, steps: int, steps_done: Callable[[], int]) -> ScaledSteps:
    """Lets the learning rate of ``optimizer`` rise linearly over its first steps; see :func:`scale_steps`.

    Args:
        optimizer: The optimizer.
        steps: The first step is taken with ``1 / steps`` of the rate, the last of them with all of it.
        steps_done: Says how many steps were taken before the one that comes.

    Returns:
        What takes it off again.
    """

    def share(optimizer: Optimizer) -> list[float] | None:
        risen = (steps_done() + 1) / steps
        return [risen] * len(optimizer.param_groups) if risen < 1.0 else None

    return scale_steps(optimizer, share)
