"""Pruning on two ranks: equal after every step, in every setting."""

from pathlib import Path

import worker
from processes import on_two_ranks


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
