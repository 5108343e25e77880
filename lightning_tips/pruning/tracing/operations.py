"""What operations do with labels: the rules of the trace for all that is no layer.

Rules exist for operations that move data, those that work entry by entry, pooling, reductions and matrix products. What
meets any other operation stays as large as it is: in doubt a channel is kept, never removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_tips.pruning.tracing import labels as lb
from lightning_tips.pruning.tracing.links import Links


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _words("""
    view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze expand slice select split
    split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind flip roll repeat narrow diagonal movedim
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle index index_select gather stack
""")
_PICKS = {"index", "index_select", "gather"}
_SAME = _words("""
    clone detach alias _to_copy contiguous lift_fresh empty_like zeros_like ones_like rand_like randn_like
    full_like bernoulli bernoulli_ native_dropout dropout dropout_ hardswish hardswish_ _prelu_kernel
    log_sigmoid_forward fill_ zero_ uniform_ normal_ _conj resolve_conj resolve_neg isnan isinf
""")
_REDUCTIONS = _words("""
    mean sum amax amin var var_mean std std_mean prod norm linalg_vector_norm max min logsumexp any all median
    nanmean nansum
""")
_SOFTMAX = {"_softmax", "_log_softmax", "cumsum", "_safe_softmax"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "matmul"}
_NEW = {"new_empty", "new_zeros", "new_ones", "new_full"}
_SUMS = {"add", "add_", "sub", "sub_"}


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers, dataclasses and mappings, in order."""
    found: list[Tensor] = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dataclass_fields__"):
            found += tensors_in([getattr(leaf, name) for name in leaf.__dataclass_fields__])
        elif hasattr(leaf, "items") and callable(leaf.items):
            found += tensors_in([item for _, item in leaf.items()])
    return found


