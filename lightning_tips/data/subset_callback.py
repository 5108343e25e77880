"""`SubsetCallback` and its mixin: any run on a part of its training data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_tips.core import TipMixin
from lightning_tips.data.part import PartCallback
from lightning_tips.data.subset import nested_subset, subset_size

__all__ = ["SubsetCallback", "SubsetMixin"]


class SubsetCallback(PartCallback):
    """Trains on a part of the training data, in any run: what would fewer samples have brought?

    Each training DataLoader, of whatever DataModule, module or argument of ``fit`` it is, gets a ``Subset`` in place of
    its dataset. The parts lie in each other: of one seed, that of 1,000 samples contains that of 500. They hold every
    class in proportion. Validation and test data are left alone. The order of an epoch depends on the seed and the
    epoch alone, so that all ranks agree and a resumed run goes on with the batches that are still due.

    It comes before everything else that changes the training loaders: a balancing sampler balances within the part.

    Args:
        size: How many samples: an int, or a float in (0, 1] as a share of each loader's.
        seed: Of the choice, and of the order of training.
        stratify: Whether each class keeps its share. Where the targets are floats, as in regression, ten bins of equal
            count take the place of classes. ``False`` takes any samples, and does not look at targets.
        target_key: Where samples are dicts: the key of the target, if it is none of the usual ones.

    Raises:
        MisconfigurationException: Before the first step, for data that cannot be chosen from.
    """

    def __init__(self, size: int | float, seed: int = 0, stratify: bool = True, target_key: str | None = None) -> None:
        super().__init__(seed, stratify, target_key)
        self.size = size
        nested_subset(1, 1, seed)  # what can be known to be wrong without data
        subset_size(size, max(1, int(size)) if isinstance(size, int) else 1)

    def choose(self, groups: Any) -> NDArray[np.int64]:
        """A subset that contains every smaller one of the same seed."""
        return nested_subset(groups, self.size, self.seed)

    def size_of_part(self, total: int) -> int:
        """``size``, as a number."""
        return subset_size(self.size, total)

    def plan(self) -> str:
        """The size alone."""
        wanted = f"{self.size:,}" if isinstance(self.size, int) else f"{100 * self.size:g} %"
        return f"{wanted} of the training samples"


class SubsetMixin(TipMixin):
    """Trains on a part of the data of a DataModule: brings a :class:`SubsetCallback` to its runs.

    Give it before ``LightningDataModule``. For somebody else's DataModule, put ``SubsetCallback`` among the Trainer's
    callbacks instead; it does the same.

    Args:
        *args: For the DataModule.
        subset_size: The ``size`` of :class:`SubsetCallback`; None: all of the data.
        subset_seed: Its ``seed``.
        subset_stratify: Its ``stratify``.
        **kwargs: For the DataModule.

    Example:
        >>> from lightning.pytorch import LightningDataModule
        >>> class MyData(SubsetMixin, LightningDataModule):
        ...     '''With a train_dataloader like any other.'''
        >>> data = MyData(subset_size=0.25)
    """

    def __init__(
        self,
        *args: Any,
        subset_size: int | float | None = None,
        subset_seed: int = 0,
        subset_stratify: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if subset_size is not None:
            self.bring(SubsetCallback(subset_size, subset_seed, subset_stratify))
