"""Training data of their own for each member: another order, a bootstrap, another part of the large classes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_tips.core import EpochSampler, class_counts, find_labels, resumable, sampler_of
from lightning_tips.core.lightning_private import with_sampler

__all__ = ["MemberData", "MemberSampler", "bootstrap", "majority_subset", "member_loaders"]

MemberData = Literal["shared", "own_order", "bootstrap", "majority_subsets"]

Indices = NDArray[np.int64]


def bootstrap(samples: int, seed: int, member: int) -> Indices:
    """Draws as many samples as there are, with replacement (Breiman 1996, "Bagging predictors").

    Returns:
        (samples,) indices in ascending order, the same for the same seed and member.
    """
    return np.sort(np.random.default_rng([seed, member, 1]).integers(samples, size=samples))


def majority_subset(labels: Any, seed: int, member: int, ratio: float = 1.0) -> Indices:
    """All samples of the rarest class, and of each other class another part for each member.

    A class is dealt out like a pack of cards: members take turns, and it is shuffled anew when it is used up, so that
    together they see as much of it as can be (Liu et al. 2009, "Exploratory undersampling for class-imbalance
    learning", EasyEnsemble).

    Args:
        labels: (N,) class ids.
        seed: Of the shuffling.
        member: Number of the member.
        ratio: How many samples of a class there are at most for each one of the rarest class, at least 1.

    Returns:
        Indices in ascending order.

    Raises:
        ValueError: If the ratio is below 1, or samples have several labels.
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 1: the rarest class stays whole.")
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError("Parts of the large classes need one class a sample, not several labels.")
    counts = class_counts(array)
    size = int(counts[counts > 0].min() * ratio)
    chosen = []
    for label in np.flatnonzero(counts):
        here = np.flatnonzero(array == label)
        if len(here) <= size:
            chosen.append(here)
            continue
        whole, place = divmod(member * size, len(here))
        deals = [np.random.default_rng([seed, int(label), deal, 2]).permutation(here) for deal in (whole, whole + 1)]
        first = deals[0][place : place + size]
        # Where one deal ends and the next begins, no card is taken twice.
        rest = deals[1][~np.isin(deals[1], first)][: size - len(first)]
        chosen.append(np.concatenate([first, rest]))
    return np.sort(np.concatenate(chosen))


def member_loaders(
    loader: DataLoader[Any],
    kind: MemberData,
    members: int,
    seed: int,
    ratio: float = 1.0,
    target_key: str | None = None,
) -> dict[str, DataLoader[Any]]:
    """A loader for each member, like the one that is given but for its sampler.

    Args:
        loader: With a dataset of a known length.
        kind: ``"own_order"``, ``"bootstrap"`` or ``"majority_subsets"``.
        members: How many.
        seed: Of them all.
        ratio: See :func:`majority_subset`.
        target_key: Where samples are dicts: the key of the label.

    Returns:
        By name, ``member_0`` and so on. They can go on in mid-epoch after a resume.

    Raises:
        ValueError: If the loader's samples cannot be chosen, or labels are needed and not found.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("The samples of an IterableDataset cannot be chosen for each member.")
    sampler, batched = sampler_of(loader), type(loader.batch_sampler) is BatchSampler
    if not batched or not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        chosen = type(sampler if batched else loader.batch_sampler).__name__
        raise ValueError(
            f"The training loader chooses its samples by {chosen}, which would be lost if each member had an order of"
            " its own. Leave the sampler out."
        )
    samples = len(loader.dataset)  # type: ignore[arg-type]
    labels = find_labels(loader.dataset, target_key) if kind == "majority_subsets" else None
    loaders = {}
    for member in range(members):
        if kind == "majority_subsets":
            indices = majority_subset(labels, seed, member, ratio)
        else:
            indices = bootstrap(samples, seed, member) if kind == "bootstrap" else np.arange(samples)
        made = with_sampler(loader, MemberSampler(indices, seed, member))
        if not len(made):
            raise ValueError(
                f"A member has {len(indices)} samples, less than a batch, and drop_last=True leaves nothing of them."
                " Lower batch_size, or leave drop_last out."
            )
        loaders[f"member_{member}"] = resumable(made)
    return loaders


class MemberSampler(EpochSampler):
    """An order of a member's samples that depends on (seed, member, epoch) alone, on any number of ranks.

    Args:
        samples: Which samples of the dataset the member sees, perhaps some of them several times.
        seed: The same for all members and ranks.
        member: Number of the member.
    """

    def __init__(self, samples: Indices, seed: int, member: int) -> None:
        super().__init__(len(samples), seed)
        self.samples, self.member = samples, member

    def order(self) -> Indices:
        """What all ranks draw together in the epoch that was set: (epoch_size,)."""
        return np.random.default_rng([self.seed, self.member, self.epoch, 3]).permutation(self.samples)
