"""Samples that occur twice, as they are or a little changed: within a data set, or in two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_tips.data.fingerprints import Fingerprints, take_fingerprints

__all__ = ["Duplicate", "find_duplicates", "groups_of_copies", "match"]

THRESHOLD = 0.998
"""Above what two different images of Fashion-MNIST come to (benchmarks/data/quality.py)."""
LEAST = 0.97
"""Less similar than this is no duplicate, even if it stands out."""
RATIO = 0.2
NEIGHBOURS = 5
"""What stands out does so against the neighbour of this number, the duplicate not counted."""
QUERIES, COLUMNS = 1024, 8192


@dataclass(frozen=True)
class Duplicate:
    """Two samples that are the same, or nearly so.

    Attributes:
        first: Place of the one, in the first data set.
        second: Place of the other, in the second data set; in the first, if there is one only.
        similarity: From -1 to 1, which is also said of identical samples.
        exact: Whether all bytes are the same.
        mirrored: Whether one is the mirror image of the other.
    """

    first: int
    second: int
    similarity: float
    exact: bool
    mirrored: bool = False


def find_duplicates(
    first: Any,
    second: Any = None,
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    mirrored: bool = False,
    device: torch.device | str | None = None,
) -> list[Duplicate]:
    """Pairs of samples that are the same, or nearly so.

    Identical ones are found by a hash of their bytes. Near ones of images by the correlation of small, smoothed grey
    thumbnails, as they are and moved to the middle: brightness, contrast, noise, JPEG, another size and a move by a
    pixel or two leave it near 1. Colour is not looked at, so the same cut in red and in blue is a near duplicate.

    A pair is near if its similarity reaches ``threshold``; or if it reaches 0.97 and stands out: its distance (1 minus
    similarity) is at most ``ratio`` times the distance to the fifth most similar of all other images. Without that no
    threshold would do: in Fashion-MNIST half of all images have a stranger with a similarity of 0.95 or more, and a
    noisy copy of an image may have less.

    Of several identical samples in ``first`` the first one stands for all, and of each sample the six most similar ones
    are looked at. Time grows with the product of the sizes, memory with their sum (about 4 kB an image).

    Args:
        first: (N, C, H, W) images, uint8 or float, or a sequence of (C, H, W) ones of different sizes; or (N, D)
            features of any data, such as the embeddings of a network, whose similarity is the cosine.
        second: (M, ...) likewise; None: look within ``first``.
        threshold: Similarity from which a pair counts, in (0, 1]; None: 0.998 for images. Features need one, as it
            depends on the network; 1.0 with ``ratio=0`` finds identical ones only.
        ratio: In [0, 1); 0 turns it off. None: 0.2 for images, 0 for features.
        mirrored: Whether to look for mirror images too. Costs as much again.
        device: Where to compare; None: where the samples are.

    Returns:
        The most similar first, identical ones before all others.

    Raises:
        ValueError: If an argument is out of its domain, or of another shape.

    Example:
        >>> images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> found = find_duplicates(images, images[[7, 3]] * 0.8 + 0.1)
        >>> sorted((pair.first, pair.second) for pair in found)
        [(3, 1), (7, 0)]
    """
    one = take_fingerprints(first)
    other = None if second is None else take_fingerprints(second)
    if one.features is not None:
        if threshold is None:
            raise ValueError(
                "threshold=...: from which cosine on are samples nearly the same? That depends on the network whose"
                " features these are: look at the most similar pairs. threshold=1.0 finds identical ones only."
            )
        ratio = 0.0 if ratio is None else ratio
    return match(one, other, threshold, ratio, mirrored, device)


def match(
    first: Fingerprints,
    second: Fingerprints | None = None,
    threshold: float | None = None,
    ratio: float | None = None,
    mirrored: bool = False,
    device: torch.device | str | None = None,
) -> list[Duplicate]:
    """:func:`find_duplicates` for fingerprints that are there already."""
    threshold = THRESHOLD if threshold is None else threshold
    ratio = RATIO if ratio is None else ratio
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is a similarity: it must lie in (0, 1].")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1); 0 turns it off.")
    if second is not None and (first.features is None) != (second.features is None):
        raise ValueError("One of the two is images and the other one features: they cannot be compared.")
    whole, alone = _identical(first, second)
    base, queries = first.views(), (first if second is None else second).views()
    if not base or not queries or (threshold == 1 and not ratio):
        return _sorted(whole)
    if base[0].shape[1] != queries[0].shape[1]:
        raise ValueError(f"The features have {base[0].shape[1]} and {queries[0].shape[1]} numbers a sample.")
    asked = alone if second is None else np.setdiff1d(np.arange(len(second)), [pair.second for pair in whole])
    near = _near(base, queries, alone, asked, second is None, threshold, ratio, False, device)
    if mirrored:
        flipped = (first if second is None else second).views(mirrored=True)
        if not flipped:
            raise ValueError("mirrored=True is for images; features have no mirror image.")
        there = {(pair.first, pair.second) for pair in near}
        turned = _near(base, flipped, alone, asked, second is None, threshold, ratio, True, device)
        near += [pair for pair in turned if (pair.first, pair.second) not in there]
    return _sorted(whole + near)


def groups_of_copies(pairs: Sequence[Duplicate], total: int) -> list[list[int]]:
    """Samples that belong together, because a chain of pairs leads from one to the other.

    Args:
        pairs: Within one data set.
        total: How many samples it has.

    Returns:
        Places of each group of two or more.
    """
    ones, others = [pair.first for pair in pairs], [pair.second for pair in pairs]
    links = coo_array((np.ones(len(pairs)), (ones, others)), shape=(total, total))
    _, group = connected_components(links, directed=False)
    members: dict[int, list[int]] = {}
    for place in sorted({*ones, *others}):
        members.setdefault(int(group[place]), []).append(place)
    return list(members.values())


def _sorted(pairs: list[Duplicate]) -> list[Duplicate]:
    return sorted(pairs, key=lambda pair: (not pair.exact, -pair.similarity, pair.second, pair.first))


def _identical(first: Fingerprints, second: Fingerprints | None) -> tuple[list[Duplicate], NDArray[np.int64]]:
    """Pairs with the same hash, and the places in ``first`` without repeats."""
    places: dict[bytes, int] = {}
    pairs = []
    for place, found in enumerate(first.hashes):
        before = places.setdefault(found, place)
        if before != place and second is None:
            pairs.append(Duplicate(before, place, 1.0, True))
    if second is not None:
        pairs = [
            Duplicate(places[found], place, 1.0, True) for place, found in enumerate(second.hashes) if found in places
        ]
    return pairs, np.fromiter(places.values(), np.int64, len(places))


def _near(
    base: list[Tensor],
    queries: list[Tensor],
    in_base: NDArray[np.int64],
    asked: NDArray[np.int64],
    within: bool,
    threshold: float,
    ratio: float,
    mirrored: bool,
    device: torch.device | str | None,
) -> list[Duplicate]:
    if not len(in_base) or not len(asked):
        return []
    rows, columns = torch.from_numpy(asked), torch.from_numpy(in_base)
    values, found = _neighbours([view[columns] for view in base], [view[rows] for view in queries], within, device)
    distance = 1 - values
    standard = torch.full((len(rows),), -1.0, dtype=distance.dtype)
    if values.shape[1] > NEIGHBOURS:
        standard = ratio * distance[:, NEIGHBOURS]
    of_pair = standard[:, None].expand_as(distance)
    if within:  # it must stand out for both
        of_pair = torch.minimum(of_pair, standard[found.clamp_min(0)])
    chosen = (values >= threshold) | ((values >= LEAST) & (distance <= of_pair) & (ratio > 0))
    chosen &= found >= 0
    pairs: dict[tuple[int, int], Duplicate] = {}
    for row, column in torch.nonzero(chosen).tolist():
        one, other = int(columns[found[row, column]]), int(rows[row])
        if within:
            one, other = min(one, other), max(one, other)
        pairs[one, other] = Duplicate(one, other, min(float(values[row, column]), 1.0), False, mirrored)
    return list(pairs.values())


def _neighbours(
    base: list[Tensor], queries: list[Tensor], within: bool, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """The most similar ones in ``base`` to each query: similarities (M, k) float64 and places (M, k), -1 for none."""
    place = torch.device(device) if device is not None else base[0].device
    kept = min(NEIGHBOURS + 1, len(base[0]))
    values, found = [], []
    for start in range(0, len(queries[0]), QUERIES):
        asked = [view[start : start + QUERIES].to(place) for view in queries]
        best = torch.full((len(asked[0]), kept), -2.0, device=place)
        where = torch.full((len(asked[0]), kept), -1, device=place)
        for begin in range(0, len(base[0]), COLUMNS):
            here = [view[begin : begin + COLUMNS].to(place) for view in base]
            likeness = asked[0] @ here[0].T
            for one, other in zip(asked[1:], here[1:], strict=True):
                likeness = torch.maximum(likeness, one @ other.T)
            if within:  # a sample is no duplicate of itself
                itself = torch.arange(start, start + len(likeness), device=place) - begin
                inside = torch.nonzero((itself >= 0) & (itself < likeness.shape[1])).flatten()
                likeness[inside, itself[inside]] = -2.0
            top, at = likeness.topk(min(kept, likeness.shape[1]), 1)
            best, order = torch.cat([best, top], 1).topk(kept, 1)
            where = torch.cat([where, at + begin], 1).gather(1, order)
        where = where.masked_fill(best < -1.5, -1)
        # Once more in double precision: neither the device nor the size of the blocks decides what is found.
        likeness = torch.stack(
            [
                torch.einsum("md,mkd->mk", a.cpu().double(), b[where.clamp_min(0).to(b.device)].cpu().double())
                for a, b in zip(asked, base, strict=True)
            ]
        ).amax(0)
        values.append(likeness.masked_fill(where.cpu() < 0, -2.0))
        found.append(where.cpu())
    return torch.cat(values), torch.cat(found)
