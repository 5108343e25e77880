"""Learning rates that are lower for one step at a time: linear warm-up in the middle of training, and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

Share = Callable[[Optimizer], Sequence[float] | None]


@dataclass
class _Lowered:
    """What is known of one optimizer.

    Attributes:
        shares: What lowers its rate, and whether that goes with the parameter groups to another optimizer.
        full: The rates as they were before a step that is being taken; ``None`` between two steps.
    """

    shares: dict[Share, bool] = field(default_factory=dict)
    full: list[Any] | None = None


# One pair of hooks for each optimizer, however many tips lower its rate: torch calls the hooks after a step in the
# order of those before it, and pairs that are nested the wrong way round would put back each other's lowered rates.
_lowered: WeakKeyDictionary[Optimizer, _Lowered] = WeakKeyDictionary()


class ScaledSteps:
    """Takes a share off again, wherever it went."""

    def __init__(self, share: Share) -> None:
        self._share = share

    def remove(self) -> None:
        """Steps are taken without this share from now on."""
        for optimizer, state in list(_lowered.items()):
            if state.shares.pop(self._share, None) is not None:
                _after_step(optimizer)  # a step that an exception cut off has not put the rates back


def scale_steps(optimizer: Optimizer, share: Share, follows: bool = False) -> ScaledSteps:
    """Lets each step of ``optimizer`` be taken with a share of the learning rate.

    The rate is changed just before each step and put back, to the bit, just after it. So it composes with every
    scheduler, which go on computing from the full rate, and there is nothing to restore on resume. (A rate monitor
    shows the full rate.)

    Args:
        optimizer: The optimizer; gets two step hooks, which do nothing where there are no shares.
        share: Called before each step; says the share of each parameter group, or ``None`` for all of it. One that
            looks at gradients needs :func:`scale_again` too, because Lightning makes them inside of the step.
        follows: Whether it goes on with another optimizer that takes over the parameter groups; see
            :func:`carry_shares`.

    Returns:
        What takes it off again.
    """
    own = partial(share)  # one function may be given twice
    _attach(optimizer, own, follows)
    return ScaledSteps(own)


def _attach(optimizer: Optimizer, share: Share, follows: bool) -> None:
    if optimizer not in _lowered:
        _lowered[optimizer] = _Lowered()
        optimizer.register_step_pre_hook(_before_step)
        optimizer.register_step_post_hook(_after_step)
    _lowered[optimizer].shares[share] = follows


def scale_again(optimizer: Optimizer) -> None:
    """Asks for the shares anew, for the step that is being taken.

    Lightning computes the gradients in a closure, so the hooks before the step come too early for a share that depends
    on them. To be called from ``on_before_optimizer_step``. With a gradient scaler the gradients are there before the
    step begins; then this does nothing, and the step asks by itself.
    """
    state = _lowered.get(optimizer)
    if state is None or state.full is None:
        return
    _put_back(state, optimizer)
    _lower(state, optimizer)


def carry_shares(old: Optimizer, new: Optimizer) -> None:
    """Lets the shares that follow go on with ``new``, which has the parameter groups of ``old``, in their order."""
    if old in _lowered:
        for share, follows in list(_lowered[old].shares.items()):
            if follows:
                _attach(new, share, follows=True)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    state = _lowered[optimizer]
    if state.full is None:  # `step` of a subclass calls that of its base, and torch the hooks with each
        _lower(state, optimizer)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    state = _lowered[optimizer]
    if state.full is not None:
        _put_back(state, optimizer)
        state.full = None


def _lower(state: _Lowered, optimizer: Optimizer) -> None:
    state.full = [group["lr"] for group in optimizer.param_groups]
    for share in list(state.shares):
        parts = share(optimizer)
        for group, part in zip(optimizer.param_groups, parts or (), strict=parts is not None):
            group["lr"] = group["lr"] * part


def _put_back(state: _Lowered, optimizer: Optimizer) -> None:
    for group, rate in zip(optimizer.param_groups, state.full or (), strict=False):
        group["lr"] = rate


def warm_up(optimizer: Optimizer, steps: int, steps_done: Callable[[], int], follows: bool = False) -> ScaledSteps:
    """Lets the learning rate of ``optimizer`` rise linearly over its first steps; see :func:`scale_steps`.

    Args:
        optimizer: The optimizer.
        steps: The first step is taken with ``1 / steps`` of the rate, the last of them with all of it.
        steps_done: Says how many steps were taken before the one that comes.
        follows: Whether it goes on with an optimizer that takes the place of this one.

    Returns:
        What takes it off again.
    """

    def share(optimizer: Optimizer) -> list[float] | None:
        risen = (steps_done() + 1) / steps
        return [risen] * len(optimizer.param_groups) if risen < 1.0 else None

    return scale_steps(optimizer, share, follows)
