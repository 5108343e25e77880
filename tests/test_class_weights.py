"""Class weights: the numbers, the losses they go into, the callback that puts them there, and what it refuses."""

import copy
import json
import math
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy  # by another name than F's
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_tips.core import changed_outputs, parameter_hash
from lightning_tips.imbalance import (
    ClassWeightCallback,
    LossCorrection,
    adjust_logits,
    best_threshold,
    class_weights,
    correct_prior,
    corrected_losses,
    find_losses,
    fit_prior_correction,
    logit_adjustment,
    weighted_binary_cross_entropy_with_logits,
    weighted_cross_entropy,
    weighted_nll_loss,
    weighted_prior,
)

from harness import PlainData, PlainModule, ResumableLoader, assert_same, bits, build, every_epoch, every_step, fit
from processes import on_two_ranks

ROOT = Path(__file__).parent.parent
COUNTS = torch.tensor([60, 30, 10])

# ---- the numbers


@pytest.mark.parametrize("scheme", ["inverse", "sqrt", "effective", "none"])
@pytest.mark.parametrize("counts", [[1000, 50], [3000, 900, 100, 30], [1, 1]])
def test_weights_have_mean_one_over_samples(scheme, counts) -> None:
    weights = class_weights(counts, scheme)
    assert weights.dtype == torch.float32
    assert float((weights.double() * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(1.0, abs=1e-6)


def test_ratios_of_the_schemes() -> None:
    def ratio(*args: Any) -> float:
        weights = class_weights([1000, 50], *args)
        return float(weights[1] / weights[0])

    assert ratio() == pytest.approx(20)
    assert ratio("sqrt") == pytest.approx(20**0.5)
    assert ratio("none") == 1
    assert ratio("effective", 0.999) == pytest.approx((1 - 0.999**1000) / (1 - 0.999**50))
    assert ratio("effective", 0.0) == 1
    assert ratio("effective", 1 - 1e-9) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("counts", [np.array([5, 10]), torch.tensor([5, 10]), (5.0, 10.0), [5, 10]])
def test_counts_of_any_form(counts) -> None:
    assert class_weights(counts).tolist() == pytest.approx([1.5, 0.75])


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([5, 0, 3, 0], {}, "No samples of class 1, 3"),
        ([5], {}, "nothing to balance with 1 class"),
        ([5, -1], {}, "not negative"),
        ([5, math.nan], {}, "finite"),
        ([5, math.inf], {}, "finite"),
        ([[1, 2], [3, 4]], {}, "one number for each class"),
        ([5, 3], {"scheme": "invers"}, "Did you mean 'inverse'"),
        ([5, 3], {"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        ([5, 3], {"beta": math.nan}, "beta"),
    ],
)
def test_bad_counts(counts, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        class_weights(counts, **options)


# ---- the ratio, which is what this is about


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("batch_size", "stock"), [(8, 6.6), (32, 14.3), (128, 18.5)])
def test_effective_ratio(batch_size: int, stock: float, ranks: int) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks" / "imbalance"))
    try:
        from ratio import effective_ratio
    finally:
        sys.path.pop(0)
    weights = class_weights([20, 1])
    batches = 12_000 // batch_size // ranks
    ours, _ = effective_ratio(lambda x, y: weighted_cross_entropy(x, y, weights), batch_size, ranks, batches)
    assert ours == pytest.approx(20, rel=0.02)
    torchs, _ = effective_ratio(lambda x, y: F.cross_entropy(x, y, weight=weights), batch_size, ranks, batches)
    assert torchs == pytest.approx(stock, rel=0.1)


def test_committed_ratios_are_within_two_percent() -> None:
    rows = json.loads((ROOT / "benchmarks/imbalance/ratio.json").read_text())["rows"]
    assert [(r["ranks"], r["batch_per_rank"]) for r in rows] == [(n, b) for n in (1, 2) for b in (8, 32, 128)]
    for row in rows:
        assert row["ours"] == pytest.approx(20, rel=0.02)


# ---- each loss


def by_hand(losses: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights[targets]).sum() / targets.numel()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 3, requires_grad=True), torch.arange(16) % 3, class_weights(COUNTS)


def test_cross_entropy(batch) -> None:
    logits, targets, weights = batch
    losses = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(weighted_cross_entropy(logits, targets, weights), by_hand(losses, targets, weights))
    each = weighted_cross_entropy(logits, targets, weights, reduction="none")
    torch.testing.assert_close(each, losses * weights[targets])
    assert weighted_cross_entropy(logits, targets, weights, reduction="sum") == each.sum()
    torch.testing.assert_close(weighted_nll_loss(logits.log_softmax(1), targets, weights), each.mean())


def test_cross_entropy_with_equal_weights_is_torchs(batch) -> None:
    logits, targets, _ = batch
    for options in ({}, {"label_smoothing": 0.1}, {"ignore_index": 1}, {"reduction": "sum"}):
        ours = weighted_cross_entropy(logits, targets, torch.ones(3), **options)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, F.cross_entropy(logits, targets, **options))  # type: ignore[arg-type]


