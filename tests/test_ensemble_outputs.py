"""What members return and how it is judged: what it is taken for, in which form targets come, ties, ranks, classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips import EnsembleModule
from lightning_tips.ensemble import vote
from lightning_tips.ensemble.evaluation import align_targets, combine, fit_vote, other_class_order, scores, whole_split
from lightning_tips.ensemble.outputs import Outputs, find_kind

from harness import PlainData, PlainModule, build


class Fixed(LightningModule):
    """Returns what it is given, as its own."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, x: Tensor) -> Tensor:
        return self.output[x.long()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_in_half_precision_are_no_logits(dtype: torch.dtype) -> None:
    right = (torch.randn(500, 50) * 3).softmax(1)
    for values, kind in ((right, "identity"), (right.log(), "exp")):
        outputs = Outputs("member 0", "multiclass")
        read = outputs.read(values.to(dtype))
        assert outputs.convert == kind
        torch.testing.assert_close(read, right, atol=5e-3, rtol=0.05)
        torch.testing.assert_close(read.sum(1), torch.ones(500), atol=1e-4, rtol=0)
        vote(read[None])  # which looks at sums again, in float32


def test_what_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(ValueError, match="to_probabilities='identity' or 'sigmoid'"):
        find_kind(torch.zeros(4, 3), "multilabel")  # the logits of a head that begins at 0
    assert find_kind(torch.randn(40, 3), "multilabel") == "sigmoid"
    for output in (torch.randn(4), torch.randn(4, 1)):
        with pytest.raises(ValueError, match=r"member 1 returns one number .*to_probabilities='binary'"):
            Outputs("member 1", "multiclass").read(output)
    with pytest.raises(ValueError, match="member 1 yields NaN"):
        Outputs("member 1", "multiclass").read(torch.full((4, 1), torch.nan))
    assert find_kind(torch.zeros(4, 3), "multiclass") == "softmax"


class OneLogit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.1)


def test_one_logit_for_two_classes_with_targets_of_a_binary_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(120, 4)
    loader = DataLoader(TensorDataset(x, (x.sum(1, keepdim=True) > 0).float()), 20)
    ensemble = EnsembleModule(member=OneLogit, n=2, to_probabilities="binary", seed=0)
    trainer, _ = build(folder=tmp_path, module=ensemble, max_epochs=6)
    trainer.fit(ensemble, loader, loader)
    (found,) = trainer.test(ensemble, loader, verbose=False)
    assert found["test_acc"] > 0.9
    assert trainer.predict(ensemble, loader)[0]["probabilities"].shape == (20, 2)


@pytest.mark.parametrize(
    ("targets", "shape", "task", "expected"),
    [
        (torch.ones(5, 1), (5,), "regression", torch.ones(5)),
        (torch.ones(5), (5, 1), "regression", torch.ones(5, 1)),
        (torch.ones(5), (5, 2), "regression", torch.ones(5)),
        (torch.tensor([[0], [2]]), (2, 3), "multiclass", torch.tensor([0, 2])),
        (torch.tensor([0.0, 1.0]), (2, 2), "multiclass", torch.tensor([0, 1])),
        (torch.tensor([0.0, 0.5]), (2, 2), "multiclass", torch.tensor([0.0, 0.5])),
        (torch.ones(3, 1), (3, 1), "multilabel", torch.ones(3, 1)),
    ],
)
def test_targets_in_another_form(targets: Tensor, shape: Any, task: Any, expected: Tensor) -> None:
    found = align_targets(targets, shape, task)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_numbers_as_columns_and_targets_as_rows(tmp_path: Path) -> None:
    x, y = torch.arange(30), torch.linspace(0, 3, 30)
    ensemble = EnsembleModule([Fixed(y[:, None] + 1), Fixed(y[:, None] - 1)], task="regression", weights="fit")
    assert ensemble.fit_weights(DataLoader(TensorDataset(x, y), 10))["loss"] == pytest.approx(0, abs=0.02)
    torch.testing.assert_close(ensemble.vote_weights, torch.tensor([0.5, 0.5]))


