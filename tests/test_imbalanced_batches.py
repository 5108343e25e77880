"""Batches with a minimum of each class, and what Lightning makes of both samplers on two ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips.imbalance import ImbalancedBatchSampler, ImbalancedSampler

from harness import build
from processes import on_two_ranks
from sampled import LABELS, NAMES, visits

# ---- batches


@pytest.mark.parametrize("minimum", [1, 3, {3: 5, 2: 2}, [0, 0, 0, 8]], ids=str)
@pytest.mark.parametrize("strategy", NAMES, ids=str)
def test_every_batch_has_the_minimum(strategy, minimum) -> None:
    sampler = ImbalancedBatchSampler(LABELS, 16, minimum, strategy, num_samples=1000)
    wanted = {int: lambda m: [m] * 4, dict: lambda m: [m.get(c, 0) for c in range(4)], list: list}[type(minimum)](
        minimum
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = np.array(list(sampler)).reshape(-1, 16)
        assert len(drawn) == 63
        of_batches = np.array([np.bincount(LABELS[batch], minlength=4) for batch in drawn])
        assert (of_batches >= wanted).all()
        assert (of_batches.max(0) - of_batches.min(0) <= 1).all()
        for label in range(4):
            seen = visits(sampler, drawn.ravel())[label == LABELS]
            assert seen.max() - seen.min() <= 1


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_batches(world) -> None:
    alone = ImbalancedBatchSampler(LABELS, 8, num_samples=8 * 16)
    batches = alone.indices(2).reshape(-1, 8)
    ranks = [ImbalancedBatchSampler(LABELS, 8, num_samples=8 * 16, num_replicas=world, rank=r) for r in range(world)]
    assert (np.stack([r.indices(2).reshape(-1, 8) for r in ranks], 1).reshape(-1, 8) == batches).all()
    uneven = [
        ImbalancedBatchSampler(LABELS, 8, num_samples=8 * 15, num_replicas=world, rank=r, drop_last=drop)
        for drop in (False, True)
        for r in range(world)
    ]
    assert len({len(list(rank)) for rank in uneven}) == 2
    assert [len(list(rank)) for rank in uneven] == [len(rank) for rank in uneven]


def test_batches_go_on_where_they_were() -> None:
    sampler = ImbalancedBatchSampler(LABELS, 8, num_samples=80)
    whole = sampler.indices(1).tolist()
    sampler.set_position(1, 24)
    assert list(sampler) == whole[24:]
    assert sampler.indices(1, 3, 21).tolist() == whole[3:21]
    with pytest.raises(ValueError, match="position=3 is in the middle of a batch"):
        sampler.set_position(1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class_minimum": 5}, "need 20 samples, more than batch_size=16"),
        ({"per_class_minimum": -1}, "0 or more"),
        ({"per_class_minimum": {9: 1}}, r"names classes \[9\]"),
        ({"per_class_minimum": [1, 1]}, "one for each of 4 classes"),
        ({"per_class_minimum": [1, 1, 0, 1.5]}, "integer"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_wrong_minima_say_so(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImbalancedBatchSampler(LABELS, **{"batch_size": 16} | arguments)


def test_batches_leave_out_what_the_mix_leaves_out_and_undersample_without_repeats() -> None:
    sampler = ImbalancedBatchSampler(LABELS, 8, 2, {0: 0, 1: 1, 2: 1, 3: 1}, num_samples=80)
    assert 0 not in LABELS[sampler.indices(0)]
    under = ImbalancedBatchSampler(LABELS, 16, 1, "undersample")
    assert len(under) == 16
    assert len(set(under)) == 16


# ---- Lightning on two ranks


SMALL = TensorDataset(torch.arange(100), torch.tensor([0] * 90 + [1] * 10))


class Watcher(LightningModule):
    """Remembers which samples it saw; of its own hook Lightning watches how loaders and batch samplers are made."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.layer, self.seen, self.loader = torch.nn.Linear(1, 1), [], loader

    def train_dataloader(self) -> Any:
        return self.loader()

    def training_step(self, batch: Any) -> Tensor:
        self.seen.append(batch[0].tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def what_a_rank_sees(folder: Path) -> dict[str, Any]:
    def train(loader: Any, hook: bool) -> Any:
        module = Watcher(loader)
        trainer, _ = build(folder=folder, module=module, devices=2, strategy="ddp", max_epochs=2)
        trainer.fit(module, train_dataloaders=None if hook else loader())
        return module.seen

    labels = SMALL.tensors[1]
    result = {}
    for hook in (True, False):
        result[f"batches {hook}"] = train(
            lambda: ImbalancedBatchSampler(labels, 8, {0: 2, 1: 3}, num_samples=64).loader(SMALL), hook
        )
    result["samples"] = train(lambda: DataLoader(SMALL, 8, sampler=ImbalancedSampler(SMALL, num_samples=64)), True)
    return result


def test_lightning_on_two_ranks_leaves_both_samplers_alone(tmp_path: Path) -> None:
    ranks = on_two_ranks(tmp_path, what_a_rank_sees)
    labels = np.repeat([0, 1], [90, 10])
    batches = ImbalancedBatchSampler(labels, 8, {0: 2, 1: 3}, num_samples=64)
    samples = ImbalancedSampler(labels, num_samples=64)
    for hook in (True, False):
        together = np.stack([rank[f"batches {hook}"] for rank in ranks], 1)
        assert together.reshape(2, 64).tolist() == [batches.indices(epoch).tolist() for epoch in (0, 1)]
    together = np.stack([np.reshape(rank["samples"], -1) for rank in ranks], 1)
    assert together.reshape(2, 64).tolist() == [samples.indices(epoch).tolist() for epoch in (0, 1)]
