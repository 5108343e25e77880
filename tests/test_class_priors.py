"""Logit adjustment, and probabilities at the true prevalence: the functions, and in the callback."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_tips.core import changed_outputs
from lightning_tips.imbalance import (
    ClassWeightCallback,
    adjust_logits,
    best_threshold,
    class_weights,
    correct_prior,
    fit_prior_correction,
    logit_adjustment,
    weighted_cross_entropy,
    weighted_prior,
)

from harness import assert_same, bits, build, every_epoch, fit
from weighted import RareData, WithCriterion, seeded

# ---- logit adjustment and the prior


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
    with pytest.warns(UserWarning, match=r"knows no class counts.* Outputs stay as they are"):
        fresh.validate(module, RareData(), verbose=False)
    torch.testing.assert_close(
        predictions(fresh, module, ckpt_path=tmp_path / "kept" / "epoch-epoch=1.ckpt"), logits - offsets
    )