def test_ties_of_hard_votes_are_judged_as_they_are_predicted(tmp_path: Path) -> None:
    members = torch.tensor([[[0.6, 0.4, 0.0]], [[0.0, 0.9, 0.1]], [[0.0, 0.1, 0.9]]]).expand(3, 20, 3)
    truth = torch.ones(20, dtype=torch.long)  # a tie of three, and class 1 is likeliest
    found = scores(combine(members, torch.ones(3), 1.0, "hard", "multiclass"), truth, "multiclass")
    assert found["acc"] == 1
    ensemble = EnsembleModule([Fixed(one) for one in members], voting="hard", weights="uniform")
    loader = DataLoader(TensorDataset(torch.arange(20), truth), 10)
    trainer, _ = build(folder=tmp_path, module=ensemble)
    (tested,) = trainer.test(ensemble, loader, verbose=False)
    right = torch.cat([part["prediction"] for part in trainer.predict(ensemble, loader)]) == truth
    assert tested["test_acc"] == float(right.float().mean()) == 1


def test_hard_votes_are_cross_fitted_too() -> None:
    """With more members than samples say, greedy finds by luck some that seem right."""
    generator = torch.Generator().manual_seed(0)
    members = (5 * torch.randn(60, 40, 2, generator=generator)).softmax(2)
    truth = torch.randint(2, (40,), generator=generator)
    found = fit_vote(members, truth, "greedy", "hard")
    weights = torch.tensor(found["weights"])
    lucky = scores(combine(members, weights, 1.0, "hard", "multiclass"), truth, "multiclass")
    assert lucky["acc"] > 0.7
    assert found["scores"]["acc"] < 0.6


def test_ranks_make_up_the_split_as_one_rank_has_it() -> None:
    members, targets = torch.arange(2 * 7 * 3).reshape(2, 7, 3), torch.arange(7)
    padded = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])  # for three ranks
    ranks = [(members[:, padded[r::3]], targets[padded[r::3]]) for r in range(3)]
    found = whole_split(ranks, samples=7)
    assert found is not None
    assert torch.equal(found[0], members)
    assert torch.equal(found[1], targets)
    begun = whole_split([(m[:, :1], t[:1]) for m, t in ranks], samples=7)  # limited to the first batches
    assert begun is not None
    assert begun[1].tolist() == [0, 1, 2]
    other = whole_split(ranks)
    assert other is not None
    assert other[1].tolist() == [0, 3, 6, 1, 4, 0, 2, 5, 1]
    assert whole_split([None, None]) is None
    (alone,) = [part for part in [whole_split([ranks[0], None, None], samples=1)] if part]
    assert alone[1].tolist() == [0]


def test_a_member_with_its_classes_in_another_order_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (200,), generator=generator)
    good = (4 * F.one_hot(truth, 4) + torch.randn(200, 4, generator=generator)).softmax(1)
    order = [2, 0, 1, 3]  # its class 0 is class 2
    shuffled = good[:, order]
    assert other_class_order(good, truth) is None
    assert other_class_order(torch.full((200, 4), 0.25), truth) is None  # untrained
    found = other_class_order(shuffled, truth)
    assert found is not None
    assert found[2] == order
    ensemble = EnsembleModule([Fixed(good), Fixed(shuffled)])
    with pytest.warns(UserWarning, match=r"member 1 .Fixed. is right for .*\[2, 0, 1, 3\]"):
        ensemble.fit_weights(DataLoader(TensorDataset(torch.arange(200), truth), 50))


class Normed(PlainModule):
    """In training mode, with a part of it that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.head.eval()

    def forward(self, images: Any) -> Tensor:
        return super().forward(images["left"] if isinstance(images, dict) else images)


def test_an_export_leaves_the_members_as_they_are(tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=Normed, n=2, seed=0)
    before = {k: v.clone() for k, v in ensemble.state_dict().items()}
    images = PlainData().images[:4]
    assert ensemble.export(tmp_path / "vote.pt2", images) <= 1e-6
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items())
    assert ensemble.members[0].training
    assert not ensemble.members[0].head.training
    with pytest.raises(TypeError, match=r"inputs of the example are a dict.*input_key"):
        ensemble.export(tmp_path / "vote.pt2", {"x": {"left": images}})


def test_a_soft_vote_takes_no_weights_from_a_checkpoint() -> None:
    weighted = EnsembleModule(member=PlainModule, n=2, weights=[0.9, 0.1], seed=0)
    soft = EnsembleModule(member=PlainModule, n=2, voting="soft").eval()
    soft.load_state_dict(weighted.state_dict())
    images = PlainData().images[:4]
    expected = torch.stack([member(images).softmax(1) for member in soft.members]).mean(0)
    torch.testing.assert_close(soft(images), expected)
    torch.testing.assert_close(soft.predict_step(images)["probabilities"], expected)
    torch.testing.assert_close(soft.to_export(images)(images), expected)
