"""What a network costs: multiplications, parameters, bytes, and measured time and memory.

Pure functions on torch objects; the network stays as it is.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_tips.pruning.networks.copies import plain_attention
from lightning_tips.pruning.networks.runs import call, device_of, moved, untouched

FEWEST = 100
"""A target between 1 and this is a mistake: no network has so few operations or parameters."""


@dataclass(frozen=True)
class Cost:
    """What a network costs on its example inputs.

    Args:
        macs: Multiply-accumulate operations of a forward pass over the whole example batch.
        parameters: Numbers in the parameters, tied ones once.
        filters: Output channels of all convolutions together.
    """

    macs: int
    parameters: int
    filters: int

    def to_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def flop_counter() -> FlopCounterMode:
    """Torch's counter of operations, also for the fused attention of CPUs, which torch before 2.15 leaves out."""
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return FlopCounterMode(display=False, custom_mapping=None if fused is None else {fused: _fused_attention})


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def check_goal(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a share in (0, 1) of a cost or, above 1, a number that can be meant."""
    if not (math.isfinite(value) and value > 0) or value == 1:
        raise ValueError(f"target[{name!r}]={value!r} must be a share in (0, 1) or, above 1, a number.")
    counted = name == "filters" and value == int(value)  # of these there may be few
    if 1 < value < FEWEST and not counted:
        raise ValueError(
            f"target[{name!r}]={value!r} would be the number of {name} that is left. For a share write one below 1,"
            " such as 0.5 for a half."
        )


def count_cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Counts multiply-accumulate operations, parameters and filters.

    Operations are those of convolutions, matrix products and attention, wherever they come from: modules, functional
    calls, transposed and grouped convolutions (``torch.utils.flop_counter``, which counts a multiplication and an
    addition as two). Element-wise operations, norms, pooling and recurrent layers count nothing.

    Args:
        model: Runs once, in eval mode; it stays as it is.
        example_inputs: A tensor, a tuple or list of arguments or a dict of them, with the batch dimension.
    """
    with untouched(model), plain_attention(), flop_counter() as counter:
        call(model, moved(example_inputs, device_of(model)))
    return Cost(
        macs=counter.get_total_flops() // 2,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        filters=sum(module.out_channels for module in model.modules() if isinstance(module, _ConvNd)),
    )


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass.

    Args:
        median: Seconds.
        quartiles: First and third quartile of the repeats, seconds.
        device: Where it was measured, such as ``cpu`` or ``cuda:0``.
        batch_size: Length of the first input.
        repeats: How often it was measured.
        threads: Threads of torch on the CPU.
    """

    median: float
    quartiles: tuple[float, float]
    device: str
    batch_size: int
    repeats: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "quartiles": list(self.quartiles)}


def measure_latency(model: nn.Module, example_inputs: Any, repeats: int = 30, warmup: int = 5) -> Latency:
    """Measures the forward pass in eval and inference mode, on the device of the model.

    By CUDA events there, by ``time.perf_counter`` elsewhere. To compare networks use :func:`measure_latencies`.

    Args:
        model: It stays as it is.
        example_inputs: A tensor, a tuple or list of arguments or a dict of them, with the batch dimension.
        repeats: Measured passes, at least 1.
        warmup: Passes before them.
    """
    return measure_latencies([model], example_inputs, repeats, warmup)[0]


def measure_latencies(
    models: Sequence[nn.Module], example_inputs: Any, repeats: int = 30, warmup: int = 5
) -> list[Latency]:
    """Measures several networks on the same inputs, in turns and in random order.

    What disturbs the machine meanwhile then disturbs all of them alike, and the quotient of the medians holds. A fixed
    order, also there and back, falls in step with the scheduler of a busy machine: the same networks pay each time.

    Args:
        models: The networks; they stay as they are. One network may come twice, as a measure of the noise.
        example_inputs: See :func:`measure_latency`.
        repeats: Measured passes of each.
        warmup: Passes of each before them.

    Returns:
        One for each network.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}.")
    devices = [device_of(model) for model in models]
    inputs = {device: moved(example_inputs, device) for device in devices}
    times: list[list[float]] = [[] for _ in models]
    shuffle = random.Random(0).shuffle  # its own, so that a user's random numbers stay where they are
    order = list(range(len(models)))
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(untouched(model, compiled=True))
        stack.enter_context(torch.inference_mode())
        for turn in range(warmup + repeats):
            shuffle(order)
            for i in order:
                seconds = _seconds(models[i], inputs[devices[i]], devices[i])
                if turn >= warmup:
                    times[i].append(seconds)
    size = _batch_size(example_inputs)
    threads = torch.get_num_threads()
    return [
        Latency(statistics.median(row), _quartiles(row), str(device), size, repeats, threads)
        for row, device in zip(times, devices, strict=True)
    ]


def _seconds(model: nn.Module, inputs: Any, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            call(model, inputs)
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000  # it gives milliseconds
    _wait_for(device)
    started = time.perf_counter()
    call(model, inputs)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(times), [0.25, 0.75])
    return float(low), float(high)


def _batch_size(inputs: Any) -> int:
    sizes: list[int] = []
    apply_to_collection(inputs, Tensor, lambda tensor: sizes.append(len(tensor) if tensor.ndim else 1))
    return sizes[0] if sizes else 1


def model_size(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that a checkpoint of the network holds, tied ones once."""
    tensors = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): tensor
        for tensor in model.state_dict().values()
        if isinstance(tensor, Tensor) and tensor.numel()
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    # It prints lines of its own; the variable is read when it is first used.
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """The most bytes that a forward pass in inference mode holds at once, beside the network and its inputs.

    On CUDA by the allocator's own count, on the CPU from the allocations that torch's profiler sees.

    Args:
        model: It stays as it is.
        example_inputs: See :func:`measure_latency`.

    Raises:
        ValueError: On another device, which counts nothing.
    """
    device = device_of(model)
    inputs = moved(example_inputs, device)
    with untouched(model, compiled=True), torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call(model, inputs)
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        if device.type != "cpu":
            raise ValueError(f"No way is known to measure memory on {device}; move the model to the CPU or to CUDA.")
        call(model, inputs)  # what is allocated once only
        with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