def test_ignored_targets_count_neither_above_nor_below_the_line(batch) -> None:
    logits, targets, weights = batch
    some = targets.clone()
    some[::4] = -100
    kept = some != -100
    expected = weighted_cross_entropy(logits[kept], targets[kept], weights)
    torch.testing.assert_close(weighted_cross_entropy(logits, some, weights), expected)


def test_label_smoothing_takes_the_weight_of_the_samples_class(batch) -> None:
    logits, targets, weights = batch
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    ours = weighted_cross_entropy(logits, targets, weights, label_smoothing=0.2)
    torch.testing.assert_close(ours, by_hand(losses, targets, weights))


def test_pixels_and_a_single_sample() -> None:
    torch.manual_seed(0)
    weights = class_weights(COUNTS)
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    losses = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(weighted_cross_entropy(logits, targets, weights), by_hand(losses, targets, weights))
    one = weighted_cross_entropy(logits[0, :, 0, 0], targets[0, 0, 0], weights)
    torch.testing.assert_close(one, losses[0, 0, 0] * weights[targets[0, 0, 0]])


@pytest.mark.parametrize("shape", [(12,), (12, 1), (3, 1, 2, 2), (1,)])
def test_binary(shape) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(shape), torch.randint(2, shape)
    weights = class_weights([20, 1])
    losses = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    expected = by_hand(losses, targets, weights)
    torch.testing.assert_close(weighted_binary_cross_entropy_with_logits(logits, targets.float(), weights), expected)
    correction = LossCorrection.from_counts(torch.tensor([20, 1]))
    torch.testing.assert_close(correction.binary_cross_entropy_with_logits(logits, targets.float()), expected)
    # the ratio is torch's pos_weight
    same = F.binary_cross_entropy_with_logits(logits, targets.float(), pos_weight=weights[1] / weights[0]) * weights[0]
    torch.testing.assert_close(same, expected)


def test_several_labels() -> None:
    torch.manual_seed(0)
    labels = (torch.rand(1000, 3) < torch.tensor([0.5, 0.1, 0.02])).float()
    logits = torch.randn(1000, 3)
    correction = LossCorrection.from_counts(labels.sum(0), total=1000)
    each = correction.binary_cross_entropy_with_logits(logits, labels, "none")
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    factors = each / losses
    # each label: presence and absence count the same in sum, with mean 1
    torch.testing.assert_close((factors * labels).sum(0), torch.full((3,), 500.0))
    torch.testing.assert_close((factors * (1 - labels)).sum(0), torch.full((3,), 500.0))
    torch.testing.assert_close(correction.binary_cross_entropy_with_logits(logits, labels), each.mean())
    with pytest.raises(ValueError, match="several labels a sample"):
        correction.cross_entropy(logits, torch.zeros(1000, dtype=torch.long))
    # one class each, against one output a class
    classes = LossCorrection.from_counts(COUNTS)
    one_hot = F.one_hot(torch.repeat_interleave(torch.arange(3), COUNTS), 3).float()
    factors = classes.binary_cross_entropy_with_logits(torch.zeros(100, 3), one_hot, "none") / math.log(2)
    torch.testing.assert_close((factors * one_hot).sum(0), torch.full((3,), 50.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay_as_in_torch(dtype) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 2, dtype=dtype), torch.randint(2, (64,))
    weights = class_weights([20, 1])
    ours = weighted_cross_entropy(logits, targets, weights)
    assert ours.dtype == F.cross_entropy(logits, targets).dtype == dtype
    exact = weighted_cross_entropy(logits.double(), targets, weights)
    assert float(ours) == pytest.approx(float(exact), rel=1e-2)
    binary = weighted_binary_cross_entropy_with_logits(logits[:, 0], targets.to(dtype), weights)
    assert binary.dtype == dtype


def test_autocast(batch) -> None:
    _, targets, weights = batch
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 3), torch.randn(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(inputs)
        loss = weighted_cross_entropy(logits, targets, weights)
        expected = F.cross_entropy(logits, targets)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == expected.dtype
    assert torch.isfinite(loss)


def test_mixed_targets_are_refused(batch) -> None:
    logits, targets, weights = batch
    with pytest.raises(ValueError, match=r"mixed or soft.*ImbalancedSampler"):
        weighted_cross_entropy(logits, F.one_hot(targets, 3).float(), weights)
    with pytest.raises(ValueError, match=r"between 0 and 1.*ImbalancedSampler"):
        weighted_binary_cross_entropy_with_logits(logits, torch.full((16, 3), 0.05), torch.ones(2))
    with pytest.raises(ValueError, match=r"sees 3 classes.*for 2"):
        weighted_cross_entropy(logits, targets, weights[:2])
    with pytest.raises(ValueError, match=r"two weights, \[negative, positive\]"):
        LossCorrection.from_counts(COUNTS).binary_cross_entropy_with_logits(logits[:, 0], torch.zeros(16))


# ---- finding and replacing them


class Smoothing(nn.CrossEntropyLoss):
    """A subclass that changes nothing in forward."""


class Own(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def timm_loss(name: str, **options: Any) -> nn.Module:
    return getattr(pytest.importorskip("timm.loss"), name)(**options)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        nn.CrossEntropyLoss,
        partial(nn.CrossEntropyLoss, label_smoothing=0.1, ignore_index=2),
        partial(nn.CrossEntropyLoss, reduction="sum"),
        partial(nn.CrossEntropyLoss, reduction="none"),
        Smoothing,
        partial(timm_loss, "LabelSmoothingCrossEntropy", smoothing=0.1),
    ],
)
def test_losses_are_found_weighted_once_and_left_as_they_were(make, functional, batch) -> None:
    logits, targets, weights = batch
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": make()})
    (name,) = find_losses(model)
    assert name == "loss"
    before = (list(model.state_dict()), vars(model["loss"]).copy(), model["loss"](logits, targets))
    correction = LossCorrection.from_counts(COUNTS)
    with corrected_losses(list(find_losses(model).values()), correction, functional):
        weighted = model["loss"](logits, targets)
        copied = copy.deepcopy(model)
        assert list(model.state_dict()) == before[0]
    loss = model["loss"]
    smoothing = getattr(loss, "label_smoothing", getattr(loss, "smoothing", 0.0))
    options = {"ignore_index": getattr(loss, "ignore_index", -100), "reduction": getattr(loss, "reduction", "mean")}
    expected = weighted_cross_entropy(logits, targets, weights, label_smoothing=smoothing, **options)
    torch.testing.assert_close(weighted, expected)
    assert correction.calls == 1
    assert vars(loss) == before[1]
    assert torch.equal(loss(logits, targets), before[2])
    assert torch.equal(pickle.loads(pickle.dumps(model))["loss"](logits, targets), before[2])
    assert list(copied.state_dict()) == before[0]


