"""The learning rate for SGD that SWATS reads off the steps of an adaptive optimizer.

Keskar & Socher 2017, "Improving Generalization Performance by Switching from Adam to SGD" (arXiv 1712.07628).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tips.core.optimizers import decay_is_decoupled


class SwatsProjection:
    """Watches an optimizer's steps and projects them on the gradients.

    For a step ``p`` taken at gradient ``g``, SGD with rate ``gamma = p'p / (-p'g)`` would have gone as far: its step
    ``-gamma g``, projected on ``p``, is ``p`` (section 4 of the paper). The paper averages ``gamma`` itself. Its
    denominator comes near zero, so that single values run from -2.8 to 2.1 where the truth is 0.2; here numerator and
    denominator are averaged apart and divided once::

        Lambda = EMA(p'p) / EMA(-p'g)

    over all parameters together. A decoupled weight decay (AdamW) is no answer to the gradient and is taken out of
    ``p``; an L2 penalty is part of the loss and is added to ``g``. Two averages are kept, over about 1,000 and 100
    optimizer steps; they agree when the projection no longer drifts, which is what the trigger ``"swats"`` waits for.

    Args:
        every: Look at each ``every``-th step only. A look copies the parameters once and costs two dot products
            a tensor; the default keeps that below one percent of a small network's step.
    """

    DECAYS = (0.99, 0.9)  # of the slow and the fast average, a look
    MIN_LOOKS = 30  # before this the slow average has seen no more than the fast one

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._handles: list[RemovableHandle] = []
        self._before: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all steps."""
        self._steps = 0
        self._sums: Tensor | None = None  # (2, 2) float64: slow and fast EMA of p'p and -p'g

    @property
    def looks(self) -> int:
        """How many steps were looked at."""
        return self._steps // self.every

    def watch(self, optimizer: Optimizer) -> None:
        """Hooks on ``optimizer``; whoever steps it, loop, GradScaler or Lightning, is seen. Ends an earlier watch."""
        self.unwatch()
        self._handles = [
            optimizer.register_step_pre_hook(self._note_parameters),
            optimizer.register_step_post_hook(self._look),
        ]

    def unwatch(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before = []

    def scale(self) -> float | None:
        """Lambda, the rate of plain SGD, from the slow average; ``None`` before there is a usable one."""
        return self._ratio(0)

    def drift(self) -> float | None:
        """How far the fast average lies from the slow one, as a share of it; ``None`` before it can be told."""
        slow, fast = self._ratio(0), self._ratio(1)
        if slow is None or fast is None or self.looks < self.MIN_LOOKS:
            return None
        return abs(fast / slow - 1.0)

    def rate_for(self, optimizer: Optimizer) -> float | None:
        """The ``lr`` with which torch's SGD in ``optimizer`` goes as far as the watched optimizer.

        Momentum ``mu`` with dampening ``d`` makes SGD walk ``lr (1 - d) / (1 - mu)`` times the gradient in the long
        run, so ``lr = Lambda (1 - mu) / (1 - d)``. (The paper writes the factor into its update instead.)
        """
        scale = self.scale()
        if scale is None:
            return None
        options = optimizer.defaults
        return scale * (1.0 - float(options.get("momentum", 0.0))) / (1.0 - float(options.get("dampening", 0.0)))

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"steps": self._steps, "sums": None if self._sums is None else self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._steps = int(state["steps"])
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float64)

    def _ratio(self, row: int) -> float | None:
        if self._sums is None:
            return None
        step_length, descent = self._sums[row].tolist()
        # A walk that does not descend on average has no SGD that does the same.
        return step_length / descent if step_length > 0.0 and descent > 0.0 else None

    @torch.no_grad()
    def _note_parameters(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps += 1
        if self._steps % self.every:
            return
        self._before = []
        for group in optimizer.param_groups:
            # Where the weights would be if only a decoupled decay acted. The rate of just now: a warm-up lowers it for
            # the time of the step.
            decay = group.get("weight_decay", 0.0) if decay_is_decoupled(optimizer, group) else 0.0
            self._before += [p.detach() * (1.0 - group["lr"] * decay) for p in group["params"]]

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._before:
            return
        before, self._before = iter(self._before), []
        products: list[Tensor] = []
        for group in optimizer.param_groups:
            penalty = 0.0 if decay_is_decoupled(optimizer, group) else group.get("weight_decay", 0.0)
            for parameter in group["params"]:
                old = next(before)
                if parameter.grad is None or parameter.grad.is_sparse:
                    continue
                step = parameter - old
                gradient = parameter.grad.add(old, alpha=penalty) if penalty else parameter.grad
                products.append(torch.stack([_dot(step, step), -_dot(step, gradient)]))
        if not products:
            return
        seen = torch.stack([p.to(products[0].device) for p in products]).sum(0)
        if self._sums is None:
            self._sums = torch.zeros(2, 2, dtype=torch.float64)
        decays = torch.tensor(self.DECAYS, dtype=torch.float64, device=seen.device)[:, None]
        # Both averages start from zero alike, so the bias cancels in their ratio. An overflow must not stay in them.
        sums = self._sums.to(seen.device)
        self._sums = torch.where(seen.isfinite().all(), decays * sums + (1.0 - decays) * seen, sums)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product = (a.float() * b.float()).sum()
    if hasattr(product, "full_tensor"):  # sharded parameters: the sum over all ranks
        product = product.full_tensor()
    if product.device.type == "mps":  # knows no float64
        product = product.cpu()
    return product.double()


class SettledTrigger:
    """Says when a :class:`SwatsProjection` has stopped drifting.

    The paper switches when one value of the projection meets its average to 1e-9, which is a coincidence of two
    curves and not a state: it never happens over thousands of steps, or at step 2. Here the fast average has to stay
    within a share of the slow one for a number of looks in a row.

    Args:
        tolerance: The share.
        hold: The number of looks, each ten optimizer steps apart by default.

    Raises:
        ValueError: If ``tolerance`` or ``hold`` is not above 0.
    """

    def __init__(self, tolerance: float = 0.1, hold: int = 10) -> None:
        if tolerance <= 0 or hold < 1:
            raise ValueError(f"tolerance={tolerance} and hold={hold} must be above 0; 0.1 and 10 are usual.")
        self.tolerance = tolerance
        self.hold = hold
        self.reset()

    def reset(self) -> None:
        """Forgets all looks."""
        self.looks = 0  # how many of the projection's were taken into account
        self._held = 0

    def update(self, projection: SwatsProjection) -> bool:
        """Takes the projection's newest look into account, once; returns whether it has settled."""
        if projection.looks > self.looks:
            self.looks = projection.looks
            drift = projection.drift()
            self._held = self._held + 1 if drift is not None and drift < self.tolerance else 0
        return self._held >= self.hold

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"seen": self.looks, "held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.looks, self._held = int(state["seen"]), int(state["held"])
