"""Pseudo-labels: the choice, the draw, the teacher, the guard, and the callback in runs."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_tips.core.lightning_private import with_dataset
from lightning_tips.data import (
    MixedSampler,
    PseudoLabelCallback,
    SupervisedGuard,
    as_probabilities,
    choose_pseudo_labels,
    draw_mixed,
    draw_weighted,
)
from lightning_tips.data.mixed_loader import RelabelledDataset
from lightning_tips.data.pseudo_report import warn_of_odd_labels

from harness import LoaderData, PlainModule, assert_same, bits, build, every_epoch, fit
from settings import SETTINGS

QUIET: dict[str, Any] = {"epoch_size": 128, "max_drop": None, "threshold": 0.0, "top_share": 0.5, "align": True}


# ---- the choice


def some_probabilities(samples: int = 200, classes: int = 4, favour: float = 0.0) -> Tensor:
    logits = 3 * torch.randn(samples, classes, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += favour
    return logits.softmax(1)


def test_confident_samples_get_their_most_likely_class() -> None:
    probabilities = some_probabilities()
    chosen = choose_pseudo_labels(probabilities, 0.9)
    confidence, labels = probabilities.max(1)
    assert chosen.indices.tolist() == torch.nonzero(confidence >= 0.9).flatten().tolist()
    assert torch.equal(chosen.labels, labels[chosen.indices])
    assert chosen.weights.unique().tolist() == [1.0]


def test_thresholds_of_each_class_and_the_most_confident_of_each() -> None:
    probabilities = some_probabilities()
    never = choose_pseudo_labels(probabilities, [1.0, 0.5, 0.5, 0.5])
    assert 0 not in never.labels
    some = choose_pseudo_labels(probabilities, 0.0, per_class=7)
    assert torch.bincount(some.labels).tolist() == [7] * 4
    confidence, labels = probabilities.max(1)
    kept = confidence[some.indices][some.labels == 2].min()
    dropped = [i for i in torch.nonzero(labels == 2).flatten().tolist() if i not in some.indices.tolist()]
    assert kept >= confidence[dropped].max()
    half = choose_pseudo_labels(probabilities, 0.0, top_share=0.5)
    assert torch.bincount(half.labels).tolist() == (torch.bincount(labels) // 2).tolist()


def test_weights_give_each_class_its_share() -> None:
    chosen = choose_pseudo_labels(some_probabilities(favour=2.0), 0.5, prior=[1, 1, 1, 3], max_weight=100)
    of_class = torch.zeros(4).index_add_(0, chosen.labels, chosen.weights)
    assert torch.allclose(of_class / of_class.sum(), torch.tensor([1, 1, 1, 3]) / 6)
    assert chosen.weights.mean() == pytest.approx(1)


def test_no_weight_is_above_the_limit() -> None:
    probabilities = torch.tensor([[0.99, 0.01]] * 98 + [[0.01, 0.99]] * 2)
    chosen = choose_pseudo_labels(probabilities, 0.9, prior=[1, 1], max_weight=4)
    assert chosen.weights.max() == pytest.approx(4, rel=1e-5)
    assert chosen.weights.mean() == pytest.approx(1)


def test_alignment_takes_the_teachers_preference_back() -> None:
    probabilities = some_probabilities(favour=3.0)
    plain = torch.bincount(choose_pseudo_labels(probabilities, 0.0).labels, minlength=4)
    aligned = torch.bincount(choose_pseudo_labels(probabilities, 0.0, prior=[1] * 4, align=True).labels, minlength=4)
    assert plain.max() > 1.3 * aligned.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": [0.5, 0.5]}, "each of 4 classes"),
        ({"top_share": 0.0}, "top_share"),
        ({"per_class": 0}, "per_class"),
        ({"prior": [1.0]}, "prior"),
        ({"align": True}, "needs a prior"),
        ({"max_weight": 0.5}, "max_weight"),
    ],
)
def test_choice_refuses_what_makes_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_pseudo_labels(some_probabilities(), **arguments)


def test_logits_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match="softmax"):
        choose_pseudo_labels(torch.randn(4, 3))


def test_outputs_of_any_kind_become_probabilities() -> None:
    probabilities = some_probabilities(5)
    assert torch.equal(as_probabilities(probabilities), probabilities)
    assert torch.allclose(as_probabilities(probabilities.log()), probabilities, atol=1e-6)
    assert torch.allclose(as_probabilities({"logits": probabilities.log()}), probabilities, atol=1e-6)
    assert as_probabilities(torch.tensor([0.0, 2.0]))[:, 1].tolist() == pytest.approx([0.5, 0.8808], abs=1e-4)
    with pytest.raises(TypeError, match="list"):
        as_probabilities([1, 2])
    with pytest.raises(ValueError, match="not finite"):
        as_probabilities(torch.full((2, 3), float("nan")))
    with pytest.raises(ValueError, match="one class a sample"):
        as_probabilities(torch.zeros(2, 3, 8, 8))


# ---- the draw


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_each_batch_has_its_share(share: float) -> None:
    mixed = draw_mixed(960, share)
    for batch in (7, 32, 64):
        counts = [int(mixed[at : at + batch].sum()) for at in range(0, 960 - batch, batch)]
        assert all(int(batch * share + 1e-9) <= count <= -int(-batch * share // 1) for count in counts)
    assert abs(mixed.sum() - 960 * share) < 1


def test_weighted_draw_is_exact_over_epochs() -> None:
    weights = np.array([1.0, 2.0, 0.0, 0.5])
    counts = sum(np.bincount(draw_weighted(7, weights, 0, epoch), minlength=4) for epoch in range(400))
    assert np.allclose(counts / counts.sum(), weights / weights.sum(), atol=0.01)
    assert set(np.bincount(draw_weighted(10, 4, 0, 0))) == {2, 3}


def test_any_number_of_ranks_draws_the_same_batches() -> None:
    def make(world: int, rank: int) -> MixedSampler:
        sampler = MixedSampler(40, 96, 8, seed=3, num_replicas=world, rank=rank)
        sampler.set_extra(np.arange(100, 130), 0.25, np.ones(30))
        sampler.set_epoch(2)
        return sampler

    alone = np.array(list(make(1, 0))).reshape(-1, 8)
    ranks = [np.array(list(make(2, rank))).reshape(-1, 8) for rank in (0, 1)]
    assert np.array_equal(np.stack(ranks, 1).reshape(-1, 8), alone)
    assert ((alone >= 100).sum(1) == 2).all()
    began_late = make(1, 0)
    began_late.set_position(2, 24)
    assert list(began_late) == alone.reshape(-1)[24:].tolist()


# ---- the samples


class Samples(Dataset):
    def __init__(self, samples: list) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "expected"),
    [
        ((1.0, 5), (2.0, 7), (2.0, 3)),
        ((1.0, 5), (2.0,), (2.0, 3)),
        ((1.0, 5), 2.0, (2.0, 3)),
        ((1.0, 5, "a"), (2.0, "b"), (2.0, 3, "b")),
        ({"x": 1.0, "y": 5}, {"x": 2.0}, {"x": 2.0, "y": 3}),
        ({"x": 1.0, "y": 5}, {"x": 2.0, "y": 9, "more": 1}, {"x": 2.0, "y": 3}),
        ({"x": 1.0, "y": 5}, 2.0, {"x": 2.0, "y": 3}),
    ],
)
def test_samples_of_any_form_get_a_label(labelled: Any, unlabelled: Any, expected: Any) -> None:
    data = RelabelledDataset(Samples([labelled] * 4), Samples([unlabelled] * 6))
    index = int(data.index_of(5, 3))
    assert data[index] == expected
    assert data.__getitems__([0, index, 1]) == [labelled, expected, labelled]
    assert len(data) == 4


def test_labels_keep_their_type_and_several_are_refused() -> None:
    data = RelabelledDataset(Samples([(1.0, torch.tensor([5.0]))]), Samples([2.0]))
    assert torch.equal(data[int(data.index_of(0, 1))][1], torch.tensor([1.0]))
    for label in (torch.zeros(3), [1, 0], np.zeros(4)):
        with pytest.raises(ValueError, match="label"):
            RelabelledDataset(Samples([(1.0, label)]), Samples([2.0]))
    with pytest.raises(ValueError, match="lacks"):
        RelabelledDataset(Samples([{"x": 1.0, "y": 5, "id": 3}]), Samples([{"x": 2.0}]))
    with pytest.raises(ValueError, match="3 parts"):
        RelabelledDataset(Samples([(1.0, 5, "a")]), Samples([2.0]))


def test_loader_gets_other_data_without_reading_the_old(tmp_path: Path) -> None:
    loader: DataLoader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2)
    other = TensorDataset(torch.arange(10, 14))
    changed = with_dataset(loader, other, MixedSampler(4, 4, 2))
    assert sorted(torch.cat([b[0] for b in changed]).tolist()) == [10, 11, 12, 13]
    assert changed.batch_size == 2
    assert loader.dataset is not other


# ---- the guard


def test_guard_waits_and_takes_the_best_supervised_value() -> None:
    guard = SupervisedGuard(0.05, patience=2)
    for value in (0.5, 0.8, 0.7):
        guard.update(value, mixed=False)
    assert guard.reference == 0.8
    guard.update(0.6, mixed=True)
    assert not guard.hurts
    guard.update(0.76, mixed=True)
    assert not guard.hurts
    guard.update(0.7, mixed=True)
    guard.update(float("nan"), mixed=True)
    assert guard.hurts
    again = SupervisedGuard(0.05, patience=2)
    again.load_state_dict(guard.state_dict())
    assert again.hurts
    lower = SupervisedGuard(0.1, "min", 1, reference=1.0)
    lower.update(1.05, mixed=True)
    assert not lower.hurts
    lower.update(1.2, mixed=True)
    assert lower.hurts


def test_odd_labels_are_warned_of() -> None:
    labelled = torch.tensor([10, 10, 10])

    def warned(counts: list[int], size: int) -> str:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_odd_labels("tip", torch.tensor(counts), labelled, size, 0.9)
        return " ".join(str(warning.message) for warning in seen)

    assert "only 0 of 100" in warned([0, 0, 0], 100)
    assert "tells nothing" in warned([34, 33, 33], 100)
    assert "95% of the pseudo-labels are of class 0" in warned([38, 1, 1], 100)
    assert not warned([20, 15, 10], 100)


# ---- in runs


class Teacher(nn.Module):
    """Knows the digits by heart."""

    def __init__(self) -> None:
        super().__init__()
        data = LoaderData()
        self.images, self.labels = data.images.flatten(1), data.labels

    def forward(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.flatten(1).cpu(), self.images).argmin(1)
        return torch.nn.functional.one_hot(self.labels[nearest], 10).float()


class Recording(PlainModule):
    """Writes down what it is trained on, and whether the pseudo-labelled are there with the right labels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        known = {image.numpy().tobytes(): int(label) for image, label in zip(*self.secret, strict=True)}
        hits = [(known.get(i.numpy().tobytes()), int(y)) for i, y in zip(images, labels, strict=True)]
        mixed = [(true, given) for true, given in hits if true is not None]
        self.seen.append((len(mixed), sum(true == given for true, given in mixed)))
        return super().training_step(batch, batch_idx)