@pytest.mark.parametrize("functional", [False, True])
def test_binary_and_nll_modules(functional, batch) -> None:
    logits, targets, weights = batch
    pair, binary = LossCorrection.from_counts(torch.tensor([20, 1])), nn.BCEWithLogitsLoss()
    truth = (targets == 0).float()
    with corrected_losses([binary], pair, functional):
        weighted = binary(logits[:, 0], truth)
    expected = weighted_binary_cross_entropy_with_logits(logits[:, 0], truth, class_weights([20, 1]))
    torch.testing.assert_close(weighted, expected)
    nll = nn.NLLLoss()
    with corrected_losses([nll], LossCorrection.from_counts(COUNTS), functional):
        weighted = nll(logits.log_softmax(1), targets)
    torch.testing.assert_close(weighted, weighted_cross_entropy(logits, targets, weights))


def test_functions_are_weighted_under_any_name(batch) -> None:
    logits, targets, weights = batch
    expected = weighted_cross_entropy(logits, targets, weights)
    own = Own()
    correction = LossCorrection.from_counts(COUNTS)
    assert not find_losses(own)
    with corrected_losses([], correction, functional=True):
        for loss in (F.cross_entropy, cross_entropy, nn.CrossEntropyLoss()):
            torch.testing.assert_close(loss(logits, targets), expected)
        torch.testing.assert_close(F.nll_loss(logits.log_softmax(1), targets), expected)
        torch.testing.assert_close(own(logits, targets), 2 * expected)
        torch.testing.assert_close(F.cross_entropy(input=logits, target=targets, size_average=False), expected * 16)
        with pytest.raises(ValueError, match=r"F\.cross_entropy has a weight of its own, \[0\.5.*corrected twice"):
            F.cross_entropy(logits, targets, weight=weights)
        with pytest.raises(ValueError, match="pos_weight of its own"):
            F.binary_cross_entropy_with_logits(logits, torch.ones(16, 3), pos_weight=weights)
    assert correction.calls == 6
    torch.testing.assert_close(F.cross_entropy(logits, targets), nn.CrossEntropyLoss()(logits, targets))


