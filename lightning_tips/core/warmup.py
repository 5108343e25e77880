"""Linear warm-up of an optimizer that starts in the middle of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def warm_up(optimizer: Optimizer, steps: int, steps_done: Callable[[], int]) -> list[RemovableHandle]:
    """Lets the learning rate of ``optimizer`` rise linearly over its first steps.

    The rate is lowered just before each step and put back, to the bit, just after it. So it composes with every
    scheduler, which go on computing from the full rate, and there is nothing to restore on resume but the number of
    steps done. (A rate monitor shows the full rate.)

    Args:
        optimizer: The optimizer; gets two step hooks, which do nothing once it is warm.
        steps: The first step is taken with ``1 / steps`` of the rate, the last of them with all of it.
        steps_done: Says how many steps were taken before the one that comes.

    Returns:
        What takes the two hooks off again.
    """
    full: list[Any] = []

    def lower(optimizer: Optimizer, *_: Any) -> None:
        share = (steps_done() + 1) / steps
        if share < 1.0 and not full:  # `step` of a subclass calls that of its base, and torch the hooks with each
            full[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * share

    def restore(optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, full, strict=False):
            group["lr"] = rate
        full.clear()

    return [optimizer.register_step_pre_hook(lower), optimizer.register_step_post_hook(restore)]