class OperationRules:
    """The rules; ``ChannelTrace`` calls them with an operation, its arguments, its tensors and their labels."""

    links: Links

    def of(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor."""
        raise NotImplementedError

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Sets the labels of a tensor."""
        raise NotImplementedError

    def is_parameter(self, tensor: Any) -> bool:
        """Whether it is a parameter or buffer of the network itself."""
        raise NotImplementedError

    def rule_of(self, func: Any, name: str) -> Callable[..., None]:
        """The rule for an operation."""
        if name in ("cat", "concat"):
            return self._cat
        if name in _VIEWS:
            return self._move
        if name == "as_strided_":  # pooling to one pixel sets the strides anew
            return self._strides
        if name == "copy_":
            return self._copy
        if name in _SAME or torch.Tag.pointwise in func.tags:
            return self._elementwise
        if name == "constant_pad_nd":
            return self._pad
        if name.endswith(("1d", "2d", "3d", "_with_indices", "_aa")) and (
            "pool" in name or "upsample" in name or "pad" in name
        ):
            return self._spatial
        if name in _REDUCTIONS:
            return self._reduce
        if name in _NEW:
            return self._new
        if name in _SOFTMAX:
            return self._softmax
        if name in _PRODUCTS:
            return self._product
        if name == "glu":
            return self._glu
        return self._unknown

    def _unknown(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        for labels in before:
            self.links.fix(lb.thin(labels), f"goes through the operation {name}")
        for tensor in results:
            self.put(tensor, lb.none(tensor.shape))

    def _new(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        """Noise, masks and states made to fit a tensor, such as those of Dropout2d: as large as it where sizes agree.

        Whether the code takes the size from the tensor or has it written down is not seen here, but in the trial.
        """
        shape, labels = results[0].shape, before[0]
        if len(shape) != labels.ndim:
            self.put(results[0], lb.none(shape))
            return
        for d in range(labels.ndim):
            if labels.shape[d] != shape[d]:
                if lb.varies(labels, d) and shape[d] != 1:
                    labels = lb.none(shape)
                    break
                labels = lb.none(labels.shape) if lb.varies(labels, d) else labels
                labels = labels.narrow(d, 0, 1)
        self.put(results[0], labels.expand(shape))

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        if name in _PICKS and any(
            lb.any_channel(labels)
            for tensor, labels in zip(given, before, strict=True)
            if tensor is not args[0] and not tensor.is_floating_point()
        ):  # which channels are picked depends on data
            self._unknown(func, name, args, kwargs, given, before, results)
            return
        by_id = {id(tensor): labels for tensor, labels in zip(given, before, strict=True)}

        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return by_id[id(value)] if value.is_floating_point() or lb.any_channel(by_id[id(value)]) else value.cpu()

        try:
            moved = func(*tree_map(swap, args), **tree_map(swap, kwargs))
        except RuntimeError:
            if name not in ("view", "_unsafe_view", "_reshape_alias"):
                raise
            moved = before[0].reshape(results[0].shape)  # expanded labels cannot always be viewed
        after = [lb.compact(labels) for labels in tensors_in(moved)]
        self._keep_parts_equal(name, before, after)
        for tensor, labels in zip(results, after, strict=True):
            self.put(tensor, labels)

    def _keep_parts_equal(self, name: str, before: list[Tensor], after: list[Tensor]) -> None:
        """Parts of equal size that channels are divided into, or that are stacked, have to stay equally large."""
        if name == "stack":
            parts = before
        elif "split" in name or name in ("chunk", "unbind"):
            parts = after if lb.varying(before[0]) == lb.varying(after[0]) else []
        else:
            parts = []
        shapes = {part.shape for part in parts}
        if len(parts) > 1 and len(shapes) == 1:
            for part in parts[1:]:
                if lb.varying(part) == lb.varying(parts[0]) and not self.links.are_entries(lb.thin(part)):
                    self.links.join(lb.thin(part), lb.thin(parts[0]), name)
        if "view" in name or "reshape" in name:
            changing = lb.varying(after[0])
            if len(lb.varying(before[0])) == 1 and len(changing) > 1:
                small = lb.thin(after[0])
                content = max(changing, key=lambda d: (small.shape[d], d))
                for d in changing:
                    if d != content:
                        self.links.join(small, small.narrow(d, 0, 1), name)

    def _cat(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        tensors = [tensor for tensor in args[0] if tensor.numel()]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % results[0].ndim
        parts = [self.of(tensor) for tensor in tensors]
        if not any(lb.varies(part, dim) for part in parts):  # the other dimensions have to agree
            slices = [part.narrow(dim, 0, 1) for part in parts]
            merged = slices[0]
            for part in slices[1:]:
                merged = self._join(merged, part, part.shape, name)
            self.put(results[0], merged.expand(results[0].shape))
            return
        for d in range(results[0].ndim):
            if d != dim and not any(lb.varies(part, d) for part in parts):
                parts = [part.narrow(d, 0, 1) for part in parts]
        self.put(results[0], lb.compact(torch.cat(parts, dim)).expand(results[0].shape))

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        if args[0]._base is None:
            self.put(results[0], lb.compact(before[1].expand(results[0].shape)))
        else:  # a part of another tensor
            self._join(before[0], before[1], results[0].shape, name)

    def _elementwise(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        shape = results[0].shape
        merged: Tensor | None = None
        for tensor, labels in zip(given, before, strict=True):
            if tensor.numel() == 1 and not lb.any_channel(labels):
                continue
            if labels.ndim > len(shape):
                self._unknown(func, name, args, kwargs, given, before, results)
                return
            for d in range(
                labels.ndim
            ):  # one value that was expanded, such as by expand_as, is spread as if it were not
                if tensor.shape[d] > 1 and tensor.stride(d) == 0 and not lb.varies(labels, d):
                    labels = labels.narrow(d, 0, 1)
            merged = labels if merged is None else self._join(merged, labels, shape, name)
        if name in _SUMS and len(given) == 2 and not any(self.is_parameter(tensor) for tensor in given):
            a, b = before
            if lb.any_channel(a) and lb.any_channel(b):
                for labels in (a, b):
                    self.links.mark("residual", lb.thin(labels))
        final = lb.none(shape) if merged is None else merged.expand(shape)
        for tensor in results:
            if tensor.shape == shape:
                self.put(tensor, final)

    def _join(self, a: Tensor, b: Tensor, shape: torch.Size, where: str) -> Tensor:
        """Links the labels of two tensors that are combined entry by entry, and returns those of the result."""
        a, b = (t.reshape((1,) * (len(shape) - t.ndim) + tuple(t.shape)) if t.ndim < len(shape) else t for t in (a, b))
        small_a, small_b = lb.thin(a), lb.thin(b)
        a_repeated = b_repeated = unlike = False
        for d, size in enumerate(shape):
            if size > 1:
                a_repeated |= a.shape[d] == 1 and small_b.shape[d] > 1
                b_repeated |= b.shape[d] == 1 and small_a.shape[d] > 1
                unlike |= (small_a.shape[d] > 1) != (small_b.shape[d] > 1)
        if a_repeated or b_repeated:
            # One channel for all of the other's: it has to stay, the others may go.
            if a_repeated:
                self.links.fix(small_a, f"is spread over channels at {where}")
            if b_repeated:
                self.links.fix(small_b, f"is spread over channels at {where}")
            if a_repeated and b_repeated:
                return lb.none(shape)
            return (b if a_repeated else a).expand(shape)
        entries_a, entries_b = self.links.are_entries(small_a), self.links.are_entries(small_b)
        if unlike and entries_a != entries_b:
            # A parameter such as an embedding of positions: its entries go with the channels, whatever their place.
            self.links.join(small_a, small_b, where)
            return (b if entries_a else a).expand(shape)
        if unlike:
            self.links.fix(small_a, f"meets something of fixed size at {where}")
            self.links.fix(small_b, f"meets something of fixed size at {where}")
            return lb.none(shape)
        self.links.join(small_a, small_b, where)
        return torch.where(small_a != 0, small_a, small_b).expand(shape)

    def _strides(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        shape = results[0].shape
        plain = shape == before[0].shape and all(size == 1 for size in shape[2:]) and 0 not in lb.varying(before[0])
        if not plain:
            self._unknown(func, name, args, kwargs, given, before, results)

    def _pad(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        labels, shape = before[0], results[0].shape
        for d in lb.varying(labels):
            if shape[d] != labels.shape[d]:  # zeros beside channels, or fewer of these
                pads = list(args[1]) + [0] * (2 * labels.ndim - len(args[1]))
                at = 2 * (labels.ndim - 1 - d)
                labels = lb.compact(nn.functional.pad(lb.thin(labels), [0] * at + pads[at : at + 2]))
        for d in range(len(shape)):
            if labels.shape[d] != shape[d] and not lb.varies(labels, d):
                labels = labels.narrow(d, 0, 1)
        self.put(results[0], labels.expand(shape))

    def _spatial(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        dims = 1 if "1d" in name else 3 if "3d" in name else 2
        labels = before[0]
        if any(size > 1 for size in lb.thin(labels).shape[-dims:]) or labels.ndim != results[0].ndim:
            self._unknown(func, name, args, kwargs, given, before, results)
            return
        for d in range(1, dims + 1):
            labels = labels.narrow(-d, 0, 1)
        for tensor in results:
            self.put(tensor, labels.expand(tensor.shape))

    def _dims(self, func: Any, args: Any, kwargs: Any, ndim: int) -> list[int]:
        for position, argument in enumerate(func._schema.arguments):
            if argument.name == "dim":
                dims = args[position] if len(args) > position else kwargs.get("dim")
                break
        else:
            dims = None
        if dims is None or dims == []:
            return list(range(ndim))
        return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)]

    def _reduce(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        if len(given) > 1:
            self._elementwise(func, name, args, kwargs, given, before, results)
            return
        labels = before[0]
        dims = self._dims(func, args, kwargs, labels.ndim)
        changing = lb.varying(labels)
        over = [d for d in dims if d in changing]
        small = lb.thin(labels)
        if over and len(over) < len(changing):  # channels along another dimension: these are combined
            for d in over:
                self.links.join(small, small.narrow(d, 0, 1), name)
        elif over:
            self.links.mark("inexact", small)
            labels = lb.none(labels.shape)
        for d in dims:
            labels = labels.narrow(d, 0, 1)
        for tensor in results:
            self.put(tensor, lb.compact(labels.reshape(tensor.shape)))

    def _softmax(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        labels = before[0]
        small, changing = lb.thin(labels), lb.varying(labels)
        for d in self._dims(func, args, kwargs, labels.ndim):
            if d in changing and len(changing) > 1:
                self.links.join(small, small.narrow(d, 0, 1), name)
            elif d in changing:
                self.links.mark("inexact", small)
        self.put(results[0], labels)

    def _glu(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        dim = args[1] if len(args) > 1 else -1
        a, b = before[0].chunk(2, dim)
        self.put(results[0], self._join(lb.compact(a), lb.compact(b), results[0].shape, name))

    def _product(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, before: Any, results: Any) -> None:
        a, b = before[-2:]
        if name in ("mv", "addmv", "dot") or a.ndim != b.ndim:
            self._unknown(func, name, args, kwargs, given, before, results)
            return
        rows, inner_a, inner_b, columns = (lb.varies(t, d) for t, d in ((a, -2), (a, -1), (b, -2), (b, -1)))
        batched = any(d < a.ndim - 2 for t in (a, b) for d in lb.varying(t))
        shape = results[0].shape
        out: Tensor | None = None
        if not batched and not (rows and (inner_a or columns)) and not (columns and inner_b):
            if inner_a or inner_b:  # a sum over channels: those of both sides go together
                if inner_a and inner_b:
                    self.links.join(lb.along(a, -1), lb.along(b, -2), name)  # type: ignore[arg-type]
                    out = lb.none(shape)
            elif rows:
                out = a.narrow(-1, 0, 1).expand(shape)
            elif columns:
                out = b.narrow(-2, 0, 1).expand(shape)
        if out is None or len(given) > 2:
            self._unknown(func, name, args, kwargs, given, before, results)
        else:
            self.put(results[0], out)
