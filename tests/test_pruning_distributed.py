"""Pruning on two ranks: equal after every step, in every setting."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_tips import LayerPruningCallback
from lightning_tips.core import parameter_hash

import worker
from harness import PlainData, ResidualModule, fit
from processes import on_two_ranks
from prunable import pruning


class Shards(IterableDataset):
    """Rank 1 has fewer samples than rank 0."""

    def __init__(self, data: PlainData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        number = 48 - 32 * torch.distributed.get_rank()
        return iter(zip(self.data.images[-number:], self.data.labels[-number:], strict=True))


class UnevenData(PlainData):
    def val_dataloader(self) -> Any:
        return DataLoader(Shards(self), batch_size=8)


class Alone(ResidualModule):
    """Waits for no other rank in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=False)


def uneven(folder: Path) -> list[tuple[str, list[str]]]:
    warnings.filterwarnings(
        "ignore",
        "It is recommended to use|Your .IterableDataset. has|.*have many workers|.broadcast_buffers. is deprecated",
    )
    metric: dict[str, Any] = {"criterion": "metric", "monitor": "val_loss", "mode": "min", "samples": 256}
    found = []
    for tip in (
        LayerPruningCallback(target={"macs": 0.7}, schedule="one_shot", start_epoch=1, **metric),
        pruning(criterion="mean_activation", samples=256),
    ):
        options: dict[str, Any] = {"devices": 2, "strategy": DDPStrategy(broadcast_buffers=False), "max_epochs": 3}
        trainer = fit(tip, folder=folder, data=UnevenData(), module=Alone(), **options)
        found.append((parameter_hash(trainer.lightning_module), [str(event) for event in tip.events]))
    return found


def test_ranks_may_have_other_numbers_of_validation_batches(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, uneven)
    assert first == second
    assert [len(events) for _, events in first] == [1, 2]


def test_two_ranks_stay_equal_in_every_setting(tmp_path: Path) -> None:
    name, blocks = "FilterPruningCallback", "LayerPruningCallback"
    full = {"distill": 0.5, "max_drop": 1.0, "criterion": "taylor"}
    falls = {"max_drop": 0.1, "monitor": "val_loss", "mode": "min", "reference": -9.0, "on_drop": "smaller"}
    often = {"every_n_epochs": 1}
    static = {"class": "DDPStrategy", "static_graph": True}
    unused = {"class": "DDPStrategy", "find_unused_parameters": True}
    runs = [
        {"name": "static", "tips": [[name, full]], "arguments": {"strategy": static, "keep": "epoch"}},
        {
            "name": "resumed",
            "tips": [[name, full]],
            "arguments": {"strategy": static, "keep": "epoch"},
            "resume": "static/checkpoints/epoch-epoch=1.ckpt",
        },
        {
            "name": "unused",
            "tips": [[name, {"criterion": "mean_activation"}]],
            "arguments": {"strategy": unused, "module": "BranchingModule"},
        },
        {"name": "by hand", "tips": [[name, {}]], "arguments": {"strategy": static, "module": "ByHandModule"}},
        {"name": "first", "tips": [[name, {"start_epoch": 0}]], "arguments": {"max_epochs": 2}},
        {"name": "back", "tips": [[name, falls]], "arguments": {"max_epochs": 4}},
        {"name": "fails", "tips": [[name, {"target": {"macs": 0.0001}}]], "raises": True},
        {
            "name": "communicates",
            "tips": [[name, {}]],
            "arguments": {"module": "CommunicatingModule"},
            "raises": True,
        },
        {"name": "blocks", "tips": [[blocks, often | {"distill": 0.5}]], "arguments": {"strategy": static}},
        {
            "name": "blocks by metric",
            "tips": [[blocks, often | {"criterion": "metric"}]],
            "arguments": {"keep": "epoch"},
        },
        {
            "name": "blocks resumed",
            "tips": [[blocks, often | {"criterion": "metric"}]],
            "arguments": {"keep": "epoch"},
            "resume": "blocks by metric/checkpoints/epoch-epoch=1.ckpt",
        },
        {
            "name": "block back",
            "tips": [[blocks, falls | often | {"on_drop": "stop"}]],
            "arguments": {"strategy": unused},
        },
    ]
    for run in runs:
        run["arguments"] = {"devices": 2, "max_epochs": 3, "strategy": "ddp"} | run.get("arguments", {})  # type: ignore[operator]
    first, second = on_two_ranks(tmp_path, worker.run_all, runs)
    assert first == second
    for each in ("static", "unused", "by hand", "first", "blocks", "blocks by metric"):
        assert len(first[each]["events"][0]) == 2, each
    for resumed, whole in (("resumed", "static"), ("blocks resumed", "blocks by metric")):
        assert first[resumed]["hash"] == first[whole]["hash"]
        assert first[resumed]["momenta"] == first[whole]["momenta"]
    back = [event.split(": ")[1].split(" (")[0] for event in first["back"]["events"][0]][1::2]
    assert back == ["back to the last good network, smaller steps"] * 2 + [
        "back to the last good network, no more steps"  # at the end
    ]
    assert "back to the last good network" in first["block back"]["events"][0][-1]
    assert "cannot be reached" in first["fails"]["error"]
    assert "communicates with the other ranks (all_reduce)" in first["communicates"]["error"]
