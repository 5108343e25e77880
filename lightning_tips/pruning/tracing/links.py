"""Which entries of which tensors belong together: ids, and the links between them.

Every index along a dimension of a parameter gets an id. Entries whose ids are linked can only be removed together;
entries that are linked to something of fixed size cannot be removed at all. Id 0 stands for "no channel".
Ids are on the CPU, whatever torch's default device is.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Key = tuple[str, int]
"""A dimension of a tensor: the tensor's name in the ``state_dict``, and the dimension; -1 stands for single entries."""


class Links:
    """Ids of entries, links between them, and the reasons why some of them must stay."""

    def __init__(self) -> None:
        self.count = 1
        self.vectors: dict[Key, Tensor] = {}
        self.at_least: dict[Key, int] = {}
        self._entries: list[tuple[int, int]] = []
        self._settled: tuple[int, Tensor] = (-1, torch.zeros(0, device="cpu"))
        self._pairs: list[Tensor] = []
        self._fixed: list[tuple[Tensor, str]] = []
        self._marked: dict[str, list[Tensor]] = {"residual": [], "inexact": []}

    def new(self, *shape: int) -> Tensor:
        """Ids that nothing else has."""
        number = int(np.prod(shape))
        ids = torch.arange(self.count, self.count + number, device="cpu").reshape(shape)
        self.count += number
        return ids

    def vector(self, key: Key, *shape: int) -> Tensor:
        """The ids of a tensor's dimension, the same at each call."""
        if key not in self.vectors:
            if key[1] < 0:
                self._entries.append((self.count, self.count + int(np.prod(shape))))
            self.vectors[key] = self.new(*shape)
        return self.vectors[key]

    def are_entries(self, ids: Tensor) -> bool:
        """Whether these are single entries of parameters, so that which of their dimensions has channels is open."""
        largest = int(ids.max())
        return any(start <= largest < stop for start, stop in self._entries)

    def join(self, a: Tensor, b: Tensor, where: str) -> None:
        """Links ids one by one; where one of the two is no channel, the other has to stay."""
        a, b = torch.broadcast_tensors(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        differ = a != b
        if not bool(differ.any()):
            return
        a, b = a[differ], b[differ]
        free = (a != 0) & (b != 0)
        if not bool(free.all()):
            self.fix((a + b)[~free], f"meets something of fixed size at {where}")
        if bool(free.any()):
            self._pairs.append(torch.stack([a[free], b[free]]))

    def settled(self, labels: Tensor) -> Tensor:
        """The labels with one id for all that are linked by now."""
        if self._settled[0] != len(self._pairs) or len(self._settled[1]) < self.count:
            component = torch.from_numpy(self._connected()).to(torch.int64)
            first = torch.full((int(component.max()) + 1,), self.count, dtype=torch.int64, device="cpu")
            first.scatter_reduce_(0, component, torch.arange(self.count, device="cpu"), "amin")
            self._settled = (len(self._pairs), first[component])
        return self._settled[1][labels]

    def fix(self, ids: Tensor, reason: str) -> None:
        """Says that entries have to stay."""
        ids = torch.unique(ids)
        ids = ids[ids != 0]
        if len(ids):
            self._fixed.append((ids, reason))

    def mark(self, what: str, ids: Tensor) -> None:
        """Notes that entries take part in a sum of branches (``residual``) or in a mean over channels (``inexact``)."""
        self._marked[what].append(torch.unique(ids))

    def components(self) -> tuple[np.ndarray, dict[int, str], set[int], set[int]]:
        """What belongs together.

        Returns:
            For each id the number of its component; for components that have to stay the first reason; the components
            that take part in sums of branches; those that take part in means over channels.
        """
        component = self._connected()
        reasons: dict[int, str] = {int(component[0]): "no channel"}
        for ids, reason in self._fixed:
            for number in np.unique(component[ids.numpy()]):
                reasons.setdefault(int(number), reason)
        residual, inexact = (
            set(np.unique(component[torch.cat(ids).numpy()]).tolist()) if ids else set()
            for ids in (self._marked["residual"], self._marked["inexact"])
        )
        return component, reasons, residual, inexact

    def _connected(self) -> np.ndarray:
        pairs = torch.cat(self._pairs, 1).numpy() if self._pairs else np.zeros((2, 0), dtype=np.int64)
        graph = coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), (self.count, self.count))
        _, component = connected_components(graph, directed=False)
        return component