class HiddenLabels(LoaderData):
    """The unlabelled samples lie about their labels."""

    def unlabelled_dataset(self) -> Any:
        whole = super().unlabelled_dataset()
        return TensorDataset(whole.tensors[0], (whole.tensors[1] + 1) % 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_their_share_with_the_teachers_labels(workers: int, tmp_path: Path) -> None:
    tip = PseudoLabelCallback(
        teacher=Teacher(), start_epoch=1, every_n_epochs=2, share=0.1, max_drop=None, epoch_size=128, threshold=0.99
    )
    data = HiddenLabels(num_workers=workers)
    original = data.train_dataloader

    def persistent() -> DataLoader:
        loader = original()
        return DataLoader(
            loader.dataset, loader.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

    data.train_dataloader = persistent  # type: ignore[method-assign]
    module = Recording()
    whole = LoaderData().unlabelled_dataset()
    module.secret = whole.tensors
    warnings.filterwarnings("ignore", ".*tells nothing")
    fit(tip, folder=tmp_path, module=module, data=data, max_epochs=3)
    assert [mixed for mixed, _ in module.seen[:4]] == [0] * 4
    assert sum(mixed for mixed, _ in module.seen[4:]) == 2 * int(128 * tip.sampler.share)
    assert all(mixed == right for mixed, right in module.seen)  # what the set said of itself was never used
    assert tip.sampler.share == pytest.approx(0.1)


def test_labelling_leaves_no_trace_on_the_run(tmp_path: Path) -> None:
    class Counting(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1  # even that
            if not self.training:
                torch.rand(1), random.random(), np.random.rand()
            return super().forward(images)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0 * torch.rand(())

    def run(name: str, **changes: Any) -> Any:
        tip = PseudoLabelCallback(**(QUIET | {"start_epoch": 0, "every_n_epochs": 1} | changes))
        trainer, _ = build(tip, folder=tmp_path / name, module=Counting(), max_epochs=2)
        trainer.fit(trainer.lightning_module or Counting(), datamodule=LoaderData())
        return trainer, tip

    torch.manual_seed(0)
    none, _ = run("none", start_epoch=100)
    # Labels are made in each epoch, but of none is anything used.
    torch.manual_seed(0)
    import lightning_tips.data.pseudo_callback as room

    real = room.natural_share
    room.natural_share = lambda *_: 0.0
    try:
        labelled, tip = run("labelled")
    finally:
        room.natural_share = real
    assert len(tip.events) == 2
    first, second = bits(none), bits(labelled)
    first.pop("events"), second.pop("events")
    assert_same(first, second)


def test_guard_gives_up_and_says_so(tmp_path: Path) -> None:
    class Liar(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.arange(len(images)) % 10, 10).float()

    tip = PseudoLabelCallback(
        teacher=Liar(), start_epoch=1, every_n_epochs=5, max_drop=0.0, reference=2.0, patience=2, epoch_size=128
    )
    warnings.filterwarnings("ignore", ".*tells nothing")
    fit(tip, folder=tmp_path, module=PlainModule(), data=LoaderData(), max_epochs=5)
    assert [(event.epoch, event.what) for event in tip.events] == [
        (1, "pseudo-labels, round 1"),
        (3, "pseudo-labels hurt: given up"),
    ]
    assert tip.events[1].details["supervised"] == 2.0
    assert tip.sampler.share == 0
    assert tip.pseudo_labels is None


def test_teachers_of_other_moments(tmp_path: Path) -> None:
    keep = every_epoch(tmp_path / "kept")
    fit(keep, folder=tmp_path, data=LoaderData(), max_epochs=2)
    paths = sorted(map(str, (tmp_path / "kept").glob("*.ckpt")))
    module = PlainModule()
    tip = PseudoLabelCallback(teacher=paths, start_epoch=0, every_n_epochs=9, audit=True, **QUIET)
    fit(tip, folder=tmp_path, module=module, data=LoaderData(), max_epochs=1)
    members = []
    for path in paths:
        member = PlainModule()
        member.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        with torch.no_grad():
            members.append(member.eval()(LoaderData().unlabelled_dataset().tensors[0]).softmax(1))
    prior = np.bincount(LoaderData().train.tensors[1])
    expected = choose_pseudo_labels(sum(members) / 2, 0.0, 0.5, None, prior, True)
    assert torch.equal(tip.pseudo_labels.labels, expected.labels)
    assert torch.equal(tip.pseudo_labels.indices, expected.indices)
    right = (LoaderData().unlabelled_dataset().tensors[1][expected.indices] == expected.labels).float().mean()
    assert tip.events[0].details["right"] == pytest.approx(float(right))
    assert tip.events[0].details["teacher"] == "2 checkpoints"
    assert list(tmp_path.rglob("pseudo_labels.csv"))
    assert list(tmp_path.rglob("pseudo_labels.png"))


class NothingNew(LoaderData):
    def unlabelled_dataset(self) -> Any:
        return TensorDataset(self.images[:0])


class SeveralLabels(LoaderData):
    def __init__(self) -> None:
        super().__init__()
        self.train = TensorDataset(self.images[:64], torch.zeros(64, 5))


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({}, NothingNew, "unlabelled set is empty"),
        ({"unlabelled": "unlabeled_dataset"}, LoaderData, "Did you mean 'unlabelled_dataset'"),
        ({}, SeveralLabels, "several labels"),
        ({"teacher": "nowhere.ckpt"}, LoaderData, "no checkpoint nowhere.ckpt"),
        ({"teacher": "best"}, LoaderData, "ModelCheckpoint with a monitor"),
        ({"max_drop": 0.1, "start_epoch": 0}, LoaderData, "to compare with"),
        ({"max_drop": 0.1, "monitor": "val_accuracy"}, LoaderData, "max_drop=None"),
    ],
)
def test_refused_before_the_first_step(
    arguments: dict, data: type[LightningDataModule], message: str, tmp_path
) -> None:
    tip = PseudoLabelCallback(**(QUIET | arguments))
    trainer, module = build(tip, folder=tmp_path, max_epochs=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, datamodule=data())
    assert_same(dict(module.state_dict()), before)


def test_resume_with_another_unlabelled_set_is_refused(tmp_path: Path) -> None:
    keep = every_epoch(tmp_path / "kept")
    fit(PseudoLabelCallback(**QUIET), keep, folder=tmp_path, data=LoaderData(), max_epochs=2)
    data = LoaderData()
    data.unlabelled_dataset = lambda: TensorDataset(data.images[:10])  # type: ignore[method-assign]
    checkpoint = tmp_path / "kept/epoch-epoch=1.ckpt"
    with pytest.raises(MisconfigurationException, match="64 unlabelled samples, and now there are 10"):
        fit(PseudoLabelCallback(**QUIET), keep, folder=tmp_path, data=data, max_epochs=3, ckpt_path=checkpoint)


@pytest.mark.parametrize("arguments", [{"share": 1.0}, {"share": 0.0}, {"every_n_epochs": 0}, {"teacher": []}])
def test_arguments_that_make_no_sense(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PseudoLabelCallback(**arguments)


def test_labels_of_an_imbalanced_sampler_are_kept_in_balance(tmp_path: Path) -> None:
    from lightning_tips import ImbalancedSamplerCallback

    balance = ImbalancedSamplerCallback("oversample", num_samples=128, show=False)
    tip = PseudoLabelCallback(start_epoch=0, share=0.25, **(QUIET | {"epoch_size": None}))
    trainer = fit(tip, balance, folder=tmp_path, data=LoaderData(), max_epochs=1)
    labels = trainer.train_dataloader.dataset.tensors[1]
    order = tip.sampler.order()
    drawn = labels[order[order < len(labels)]].bincount()
    assert drawn.max() <= 2 * drawn.min()  # of the data it is six times
    assert len(tip.sampler) == 128


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"class_path": "torch.nn.Flatten"}, nn.Flatten), (["a.ckpt", "b.ckpt"], list), ("best", str)],
)
def test_teacher_and_data_from_yaml(given: Any, kind: type) -> None:
    row = next(setting for setting in SETTINGS if setting.tip is PseudoLabelCallback)
    data = {"class_path": "torchvision.datasets.FakeData", "init_args": {"size": 5}}
    _, tip = row.make(teacher=given, unlabelled=data)
    assert isinstance(tip._teacher.given, kind)
    assert len(tip.unlabelled) == 5
