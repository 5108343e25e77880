"""Features of a frozen network, computed once for each input: the network is passed by, and only its head is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tips.transfer.fingerprints import fingerprints

Key = tuple[Any, ...]

# So many inputs of a second look at the data, none of which was seen in the first, and there is no sense in going on.
_PATIENCE = 64


class NotCacheable(Exception):
    """Why features of a network cannot be kept; a sentence."""


class _Reached(Exception):
    """Thrown by the hook on the part that follows the frozen one, to stop the network there."""


class FeatureCache:
    """Keeps what frozen layers make of each input, under a fingerprint of the input's bits.

    Works on the module in place: while it is installed, a call of the network looks each sample of the batch up, runs
    the frozen layers for those that are new, and the head for all of them. Nothing depends on the order of the data,
    on datasets or on indices, so it works for any loader, and on each rank for what that rank sees. Features in train
    and in eval mode are kept apart.

    Args:
        module: The module that holds the network.
        network: Name of the part whose calls are taken over.
        tail: Names of the parts that may be what follows the frozen layers, all of them in the network and the deepest
            first; the first is taken that the network ends with. None: the network itself is frozen, and all of its
            output is kept.
        limit: Bytes that features may take; what does not fit is computed each time.
        ranks: Processes that the data is spread over.
        say: Where messages for the user go.

    Attributes:
        off: Why it has given up, if it has.
    """

    def __init__(
        self,
        module: nn.Module,
        network: str,
        tail: list[str],
        limit: float,
        ranks: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self.name = network or type(module).__name__
        self._module, self._network = module, module.get_submodule(network)
        self._candidates = [module.get_submodule(name) for name in tail]
        self._tail: nn.Module | None = None
        self._limit, self._ranks, self._say = limit, ranks, say
        outside = {id(p) for part in self._candidates[:1] for p in part.parameters()}
        self._frozen = [p for p in self._network.parameters() if id(p) not in outside]
        self._rows: dict[Key, Tensor] = {}
        self._shape: tuple[int, ...] = ()  # of what the network makes of a sample
        self._weights: list[tuple[int, int]] = []
        self._tried = False
        self._own_forward = vars(self._network).get("forward")
        self._forward: Callable[..., Any] | None = None
        self.bytes = self.found = self.looked_up = 0
        self._epochs = self._looked_before = 0
        self._is_full = self._is_renewed = False
        self.off = ""

    def install(self) -> None:
        """Takes over the calls of the network."""
        self._forward = self._network.forward
        self._network.forward = self._call

    def remove(self) -> None:
        """Gives the calls back and forgets all features."""
        if self._forward is None:
            return
        if self._own_forward is None:
            vars(self._network).pop("forward", None)
        else:
            self._network.forward = self._own_forward
        self._forward = None
        self._rows.clear()

    def start_epoch(self) -> None:
        """Says that a whole epoch begins: from the second on, inputs should have been seen."""
        if self._epochs == 1 and not self.looked_up and not self.off:
            self._give_up(f"nothing calls {self.name} in training, but parts of it, perhaps. Call it as a whole")
        elif self._epochs == 1:
            self._looked_before = self.looked_up
            self.found = 0
        elif self._epochs == 2 and not self.found and self.looked_up > self._looked_before:
            self._give_up(self._why_none_is_found())
        self._epochs += 1

    def describe(self) -> str:
        """What it holds, for the user."""
        return f"{len(self._rows)} samples' features, {self.bytes / 2**20:.3g} MB"

    # ---- a call of the network

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        assert self._forward is not None
        if self.off:
            return self._forward(*args, **kwargs)
        try:
            # A tensor of inference mode cannot be trained on.
            keys = fingerprints(args, kwargs, self._network.training, torch.is_inference_mode_enabled())
            if not self._tried:
                self._try(len(keys), args, kwargs)
            features = self._features(keys, args, kwargs)
        except (NotCacheable, ValueError) as reason:
            self._give_up(str(reason))
            return self._forward(*args, **kwargs)
        if self._tail is None:
            return features
        output = self._tail(features)
        return output if output.shape[1:] == self._shape else output.reshape(len(output), *self._shape)

    def _features(self, keys: list[Key], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        weights = [(p.data_ptr(), p._version) for p in self._frozen]
        if weights != self._weights:  # somebody has loaded, pruned or averaged weights
            self._is_renewed |= bool(self._rows)
            self._rows.clear()
            self._weights, self.bytes, self._is_full = weights, 0, False
        missing = [place for place, key in enumerate(keys) if key not in self._rows]
        if self._module.training:  # not in validation
            self.looked_up += len(keys)
            self.found += len(keys) - len(missing)
            started = self.looked_up - self._looked_before
            if self._epochs == 2 and not self.found and started >= _PATIENCE * self._ranks:
                raise NotCacheable(self._why_none_is_found())
        if not missing:
            return torch.stack([self._rows[key] for key in keys])
        # Rounding depends on the size of a batch, so a part of it is taken only where that saves much: on several
        # ranks each meets samples that are new to it for many epochs.
        if self._ranks == 1 or 2 * len(missing) > len(keys):
            missing = list(range(len(keys)))
        else:
            args = tuple(_choose(value, missing) for value in args)
            kwargs = {name: _choose(value, missing) for name, value in kwargs.items()}
        new = self._run_frozen(len(missing), args, kwargs)
        self._keep([keys[place] for place in missing], new)
        if len(missing) == len(keys):
            return new
        rows = dict(zip(missing, new.unbind(), strict=True))
        return torch.stack([rows[place] if place in rows else self._rows[key] for place, key in enumerate(keys)])

    def _keep(self, keys: list[Key], new: Tensor) -> None:
        if self._is_full:
            return
        size = new[0].numel() * new.element_size()
        for key, row in zip(keys, new, strict=True):
            if key in self._rows:
                continue
            if self.bytes + size > self._limit:
                self._is_full = True
                self._say(
                    f"The features do not all fit: {self.describe()} are kept, and the rest is computed each time."
                    f" Each sample takes {size / 2**10:.3g} KB; raise cache_gigabytes, here {self._limit / 2**30:.3g},"
                    " if there is more memory."
                )
                return
            self._rows[key] = row.clone()
            self.bytes += size

    # ---- the frozen part

    def _run_frozen(self, samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self._forward is not None
        if self._tail is None:
            features = self._forward(*args, **kwargs)
        else:
            given: list[tuple[Any, ...]] = []
            with _stop_at(self._tail, given):
                self._forward(*args, **kwargs)
                raise NotCacheable("it does not always run its head")
            features = given[0][0] if len(given[0]) == 1 else None
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != samples:
            raise NotCacheable("what it makes of a batch is not one tensor with a row for each sample")
        if features.requires_grad:
            raise NotCacheable("something in it that is not frozen, or its input, requires a gradient")
        return features

    def _try(self, samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds out, on the first batch, what the network ends with and whether it makes the same of it twice."""
        with _random_state_kept(args), torch.no_grad():
            reason = ""
            for part in self._find_tails(args, kwargs):
                self._tail = part
                if not (reason := self._test(samples, args, kwargs)):
                    break
        if reason:
            raise NotCacheable(reason)
        self._tried = True

    def _test(self, samples: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        first, second = (self._run_frozen(samples, args, kwargs) for _ in range(2))
        if not torch.equal(first, second):
            return (
                "it makes something else of the same images each time. That is dropout, stochastic depth or noise in"
                " the frozen layers; make the network with drop_rate=0 and drop_path_rate=0"
            )
        places = list(range(samples // 2 - 1, -1, -1))
        if not places:
            return ""
        chosen = tuple(_choose(value, places) for value in args)
        part = self._run_frozen(len(places), chosen, {name: _choose(value, places) for name, value in kwargs.items()})
        # Rounding differs with the size of a batch: by 1e-6, by 1e-3 with TF32, more with half precision.
        tolerance = (2e-2 if first.dtype in (torch.half, torch.bfloat16) else 2e-3) * _size(first)
        if not torch.allclose(part.float(), first[places].float(), rtol=0, atol=tolerance):
            return (
                "what it makes of an image depends on the others in the batch. That is BatchNorm with the statistics"
                " of the batch; freeze it (batch_norm='frozen')"
            )
        return ""

    def _find_tails(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[nn.Module | None]:
        """The candidates that the network ends with, the deepest first."""
        assert self._forward is not None
        if not self._candidates:
            return [None]
        outputs: dict[int, list[tuple[Any, int]]] = {id(part): [] for part in self._candidates}
        buffers = [(b, b.clone()) for b in self._candidates[-1].buffers()]

        def note(part: nn.Module, _: Any, output: Any) -> None:
            outputs[id(part)].append((output, _version(output)))

        handles = [part.register_forward_hook(note) for part in self._candidates]
        try:
            whole = self._forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            for buffer, before in buffers:  # the head's own statistics
                buffer.copy_(before)
        if not isinstance(whole, Tensor):
            raise NotCacheable(f"it returns a {type(whole).__name__}, not the output of its head")
        tails: list[nn.Module] = []
        for part in self._candidates:
            made = outputs[id(part)]
            if len(made) == 1 and isinstance(made[0][0], Tensor) and _is_returned(*made[0], whole):
                tails.append(part)
        if not tails:
            raise NotCacheable("it does more with the output of its head than to return it")
        self._shape = tuple(whole.shape[1:])
        return tails

    def _why_none_is_found(self) -> str:
        return _RENEWED if self._is_renewed else _VARY

    def _give_up(self, reason: str) -> None:
        self.off = reason
        self._rows.clear()
        self.bytes = 0
        self._say(f"Features of {self.name} are not cached: {reason}. Training goes on without, only slower.")


_VARY = (
    "the inputs are others in each epoch, so something augments them. Switch that off while the head trains alone, or"
    " take cache_features away"
)

_RENEWED = (
    "something writes to the frozen weights in each epoch, such as an average of weights that is put in place for"
    " validation. Begin with that when more layers train, or take cache_features away"
)


@contextmanager
def _stop_at(part: nn.Module, given: list[tuple[Any, ...]]) -> Iterator[None]:
    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        given.append(args)
        raise _Reached

    handle = part.register_forward_pre_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


@contextmanager
def _random_state_kept(args: tuple[Any, ...]) -> Iterator[None]:
    devices = [value.device for value in args if isinstance(value, Tensor) and value.device.type != "cpu"]
    with torch.random.fork_rng(devices[:1], device_type=devices[0].type if devices else "cuda"):
        yield


def _version(output: Any) -> int:
    """How often a tensor was changed in place."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0


def _is_returned(output: Tensor, version: int, whole: Tensor) -> bool:
    """Whether ``whole`` is the output of a part, perhaps flattened: not changed in place, its axes not swapped.

    Args:
        output: Of the part.
        version: Of that, when the part returned it.
        whole: Output of the network.
    """
    if output.data_ptr() != whole.data_ptr() or output.numel() != whole.numel() or _version(output) != version:
        return False
    strides = zip(whole.shape, output.reshape(whole.shape).stride(), whole.stride(), strict=True)
    return all(mine == its for size, mine, its in strides if size > 1)


def _choose(value: Any, places: list[int]) -> Any:
    return value[places] if isinstance(value, Tensor) else value


def _size(tensor: Tensor) -> float:
    return float(tensor.float().abs().amax()) or 1.0
