"""The vote, its temperature and its pictures, against formulas written out."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_tips.ensemble import (
    RegressionVote,
    Vote,
    apply_temperature,
    as_weights,
    calibration_error,
    fit_temperature,
    plot_reliability,
    plot_weights,
    reliability,
    vote,
    vote_regression,
)


def random_members(members: int = 4, samples: int = 50, classes: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(members)
    return (2 * torch.randn(members, samples, classes, generator=generator)).softmax(2).to(dtype)


def entropy(probabilities: Tensor) -> Tensor:
    return torch.distributions.Categorical(probs=probabilities.double()).entropy()


WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("voting", ["soft", "weighted", "hard"])
def test_vote_is_what_the_formulas_say(voting) -> None:
    members = random_members()
    weights = None if voting == "soft" else WEIGHTS
    shares = torch.full((4,), 0.25) if weights is None else WEIGHTS
    found = vote(members, weights, voting)
    mean = torch.einsum("m,mnc->nc", shares, members)
    votes = torch.einsum("m,mnc->nc", shares, torch.nn.functional.one_hot(members.argmax(2), 5).float())
    torch.testing.assert_close(found.votes, votes, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.probabilities, votes if voting == "hard" else mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.entropy.double(), entropy(mean), atol=1e-5, rtol=0)
    mutual = entropy(mean) - torch.einsum("m,mn->n", shares.double(), entropy(members))
    torch.testing.assert_close(found.disagreement.double(), mutual, atol=1e-5, rtol=0)
    assert torch.equal(found.prediction, found.probabilities.argmax(1)) or voting == "hard"
    assert (found.votes.gather(1, found.prediction[:, None])[:, 0] >= votes.amax(1) - 1e-5).all() or voting != "hard"


def test_members_one_by_one_or_all_at_once_in_any_unit_and_order() -> None:
    members = random_members()
    together = vote(members, WEIGHTS)
    one_by_one = Vote("weighted")
    for index in (2, 0, 3, 1):
        one_by_one.add(members[index], weight=7 * float(WEIGHTS[index]))
    for first, second in zip(together, one_by_one.result(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    one_by_one.add(members[0], weight=0.0)
    torch.testing.assert_close(one_by_one.result(), together, atol=1e-6, rtol=0)
    assert one_by_one.members == 5


def test_adding_a_member_leaves_it_and_earlier_results_alone() -> None:
    members = random_members()
    kept = members.clone()
    votes = Vote()
    votes.add(members[0])
    first = votes.result().probabilities.clone()
    held = votes.result()
    votes.add(members[1])
    assert torch.equal(members, kept)
    assert torch.equal(held.probabilities, first)


def test_agreement_and_disagreement_have_the_right_ends() -> None:
    sure = torch.eye(2)
    apart = vote(sure[:, None])  # one is sure of the first class, one of the second
    assert float(apart.disagreement) == pytest.approx(math.log(2))
    assert float(apart.entropy) == pytest.approx(math.log(2))
    unsure = vote(torch.full((3, 1, 2), 0.5))
    assert float(unsure.disagreement) == pytest.approx(0.0, abs=1e-6)
    assert float(unsure.entropy) == pytest.approx(math.log(2))
    same = vote(random_members(1).expand(3, -1, -1))
    assert (same.disagreement >= 0).all()
    assert (same.disagreement < 1e-5).all()


def test_ties_of_hard_votes_go_to_the_likelier_class() -> None:
    members = torch.tensor([[[0.55, 0.45, 0.0]], [[0.0, 0.9, 0.1]]])
    assert vote(members, voting="hard").prediction.tolist() == [1]
    assert vote(members, [0.1 + 0.2, 0.3], voting="hard").prediction.tolist() == [1]  # equal, but for rounding
    assert vote(members, [0.6, 0.4], voting="hard").prediction.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    found = vote(random_members(dtype=dtype))
    assert found.probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(torch.isfinite(part).all() for part in found)


def test_maps_of_classes_vote_place_by_place() -> None:
    flat = random_members(3, 24, 5)
    maps = flat.reshape(3, 2, 3, 4, 5).movedim(4, 2)
    found, expected = vote(maps, voting="hard"), vote(flat, voting="hard")
    torch.testing.assert_close(found.prediction.flatten(), expected.prediction)
    torch.testing.assert_close(found.entropy.flatten(), expected.entropy)


def test_several_labels() -> None:
    members = torch.tensor([[[0.9, 0.2]], [[0.8, 0.4]], [[0.4, 0.6]]])
    found = vote(members, task="multilabel")
    assert found.prediction.tolist() == [[True, False]]
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.7, 0.4]]))
    torch.testing.assert_close(found.votes, torch.tensor([[2 / 3, 1 / 3]]))
    both = torch.stack([members, 1 - members], -1)
    torch.testing.assert_close(found.entropy.double(), entropy(both.mean(0)), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found.disagreement.double(), entropy(both.mean(0)) - entropy(both).mean(0), atol=1e-6, rtol=0
    )
    tied = vote(members[1:], voting="hard", task="multilabel")
    assert tied.prediction.tolist() == [[True, True]]  # one vote each; means of 0.6 and 0.5 decide


def test_regression_adds_variance_within_and_between() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 1000 + torch.randn(4, 30, generator=generator)
    variances = torch.rand(4, 30, generator=generator)
    found = vote_regression(means, variances, WEIGHTS)
    weights, exact = WEIGHTS.double(), means.double()
    mean = weights @ exact
    torch.testing.assert_close(found.mean.double(), mean, atol=2e-4, rtol=0)
    between = weights @ (exact - mean).square()
    torch.testing.assert_close(found.between.double(), between, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.within, WEIGHTS @ variances, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.variance, found.within + found.between)
    assert (vote_regression(means).within == 0).all()
    torch.testing.assert_close(vote_regression(means).mean, means.mean(0), atol=2e-4, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    members = random_members()
    with pytest.raises(ValueError, match="Soft voting counts all members the same"):
        vote(members, WEIGHTS, "soft")
    with pytest.raises(ValueError, match="Weighted voting needs a weight"):
        vote(members, voting="weighted")
    with pytest.raises(ValueError, match=r"Weights of shape \(3,\) do not fit 4 members"):
        vote(members, WEIGHTS[:3])
    with pytest.raises(ValueError, match="weight of member 1 is below 0"):
        as_weights([1.0, -1.0], 2)
    with pytest.raises(ValueError, match="weight of member 0 is not finite"):
        as_weights([math.nan, 1.0], 2)
    with pytest.raises(ValueError, match="All weights are 0"):
        as_weights([0.0, 0.0], 2)
    with pytest.raises(ValueError, match=r"member 1 \(wide\) yields the shape \(50, 4\)"):
        vote([members[0], members[1][:, :4] / members[1][:, :4].sum(1, keepdim=True)], names=["small", "wide"])
    with pytest.raises(ValueError, match="member 2 yields NaN"):
        vote([members[0], members[1], members[2] * math.nan])
    with pytest.raises(ValueError, match="Are they logits"):
        vote([members[0], members[1].log() + 5])
    with pytest.raises(ValueError, match="Nobody has voted"):
        Vote().result()
    with pytest.raises(ValueError, match="Did you mean 'soft'"):
        Vote("soff")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 0 or more"):
        Vote("weighted").add(members[0], weight=math.nan)
    silent = Vote("weighted")
    silent.add(members[0], weight=0.0)
    with pytest.raises(ValueError, match="All weights are 0"):
        silent.result()
    numbers = RegressionVote()
    numbers.add(torch.ones(3))
    with pytest.raises(ValueError, match="member 1 gives a variance, unlike"):
        numbers.add(torch.ones(3), variance=torch.ones(3))
    with pytest.raises(ValueError, match="variance below 0"):
        RegressionVote().add(torch.ones(3), variance=-torch.ones(3))
    with pytest.raises(ValueError, match="same classes"):
        numbers.add(torch.ones(4))


def overconfident(factor: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose softmax is right, the labels drawn from it, and the logits times ``factor``."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits, labels, factor * logits


def test_temperature_undoes_overconfidence_and_is_the_best_one() -> None:
    _, labels, wrong = overconfident()
    temperature = fit_temperature(wrong.softmax(1), labels)
    assert temperature == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(wrong, labels, from_logits=True) == pytest.approx(temperature, rel=1e-3)
    assert fit_temperature(wrong.log_softmax(1), labels, from_logits=True) == pytest.approx(temperature, rel=1e-3)

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(wrong.double() / temperature, labels))

    alone = fit_temperature(wrong.softmax(1), labels, prior=None)
    assert nll(alone) <= min(nll(alone * 1.001), nll(alone / 1.001))
    assert temperature == pytest.approx(alone, rel=2e-3)  # of so many samples the prior changes next to nothing
    after = apply_temperature(wrong.softmax(1), temperature)
    assert torch.equal(after.argmax(1), wrong.argmax(1))
    assert calibration_error(after, labels) < 0.02 < 0.1 < calibration_error(wrong.softmax(1), labels)
    torch.testing.assert_close(after, apply_temperature(wrong, temperature, from_logits=True), atol=1e-4, rtol=0)


def test_temperature_of_a_vote_is_below_that_of_a_member() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels, _ = overconfident()
    members = (logits + 1.5 * torch.randn(5, *logits.shape, generator=generator)).softmax(2)
    mixed = vote(members).probabilities
    # The noise makes a member too sure; the mean of five is less sure of itself.
    assert fit_temperature(mixed, labels) < fit_temperature(members[0], labels)


def test_temperature_of_labels_and_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    labels = torch.bernoulli(logits.sigmoid(), generator=generator).long()
    found = fit_temperature((2 * logits).sigmoid(), labels, task="multilabel")
    assert found == pytest.approx(2.0, rel=0.1)
    after = apply_temperature((2 * logits).sigmoid(), found, task="multilabel")
    assert calibration_error(after, labels, task="multilabel") < 0.03
    flat, classes, wrong = overconfident()
    maps = wrong.reshape(80, 10, 10, 4).movedim(3, 1)
    expected = fit_temperature(wrong, classes, from_logits=True)
    assert fit_temperature(maps, classes.reshape(80, 10, 10), from_logits=True) == pytest.approx(expected)
    assert len(flat) == 8000


def test_a_lucky_split_makes_the_vote_no_surer_than_it_may_be() -> None:
    """Of a hundred held-out samples none is wrong; of new ones every hundredth is."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (4000,), generator=generator)
    logits = 4.5 * torch.nn.functional.one_hot(labels, 10) + torch.randn(4000, 10, generator=generator)
    right = (logits.argmax(1) == labels).nonzero().flatten()
    assert 0.98 < len(right) / 4000 < 0.995
    lucky, new = right[:100], torch.arange(2000, 4000)

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits[new] / temperature, labels[new]))

    alone = fit_temperature(logits[lucky], labels[lucky], from_logits=True, prior=None)
    kept = fit_temperature(logits[lucky], labels[lucky], from_logits=True)
    assert 3 * loss(kept) < min(loss(alone), loss(1.0))


