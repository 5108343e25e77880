"""The weights of an ensemble: what each method promises, and what is refused."""

import pytest
import torch
from torch import Tensor

from lightning_tips.ensemble import cross_fit, ensemble_weights
from lightning_tips.ensemble.objective import MixtureLikelihood, SquaredError, build_objective
from lightning_tips.ensemble.simplex import minimise_quadratic


def members(strengths: list[float], samples: int = 400, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Independent members that know the true class the better the greater their strength."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(len(strengths), samples, classes, generator=generator)
    logits[:, torch.arange(samples), targets] += torch.tensor(strengths)[:, None]
    return logits.softmax(2), targets


def nll(weights: Tensor, probabilities: Tensor, targets: Tensor) -> float:
    mixed = torch.einsum("m,mnc->nc", weights.double(), probabilities.double())
    return float(-mixed[torch.arange(len(targets)), targets].log().mean())


@pytest.mark.parametrize("method", ["best", "uniform", "greedy", "fit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_sum_and_type(method: str, dtype: torch.dtype) -> None:
    probabilities, targets = members([1.0, 2.0, 0.0])
    weights = ensemble_weights(probabilities.to(dtype), targets, method)
    assert weights.shape == (3,)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(weights, ensemble_weights(probabilities.to(dtype), targets, method))
    assert (weights == weights[0]).all() == (method == "uniform")


def test_fit_is_no_worse_than_any_other_weights() -> None:
    for seed in range(5):
        probabilities, targets = members([0.5, 1.0, 1.5, 1.5, 0.0], seed=seed)
        fitted = nll(ensemble_weights(probabilities.double(), targets, "fit", tolerance=1e-9), probabilities, targets)
        others = torch.distributions.Dirichlet(torch.full((5,), 0.5)).sample((200,))
        assert fitted <= min(nll(w, probabilities, targets) for w in others) + 1e-6
        # Expectation maximisation comes to the same place, slowly.
        likelihoods = probabilities.double()[:, torch.arange(len(targets)), targets]
        weights = torch.full((5,), 0.2, dtype=torch.float64)
        for _ in range(5000):
            weights = weights * (likelihoods / (weights @ likelihoods)).mean(1)
        assert fitted == pytest.approx(nll(weights, probabilities, targets), abs=1e-6)


def test_fit_keeps_its_tolerance() -> None:
    probabilities, targets = members([0.5, 1.0, 1.5, 1.5, 0.0])
    objective = build_objective(probabilities, targets)
    weights = objective.fit(1e-10)
    ratios = (objective.values / torch.tensordot(weights, objective.values, 1)).mean((1, 2))
    assert float(ratios.max().log()) <= 1e-10  # Cover's bound on what is left to gain


def test_greedy_weights_are_counts_and_never_worse_than_the_best_member_or_uniform() -> None:
    for seed in range(5):
        probabilities, targets = members([0.5, 1.0, 1.5, 1.5, 0.0], seed=seed)
        weights = ensemble_weights(probabilities.double(), targets, "greedy", rounds=20)
        counts = [weights * n for n in range(1, 21)]
        assert any(torch.allclose(c, c.round(), atol=1e-9) for c in counts)
        found = nll(weights, probabilities, targets)
        assert found <= min(nll(w, probabilities, targets) for w in torch.eye(5)) + 1e-9
        assert found <= nll(torch.full((5,), 0.2), probabilities, targets) + 1e-9
        fitted = nll(ensemble_weights(probabilities.double(), targets, "fit"), probabilities, targets)
        assert fitted <= found + 1e-6
        assert found <= fitted + 0.01


def test_best_is_greedy_with_unequal_members_and_uniform_where_greedy_only_overfits() -> None:
    unequal, targets = members([3.0, 3.0, 0.0, 0.0])
    weights = ensemble_weights(unequal, targets)
    assert torch.equal(weights, ensemble_weights(unequal, targets, "greedy"))
    assert float(weights[:2].sum()) > 0.9
    chosen = []
    for seed in range(8):
        equal, targets = members([1.0] * 6, samples=15, seed=seed)
        weights = ensemble_weights(equal, targets)
        uniform = cross_fit(equal, targets, "uniform").loss
        greedy = cross_fit(equal, targets, "greedy").loss
        assert (weights == weights[0]).all() == (uniform <= greedy)
        chosen.append(uniform <= greedy)
    assert sum(chosen) >= 6


def test_cross_fit_judges_each_fold_by_the_others() -> None:
    probabilities, targets = members([1.0, 2.0, 0.0], samples=103)
    found = cross_fit(probabilities, targets, "greedy", folds=4, seed=3)
    assert found.weights.shape == (4, 3)
    assert sorted(found.fold.bincount().tolist()) == [25, 26, 26, 26]
    for fold in range(4):
        here = found.fold == fold
        weights = ensemble_weights(probabilities[:, ~here].double(), targets[~here], "greedy")
        torch.testing.assert_close(found.weights[fold], weights)
        assert float(found.losses[here].mean()) == pytest.approx(nll(weights, probabilities[:, here], targets[here]))
    assert found.loss == pytest.approx(float(found.losses.mean()))
    assert not torch.equal(found.fold, cross_fit(probabilities, targets, folds=4, seed=4).fold)
    assert len(cross_fit(probabilities[:, :3], targets[:3], folds=10).weights) == 3
    nested = cross_fit(probabilities, targets, "best", folds=3)
    assert float(nested.weights.sum()) == pytest.approx(3.0)


def test_bags_are_seeded_and_reach_every_good_member() -> None:
    probabilities, targets = members([1.0] * 8)
    first = ensemble_weights(probabilities, targets, "greedy", bags=15, seed=1)
    assert torch.equal(first, ensemble_weights(probabilities, targets, "greedy", bags=15, seed=1))
    assert not torch.equal(first, ensemble_weights(probabilities, targets, "greedy", bags=15, seed=2))
    assert (first > 0).sum() >= (ensemble_weights(probabilities, targets, "greedy") > 0).sum()


def test_a_probability_of_zero_is_survived() -> None:
    probabilities = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.9, 0.1]], [[0.6, 0.4], [0.5, 0.5], [0.6, 0.4]]])
    targets = torch.tensor([0, 1, 0])  # the first member is sure and wrong once
    for method in ("greedy", "fit", "best"):
        weights = ensemble_weights(probabilities, targets, method, folds=3)
        assert torch.isfinite(weights).all()
        assert float(weights[1]) > 0.3


