"""The vote as one network, for ``torch.export`` and ONNX."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tips.ensemble.checks import Task, as_weights
from lightning_tips.ensemble.outputs import OutputKind, to_probabilities
from lightning_tips.ensemble.vote import Voting

__all__ = ["VoteNetwork", "export_vote"]

LOWEST = torch.finfo(torch.float32).tiny


class VoteNetwork(nn.Module):
    """From inputs to the vote's probabilities, without Lightning around it.

    Members of weight 0 are left out.

    Args:
        members: Copied, in eval mode.
        weights: One for each.
        kinds: How each one's output becomes probabilities.
        temperature: Of soft and weighted votes.
        voting: How they vote.
        task: What they predict.
    """

    weights: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Tensor,
        kinds: Sequence[OutputKind | Callable[[Any], Tensor]],
        temperature: float = 1.0,
        voting: Voting = "weighted",
        task: Task = "multiclass",
    ) -> None:
        super().__init__()
        shares = as_weights(weights, len(members)).float()
        used = [index for index, share in enumerate(shares.tolist()) if share > 0]
        self.members = nn.ModuleList(copy.deepcopy(members[index]) for index in used)
        self.register_buffer("weights", shares[used])
        self.kinds = [kinds[index] for index in used]
        self.temperature, self.voting, self.task = temperature, voting, task
        self.eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Probabilities ``(N, C, ...)``; in regression the mean ``(N, ...)``."""
        total: Tensor | None = None
        for index, (member, kind) in enumerate(zip(self.members, self.kinds, strict=True)):
            values = to_probabilities(member(inputs), kind, self.task)
            if self.voting == "hard":
                if self.task == "multilabel":
                    values = (values >= 0.5).to(values.dtype)
                else:
                    classes = torch.arange(values.shape[1], device=values.device)
                    shape = (1, -1, *([1] * (values.ndim - 2)))
                    values = (classes.reshape(shape) == values.argmax(1, keepdim=True)).to(values.dtype)
            values = values * self.weights[index]
            total = values if total is None else total + values
        assert total is not None
        if self.task == "regression" or self.voting == "hard" or self.temperature == 1.0:
            return total
        logits = total.clamp_min(LOWEST).log()
        if self.task == "multilabel":
            return ((logits - (1 - total).clamp_min(LOWEST).log()) / self.temperature).sigmoid()
        return (logits / self.temperature).softmax(1)


def export_vote(network: VoteNetwork, path: Path, example: Tensor, tolerance: float = 1e-6) -> float:
    """Writes a ``.pt2`` (torch.export) or an ``.onnx`` file that takes batches of any size, and runs what was written.

    Args:
        network: On the CPU.
        path: Its ending decides the format.
        example: A batch of inputs; with fewer than 2 samples it is repeated, as torch.export takes 1 for a constant.
        tolerance: How far the file's predictions may be from the network's.

    Returns:
        The largest difference that was found, for the example and for a batch of another size.

    Raises:
        TypeError: If the inputs are no tensor.
        ValueError: If the ending is another one, or predictions differ by more.
        ModuleNotFoundError: If what ONNX needs is not installed.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path.name} must end in .pt2 (torch.export) or .onnx.")
    if not isinstance(example, Tensor):
        raise TypeError(
            f"The inputs of the example are a {type(example).__name__}; members that take one tensor can be exported."
            " Where batches are dicts, input_key says which part of them the inputs are."
        )
    example = example.detach().cpu()
    example = torch.cat([example, example]) if len(example) < 2 else example
    batches = [example, torch.cat([example, example, example[:1]])]
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        if path.suffix == ".pt2":
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
            found = [loaded(batch) for batch in batches]
        else:
            for needed in ("onnx", "onnxruntime", "onnxscript"):
                if importlib.util.find_spec(needed) is None:
                    raise ModuleNotFoundError("An .onnx file needs: pip install 'lightning-tips[onnx]'")
            import onnxruntime

            torch.onnx.export(program, (), path, input_names=["inputs"], output_names=["probabilities"], verbose=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            found = [torch.from_numpy(session.run(None, {name: batch.numpy()})[0]) for batch in batches]
        expected = [network(batch) for batch in batches]
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if not difference <= tolerance:
        raise ValueError(
            f"What {path.name} predicts is off by up to {difference:.2g}, more than {tolerance:g}. Is a member not a"
            " function of its inputs alone (dropout in eval mode, random numbers)?"
        )
    return difference