def test_everything_is_as_before_after_an_error(batch) -> None:
    logits, targets, _ = batch
    loss = nn.CrossEntropyLoss()
    plain = loss(logits, targets)
    with pytest.raises(ZeroDivisionError), corrected_losses([loss], LossCorrection.from_counts(COUNTS), True):
        raise ZeroDivisionError
    assert "forward" not in vars(loss)
    assert torch.equal(loss(logits, targets), plain)
    assert torch.equal(F.cross_entropy(logits, targets), plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.CrossEntropyLoss(weight=torch.ones(3)), r"'0' has a weight of its own, \[1, 1, 1\]"),
        (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(20.0)), r"'0' has a pos_weight of its own, \[20\]"),
        (partial(timm_loss, "SoftTargetCrossEntropy"), "mixed or soft targets"),
        (partial(timm_loss, "BinaryCrossEntropy"), "smooths its targets"),
        (nn.BCELoss, r"Use nn\.BCEWithLogitsLoss"),
    ],
)
def test_losses_that_would_go_wrong_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_losses(nn.Sequential(make()))


def test_losses_by_name() -> None:
    model = nn.ModuleDict({"train_loss": nn.CrossEntropyLoss(), "soft": timm_loss("SoftTargetCrossEntropy")})
    assert list(find_losses(model, ["train_loss"])) == ["train_loss"]
    with pytest.raises(ValueError, match=r"no loss 'train_los' in the module\. Did you mean 'train_loss'"):
        find_losses(model, ["train_los"])
    with pytest.raises(ValueError, match="which is not among the losses"):
        find_losses(nn.ModuleDict({"layer": nn.Linear(1, 1)}), ["layer"])


# ---- logit adjustment and the prior


def test_logit_adjustment_in_the_loss(batch) -> None:
    logits, targets, _ = batch
    offsets = logit_adjustment(COUNTS, tau=1.5)
    torch.testing.assert_close(offsets, 1.5 * (COUNTS / 100).log())
    correction = LossCorrection.adjustment(COUNTS, tau=1.5)
    expected = F.cross_entropy(logits + offsets, targets)
    torch.testing.assert_close(correction.cross_entropy(logits, targets), expected)
    torch.testing.assert_close(correction.nll_loss(logits.log_softmax(1), targets), expected)
    pair = LossCorrection.adjustment(torch.tensor([20, 1]))
    truth = (targets == 0).float()
    shifted = F.binary_cross_entropy_with_logits(logits[:, 0] + math.log(1 / 20), truth)
    torch.testing.assert_close(pair.binary_cross_entropy_with_logits(logits[:, 0], truth), shifted)
    several = LossCorrection.adjustment(torch.tensor([20, 50]), total=100)
    shifted = F.binary_cross_entropy_with_logits(logits[:, :2] + torch.tensor([math.log(0.25), 0.0]), torch.ones(16, 2))
    torch.testing.assert_close(several.binary_cross_entropy_with_logits(logits[:, :2], torch.ones(16, 2)), shifted)


def test_logit_adjustment_after_training() -> None:
    offsets = logit_adjustment([90, 10])
    assert adjust_logits(offsets[None], offsets).softmax(1).flatten().tolist() == pytest.approx([0.5, 0.5])
    for shape in ((5,), (5, 1)):
        assert adjust_logits(torch.full(shape, math.log(1 / 9)), offsets).sigmoid().flatten().tolist() == pytest.approx(
            [0.5] * 5
        )
    with pytest.raises(ValueError, match="do not have the 2 classes"):
        adjust_logits(torch.zeros(4, 3), offsets)
    with pytest.raises(ValueError, match="tau must be positive"):
        logit_adjustment([1, 2], tau=0)


def test_outputs_are_changed_for_a_while() -> None:
    model = nn.Linear(2, 2)
    plain = model(torch.ones(1, 2))
    with changed_outputs(model, lambda logits: logits + 1):
        assert torch.equal(model(torch.ones(1, 2)), plain + 1)
    assert torch.equal(model(torch.ones(1, 2)), plain)
    assert "forward" not in vars(model)
    lstm = nn.LSTM(2, 2)
    with changed_outputs(lstm, lambda logits: logits), pytest.raises(TypeError, match="returns tuple"):
        lstm(torch.ones(1, 1, 2))


