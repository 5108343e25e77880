"""A network as a file that runs without its code: ``torch.export`` and ONNX, for any batch size, and checked.

Pure functions on torch objects.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tips.core import did_you_mean
from lightning_tips.pruning.fit.capture import Inputs, batch_size, mapped
from lightning_tips.pruning.fit.latency import of_size
from lightning_tips.pruning.networks.copies import copy_network
from lightning_tips.pruning.networks.runs import moved

Kind = Literal["torch", "onnx"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}
NEEDED = {"torch": (), "onnx": ("onnx", "onnxscript")}
TOLERANCE = 1e-5


def missing_for(kind: str) -> str | None:
    """Why a kind of file cannot be written here, with what to do, or ``None``."""
    absent = [name for name in NEEDED[kind] if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} missing: pip install 'lightning-tips[onnx]'"
    if kind == "onnx" and "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        return f"torch {torch.__version__} is too old for it: pip install 'torch>=2.5'"
    return None


def choose_kinds(asked: Sequence[str] | None) -> tuple[list[Kind], dict[str, str]]:
    """What will be written, and by default what not, with the reason.

    Args:
        asked: Kinds; ``None`` for all that can be written here.

    Raises:
        ValueError: For an unknown kind, or one that was asked for and cannot be written here.
    """
    for kind in asked or ():
        if kind not in KINDS:
            raise ValueError(f"There is no export {kind!r}. {did_you_mean(kind, KINDS)}")
        if reason := missing_for(kind):
            raise ValueError(f"export={kind!r}: {reason}")
    if asked is not None:
        return [kind for kind in KINDS if kind in asked], {}
    reasons = {kind: missing_for(kind) for kind in KINDS}
    return [k for k in KINDS if reasons[k] is None], {k: r for k, r in reasons.items() if r is not None}


def export_network(model: nn.Module, example_inputs: Any, path: str | Path, kind: Kind = "torch") -> float | None:
    """Writes a network in eval mode as one file, for any batch size, and compares the file's outputs with its own.

    Args:
        model: The network as it is called; it stays as it is. A copy on the CPU is exported.
        example_inputs: A tensor, a tuple of arguments or a dict of them, with the batch dimension. Every tensor that is
            as long as the first one is taken for a part of the batch.
        path: The file.
        kind: ``"torch"`` for ``torch.export`` (``torch.export.load(path).module()``), ``"onnx"`` for ONNX.

    Returns:
        The largest difference of an output, as a share of the largest output (of 1, if that is smaller), over batches
        of one, two and three; ``None`` for ONNX where onnxruntime is not installed to compare with.

    Raises:
        ValueError: For an unknown kind, one that cannot be written here, or outputs that differ by more than 1e-5; the
            file is gone then.
        RuntimeError: If the network cannot be exported, with torch's reason.
    """
    choose_kinds([kind])
    path = Path(path)
    if path.suffix != SUFFIX[kind]:
        raise ValueError(f"{path} must end in {SUFFIX[kind]}.")
    network, example = _Called(copy_network(model).cpu().eval()), _as_inputs(example_inputs)
    example = of_size(moved(example, torch.device("cpu")), 3)  # a batch of 1 would be taken for a constant
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(network, args, kwargs, dynamic_shapes=_dynamic(example), strict=False)
            if kind == "torch":
                torch.export.save(program, path)
            else:
                names = _input_names(network.network, example)
                torch.onnx.export(
                    program, (), str(path), input_names=names, dynamo=True, external_data=False, verbose=False
                )
    except Exception as error:  # of whatever kind: tracing runs any code
        path.unlink(missing_ok=True)
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise RuntimeError(f"{kind}: the network cannot be exported ({type(error).__name__}: {reason})") from error
    run = _loaded(path, kind)
    if run is None:
        return None
    worst = max(_difference(network, run, of_size(example, size)) for size in (1, 2, 3))
    if not worst <= TOLERANCE:
        path.unlink()
        raise ValueError(f"{kind}: the file's outputs differ from the network's by {worst:.2g} of the largest.")
    return worst


class _Called(nn.Module):
    """Calls a network. A LightningModule itself would be exported with its Trainer, its hooks and its metrics."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def _as_inputs(given: Any) -> Inputs:
    if isinstance(given, Mapping):
        return dict(given)
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _dynamic(example: Inputs) -> dict[str, Any]:
    """For the arguments of :class:`_Called`: the first dimension of what is in the batch may be of any size."""
    size, dim = batch_size(example), torch.export.Dim("batch")

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: dim} if value.ndim and len(value) == size else {}
        if isinstance(value, dict):
            return {key: shape(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(shape(part) for part in value)
        return None

    return {"kwargs" if isinstance(example, dict) else "args": shape(example)}


def _input_names(network: nn.Module, example: Inputs) -> list[str] | None:
    """The names that ``forward`` has for its tensors, where each argument is one."""
    values = example.values() if isinstance(example, dict) else example
    if not all(isinstance(value, Tensor) for value in values):
        return None
    if isinstance(example, dict):
        return list(example)
    known = [
        p.name for p in inspect.signature(network.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    return known[: len(example)] if len(known) >= len(example) else None


def _loaded(path: Path, kind: str) -> Callable[[Inputs], list[Tensor]] | None:
    """A function that runs the file; ``None`` if nothing here can."""
    if kind == "torch":
        module = torch.export.load(str(path)).module()
        return lambda inputs: _tensors(module(**inputs) if isinstance(inputs, dict) else module(*inputs))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [tensor.numpy() for tensor in _tensors(inputs)]
        return [torch.as_tensor(out, device="cpu") for out in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _difference(network: nn.Module, run: Callable[[Inputs], list[Tensor]], inputs: Inputs) -> float:
    # Other values than the graph was made with: a value that became a constant shows.
    other = mapped(inputs, lambda t: t.flip(-1) if t.is_floating_point() and t.ndim > 1 else t)
    with torch.no_grad():
        expected = _tensors(network(**other) if isinstance(other, dict) else network(*other))
        got = run(other)
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in got]:
        return float("inf")
    pairs = [(e.double(), g.double()) for e, g in zip(expected, got, strict=True) if e.numel()]
    return max((float((e - g).abs().max()) / max(1.0, float(e.abs().max())) for e, g in pairs), default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters tell their own developers."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
