"""The order of an epoch as a pure function of (seed, epoch, position): no table, no state, any part of it by itself.

An epoch of ``n`` draws gives class ``c`` exactly ``quota[c]`` of them. Think of all draws laid out class by class in
``n`` slots. The epoch is cut into ``K`` chunks, and chunk ``k`` holds the slots ``r, r + K, r + 2K, ...`` for a
remainder ``r`` that belongs to it alone. So each slot occurs once, and each class is in each chunk either the rounded
down or the rounded up number of times. A slot says which visit of its class it is; visit ``v`` of a class of ``m``
items takes the item at place ``v mod m`` of a permutation that is keyed by (seed, epoch, class, ``v // m``): in each
round over the class every item comes once. At last the chunk is shuffled by a permutation of its own.

All permutations are computed, not stored: by a Feistel network on ``a * b`` places, just enough, applied again where
it leads outside. The keys come from Philox, numpy's counter-based generator, at the counter (epoch, chunk).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "EpochOrder", "Pool", "build_pool", "epoch_quotas", "permute"]

CHUNK = 65_536  # draws; its arrays fit into a core's cache, and the first index is there in milliseconds
_BLOCK = 1 << 18  # labels that are sorted at a time: more would cost memory beside the index, not time
_SORTED = 4096  # draws; up to here a chunk is shuffled by sorting random numbers, which knows no pattern at all
_MAX_RUNS = 64  # of a class in an epoch

Array = NDArray[Any]


class _Word(NamedTuple):
    """Unsigned integers of one width, with odd numbers that mix them well (from MurmurHash3, xxHash and the like)."""

    kind: type[np.unsignedinteger[Any]]
    bits: int
    mixer: int
    multipliers: tuple[int, ...]  # one for each round of the Feistel network, an even number of them


# Six rounds: with four, pairs of neighbours in a class of 100 still hang together.
_NARROW = _Word(np.uint32, 32, 0x846CA68B, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x7FEB352D))
_WIDE = _Word(
    np.uint64,
    64,
    0xFF51AFD7ED558CCD,
    (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
        0xD6E8FEB86659FD93,
    ),
)


def _word(largest: int) -> _Word:
    return _NARROW if largest < 1 << 31 else _WIDE


def _word_of(x: Array) -> _Word:
    return _NARROW if x.dtype == np.uint32 else _WIDE


def _random(seed: int, epoch: int, purpose: int, chunk: int, size: int) -> Array:
    """Random 64-bit words that depend on the arguments alone."""
    return np.random.Philox(key=[seed, purpose], counter=[0, chunk, epoch, 0]).random_raw(size)


def _halves(size: Array) -> tuple[Array, Array]:
    """Factors ``a, b`` with a product of ``size`` or little more."""
    a = np.ceil(np.sqrt(size)).astype(np.int64)
    return a, -(-size // a)


def _feistel(x: Array, key: Array, a: Array, b: Array, inverse: Array) -> Array:
    """A Feistel network: one to one on ``range(a * b)``, another for each key."""
    word = _word_of(x)
    kind, half = word.kind, word.kind(word.bits // 2)
    # The quotient by way of floats: exact below 2 ** 50, and faster than dividing integers.
    left = ((x + 0.5) * inverse).astype(kind)
    right = x - left * b
    spare = np.empty_like(x)
    for multiplier in word.multipliers:
        # One addition and one multiplication bring in key and round; what follows stirs it.
        mixed = right + key
        mixed *= kind(multiplier)
        np.right_shift(mixed, half, out=spare)
        mixed ^= spare
        mixed *= kind(word.mixer)
        mixed >>= half
        mixed *= a
        mixed >>= half  # now spread over range(a)
        left += mixed
        np.subtract(left, a, out=spare)
        np.minimum(left, spare, out=left)  # modulo a: what is below 0 has wrapped around to large
        left, right, a, b = right, left, b, a
    left *= b
    left += right
    return left


def permute(x: Array, key: Array, size: Array, repeats: Array | None = None) -> Array:
    """Where random permutations of ``range(size)`` put the places ``x``; elementwise, without a table.

    Args:
        x: uint32 or uint64, each below its ``size``; run after run, when there are several.
        key: (runs,), chooses the permutation of each run; of the type of ``x``.
        size: (runs,) int64, how many places each run's permutation has.
        repeats: (runs,) how many of the places belong to each run; None: all belong to the one there is.
    """
    kind = _word_of(x).kind
    a, b = _halves(size)
    runs = [key, a.astype(kind), b.astype(kind), 1.0 / b]
    size = size.astype(kind)
    if repeats is not None:
        runs = [np.repeat(values, repeats) for values in runs]
        size = np.repeat(size, repeats)
    y = _feistel(x, *runs)
    # Outside goes on walking: a cycle that was inside always comes back inside.
    outside = np.flatnonzero(y >= size)
    while len(outside):
        y[outside] = again = _feistel(y[outside], *(v if len(v) == 1 else v[outside] for v in runs))
        outside = outside[again >= (size if len(size) == 1 else size[outside])]
    return y


@dataclass(frozen=True)
class Pool:
    """The items of a dataset, class after class.

    Attributes:
        index: (N,) int32, or int64 where there are more items than int32 counts; all items of class 0, then of 1 ...
        counts: (C,) int64, items of each class.
    """

    index: Array
    counts: Array

    @cached_property
    def offsets(self) -> Array:
        """(C,) int64, where each class begins in `index`."""
        return np.cumsum(self.counts) - self.counts


def build_pool(labels: Array, num_classes: int) -> Pool:
    """Sorts the items by class, block by block: beside the index of 4 bytes an item it takes a few megabytes.

    Args:
        labels: (N,) integers in ``range(num_classes)``.
        num_classes: How many classes there are.
    """
    small = np.min_scalar_type(max(num_classes - 1, 0))  # numpy sorts 8 and 16 bits in linear time
    counts = np.zeros(num_classes, np.int64)
    for at in range(0, len(labels), _BLOCK):
        counts += np.bincount(labels[at : at + _BLOCK].astype(small), minlength=num_classes)
    index = np.empty(len(labels), np.int32 if len(labels) <= np.iinfo(np.int32).max else np.int64)
    ends = np.cumsum(counts) - counts
    for at in range(0, len(labels), _BLOCK):
        block = labels[at : at + _BLOCK].astype(small)
        order = np.argsort(block, kind="stable")
        here = np.bincount(block, minlength=num_classes)
        within = np.arange(len(block)) - np.repeat(np.cumsum(here) - here, here)
        index[np.repeat(ends, here) + within] = order + at
        ends += here
    return Pool(index, counts)


def epoch_quotas(mix: Array, size: int, seed: int, epoch: int) -> Array:
    """How often each class is drawn in an epoch: (C,) int64 that sum to ``size``.

    Each is its share of ``size``, rounded down or up; which of the two changes with the epoch, so that over many
    epochs every class gets its share exactly, be it less than one draw an epoch.
    """
    wanted = mix * size
    quotas = np.floor(wanted + 1e-6).astype(np.int64)  # what is whole but for rounding stays whole
    left = size - int(quotas.sum())
    if left > 0:
        rest = np.maximum(wanted - quotas, 0.0)
        marks = np.cumsum(rest) * (left / rest.sum())  # a comb of unit steps hits each class by its remainder
        marks[-1] = left
        start = _random(seed, epoch, 1, 0, 1)[0] / 2.0**64
        quotas += np.diff(np.floor(marks + start).astype(np.int64), prepend=0)
    return quotas


class EpochOrder:
    """The draws of one epoch.

    Args:
        pool: The items.
        quotas: (C,) int64, how often each class is drawn; 0 for a class without items.
        seed: At least 0.
        epoch: At least 0.
        chunks: Into how many chunks to cut the epoch; None: as many as keep each at `CHUNK` or below. Each class is in
            each chunk its quota divided by ``chunks`` times, rounded down or up, and all chunks are of one length but
            for rounding.
    """

    def __init__(self, pool: Pool, quotas: Array, seed: int, epoch: int, chunks: int | None = None) -> None:
        self.pool, self.seed, self.epoch = pool, seed, epoch
        self.size = int(quotas.sum())
        self.chunks = max(1, -(-self.size // CHUNK) if chunks is None else chunks)
        word = self._word = _word(max(self.size, len(pool.index)))
        # A run is one round over a class. Of a class with very many rounds it is several, whose places are then taken
        # modulo the class: so few runs serve any class, and each item comes equally often all the same.
        drawn = np.flatnonzero(quotas)
        counts, quotas = pool.counts[drawn], quotas[drawn]
        whole, rest = quotas // counts, quotas % counts
        grouped = np.maximum(-(-whole // _MAX_RUNS), 1)  # rounds in a run
        full, left = whole // grouped, whole % grouped
        visits = np.stack([grouped * counts, left * counts, rest], 1).ravel()
        times = np.stack([full, left > 0, rest > 0], 1).ravel().astype(np.int64)
        spans = np.stack([grouped * counts, left * counts, counts], 1).ravel()

        def of_runs(of_classes: Array) -> Array:
            return np.repeat(np.repeat(of_classes, 3), times)

        self._spans = np.repeat(spans, times)  # places that a run's permutation has
        self._starts = np.concatenate([[0], np.cumsum(np.repeat(visits, times))])  # of the runs among the slots
        self._keys = _random(seed, epoch, 2, 0, len(self._spans)).astype(word.kind)
        self._offsets = of_runs(pool.offsets[drawn])
        self._modulus = of_runs(counts).astype(word.kind) if (grouped > 1).any() else None
        # Which remainder a chunk has is drawn, too: else a class with few draws would sit in neighbouring chunks.
        self._tables: dict[int, tuple[Array, Array]] = {}
        key = _random(seed, epoch, 3, 0, 1)
        places = np.arange(self.chunks, dtype=np.uint64)
        self._remainders = permute(places, key, np.array([self.chunks])).astype(np.int64)
        sizes = self.size // self.chunks + (self._remainders < self.size % self.chunks)
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])
        """(chunks + 1,) int64: chunk ``k`` holds the positions from ``bounds[k]`` to ``bounds[k + 1]``."""

    def chunk_of(self, position: int) -> int:
        """The chunk that holds a position."""
        return int(np.searchsorted(self.bounds, position, side="right")) - 1

    def draw(self, chunk: int, part: slice = slice(None)) -> Array:
        """The items of a chunk, or of ``part`` of its positions, in order; of the type of the pool's index."""
        word, remainder = self._word, int(self._remainders[chunk])
        size = int(self.bounds[chunk + 1] - self.bounds[chunk])
        edges = (self._starts - remainder + self.chunks - 1) // self.chunks
        lengths = np.diff(edges)

        # How far into its run each slot lies. The addition wraps around and is right all the same.
        places = np.arange(size, dtype=word.kind)
        places *= word.kind(self.chunks)
        places += np.repeat((remainder - self._starts[:-1]).astype(word.kind), lengths)
        places = permute(places, self._keys, self._spans, lengths)
        if self._modulus is not None:
            places %= np.repeat(self._modulus, lengths)
        where = np.repeat(self._offsets, lengths)
        where += places.astype(np.int64)

        shuffled = self._shuffled(chunk, size, part)
        if 2 * len(shuffled) < size:
            return self.pool.index.take(where.take(shuffled))
        # Class after class, so that small classes stay in the cache, although some of it may be for other ranks.
        return self.pool.index.take(where).take(shuffled)

    def _shuffled(self, chunk: int, size: int, part: slice) -> Array:
        """A random order of ``range(size)``, or ``part`` of it."""
        if size <= _SORTED:
            return np.argsort(_random(self.seed, self.epoch, 4, chunk, size), kind="stable")[part]
        # Two orders of the epoch, one after the other, each turned by an amount of the chunk's own: size ** 2 different
        # ones at the price of two look-ups. All chunks are of one or two sizes.
        if size not in self._tables:
            inner, outer = (np.argsort(_random(self.seed, self.epoch, p, size, size), kind="stable") for p in (5, 6))
            self._tables[size] = np.concatenate([inner, inner]), np.concatenate([outer, outer])
        first, second = (int(turn) for turn in _random(self.seed, self.epoch, 4, chunk, 2) % size)
        inner, outer = self._tables[size]
        return outer[second : second + size].take(inner[first : first + size][part])