def rare_problem(number: int, seed: int, prevalence: float = 1 / 21) -> tuple[Tensor, Tensor]:
    """Two overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(number, generator=generator) < prevalence).long()
    return torch.randn(number, 8, generator=generator) + 0.5 * targets[:, None], targets


@pytest.mark.parametrize("fitted", ["scale", "shift"])
@pytest.mark.parametrize("hidden", [0, 64], ids=["linear", "overconfident"])
def test_probabilities_come_back_to_the_true_prevalence(hidden: int, fitted) -> None:
    torch.manual_seed(0)
    inputs, targets = rare_problem(1050, 0)
    counts = torch.bincount(targets)
    model = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 2)) if hidden else nn.Linear(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(80):
        optimizer.zero_grad()
        weighted_cross_entropy(model(inputs), targets, class_weights(counts)).backward()
        optimizer.step()
    trained = weighted_prior(counts, class_weights(counts))
    assert trained.tolist() == pytest.approx([0.5, 0.5])
    with torch.no_grad():
        (validation, truth), (test, test_truth) = (rare_problem(20_000, seed) for seed in (1, 2))
        correction = fit_prior_correction(model(validation), truth, trained, counts, fitted)
        logits = model(test)
    true = float(test_truth.float().mean())
    assert float(logits.softmax(1)[:, 1].mean()) > (2 if hidden else 4) * true  # inflated
    corrected = correction(logits)
    if fitted == "shift" or not hidden:  # a scale alone does not bring an overfitted network's mean home
        assert float(corrected.softmax(1)[:, 1].mean()) == pytest.approx(true, rel=0.2)
    assert correction.nll < correction.nll_before
    assert F.cross_entropy(corrected, test_truth) < F.cross_entropy(logits, test_truth)
    by_hand = correct_prior(logits, trained, counts, correction.scale, correction.strength)
    torch.testing.assert_close(by_hand, corrected)
    # one logit instead of two
    single = fit_prior_correction(
        (model(validation)[:, 1] - model(validation)[:, 0])[:, None], truth, trained, counts, "shift"
    )
    both = fit_prior_correction(model(validation), truth, trained, counts, "shift")
    assert single.strength == pytest.approx(both.strength, rel=1e-4)


def test_bad_priors() -> None:
    logits, targets = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="3 classes, the true one 2"):
        correct_prior(logits, [1, 1, 1], [1, 1])
    with pytest.raises(ValueError, match="do not belong together"):
        fit_prior_correction(logits, targets[:3], [1, 1], [1, 2])
    with pytest.raises(ValueError, match="not finite"):
        fit_prior_correction(logits / 0, targets, [1, 1], [1, 2])
    with pytest.raises(ValueError, match="Did you mean 'scale'"):
        fit_prior_correction(logits, targets, [1, 1], [1, 2], "scal")  # type: ignore[arg-type]
    assert fit_prior_correction(torch.randn(4, 2), targets, [1, 1], [1, 1], "shift").strength == 1.0


@pytest.mark.parametrize("metric", ["balanced_accuracy", "f1"])
def test_best_threshold_is_that_of_a_search(metric) -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    score = {"balanced_accuracy": balanced_accuracy_score, "f1": f1_score}[metric]
    generator = torch.Generator().manual_seed(3)
    targets = (torch.rand(200, generator=generator) < 0.2).long()
    scores = ((torch.randn(200, generator=generator) + targets) * 4).round() / 4  # with ties
    found = best_threshold(scores, targets, metric)
    at = lambda threshold: score(targets, scores >= threshold)  # noqa: E731
    assert found.score == pytest.approx(at(found.value))
    assert found.score == pytest.approx(max(at(float(s)) for s in scores))


def test_bad_thresholds() -> None:
    with pytest.raises(ValueError, match="both classes"):
        best_threshold(torch.rand(3), torch.zeros(3))
    with pytest.raises(ValueError, match="targets of 0 and 1"):
        best_threshold(torch.rand(3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="NaN"):
        best_threshold(torch.tensor([math.nan, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="Did you mean 'f1'"):
        best_threshold(torch.rand(2), torch.tensor([0, 1]), "F1")  # type: ignore[arg-type]


# ---- the callback


class LabelledLoader(ResumableLoader):
    """With a dataset, as a DataLoader has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dataset = TensorDataset(self.images, self.labels)


class RareData(PlainData):
    """Zeros are rare among the digits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        keep = (self.labels != 0) | (torch.rand(len(self.labels), generator=generator) < 0.4)
        self.images, self.labels = self.images[keep], self.labels[keep]

    def train_dataloader(self) -> ResumableLoader:
        return LabelledLoader(*(t[: 128 * ResumableLoader._world()[0]] for t in (self.images, self.labels)), 32, True)


class WithCriterion(PlainModule):
    """The loss as an attribute, for training and validation alike."""

    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.plain: list[tuple[float, float]] = []
        self.validated: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = self.criterion(logits, batch[1])
        with torch.no_grad():
            counts = torch.bincount(getattr(self.trainer.train_dataloader, "labels", batch[1]), minlength=10)
            weights = class_weights(counts.clamp(1))
            expected = -(logits.log_softmax(1)[torch.arange(len(logits)), batch[1]] * weights[batch[1]]).mean()
        self.plain.append((float(loss.detach()), float(expected)))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.validated.append((float(self.criterion(logits, batch[1])), float(nll(logits, batch[1]))))
        self.log("val_loss", self.criterion(logits, batch[1]), sync_dist=True)


def seeded(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy that no tip can know of."""
    return -logits.log_softmax(1)[torch.arange(len(targets)), targets].mean()


def is_weighted(module: WithCriterion) -> list[bool]:
    return [loss == pytest.approx(expected, rel=1e-5) for loss, expected in module.plain]


