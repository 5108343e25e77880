"""The losses that class weights go into: each of them, how they are found, and that they are left as they were."""

import copy
import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy  # by another name than F's

from lightning_tips.imbalance import (
    LossCorrection,
    class_weights,
    corrected_losses,
    find_losses,
    logit_adjustment,
    weighted_binary_cross_entropy_with_logits,
    weighted_cross_entropy,
    weighted_nll_loss,
)

from weighted import COUNTS

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
