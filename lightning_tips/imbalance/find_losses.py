"""The losses of a module that somebody else wrote, and the moment in which they are weighted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_tips.core import did_you_mean
from lightning_tips.imbalance.losses import LossCorrection, Reduction

__all__ = ["corrected_losses", "find_losses"]

Loss = Callable[..., Tensor]

# timm is known by name: importing it takes seconds, and whoever uses its losses has done so.
REFUSED = {
    "timm.loss.cross_entropy.SoftTargetCrossEntropy": (
        "takes mixed or soft targets (mixup, CutMix), which have no class to take a weight from. Switch mixing off, or"
        " balance with ImbalancedSampler instead of weights"
    ),
    "timm.loss.binary_cross_entropy.BinaryCrossEntropy": (
        "smooths its targets inside, and a weight on the positive side would turn a smoothed 0 into a positive. Use"
        " nn.BCEWithLogitsLoss, or balance with ImbalancedSampler instead of weights"
    ),
    "timm.loss.asymmetric_loss.AsymmetricLossMultiLabel": (
        "treats positives and negatives differently by itself. Leave it as it is, or use nn.BCEWithLogitsLoss"
    ),
    "timm.loss.asymmetric_loss.AsymmetricLossSingleLabel": (
        "treats positives and negatives differently by itself. Leave it as it is, or use nn.CrossEntropyLoss"
    ),
    "torch.nn.modules.loss.BCELoss": (
        "takes probabilities, whose logarithm overflows under the weights of a rare class. Use nn.BCEWithLogitsLoss on"
        " the logits"
    ),
}
KNOWN = "nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss, timm's LabelSmoothingCrossEntropy"
LABEL_SMOOTHING = "timm.loss.cross_entropy.LabelSmoothingCrossEntropy"


def find_losses(module: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The losses in ``module`` that can be weighted, by name.

    These are ``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.BCEWithLogitsLoss`` and timm's
    ``LabelSmoothingCrossEntropy``, with subclasses that do not replace ``forward``.

    Args:
        module: Any module; it is not changed.
        names: Only these, as in ``module.named_modules()``.

    Returns:
        The losses; empty if there are none.

    Raises:
        ValueError: If a loss cannot be weighted rightly or has weights already, or a name is unknown.
    """
    modules = dict(module.named_modules())
    if names is not None:
        if unknown := [name for name in names if name not in modules]:
            losses = [name for name, part in modules.items() if _kind(part) is not None]
            raise ValueError(f"There is no loss {unknown[0]!r} in the module. {did_you_mean(unknown[0], losses)}")
        modules = {name: modules[name] for name in names}
    found = {}
    for name, part in modules.items():
        path = _path(type(part))
        if path in REFUSED:
            raise ValueError(
                f"{type(part).__name__} ({name!r}) {REFUSED[path]}; or name other losses with losses=[...]."
            )
        if _kind(part) is None:
            if names is not None:
                raise ValueError(
                    f"{name!r} is {type(part).__name__}, which is not among the losses that can be weighted ({KNOWN})."
                    " If it calls one of torch's functions in the end, pass functional=True without naming it."
                )
            continue
        _refuse_own_weights(
            {"weight": getattr(part, "weight", None), "pos_weight": getattr(part, "pos_weight", None)}, f"{name!r}"
        )
        found[name] = part
    return found


