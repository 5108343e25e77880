"""Replay: the draw, the memory, the scores, and the callback in runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_tips import ReplayCallback
from lightning_tips.data import choose_memory, draw_replay
from lightning_tips.data.mixed_loader import JoinedDataset
from lightning_tips.data.replay import replay_size

from harness import LoaderData, PlainModule, assert_same, bits, build, fit


def test_every_new_sample_comes_once_and_the_old_ones_change() -> None:
    epochs = [draw_replay(new=60, old=200, share=0.25, seed=1, epoch=epoch) for epoch in (0, 1)]
    for order in epochs:
        assert sorted(order[order < 60].tolist()) == list(range(60))
        assert len(order) == 80
        assert len(set(order.tolist())) == 80
        assert all((order[at : at + 8] >= 60).sum() == 2 for at in range(0, 80, 8))
    assert set(epochs[0][epochs[0] >= 60]) != set(epochs[1][epochs[1] >= 60])
    assert np.array_equal(epochs[0], draw_replay(60, 200, 0.25, 1, 0))
    assert sorted(draw_replay(5, 0, 0.0).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("new", [1, 7, 100, 1237])
def test_length_of_an_epoch(new: int, share: float) -> None:
    order = draw_replay(new, 50, share)
    assert (order < new).sum() == new
    assert len(order) == replay_size(new, share)
    assert len(order) * (1 - share) < new + 1


@pytest.mark.parametrize("arguments", [{"share": 1.0}, {"share": -0.1}, {"new": 0}, {"old": 0}])
def test_draw_refuses_what_makes_no_sense(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments)) if "old" not in arguments else "nothing to mix in"):
        draw_replay(**({"new": 5, "old": 5, "share": 0.5} | arguments))


def test_memory_keeps_classes_alike_and_grows() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 4])
    small, large = choose_memory(labels, 12, seed=2), choose_memory(labels, 30, seed=2)
    assert np.bincount(labels[small]).tolist() == [4, 4, 4]
    assert np.bincount(labels[large]).tolist() == [13, 13, 4]
    assert set(small) < set(large)
    assert len(choose_memory(labels, 1000)) == 154


def test_joined_dataset_fetches_a_batch_from_both() -> None:
    class Together(TensorDataset):
        calls = 0

        def __getitems__(self, indices: list) -> list:
            type(self).calls += 1
            return [self[i] for i in indices]

    data = JoinedDataset([Together(torch.arange(4)), TensorDataset(torch.arange(10, 13))])
    assert [int(s[0]) for s in data.__getitems__([5, 0, 4, 3])] == [11, 0, 10, 3]
    assert Together.calls == 1


class WithMetric(PlainModule):
    """Logs a torchmetrics object, and something at the end of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.validated += len(images)
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val_acc", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, labels))

    def on_validation_epoch_end(self) -> None:
        self.log("val_samples", float(self.validated))


def scored(module: PlainModule, data: TensorDataset) -> float:
    images, labels = data.tensors
    with torch.no_grad():
        right = module.eval()(images).argmax(1) == labels
        module.train()
        return float(right.float().mean())


def test_scores_before_and_after_are_the_modules_own(tmp_path: Path) -> None:
    module = WithMetric()
    data = LoaderData()
    new = TensorDataset(data.images[-128:], data.labels[-128:])
    before = {"old": scored(module, data.old_val_dataset()), "new": scored(module, new)}
    tip = ReplayCallback(share=0.5)
    trainer = fit(tip, folder=tmp_path, module=module, data=data, max_epochs=2)
    after = {"old": scored(module, data.old_val_dataset()), "new": scored(module, new)}
    for name in ("old", "new"):
        assert tip.before[name]["val_acc"] == pytest.approx(before[name])
        assert tip.after[name]["val_acc"] == pytest.approx(after[name])
    assert tip.events[-1].details["new val_acc"] == f"{before['new']:.4g} -> {after['new']:.4g}"
    assert not any(name.startswith("old") for name in trainer.callback_metrics)


def test_scoring_leaves_no_trace_on_the_run(tmp_path: Path) -> None:
    runs = []
    for scores in (False, True):
        module = PlainModule()
        torch.manual_seed(1)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        tip = ReplayCallback(epoch_size=128, scores=scores)
        runs.append(bits(fit(tip, folder=tmp_path, module=module, data=LoaderData(), max_epochs=2)))
        runs[-1].pop("events")
    assert_same(*runs)