def test_maps_of_classes_count_every_place() -> None:
    flat, targets = members([2.0, 0.0, 1.0], samples=60)
    maps = flat.reshape(3, 10, 2, 3, 4).movedim(4, 2)
    weights = ensemble_weights(maps, targets.reshape(10, 2, 3), "fit")
    torch.testing.assert_close(weights, ensemble_weights(flat, targets, "fit"), atol=1e-4, rtol=0)


def test_several_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (300, 5), generator=generator)
    noise = torch.randn(3, 300, 5, generator=generator)
    logits = noise + torch.tensor([2.0, 0.0, 2.0])[:, None, None] * (2 * targets - 1)
    weights = ensemble_weights(logits.sigmoid(), targets, "fit", task="multilabel")
    assert float(weights[1]) < 0.05
    mixed = torch.einsum("m,mnc->nc", weights, logits.sigmoid())
    expected = float(torch.nn.functional.binary_cross_entropy(mixed, targets.float()))
    objective = build_objective(logits.sigmoid(), targets, "multilabel")
    assert objective.loss(weights.double()) == pytest.approx(expected, abs=1e-5)


def test_regression_by_squared_error_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 500, 2, generator=generator, dtype=torch.float64)
    outputs = targets + noise * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[:, None, None]
    weights = ensemble_weights(outputs, targets, "fit", task="regression")
    # Independent errors: by the inverse of the variances.
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.25, 4.0], dtype=torch.float64) / 5.25, atol=0.06, rtol=0)
    objective = build_objective(outputs, targets, "regression")
    assert isinstance(objective, SquaredError)
    expected = (torch.einsum("m,mnc->nc", weights, outputs) - targets).square().mean()
    assert objective.loss(weights) == pytest.approx(float(expected))
    for other in torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((100,)):
        assert objective.loss(weights) <= objective.loss(other) + 1e-9
    best = ensemble_weights(outputs, targets, task="regression")
    assert float(best[2]) > 0.5