def test_training_loss_alone_is_weighted(tmp_path, capsys) -> None:
    module, tip = WithCriterion(), ClassWeightCallback()
    trainer = fit(tip, folder=tmp_path, module=module, data=RareData(), max_epochs=2)
    assert all(is_weighted(module))
    assert len(module.plain) == 8
    for loss, expected in module.validated:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert "forward" not in vars(module.criterion)
    assert "training_step" not in vars(trainer.strategy)
    assert "training_step" not in vars(module)
    assert [event.what for event in tip.events] == ["class weights begin"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "inverse class weights of" in printed
    pickle.dumps(tip)
    copy.deepcopy(module.criterion)


@pytest.mark.parametrize("name", ["F", "imported"])
def test_functional_loss_where_it_is_told(name, tmp_path) -> None:
    class Imported(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1])

    weights = class_weights(torch.bincount(RareData().train_dataloader().labels))

    class ByHand(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return weighted_cross_entropy(self(batch[0]), batch[1], weights)

    run = {"folder": tmp_path, "data": RareData(), "max_epochs": 2}
    module = seeded(Imported if name == "imported" else PlainModule)
    ours = fit(ClassWeightCallback(functional=True), module=module, **run)
    expected = fit(module=seeded(ByHand), **run)
    plain = fit(module=seeded(PlainModule), **run)
    assert_same(bits(ours)["weights"], bits(expected)["weights"])
    assert not torch.equal(bits(ours)["weights"]["head.weight"], bits(plain)["weights"]["head.weight"])


def test_deferred_start(tmp_path) -> None:
    module, tip = WithCriterion(), ClassWeightCallback(start_epoch=2)
    fit(tip, folder=tmp_path, module=module, data=RareData(), max_epochs=4)
    assert is_weighted(module) == [False] * 8 + [True] * 8
    assert [(event.epoch, event.step) for event in tip.events] == [(2, 8)]
    # until then the run is that of the plain module, to the bit
    begun = fit(
        ClassWeightCallback(start_epoch=2), folder=tmp_path, module=seeded(WithCriterion), data=RareData(), max_epochs=2
    )
    plain = fit(folder=tmp_path, module=seeded(WithCriterion), data=RareData(), max_epochs=2)
    assert_same(bits(begun)["weights"], bits(plain)["weights"])


class Compilable(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.compile itself
def test_compiled_module(tmp_path) -> None:
    losses = []
    for compiled in (False, True):
        tip = ClassWeightCallback({0: 50.0}, start_epoch=1)
        trainer, module = build(tip, folder=tmp_path, max_epochs=2, module=seeded(Compilable))
        trainer.fit(torch.compile(module, backend="eager") if compiled else module, datamodule=RareData())
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    trainer, module = build(ClassWeightCallback(functional=True), folder=tmp_path, module=seeded(PlainModule))
    with pytest.raises(MisconfigurationException, match="inside a compiled training_step"):
        trainer.fit(torch.compile(module, backend="eager"), datamodule=RareData())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_resume_is_exact(start: int, functional: bool, tmp_path) -> None:
    def run(*callbacks: Callback, **arguments: Any) -> Any:
        tip = ClassWeightCallback(start_epoch=start, functional=functional)
        module = seeded(PlainModule if functional else WithCriterion)
        trainer = fit(tip, *callbacks, folder=tmp_path, module=module, data=RareData(), max_epochs=4, **arguments)
        assert len(tip.events) == 1
        return bits(trainer) | {"tip": tip.state_dict()}

    expected = run(every_step(tmp_path / "kept"), every_epoch(tmp_path / "kept"))
    for name in ("step-step=3", "step-step=7", "epoch-epoch=1", "step-step=8", "step-step=10", "epoch-epoch=2"):
        checkpoint = tmp_path / "kept" / f"{name}.ckpt"
        torch.load(checkpoint, weights_only=True)
        assert_same(run(ckpt_path=checkpoint), expected, name)


def test_same_trainer_goes_on_and_another_starts_afresh(tmp_path) -> None:
    tip, module = ClassWeightCallback(start_epoch=1), WithCriterion()
    trainer, _ = build(tip, folder=tmp_path, max_epochs=2, module=module)
    trainer.fit(module, datamodule=RareData())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=RareData())
    assert is_weighted(module) == [False] * 4 + [True] * 8
    assert len(tip.events) == 1
    fit(tip, folder=tmp_path, module=(again := WithCriterion()), data=RareData(), max_epochs=2)
    assert is_weighted(again) == [False] * 4 + [True] * 4
    assert len(tip.events) == 1


def test_nothing_is_left_behind_by_a_run_that_fails(tmp_path) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            raise ZeroDivisionError

    trainer, module = build(ClassWeightCallback(), Fails(), folder=tmp_path, module=seeded(WithCriterion))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, datamodule=RareData())
    assert "training_step" not in vars(trainer.strategy)
    assert "forward" not in vars(module.criterion)


