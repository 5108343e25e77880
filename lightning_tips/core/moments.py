"""Where a callback reaches what it may not edit: the training step of a strategy, the outputs of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_tips.core.batch import targets_of

__all__ = ["Outputs", "ReplacedStep", "changed_outputs"]


class _ChangedForward:
    """Stands in the place of a module's ``forward`` while anybody changes its outputs."""

    def __init__(self, module: nn.Module) -> None:
        self.before = vars(module).get("forward")
        self.forward = module.forward
        self.name = type(module).__name__
        # Those that come last are marked, and those that put up with an output that is no tensor.
        self.changes: list[tuple[bool, bool, Callable[[Tensor], Tensor]]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module, made meanwhile, has outputs that nobody changes or looks at."""
        return self.__dict__ | {"changes": []}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.forward(*args, **kwargs)
        if not isinstance(output, torch.Tensor):
            if all(tolerant for _, tolerant, _ in self.changes):
                return output
            raise TypeError(
                f"{self.name} returns {type(output).__name__} where logits were expected as a tensor. Let forward"
                " return the logits, or adjust them where they are used."
            )
        for _, _, change in sorted(self.changes, key=lambda one: one[0]):
            output = change(output)
        return output


@contextmanager
def changed_outputs(
    module: nn.Module, change: Callable[[Tensor], Tensor], last: bool = False, tolerant: bool = False
) -> Iterator[None]:
    """While it is open, the tensors that ``module(...)`` returns pass through ``change``.

    For example ``changed_outputs(model, lambda logits: logits - offsets)``. Several may be open, and close in any
    order. The forward is replaced on the instance: under DDP Lightning sends validation and prediction steps through
    ``module(...)`` too, and a forward hook would see their outputs as well as the logits.

    Args:
        module: Returns logits as a tensor.
        change: From logits to logits.
        last: Whether it comes after all others, whenever they are opened: for what only looks.
        tolerant: Whether an output that is no tensor is let through, unseen.

    Raises:
        TypeError: If the module returns something else than a tensor, as soon as it does.
    """
    there = vars(module).get("forward")
    changed = there if isinstance(there, _ChangedForward) else _ChangedForward(module)
    module.forward = changed
    changed.changes.append((last, tolerant, change))
    try:
        yield
    finally:
        changed.changes.remove((last, tolerant, change))
        if not changed.changes and vars(module).get("forward") is changed:
            if changed.before is None:
                del module.forward
            else:
                module.forward = changed.before


class _ChangedStep:
    """Stands in the place of a strategy's ``training_step`` while anybody has replaced it."""

    def __init__(self, strategy: Strategy) -> None:
        self.before = vars(strategy).get("training_step")
        self.step = strategy.training_step
        self.around: list[ReplacedStep] = []  # the outermost comes last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step: Callable[..., Any] = self.step
        for replaced in self.around:
            step = partial(replaced.around, step)
        return step(*args, **kwargs)


class ReplacedStep:
    """Stands in the place of ``strategy.training_step`` until it is removed.

    Every training step of Lightning goes through there, with automatic and with manual optimization, and nothing else
    does; and the user's module need not be touched. Several may stand there, and be removed in any order.

    Args:
        strategy: Its step is replaced on the instance.
        around: Called with the step that was there before and the step's arguments.
    """

    def __init__(self, strategy: Strategy, around: Callable[..., Any]) -> None:
        self.around = around
        self._strategy = strategy
        there = vars(strategy).get("training_step")
        self._changed = there if isinstance(there, _ChangedStep) else _ChangedStep(strategy)
        self._changed.around.append(self)
        strategy.training_step = self._changed  # type: ignore[method-assign]

    def remove(self) -> None:
        """Puts the step back. If somebody else has replaced it since, calls go through without this one."""
        if self in self._changed.around:
            self._changed.around.remove(self)
        if self._changed.around or vars(self._strategy).get("training_step") is not self._changed:
            return
        if self._changed.before is None:
            del self._strategy.training_step
        else:
            self._strategy.training_step = self._changed.before  # type: ignore[method-assign]


class Outputs:
    """The outputs of a module's ``forward``, changed or watched for a while."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._logits: Tensor | None = None  # of the running batch
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.calls = 0  # of ``forward``, since it was last changed

    def change(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """From now on ``module(...)`` returns what ``change`` makes of its output."""
        self.close()
        self.calls = 0

        def counted(logits: Tensor) -> Tensor:
            self.calls += 1
            return change(logits)

        self._stack.enter_context(changed_outputs(module, counted))

    def watch(self, module: nn.Module, tolerant: bool = False) -> None:
        """From now on the last output can be kept; ``tolerant`` of outputs that are no tensors, which it passes by."""
        self.close()
        self._stack.enter_context(changed_outputs(module, self._note, last=True, tolerant=tolerant))

    def _note(self, logits: Tensor) -> Tensor:
        self._logits = logits.detach()
        return logits

    def keep(self, batch: Any, target_key: str | None = None) -> None:
        """Keeps the output of this batch with its targets, if it is watched.

        Raises:
            KeyError: See :func:`~lightning_tips.core.targets_of`.
            TypeError: Likewise; or if the targets are no tensor.
        """
        if self._logits is not None:
            targets = targets_of(batch, target_key)
            if not isinstance(targets, Tensor):
                raise TypeError(
                    f"The targets of a batch are a {type(targets).__name__}, where a tensor was expected. Say with"
                    " target_key where they are."
                )
            self._seen.append((self._logits.cpu(), targets.cpu()))
        self._logits = None

    def close(self) -> tuple[Tensor, Tensor] | None:
        """Leaves the module as it was; returns the logits and targets that were kept, if any were."""
        self._stack.close()
        seen, self._seen, self._logits = self._seen, [], None
        if not seen:
            return None
        logits, targets = zip(*seen, strict=True)
        return torch.cat(logits), torch.cat(targets)