def test_regression_by_the_likelihood_of_the_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 1e4 + torch.randn(300, generator=generator, dtype=torch.float64)
    outputs = torch.stack([torch.full_like(targets, 1e4), torch.full_like(targets, 1e4 + 50)])
    variances = torch.stack([torch.ones_like(targets), torch.full_like(targets, 0.01)])  # sure, and far off
    objective = build_objective(outputs, targets, "regression", variances)
    assert isinstance(objective, MixtureLikelihood)
    normal = torch.distributions.Normal(1e4, 1.0).log_prob(targets)
    alone = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(objective.losses(alone), -normal)
    weights = ensemble_weights(outputs, targets, "fit", task="regression", variances=variances)
    torch.testing.assert_close(weights, alone, atol=1e-4, rtol=0)


def test_quadratic_on_the_simplex() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 12):
        factor = torch.randn(size, 3, generator=generator, dtype=torch.float64) + 0.5  # singular for size > 3
        matrix = factor @ factor.T
        weights = minimise_quadratic(matrix)
        slope = matrix @ weights
        assert (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(1.0)
        assert float(slope @ weights - slope.min()) < 1e-8  # the condition of the optimum
    twins = minimise_quadratic(torch.ones(3, 3, dtype=torch.float64))
    assert float(twins.sum()) == 1.0


def test_one_member_and_one_sample() -> None:
    probabilities, targets = members([1.0])
    for method in ("best", "uniform", "greedy", "fit"):
        assert ensemble_weights(probabilities, targets, method).tolist() == [1.0]
    probabilities, targets = members([1.0, 2.0], samples=1)
    assert ensemble_weights(probabilities, targets, "uniform").tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="2 samples or more"):
        ensemble_weights(probabilities, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t: (p[:, :0], t[:0]), "no samples: .* a split of their own"),
        (lambda p, t: (p[:0], t), "no members"),
        (lambda p, t: (p, t[:-1]), r"Targets of shape \(400,\)"),
        (lambda p, t: (p, torch.nn.functional.one_hot(t)), "argmax"),
        (lambda p, t: (p, t + 1), r"0 \.\.\. 3, but there are 1 \.\.\. 4"),
        (lambda p, t: (p[0], t), "stacked over the members"),
        (lambda p, t: (p.index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(torch.nan)), t), "member 2.*NaN"),
        (lambda p, t: (p.index_put((torch.tensor(1),), p[1].log()), t), "member 1.*log-probabilities"),
        (lambda p, t: (p.index_put((torch.tensor(1),), 9 * p[1] - 3), t), "member 1.*logits"),
        (lambda p, t: (p.index_put((torch.tensor(1),), p[1].sqrt()), t), "member 1.*sum of 1"),
        (lambda p, t: (torch.where(p == p[0].max(), torch.inf, p), t), "member 0.*infinite"),
        (lambda p, t: (p[:, :, :1], t), "1 class"),
    ],
)
def test_bad_input_is_refused_and_the_member_named(change, message: str) -> None:
    probabilities, targets = change(*members([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=message):
        ensemble_weights(probabilities, targets)


def test_bad_arguments_are_refused() -> None:
    probabilities, targets = members([1.0, 1.0])
    with pytest.raises(ValueError, match="Did you mean 'greedy'"):
        ensemble_weights(probabilities, targets, "gready")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="There is no task"):
        ensemble_weights(probabilities, targets, task="multi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 folds"):
        ensemble_weights(probabilities, targets, folds=1)
    with pytest.raises(ValueError, match="1 round"):
        ensemble_weights(probabilities, targets, rounds=0)
    with pytest.raises(ValueError, match="tolerance"):
        ensemble_weights(probabilities, targets, tolerance=0.0)
    with pytest.raises(ValueError, match="belong to task='regression'"):
        ensemble_weights(probabilities, targets, variances=probabilities)
    with pytest.raises(TypeError, match="integers"):
        ensemble_weights(probabilities, targets.float())
    with pytest.raises(TypeError, match=r"member 0 \(small\) yields torch.int64"):
        ensemble_weights(probabilities.long(), targets, names=["small", "wide"])
    with pytest.raises(ValueError, match="3 names do not fit 2 members"):
        ensemble_weights(probabilities, targets, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="0 and 1"):
        ensemble_weights(torch.rand(2, 5, 3), torch.full((5, 3), 2), task="multilabel")
    ones = torch.ones(2, 5)
    with pytest.raises(ValueError, match="member 1 yields variances"):
        ensemble_weights(ones, ones[0], task="regression", variances=torch.stack([ones[0], -ones[0]]))
    with pytest.raises(ValueError, match="not finite"):
        ensemble_weights(torch.ones(2, 5), torch.full((5,), torch.nan), task="regression")
