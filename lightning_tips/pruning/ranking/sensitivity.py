"""How much a network suffers when channels of one layer alone are taken away.

Pure functions on torch objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_tips.pruning.networks.copies import copy_network
from lightning_tips.pruning.networks.layers import channel_dim_of, channels_of
from lightning_tips.pruning.networks.recalibrate import reestimate_batch_norm
from lightning_tips.pruning.networks.runs import Forward, Loss, untouched
from lightning_tips.pruning.ranking.criteria import Criterion, channel_scores, following_norms


@dataclass(frozen=True)
class SensitivityTable:
    """A metric against the share of channels taken from each layer, one layer at a time.

    Args:
        base: The metric of the network as it is.
        shares: Shares of the channels taken away, ascending.
        scores: For each layer the metric at each share.
        channels: Output channels of each layer.
        mode: ``max`` if a high metric is good, ``min`` if a low one is.
        criterion: By which the channels were chosen.
    """

    base: float
    shares: tuple[float, ...]
    scores: dict[str, tuple[float, ...]]
    channels: dict[str, int] = field(default_factory=dict)
    mode: str = "max"
    criterion: str = "l1"

    def drops(self) -> dict[str, tuple[float, ...]]:
        """By how much the metric gets worse than ``base``; below 0 where it gets better."""
        sign = 1.0 if self.mode == "max" else -1.0
        return {name: tuple(sign * (self.base - score) for score in row) for name, row in self.scores.items()}

    def limits(self, max_drop: float) -> dict[str, float]:
        """The share of each layer that can go while the metric falls by no more than ``max_drop``.

        Between two measured shares by a straight line, up to the first one that is too much; at most the largest share
        that was measured.

        Args:
            max_drop: In units of the metric, at least 0.
        """
        if max_drop < 0:
            raise ValueError(f"max_drop must be at least 0, not {max_drop}.")
        result = {}
        for name, row in self.drops().items():
            share, before = 0.0, 0.0
            for at, drop in zip(self.shares, row, strict=True):
                if not drop <= max_drop:  # also when it is NaN
                    step = (max_drop - before) / (drop - before) if drop < float("inf") else 0.0
                    share += (at - share) * step
                    break
                share, before = at, drop
            result[name] = share
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON or a checkpoint."""
        data = asdict(self)
        data["shares"] = list(self.shares)
        data["scores"] = {name: list(row) for name, row in self.scores.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityTable:
        """From what :meth:`to_dict` gave."""
        scores = {name: tuple(row) for name, row in data["scores"].items()}
        return cls(**{**data, "shares": tuple(data["shares"]), "scores": scores})

    def plot(self, path: Path | str) -> None:
        """Draws a curve for each layer, from the first (dark) to the last (light), into a PNG."""
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        colours = _colours(len(self.scores))
        for (name, row), colour in zip(self.scores.items(), colours, strict=True):
            axis.plot([0.0, *self.shares], [self.base, *row], marker=".", label=name, color=colour)
        axis.set_xlabel(f"share of the layer's channels taken away, by {self.criterion}")
        axis.set_ylabel("metric")
        axis.grid(alpha=0.3)
        if self.scores:
            figure.legend(loc="outside right upper", fontsize="x-small", ncols=1 + (len(self.scores) - 1) // 28)
        figure.savefig(path, dpi=120)


def _colours(number: int) -> list[tuple[float, float, float]]:
    return [tuple(colormaps["viridis"](i / max(number, 1))[:3]) for i in range(number)]  # type: ignore[misc]


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float],
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75),
    criterion: Criterion = "l1",
    layers: Sequence[str] | None = None,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    mode: str = "max",
    seed: int = 0,
) -> SensitivityTable:
    """Takes the least important channels of one layer after the other away and measures (Li et al. 2017, figure 2).

    All on a copy, where a channel is taken away by setting the outputs of the layer and of the BatchNorm that follows
    to 0: what a cut comes to where the nonlinearity maps 0 to 0. A layer that adds to a shortcut
    loses its own contribution alone; channels that other layers would lose with it stay.

    Args:
        model: The network; it stays as it is.
        example_inputs: A tensor, a tuple of arguments or a dict of them, for one forward pass.
        evaluate: Returns the metric of a network on validation data. It gets the copy, in eval mode.
        shares: Shares of a layer's channels, above 0 and below 1. At least one channel stays.
        criterion: See :func:`~lightning_tips.pruning.channel_scores`.
        layers: Their names; by default all convolutions with more than one channel.
        batches: BatchNorm is re-estimated on them before each measurement, which the pruned network will have, too; and
            they are the data of a criterion that needs some. Without them the curves are far too pessimistic. An
            iterator is kept as a list.
        forward: See :func:`~lightning_tips.pruning.channel_scores`.
        loss: For the criterion ``taylor``.
        mode: ``max`` if a high metric is good, ``min`` if a low one is.
        seed: For the criterion ``random``.

    Raises:
        ValueError: Shares outside (0, 1), an unknown mode, no layers, and what the criterion raises.
    """
    shares = tuple(sorted(float(share) for share in shares))
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares must lie between 0 and 1, not {shares}.")
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', not {mode!r}.")
    if batches is not None and iter(batches) is batches:
        batches = list(batches)
    copied = copy_network(model)
    if layers is None:
        modules = copied.named_modules()
        layers = [name for name, module in modules if isinstance(module, _ConvNd) and module.out_channels > 1]
    if not layers:
        raise ValueError("The model has no convolution with more than one channel, so there is nothing to take away.")
    order = {
        name: scores.argsort(stable=True)
        for name, scores in channel_scores(
            copied, layers, criterion, batches, forward, loss, seed, example_inputs=example_inputs
        ).items()
    }
    norms = following_norms(copied, layers, example_inputs=example_inputs)

    def measured() -> float:
        if batches is not None:
            reestimate_batch_norm(copied, batches, forward)
        with untouched(copied):
            return float(evaluate(copied))

    base = measured()
    rows: dict[str, tuple[float, ...]] = {}
    for name in layers:
        row = []
        for share in shares:
            number = min(round(share * len(order[name])), len(order[name]) - 1)
            with _silenced(copied, [name, norms[name]], order[name][:number]):
                row.append(measured() if number else base)
        rows[name] = tuple(row)
    channels = {name: channels_of(copied.get_submodule(name)) for name in layers}
    label = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "own")
    return SensitivityTable(base, shares, rows, channels, mode, label)


@contextmanager
def _silenced(model: nn.Module, names: Sequence[str | None], channels: Tensor) -> Iterator[None]:
    """While it is open, these channels of a layer and of the BatchNorm after it are 0."""
    dim = channel_dim_of(model.get_submodule(names[0] or ""))

    def zeroed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.index_fill(dim, channels.to(output.device), 0.0)

    with ExitStack() as hooks:
        for name in names:
            if name is not None:
                hooks.callback(model.get_submodule(name).register_forward_hook(zeroed).remove)
        yield