@pytest.mark.parametrize("weights", [[10.0] + [1.0] * 9, {0: 10.0}, {"0": 10}, {"zero": 10}])
def test_given_weights_are_scaled_to_mean_one(weights, tmp_path) -> None:
    data = RareData()

    class Named(RareData):
        def train_dataloader(self) -> ResumableLoader:
            loader = super().train_dataloader()
            loader.dataset.classes = ["zero", *map(str, range(1, 10))]  # type: ignore[attr-defined]
            return loader

    tip = ClassWeightCallback(weights)
    fit(tip, folder=tmp_path, module=seeded(WithCriterion), data=Named() if "zero" in weights else data, max_epochs=1)
    found = torch.tensor(tip.state_dict()["weights"])
    counts = torch.bincount(data.train_dataloader().labels)
    assert float(found[0] / found[1]) == pytest.approx(10)
    assert float((found * counts).sum() / counts.sum()) == pytest.approx(1.0)


def test_given_weights_do_without_labels(tmp_path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(RareData().images[:64], RareData().labels[:64], strict=True)

    tip = ClassWeightCallback([3.0] + [1.0] * 9)
    trainer, module = build(tip, folder=tmp_path, module=seeded(WithCriterion), max_epochs=1)
    trainer.fit(module, DataLoader(Stream(), batch_size=32), RareData().val_dataloader())
    assert tip.state_dict()["weights"] == [3.0] + [1.0] * 9
    trainer, module = build(ClassWeightCallback(), folder=tmp_path, module=seeded(WithCriterion), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"IterableDataset.*weights as a list"):
        trainer.fit(module, DataLoader(Stream(), batch_size=32), RareData().val_dataloader())
    assert trainer.global_step == 0


def refuses(message: str, folder: Path, *tips: Callback, module: Any = None, data: Any = None) -> None:
    trainer, module = build(*tips, folder=folder, module=module or WithCriterion(), max_epochs=1)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer.fit(module, datamodule=data or RareData())
    assert trainer.global_step == 0
    assert "training_step" not in vars(trainer.strategy)


def test_refusals_before_the_first_step(tmp_path) -> None:
    tip = ClassWeightCallback
    refuses("finds no loss in PlainModule.*functional=True", tmp_path, tip(), module=seeded(PlainModule))
    refuses("There are 3 weights, but .* 10 classes", tmp_path, tip([1.0, 2.0, 3.0]))
    refuses("no class 12: the training data has classes 0 to 9", tmp_path, tip({12: 2.0}))
    refuses("no names of classes", tmp_path, tip({"weapon": 2.0}))
    refuses("both would weight the same loss", tmp_path, tip(), tip(scheme="sqrt"))
    refuses("weight of its own", tmp_path, tip(), module=WithCriterion(nn.CrossEntropyLoss(weight=torch.ones(10))))
    refuses("no loss 'criterio'.*Did you mean 'criterion'", tmp_path, tip(losses=["criterio"]))

    class Unused(PlainModule):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    for start in (0, 5):
        refuses("did not call CrossEntropyLoss.*functional=True", tmp_path, tip(start_epoch=start), module=Unused())
    own = PlainModule()
    own.training_step = lambda batch, batch_idx: nll(own(batch[0]), batch[1])  # type: ignore[method-assign]
    refuses("did not call torch's loss functions", tmp_path, tip(functional=True), module=own)

    class Mixed(WithCriterion):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self(batch[0]), F.one_hot(batch[1], 10).float())

    for start in (0, 5):
        refuses("mixed or soft", tmp_path, tip(start_epoch=start), module=Mixed())

    class Gap(RareData):
        def __init__(self) -> None:
            super().__init__()
            self.labels[self.labels == 4] = 5

    refuses("No samples of class 4", tmp_path, tip(), data=Gap())

    class OneClass(RareData):
        def __init__(self) -> None:
            super().__init__()
            self.labels[:] = 0

    refuses("nothing to balance with 1 class", tmp_path, tip(), data=OneClass())

    class Negative(RareData):
        def train_dataloader(self) -> ResumableLoader:
            return LabelledLoader(self.images[:128], self.labels[:128] - 1, 32, True)

    refuses("negative class ids", tmp_path, tip(), data=Negative())


