"""`FilterPruningCallback`: what is pruned and when, by how much, and beside whom."""

import json
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    LearningRateMonitor,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import FilterPruningCallback, LayerPruningCallback
from lightning_tips.core import keep_indices
from lightning_tips.pruning import count_cost, plan_filters
from lightning_tips.pruning.fit.latency import plan_for_latency
from lightning_tips.pruning.fit.schedule import Schedule, steps_until
from lightning_tips.pruning.networks.copies import plain_copy, real_names

from harness import STEPS_A_EPOCH, PlainData, PlainModule, ResidualModule, assert_same, bits, build, every_step, fit
from prunable import InnerModule, ManualModule, TogglingModule, pruning, widths


@pytest.mark.parametrize("module", [PlainModule, InnerModule, ManualModule])
def test_any_module_is_pruned_where_its_network_is(module: type, tmp_path: Path) -> None:
    tip = pruning()
    trainer = fit(tip, module(), folder=tmp_path)
    assert [event.epoch for event in tip.events] == [1, 2]
    assert tip.events[-1].details["macs"] <= 0.6
    assert tip._network == ("" if module is PlainModule else "net")
    assert widths(trainer.lightning_module) < [8, 12]
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, Tensor) and v.ndim)


@pytest.mark.parametrize(
    ("tip", "module"),
    [
        (FilterPruningCallback(target={"macs": 0.6}, filters_per_step=2, start_epoch=9), PlainModule),
        (LayerPruningCallback(target={"macs": 0.6}, blocks_per_step=1, start_epoch=9), ResidualModule),
    ],
)
def test_a_run_that_ends_before_the_first_step_is_told_of(tip: Any, module: type, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Nothing will be pruned: the first step is due in epoch 9"):
        fit(tip, module(), folder=tmp_path, max_epochs=1)


@pytest.mark.parametrize(("accumulated", "steps"), [(1, STEPS_A_EPOCH), (3, 2)])  # the last step of an epoch has less
def test_so_is_one_that_ends_by_its_number_of_steps(accumulated: int, steps: int, tmp_path: Path) -> None:
    more = {"max_epochs": -1, "accumulate_grad_batches": accumulated}
    with pytest.warns(UserWarning, match="last pruning step is due in epoch 1, and the run ends after 1"):
        fit(pruning(schedule="one_shot"), folder=tmp_path, max_steps=steps, **more)
    tip = pruning(schedule="one_shot")
    fit(tip, every_step(tmp_path / "kept"), folder=tmp_path, max_steps=steps + 1, **more)
    assert tip.finished
    again = pruning(schedule="one_shot")  # from the middle of an epoch
    kept = every_step(tmp_path / "again")
    fit(again, kept, folder=tmp_path, max_steps=steps + 1, ckpt_path=tmp_path / "kept/step-step=1.ckpt", **more)
    assert again.finished


def test_without_a_sanity_check_it_prunes_before_the_first_step(tmp_path: Path) -> None:
    tip = pruning(start_epoch=0, schedule="one_shot")
    trainer = fit(tip, InnerModule(), folder=tmp_path, num_sanity_val_steps=0, max_epochs=1)
    assert [(event.step, event.epoch) for event in tip.events] == [(0, 0)]
    assert trainer.global_step == 4


@pytest.mark.parametrize(("module", "network"), [(PlainModule, None), (TogglingModule, "net")])
def test_looking_for_the_inputs_leaves_no_trace(module: type, network: str | None, tmp_path: Path) -> None:
    def run(*tips: FilterPruningCallback) -> dict[str, Any]:
        torch.manual_seed(0)
        return bits(fit(*tips, module(), folder=tmp_path, num_sanity_val_steps=0, max_epochs=2)) | {"events": []}

    idle = run()
    with pytest.warns(UserWarning, match="target is not reached"):
        watched = run(pruning(start_epoch=3, module=network))
    assert_same(watched, idle)


def test_a_network_that_runs_after_another_has_learned_needs_its_inputs(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="before its first backward pass"):
        fit(pruning(module="other"), TogglingModule(), folder=tmp_path)
    tip = pruning(module="other", example_inputs=[2, 1, 8, 8])
    trainer = fit(tip, TogglingModule(), folder=tmp_path, max_epochs=3)
    assert len(tip.events) == 2
    assert trainer.lightning_module.other[0].out_channels < 4


def test_momentum_goes_on_and_statistics_fit_the_pruned_network(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(FilterPruningCallback):
        def _step(self, trainer: Any, module: Any, batches: Any) -> None:
            before = {id(p): dict(s) for o in trainer.optimizers for p, s in o.state.items()}
            super()._step(trainer, module, batches)
            seen["kept"] = [
                float(state["exp_avg"].abs().sum()) > 0 and torch.isin(state["exp_avg"], before[id(p)]["exp_avg"]).all()
                for o in trainer.optimizers
                for p, state in o.state.items()
            ]
            module.eval()
            with torch.no_grad():
                inputs = torch.cat([batch[0] for batch in batches])
                first = module.features[0](inputs)
                norm = module.features[1]
                seen["mean"] = (first.mean((0, 2, 3)) - norm.running_mean).abs().max()
            module.train()

    tip = Look(target={"macs": 0.6}, schedule="one_shot", start_epoch=2, samples=64)
    fit(tip, folder=tmp_path)
    assert len(seen["kept"]) == 8
    assert all(seen["kept"])
    assert seen["mean"] < 1e-5


def test_a_number_of_filters_at_a_time_until_the_target(tmp_path: Path) -> None:
    tip = pruning(filters_per_step=3, target={"filters": 0.5})
    trainer = fit(tip, folder=tmp_path, max_epochs=8)
    assert [event.what for event in tip.events] == ["3 filters taken out"] * 3 + ["1 filters taken out"]
    assert sum(widths(trainer.lightning_module)) == 10
    assert tip.finished
    share = pruning(filters_per_step=0.25, target={"params": 0.6})
    fit(share, folder=tmp_path)
    assert share.events[0].what == "5 filters taken out"
    assert share.events[-1].details["params"] <= 0.6


def test_cubic_steps_grow_smaller_and_one_shot_is_one() -> None:
    goals = [Schedule("cubic", 4).goal(0.2, t / 4) for t in range(5)]
    steps = [a - b for a, b in pairwise(goals)]
    assert steps == sorted(steps, reverse=True)
    assert math.isclose(goals[-1], 0.2)
    assert Schedule("one_shot", steps=5, start_epoch=3).last_epoch == 3
    assert Schedule("linear", steps=5, start_epoch=3, every_n_epochs=2).last_epoch == 11
    assert steps_until(10, 3, 2) == 4
    with pytest.raises(ValueError, match="before start_epoch"):
        steps_until(2, 3, 1)


def test_latency_is_found_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from lightning_tips.pruning.fit import latency
    from lightning_tips.pruning.networks.measure import count_cost

    network = InnerModule(width=32).net
    inputs = (torch.rand(2, 1, 8, 8),)

    def timed(models: Any, inputs: Any) -> list[Any]:  # a floor of fixed costs, the rest by operations
        return [SimpleNamespace(median=1.0 + 9.0 * count_cost(m, inputs).macs / full) for m in models]

    full = count_cost(network, inputs).macs
    monkeypatch.setattr(latency, "measure_latencies", timed)
    plan = plan_for_latency(
        network, inputs, {"latency": 0.5}, lambda target: plan_filters(network, inputs, target=target)
    )
    assert 0.40 < plan.after.macs / full <= 4 / 9
    with pytest.raises(ValueError, match="one gets to"):
        plan_for_latency(
            network, inputs, {"latency": 0.05}, lambda target: plan_filters(network, inputs, target=target)
        )


def test_latency_is_measured_and_logged(tmp_path: Path) -> None:
    tip = pruning(target={"latency": 0.98}, schedule="one_shot", latency_batch=32)
    try:
        fit(tip, InnerModule(width=48), folder=tmp_path, max_epochs=2)
    except MisconfigurationException as error:  # a busy machine
        assert "one gets to" in str(error)  # noqa: PT017
        return
    assert tip.events[0].details["latency"] > 0


class TwoHeads(PlainModule):
    """Another head in every other step, which the module's ``forward`` does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.second_head = nn.Linear(12, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % 2 == 0:
            return F.cross_entropy(self(batch[0]), batch[1])
        return F.cross_entropy(self.second_head(self.features(batch[0]).mean((2, 3))), batch[1])


def test_what_a_layer_outside_of_the_call_may_read_stays(tmp_path: Path) -> None:
    tip = pruning()
    trainer = fit(tip, TwoHeads(), folder=tmp_path)
    assert tip._network == ""
    assert len(tip.events) == 2
    assert trainer.lightning_module.second_head.in_features == trainer.lightning_module.features[3].out_channels == 12


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.5},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_trainer_options(arguments: dict[str, Any], tmp_path: Path) -> None:
    tip = pruning(distill=0.5, max_drop=1.0)
    logger = CSVLogger(tmp_path)
    rates = LearningRateMonitor()
    trainer = fit(tip, rates, folder=tmp_path, logger=logger, **arguments)
    assert len(tip.events) == 2
    assert (Path(logger.log_dir) / "tips" / "pruning.png").exists()
    report = json.loads((Path(logger.log_dir) / "tips" / "pruning.json").read_text())
    now = widths(trainer.lightning_module)
    assert [after for _, after in report["channels"].values()][: len(now)] == now
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    logger.save()
    assert "tips/pruning/step_seconds" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(whole: bool, tmp_path: Path) -> None:
    module: Any = PlainModule() if whole else InnerModule()
    expected = fit(pruning(schedule="one_shot"), type(module)(), folder=tmp_path, max_epochs=2)
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")  # without the tip too
    tip = pruning(schedule="one_shot")
    trainer, _ = build(tip, folder=tmp_path, max_epochs=2, module=module)
    if whole:
        module = torch.compile(module, backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    trainer.fit(module, datamodule=PlainData())
    assert len(tip.events) == 1
    assert widths(trainer.lightning_module) == widths(expected.lightning_module)


def test_learning_rate_finder_beside_it(tmp_path: Path) -> None:
    tip = pruning()
    module = PlainModule(scheduler=False)
    module.lr = 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tip, LearningRateFinder(num_training_steps=8), module, folder=tmp_path)
    assert [event.epoch for event in tip.events] == [1, 2]


def test_synchronised_batch_norm_is_planned_on_one_rank() -> None:
    module = InnerModule()
    module.net = nn.SyncBatchNorm.convert_sync_batchnorm(module.net)
    copied = plain_copy(module.net)
    assert copied.state_dict().keys() == module.net.state_dict().keys()
    assert isinstance(module.net[1], nn.SyncBatchNorm)
    images = torch.rand(2, 1, 8, 8)
    assert copied.train()(images).shape == (2, 10)  # a SyncBatchNorm would ask for a GPU
    plan = plan_filters(copied, (images,), target={"macs": 0.5})
    keep_indices(module.net, real_names(module.net, plan.kept))
    assert torch.equal(module.net[1].running_mean, torch.zeros(module.net[0].out_channels))


def test_a_target_in_operations_is_that_of_one_sample(tmp_path: Path) -> None:
    module = PlainModule()
    whole = count_cost(module, PlainData().images[:1]).macs
    trainer = fit(pruning(target={"macs": whole * 0.6}, start_epoch=0), folder=tmp_path, module=module, max_epochs=3)
    left = count_cost(module, PlainData().images[:1]).macs
    assert 0.4 * whole < left <= 0.6 * whole
    report = json.loads((Path(trainer.default_root_dir) / "tips" / "pruning.json").read_text())
    assert (report["before"]["macs"], report["after"]["macs"]) == (whole, left)


def test_a_step_that_names_its_arguments_otherwise_or_takes_the_batch_alone(tmp_path: Path) -> None:
    class Unnamed(PlainModule):
        def training_step(self, batch: Any, _: int) -> Tensor:  # type: ignore[override]
            return super().training_step(batch, _)

    class Alone(PlainModule):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(batch, 0)

    for module in (Unnamed(), Alone()):
        tip = pruning(schedule="one_shot")
        fit(tip, module, folder=tmp_path, max_epochs=2)
        assert len(tip.events) == 1


def test_what_another_tip_took_out_counts(tmp_path: Path) -> None:
    """Blocks and filters to one target, and it resumes."""

    def run(**more: Any) -> Trainer:
        blocks = LayerPruningCallback(target={"macs": 0.8}, schedule="one_shot", start_epoch=1, samples=64)
        parts = pruning(), blocks, ResidualModule(), every_step(tmp_path / "kept")
        return fit(*parts, folder=tmp_path, max_epochs=3, **more)

    expected = run()
    filters = expected.callbacks[0]
    assert isinstance(filters, FilterPruningCallback)
    assert [event.epoch for event in filters.events] == [1, 2]
    assert 0.5 < filters.events[-1].details["macs"] <= 0.6
    for step in (5, 9):
        again = run(ckpt_path=tmp_path / "kept" / f"step-step={step}.ckpt")
        assert_same(bits(again), bits(expected), f"step {step}")


def test_the_inputs_can_be_given(tmp_path: Path) -> None:
    for given in ([2, 1, 8, 8], torch.rand(2, 1, 8, 8), (torch.rand(2, 1, 8, 8),)):
        tip = pruning(example_inputs=given, schedule="one_shot")
        fit(tip, folder=tmp_path, max_epochs=2, num_sanity_val_steps=0)
        assert len(tip.events) == 1
    tip = pruning(module="net", start_epoch=0, schedule="one_shot")
    fit(tip, InnerModule(), folder=tmp_path, max_epochs=1)
    assert len(tip.events) == 1