@contextmanager
def corrected_losses(
    losses: Sequence[nn.Module], correction: LossCorrection, functional: bool = False
) -> Iterator[None]:
    """While it is open, losses are computed with ``correction``; before and after, nothing is different.

    Open it around the training loss alone::

        losses = find_losses(model).values()
        correction = LossCorrection.from_counts(counts)
        with corrected_losses(losses, correction):
            loss = model.training_step(batch)

    Args:
        losses: From :func:`find_losses`; their ``forward`` is replaced on the instance for the while.
        correction: Weights or offsets. Its ``calls`` counts the losses that it was applied to.
        functional: Also ``F.cross_entropy``, ``F.nll_loss`` and ``F.binary_cross_entropy_with_logits``, under whatever
            name they were imported and from whatever module they are called. Every torch function then passes through
            Python once more, about a microsecond each.
    """
    with ExitStack() as stack:
        if functional:
            stack.enter_context(_Functions(correction))
        for loss in losses:
            kind = _kind(loss)
            # What calls one of the functions is met there; here it would be weighted a second time.
            if kind is not None and (not functional or kind is _label_smoothing):
                stack.enter_context(_replaced_forward(loss, kind(loss, correction)))
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Loss) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Functions(TorchFunctionMode):
    """Passes calls of the three functions to the correction; within these, the mode is off."""

    def __init__(self, correction: LossCorrection) -> None:
        super().__init__()

        def cross_entropy(
            input: Tensor,
            target: Tensor,
            weight: Tensor | None = None,
            size_average: bool | None = None,
            ignore_index: int = -100,
            reduce: bool | None = None,
            reduction: Reduction = "mean",
            label_smoothing: float = 0.0,
        ) -> Tensor:
            _refuse_own_weights({"weight": weight}, "F.cross_entropy")
            reduction = _reduction(reduction, size_average, reduce)
            return correction.cross_entropy(input, target, ignore_index, reduction, label_smoothing)

        def nll_loss(
            input: Tensor,
            target: Tensor,
            weight: Tensor | None = None,
            size_average: bool | None = None,
            ignore_index: int = -100,
            reduce: bool | None = None,
            reduction: Reduction = "mean",
        ) -> Tensor:
            _refuse_own_weights({"weight": weight}, "F.nll_loss")
            return correction.nll_loss(input, target, ignore_index, _reduction(reduction, size_average, reduce))

        def binary_cross_entropy_with_logits(
            input: Tensor,
            target: Tensor,
            weight: Tensor | None = None,
            size_average: bool | None = None,
            reduce: bool | None = None,
            reduction: Reduction = "mean",
            pos_weight: Tensor | None = None,
        ) -> Tensor:
            own = {"weight": weight, "pos_weight": pos_weight}
            _refuse_own_weights(own, "F.binary_cross_entropy_with_logits")
            reduction = _reduction(reduction, size_average, reduce)
            return correction.binary_cross_entropy_with_logits(input, target, reduction)

        self.correction = correction
        self.instead: dict[Any, Loss] = {
            F.cross_entropy: cross_entropy,
            F.nll_loss: nll_loss,
            F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = func if self.correction.at_work else self.instead.get(func, func)
        return instead(*args, **kwargs or {})


def _cross_entropy(loss: Any, correction: LossCorrection) -> Loss:
    def forward(input: Tensor, target: Tensor) -> Tensor:
        return correction.cross_entropy(input, target, loss.ignore_index, loss.reduction, loss.label_smoothing)

    return forward


def _nll(loss: Any, correction: LossCorrection) -> Loss:
    def forward(input: Tensor, target: Tensor) -> Tensor:
        return correction.nll_loss(input, target, loss.ignore_index, loss.reduction)

    return forward


def _binary(loss: Any, correction: LossCorrection) -> Loss:
    def forward(input: Tensor, target: Tensor) -> Tensor:
        return correction.binary_cross_entropy_with_logits(input, target, loss.reduction)

    return forward


def _label_smoothing(loss: Any, correction: LossCorrection) -> Loss:
    def forward(x: Tensor, target: Tensor) -> Tensor:
        correction.at_work = True
        try:
            return correction.cross_entropy(x, target, label_smoothing=loss.smoothing)
        finally:
            correction.at_work = False

    return forward


def _kind(module: nn.Module) -> Callable[[Any, LossCorrection], Loss] | None:
    forward = type(module).forward
    if isinstance(module, nn.CrossEntropyLoss) and forward is nn.CrossEntropyLoss.forward:
        return _cross_entropy
    if isinstance(module, nn.NLLLoss) and forward is nn.NLLLoss.forward:
        return _nll
    if isinstance(module, nn.BCEWithLogitsLoss) and forward is nn.BCEWithLogitsLoss.forward:
        return _binary
    return _label_smoothing if _path(type(module)) == LABEL_SMOOTHING else None


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse_own_weights(own: dict[str, Tensor | None], where: str) -> None:
    for name, given in own.items():
        if given is not None:
            raise ValueError(
                f"The loss {where} has a {name} of its own, {_short(given)}: the classes would be corrected twice. Take"
                f" it away, or pass it on instead (weights=[...]); the loss is then weighted without bias."
            )


def _short(given: Any) -> str:
    values = given.flatten().tolist() if isinstance(given, Tensor) else [given]
    return f"[{', '.join(f'{value:.3g}' for value in values[:4])}{', ...' if len(values) > 4 else ''}]"


def _reduction(reduction: Reduction, size_average: bool | None, reduce: bool | None) -> Reduction:
    """Also from the two arguments that torch has deprecated."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"