def test_data_without_labels_is_refused(tmp_path) -> None:
    class WithLoss(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss()

    trainer, module = build(ClassWeightCallback(), folder=tmp_path, module=WithLoss(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="No labels can be found in RandomDataset"):
        trainer.fit(module, DataLoader(RandomDataset(32, 64), batch_size=8))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "balanced"}, "must be 'auto'"),
        ({"weights": [1.0, -1.0]}, "not negative"),
        ({"weights": {0: -1.0}}, "not negative"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": [1.0]}, "two or more"),
        ({"scheme": "squrt"}, "Did you mean 'sqrt'"),
        ({"beta": 2.0}, "beta"),
        ({"start_epoch": -1}, "counts from 0"),
        ({"weights": [1.0, 2.0], "logit_adjustment": 1.0}, "twice is too much"),
        ({"weights": None, "logit_adjustment": -1.0}, "tau must be positive"),
        ({"adjust": "outputs"}, "pass logit_adjustment"),
        ({"weights": None, "logit_adjustment": 1.0, "adjust": "output"}, "Did you mean 'outputs'"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ClassWeightCallback(**arguments)


def test_sampler_beside_the_weights_warns(tmp_path) -> None:
    data = RareData()
    dataset = TensorDataset(data.images[:64], data.labels[:64])
    loader = DataLoader(dataset, 32, sampler=WeightedRandomSampler([1.0] * 64, 64))
    trainer, module = build(ClassWeightCallback({0: 3.0}), folder=tmp_path, module=seeded(WithCriterion), max_epochs=1)
    module.training_step = lambda batch, batch_idx: module.criterion(module(batch[0]), batch[1])
    with pytest.warns(UserWarning, match="ClassWeightCallback and WeightedRandomSampler both balance the classes"):
        trainer.fit(module, loader, RareData().val_dataloader())

    class ImbalancedSamplerCallback(Callback):
        pass

    trainer, module = build(
        ClassWeightCallback(), ImbalancedSamplerCallback(), folder=tmp_path, module=seeded(WithCriterion), max_epochs=1
    )
    with pytest.warns(UserWarning, match="and ImbalancedSamplerCallback both"):
        trainer.fit(module, datamodule=RareData())


def test_no_weights_do_nothing_and_say_so(tmp_path, capsys) -> None:
    ours = fit(ClassWeightCallback(None), folder=tmp_path, data=RareData(), max_epochs=1)
    assert "weights=None" in capsys.readouterr().out
    assert_same(bits(ours)["weights"], bits(fit(folder=tmp_path, data=RareData(), max_epochs=1))["weights"])


# ---- logit adjustment and the prior, in the callback


class Predicts(WithCriterion):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def predictions(trainer: Any, module: LightningModule, **arguments: Any) -> Tensor:
    return torch.cat(trainer.predict(module, RareData().val_dataloader(), **arguments))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_logit_adjustment_by_the_callback(tmp_path) -> None:
    counts = torch.bincount(RareData().train_dataloader().labels)
    offsets = logit_adjustment(counts, 0.7)

    class ByHand(Predicts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]) + offsets, batch[1])

    run = {"folder": tmp_path, "data": RareData(), "max_epochs": 2}
    expected = fit(module=seeded(ByHand), **run)
    ours = fit(ClassWeightCallback(None, logit_adjustment=0.7), module=seeded(Predicts), **run)
    assert_same(bits(ours)["weights"], bits(expected)["weights"])

    tip = ClassWeightCallback(None, logit_adjustment=0.7, adjust="outputs")
    trainer = fit(tip, every_epoch(tmp_path / "kept"), module=seeded(Predicts), **run)
    plain = fit(module=seeded(Predicts), **run)
    assert_same(bits(trainer)["weights"], bits(plain)["weights"])
    logits = predictions(plain, plain.lightning_module)
    torch.testing.assert_close(predictions(trainer, trainer.lightning_module), logits - offsets)
    # validation, too; and from the checkpoint alone
    assert trainer.validate(trainer.lightning_module, RareData(), verbose=False) != plain.validate(
        plain.lightning_module, RareData(), verbose=False
    )
    fresh, module = build(
        ClassWeightCallback(None, logit_adjustment=0.7, adjust="outputs"), folder=tmp_path, module=seeded(Predicts)
    )
    with pytest.raises(MisconfigurationException, match="knows no class counts"):
        predictions(fresh, module)
    torch.testing.assert_close(
        predictions(fresh, module, ckpt_path=tmp_path / "kept" / "epoch-epoch=1.ckpt"), logits - offsets
    )


# ---- two ranks


def both_ways(folder: Path) -> dict[str, Any]:
    results = {}
    for functional in (False, True):
        module = seeded(PlainModule if functional else WithCriterion)
        tip = ClassWeightCallback(functional=functional, start_epoch=1)
        fit(tip, folder=folder, data=RareData(), module=module, max_epochs=2, devices=2, strategy="ddp")
        results[str(functional)] = [parameter_hash(module), [str(e) for e in tip.events], tip.state_dict()["weights"]]
        if not functional:
            results["losses"] = module.plain
    return results


def test_two_ranks(tmp_path) -> None:
    first, second = on_two_ranks(tmp_path, both_ways)
    assert first["False"] == second["False"]
    assert first["True"] == second["True"]
    assert first["False"][0] == first["True"][0]  # the functional loss is weighted as the module is
    assert first["losses"] != second["losses"]
    for losses in (first["losses"], second["losses"]):
        assert [loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses] == [False] * 4 + [True] * 4
