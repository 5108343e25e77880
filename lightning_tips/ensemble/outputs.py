"""From a batch and a member to probabilities, whatever the member's forward returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tips.core import inputs_of
from lightning_tips.ensemble.checks import Task, check_outputs

__all__ = ["OutputKind", "Outputs", "find_kind", "to_probabilities", "watched_forward"]

OutputKind = Literal["softmax", "sigmoid", "exp", "identity", "binary"]
"""How a forward's output becomes probabilities: from logits by softmax or sigmoid, from log-probabilities by exp, or
as it is. ``"binary"``: one logit ``(N,)`` or ``(N, 1)``, of the second of two classes."""

_HALF = (torch.float16, torch.bfloat16)


def find_kind(output: Tensor, task: Task) -> OutputKind:
    """Finds out what a member's forward returns, from the values of one batch.

    Logits that happen to lie in [0, 1] and to sum to 1 in each row of a batch are as good as impossible.

    Raises:
        ValueError: Where it cannot be told: one output for two classes, or labels whose outputs all lie in [0, 1],
            which may be probabilities as well as the logits of a head that begins at 0.
    """
    if task == "regression":
        return "identity"
    values = output.detach().float()
    inside = bool(((values >= 0) & (values <= 1)).all())
    if task == "multilabel":
        if inside:
            raise ValueError(
                "returns numbers in [0, 1], which may be probabilities or logits: pass to_probabilities='identity' or"
                " 'sigmoid'."
            )
        return "sigmoid"
    if values.ndim < 2 or values.shape[1] == 1:
        raise ValueError(
            "returns one number for each sample. If it is the logit of the second of two classes, pass"
            " to_probabilities='binary'; if it is a number, task='regression'."
        )
    tolerance = 0.02 if output.dtype in _HALF else 1e-3  # as in check_outputs
    if inside and bool(((values.sum(1) - 1).abs() < tolerance).all()):
        return "identity"
    if bool((values <= 0).all()) and bool(((values.exp().sum(1) - 1).abs() < tolerance).all()):
        return "exp"
    return "softmax"


def to_probabilities(output: Tensor, kind: OutputKind | Callable[[Any], Tensor], task: Task = "multiclass") -> Tensor:
    """Applies what :data:`OutputKind` says, in float32 at least.

    Args:
        output: ``(N, C, ...)``.
        kind: A name, or a function that does it.
        task: Probabilities of classes in half precision are made to sum to 1 again.
    """
    if callable(kind):
        return kind(output)
    values = output if output.dtype == torch.float64 else output.float()
    if kind == "softmax":
        return values.softmax(1)
    if kind == "sigmoid":
        return values.sigmoid()
    if kind == "binary":
        second = values.reshape(-1, 1).sigmoid()
        return torch.cat([1 - second, second], 1)
    values = values.exp() if kind == "exp" else values
    return values / values.sum(1, keepdim=True) if task == "multiclass" and output.dtype in _HALF else values


@contextmanager
def watched_forward(module: nn.Module) -> Iterator[list[Any]]:
    """While it is open, what ``module.forward`` returns is also put into the list that it yields."""
    before, forward = vars(module).get("forward"), module.forward
    seen: list[Any] = []

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output)
        return output

    module.forward = watch
    try:
        yield seen
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class Outputs:
    """Probabilities of one member, with the checks that name it.

    Args:
        name: What errors call the member.
        task: What it predicts.
        convert: How its output becomes probabilities; None: found out from the first batch.
        input_key: Where batches are dicts: the key of the inputs.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        convert: OutputKind | Callable[[Any], Tensor] | None = None,
        input_key: str | None = None,
    ) -> None:
        self.name = name
        self.task = task
        self.convert = convert
        self.input_key = input_key

    def run(self, module: nn.Module, batch: Any) -> Any:
        """What ``module(inputs)`` returns.

        Raises:
            TypeError: With the member's name, if it cannot be called with the inputs of the batch.
        """
        inputs = inputs_of(batch, self.input_key)
        try:
            return module(inputs)
        except (TypeError, NotImplementedError) as error:
            raise TypeError(
                f"{self.name} cannot be called with the inputs of a batch, a {type(inputs).__name__}: {error}. Its"
                " forward must take them and return logits or probabilities; input_key says which part of a dict they"
                " are."
            ) from error

    def read(self, output: Any, samples: int | None = None) -> Tensor:
        """Probabilities ``(N, C, ...)`` from what a forward returned.

        Raises:
            TypeError: If it is no tensor.
            ValueError: If it is of another length than the batch, NaN, no probabilities, or cannot be told what it is.
        """
        if not callable(self.convert) and not isinstance(output, Tensor):
            raise TypeError(
                f"{self.name} returns a {type(output).__name__} from forward, where a tensor was expected. Pass"
                " to_probabilities=<function>, which gets it and returns probabilities."
            )
        if self.convert is None:
            if not bool(torch.isfinite(output.detach()).all()):
                check_outputs(output.detach(), "regression", self.name)  # says so, before it is taken for something
            try:
                self.convert = find_kind(output, self.task)
            except ValueError as error:
                raise ValueError(f"{self.name} {error}") from None
        if self.convert == "identity":
            check_outputs(output.detach(), self.task, self.name)  # at its own precision
        probabilities = to_probabilities(output, self.convert, self.task)
        check_outputs(probabilities.detach(), self.task, self.name)
        if samples is not None and len(probabilities) != samples:
            raise ValueError(f"{self.name} yields {len(probabilities)} predictions for a batch of {samples}.")
        return probabilities
