"""Learning from the unpruned network while fine-tuning: the loss, the teacher, and the tip that keeps one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional

from lightning_tips.core import ReplacedStep, resize_to
from lightning_tips.core.lightning_private import is_redirected
from lightning_tips.pruning.fit.capture import as_inputs
from lightning_tips.pruning.fit.going_back import GuardedTip
from lightning_tips.pruning.networks.copies import log_nothing, plain_copy

Task = Literal["multiclass", "multilabel", "regression"]


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, task: Task = "multiclass", dim: int = 1
) -> Tensor:
    """How far the student's outputs are from the teacher's; no gradient flows to the teacher.

    - ``multiclass``: the divergence KL(teacher || student) of the softmax distributions at the temperature, mean over
      samples (and places, for dense outputs).
    - ``multilabel``: the same for the two outcomes of each label, by the sigmoid, mean over samples and labels.
    - ``regression``: mean squared difference; the temperature has no part in it.

    The divergences are multiplied by temperature^2, so that their gradients keep their size when it changes (Hinton et
    al. 2015, section 2).

    Args:
        student: Logits ``(N, C, ...)``, or predictions of any shape for ``regression``. Computed in float32.
        teacher: The same shape.
        temperature: Above 0; the higher, the more the small probabilities count.
        task: See above.
        dim: The dimension of the classes, for ``multiclass``.

    Returns:
        A scalar, 0 when both agree.

    Raises:
        ValueError: Shapes that differ, a temperature that is not above 0, an unknown task.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"Outputs {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}.")
    ours, theirs = student.float(), teacher.detach().float()
    if task == "regression":
        return functional.mse_loss(ours, theirs)
    ours, theirs = ours / temperature, theirs / temperature
    if task == "multiclass":
        ours, theirs = functional.log_softmax(ours, dim), functional.log_softmax(theirs, dim)
        divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)
    elif task == "multilabel":
        # p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q)), in logits, where nothing is rounded to 0 or 1.
        positive = theirs.sigmoid() * (functional.logsigmoid(theirs) - functional.logsigmoid(ours))
        negative = (-theirs).sigmoid() * (functional.logsigmoid(-theirs) - functional.logsigmoid(-ours))
        divergence = positive + negative
    else:
        raise ValueError(f"Unknown task {task!r}: multiclass, multilabel or regression.")
    return divergence.mean() * temperature**2


class Teacher:
    """A frozen copy of a network, whose outputs are taught in every training step.

    Args:
        network: What is taught; the copy is made of it as it is now.
        weight: Of the distillation loss, added to the step's own.
        temperature: See :func:`distillation_loss`.
        task: Likewise.
        state: Other weights for the copy, perhaps in other shapes.
    """

    def __init__(
        self,
        network: nn.Module,
        weight: float,
        temperature: float,
        task: Task = "multiclass",
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.weight = weight
        self.temperature = temperature
        self.task: Task = task
        copied = plain_copy(network)
        if state is not None:
            resize_to(copied, state)
            copied.load_state_dict(state)
        log_nothing(copied)
        self.network = copied.eval().requires_grad_(False)
        self._student = network
        self._calls: list[tuple[Any, Any]] = []  # inputs and output
        self._open: list[Any] = []
        self._step: ReplacedStep | None = None
        self._handles: list[Any] = []

    def attach(self, trainer: pl.Trainer) -> None:
        """Teaches from the next training step on."""
        self._strategy = trainer.strategy
        self._step = ReplacedStep(trainer.strategy, self._around)

    def detach(self) -> None:
        """Stops."""
        if self._step is not None:
            self._step.remove()
            self._step = None

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights, on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.network.state_dict().items()}

    def _around(self, step: Any, *args: Any, **kwargs: Any) -> Any:
        self._calls, self._open = [], []
        handles = [
            self._student.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._student.register_forward_hook(self._end),
        ]
        try:
            output = step(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if output is None or not self._calls:
            return output
        with self._strategy.precision_plugin.train_step_context():
            term = self.weight * torch.stack([self._term(*call) for call in self._calls]).mean()
        self._calls = []
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + term}
        return output + term

    def _begin(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        self._open.append(None if is_redirected(network) else as_inputs(network, args, kwargs))

    def _end(self, network: nn.Module, args: Any, output: Any) -> None:
        inputs = self._open.pop()
        if inputs is not None:
            self._calls.append((inputs, output))

    def _term(self, inputs: Any, output: Any) -> Tensor:
        with torch.no_grad():
            taught = self.network(**inputs) if isinstance(inputs, dict) else self.network(*inputs)
        return distillation_loss(_logits(output), _logits(taught), self.temperature, self.task)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, list | tuple):
        output = output[0] if output else None
    else:
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise TypeError(
            f"Distillation needs logits (N, C, ...) from the network; it returns a {type(output).__name__}. Leave"
            " distill at 0, or name the part of the module that returns logits, with module=..."
        )
    return output


class TaughtTip(GuardedTip):
    """A tip whose network is taught by what it was before the first step.

    Args:
        distill: Weight of the distillation loss; 0 for none.
        temperature: Of the distillation loss.
        distill_task: Likewise.
        **arguments: See :class:`GuardedTip`.
    """

    def __init__(self, distill: float, temperature: float, distill_task: Task, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.distill = distill
        self.temperature = temperature
        self.distill_task: Task = distill_task
        self._teacher: Teacher | None = None

    def reset(self) -> None:
        """Forgets the last run."""
        super().reset()
        self._teacher_state: dict[str, Any] | None = None
        self._drop_teacher()

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return super().state_dict() | {"teacher": self._teacher_state}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up :meth:`state_dict`."""
        super().restore(state)
        self._teacher_state = state["teacher"]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a module whose loss nobody can add to."""
        super().prepare(trainer, pl_module)
        if self.distill and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__}: distill adds to the loss that training_step returns, and"
                f" {type(pl_module).__name__} optimizes manually. Leave distill at 0."
            )

    def _teach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network, _ = self._target(pl_module)
        self._drop_teacher()
        self._teacher = Teacher(network, self.distill, self.temperature, self.distill_task, self._teacher_state)
        self._teacher_state = self._teacher_state or self._teacher.state_dict()
        self._teacher.attach(trainer)

    def _drop_teacher(self) -> None:
        if self._teacher is not None:
            self._teacher.detach()
            self._teacher = None