def test_no_share_is_plain_training_on_the_new_data(tmp_path: Path) -> None:
    tip = ReplayCallback(share=0.0, old_validation=None, metrics=["val_acc"])
    trainer = fit(tip, folder=tmp_path, data=LoaderData(), max_epochs=1)
    assert sorted(tip.sampler) == list(range(len(LoaderData().train)))
    assert list(tip.events[-1].details) == ["new val_acc"]
    assert trainer.global_step == -(-len(LoaderData().train) // 32)


def test_memory_limits_what_is_replayed(tmp_path: Path) -> None:
    tip = ReplayCallback(share=0.5, memory=20, scores=False)
    fit(tip, folder=tmp_path, data=LoaderData(), max_epochs=1)
    new = len(LoaderData().train)
    replayed = {index - new for index in tip.sampler if index >= new}
    assert len(replayed) == 20
    assert LoaderData().old_dataset().tensors[1][sorted(replayed)].bincount(minlength=10).tolist() == [2] * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"old": "old_data"}, "Did you mean 'old_dataset'"),
        ({"old": TensorDataset(torch.zeros(0, 1, 8, 8))}, "old data is empty"),
        ({"old": TensorDataset(torch.zeros(4, 1, 8, 8))}, "a row of 1 and a new one a row of 2"),
        ({"metrics": ["val_accuracy"]}, "Did you mean 'val_acc'"),
        ({"old_validation": "old_val"}, "looks for the old validation data under 'old_val'"),
    ],
)
def test_refused_before_the_first_step(arguments: dict, message: str, tmp_path: Path) -> None:
    trainer, module = build(ReplayCallback(**arguments), folder=tmp_path, max_epochs=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, datamodule=LoaderData())
    assert_same(dict(module.state_dict()), before)


def test_scores_need_validation_even_if_it_is_far_off(tmp_path: Path) -> None:
    tip = ReplayCallback(epoch_size=64)
    fit(tip, folder=tmp_path, data=LoaderData(), max_epochs=1, check_val_every_n_epoch=100, num_sanity_val_steps=0)
    assert set(tip.after) == {"old", "new"}
    with pytest.raises(MisconfigurationException, match="scores=False"):
        fit(ReplayCallback(epoch_size=64), folder=tmp_path, data=LoaderData(), max_epochs=1, limit_val_batches=0)


def test_a_share_of_a_small_validation_set_is_a_batch(tmp_path: Path) -> None:
    module, data = PlainModule(), LoaderData(batch_size=64)
    expected = scored(module, data.old_val_dataset())
    tip = ReplayCallback(epoch_size=64)
    fit(tip, folder=tmp_path, module=module, data=data, max_epochs=1, limit_val_batches=0.5)
    assert tip.before["old"]["val_acc"] == pytest.approx(expected)


def test_resumed_run_compares_with_what_came_before_its_first_step(tmp_path: Path) -> None:
    first = ReplayCallback(epoch_size=128)
    trainer = fit(first, folder=tmp_path, data=LoaderData(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = ReplayCallback(epoch_size=128)
    fit(again, folder=tmp_path, data=LoaderData(), max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert again.before == first.before
    assert again.after != first.after
    # From the checkpoint of a run without the tip, which is how old weights come in.
    plain = fit(folder=tmp_path, data=LoaderData(), max_epochs=1)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    late = ReplayCallback(epoch_size=128)
    fit(late, folder=tmp_path, data=LoaderData(), max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert late.before["new"]["val_acc"] == pytest.approx(float(plain.callback_metrics["val_acc"]))


def test_workers_draw_the_same(tmp_path: Path) -> None:
    def run(workers: int) -> dict:
        torch.manual_seed(0)
        module = PlainModule()
        data = LoaderData(num_workers=workers)
        return bits(fit(ReplayCallback(epoch_size=64), folder=tmp_path, module=module, data=data, max_epochs=2))

    assert_same(run(0), run(1))


def test_two_that_mix_are_refused(tmp_path: Path) -> None:
    from lightning_tips import PseudoLabelCallback

    with pytest.raises(MisconfigurationException, match="both mix samples"):
        fit(ReplayCallback(), PseudoLabelCallback(), folder=tmp_path, data=LoaderData())


def test_shape_of_a_batch(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch[1])
            return super().training_step(batch, batch_idx)

    data = LoaderData()
    marked = TensorDataset(data.images[:50], torch.full((50,), 9))  # the new data has 17 of these among 475
    fit(ReplayCallback(marked, share=0.5, scores=False), folder=tmp_path, module=Watching(), data=data, max_epochs=1)
    nines = [int((labels == 9).sum()) for labels in seen if len(labels) == 32]
    assert min(nines) >= 16
    assert sum(map(len, seen)) == 950