def test_temperature_at_the_ends() -> None:
    labels = torch.tensor([0, 1])
    assert fit_temperature(torch.full((2, 2), 0.5), labels) == 1.0  # it makes no difference
    never_wrong, never_right = torch.tensor([[0.6, 0.4], [0.4, 0.6]]), torch.tensor([[0.4, 0.6], [0.6, 0.4]])
    assert fit_temperature(never_wrong, labels, prior=None) == pytest.approx(0.02)
    assert fit_temperature(never_right, labels, prior=None) == pytest.approx(50.0)
    assert 0.8 < fit_temperature(never_wrong, labels) < 1  # two samples are no reason to be so sure
    assert 1 < fit_temperature(never_right, labels) < 1.25
    with pytest.raises(ValueError, match="prior=0"):
        fit_temperature(never_right, labels, prior=0)
    assert math.isfinite(fit_temperature(torch.eye(2), labels))
    with pytest.raises(ValueError, match="above 0 and finite"):
        apply_temperature(torch.eye(2), 0.0)
    with pytest.raises(ValueError, match="no samples"):
        fit_temperature(torch.ones(0, 2), labels[:0])
    with pytest.raises(ValueError, match="no temperature"):
        fit_temperature(torch.ones(2), torch.ones(2), task="regression")
    with pytest.raises(ValueError, match="1 bin"):
        reliability(torch.eye(2), labels, bins=0)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_reliability_agrees_with_the_calibration_error(task) -> None:
    generator = torch.Generator().manual_seed(0)
    if task == "multiclass":
        _, labels, wrong = overconfident()
        probabilities = wrong.softmax(1)
    else:
        probabilities = torch.rand(500, 3, generator=generator)
        labels = torch.randint(2, (500, 3), generator=generator)
    for bins in (5, 15):
        found = reliability(probabilities, labels, bins, task=task)
        assert len(found.edges) == bins + 1
        assert int(found.counts.sum()) == (len(labels) if task == "multiclass" else labels.numel())
        assert found.error == pytest.approx(calibration_error(probabilities, labels, bins, task=task), abs=1e-4)


def test_pictures(tmp_path: Path) -> None:
    _, labels, wrong = overconfident()
    curves = {"vote": reliability(wrong.softmax(1), labels)}
    plot_reliability(curves, tmp_path / "reliability.png")
    plot_weights([0.5, 0.5, 0.0], tmp_path / "weights.png", names=["a", "b"], scores=[0.9, 0.8, 0.1])
    plot_weights(torch.ones(60), tmp_path / "many.png")
    for name in ("reliability", "weights", "many"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_reliability({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="2 scores do not fit 3 members"):
        plot_weights([1.0, 1.0, 1.0], tmp_path / "none.png", scores=[1.0, 2.0])
