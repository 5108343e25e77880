"""A fingerprint of a labelled and an unlabelled set, by which ranks see whether they have the same."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from lightning_tips.core import same_random_numbers

__all__ = ["fingerprint_of_sets"]


def fingerprint_of_sets(labelled: Any, labels: NDArray[Any], unlabelled: Any) -> str:
    """The same string where two ranks have the same samples, as far as one can see cheaply.

    Looked at are the labels, the two lengths, the places that a ``Subset`` takes, and the first unlabelled sample: no
    other one, as that could make a dataset open files which its workers would share.

    Args:
        labelled: A dataset.
        labels: Of its samples, in their order.
        unlabelled: A dataset of which the first sample has been read before.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(f"{labels.shape} {len(unlabelled)}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(labels).tobytes())
    for part in (labelled, unlabelled):
        while isinstance(part, Subset):
            digest.update(np.asarray(part.indices, np.int64).tobytes())
            part = part.dataset
    first = _fingerprint_of_sample(unlabelled)
    # A dataset with a random generator of its own has another sample each time, and that tells nothing.
    if first == _fingerprint_of_sample(unlabelled):
        digest.update(first)
    return digest.hexdigest()


def _fingerprint_of_sample(dataset: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with same_random_numbers():
        # Random transforms alike on all ranks.
        torch.default_generator.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        _add(digest, dataset[0])
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    """Adds what is data of a sample; not texts, as a path may be another one on each machine."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            _add(digest, part)
    elif isinstance(value, Tensor) and value.layout == torch.strided:
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        digest.update(value.tobytes())
    elif isinstance(value, bool | int | float):
        digest.update(repr(value).encode())
    elif callable(getattr(value, "tobytes", None)):  # an image of PIL
        digest.update(value.tobytes())
