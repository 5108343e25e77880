"""What an EnsembleModule is given, what it predicts and tests, and how it refuses what cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import EnsembleModule
from lightning_tips.vision import DigitsDataModule, ImageClassifier

from ensembles import Wide, by_hand, digits
from harness import PlainData, PlainModule, assert_same, build, fit


class Fewer(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 11)


class Broken(PlainModule):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


@pytest.mark.parametrize("voting", ["soft", "weighted", "hard"])
def test_predict_says_what_the_pure_functions_say(voting: str, tmp_path: Path) -> None:
    from lightning_tips.ensemble import apply_temperature, vote

    torch.manual_seed(1)
    members: list[LightningModule] = [PlainModule(), Wide(), PlainModule()]
    weights: Any = "uniform" if voting == "soft" else [0.5, 0.2, 0.3]
    ensemble = EnsembleModule(members, voting=voting, weights=weights, return_members=True)
    ensemble.vote_temperature.fill_(0.5)
    trainer, _ = build(folder=tmp_path, module=ensemble)
    images, labels = digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 20)
    parts = trainer.predict(ensemble, loader)
    found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    probabilities = by_hand(members, images).detach()
    expected = vote(probabilities, None if voting == "soft" else [0.5, 0.2, 0.3], voting)
    torch.testing.assert_close(found["members"], probabilities.transpose(0, 1), atol=1e-6, rtol=0)
    for name in ("prediction", "votes", "entropy", "disagreement"):
        torch.testing.assert_close(found[name], getattr(expected, name), atol=1e-6, rtol=0)
    right = expected.probabilities if voting == "hard" else apply_temperature(expected.probabilities, 0.5)
    torch.testing.assert_close(found["probabilities"], right, atol=1e-6, rtol=0)
    torch.testing.assert_close(ensemble.eval()(images).detach(), right, atol=1e-6, rtol=0)


def test_test_tells_what_each_member_and_the_vote_are_worth(tmp_path: Path) -> None:
    torch.manual_seed(1)
    members: list[LightningModule] = [PlainModule(), Wide()]
    ensemble = EnsembleModule(members, weights=[3.0, 1.0])
    trainer, _ = build(folder=tmp_path, module=ensemble)
    images, labels = digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 20)
    (found,) = trainer.test(ensemble, loader, verbose=False)
    probabilities = by_hand(members, images)
    mixed = 0.75 * probabilities[0] + 0.25 * probabilities[1]
    assert found["test_loss"] == pytest.approx(F.nll_loss(mixed.log(), labels).item(), abs=1e-5)
    assert found["test_acc"] == pytest.approx((mixed.argmax(1) == labels).float().mean().item())
    assert found["test_acc/member_1"] == pytest.approx((probabilities[1].argmax(1) == labels).float().mean().item())
    assert 0 < found["test_ece/member_0"] < 1
    assert list(tmp_path.rglob("ensemble_reliability.png"))
    assert not ensemble.is_fitted  # test data never serve


def test_members_that_disagree_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for wrong, match in ((Fewer, "member 1 .Fewer. yields .*11.*member 0 .PlainModule"), (Broken, "member 1 .*NaN")):
        ensemble = EnsembleModule([PlainModule(), wrong()])
        before = {k: v.clone() for k, v in ensemble.state_dict().items()}
        with pytest.raises(MisconfigurationException, match=match):
            fit(ensemble, folder=tmp_path, num_sanity_val_steps=0)
        assert_same(dict(ensemble.state_dict()), before)
        with pytest.raises(ValueError, match=match):
            fit(EnsembleModule([PlainModule(), wrong()]), folder=tmp_path)
        images, _ = digits()
        for use in (ensemble, ensemble.to_export):
            with pytest.raises(ValueError, match=match):
                use(images)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "Give either members"),
        ({"members": []}, "empty"),
        ({"members": [nn.Linear(1, 1)]}, "member 0 is a Linear"),
        ({"member": lambda: nn.Linear(1, 1)}, "gives a Linear"),
        ({"member": PlainModule, "n": 0}, "n=0"),
        ({"member": PlainModule, "n": 2, "weights": [1.0]}, "do not fit 2 members"),
        ({"member": PlainModule, "n": 2, "weights": [1.0, -1.0]}, "member 1 is below 0"),
        ({"member": PlainModule, "n": 2, "weights": "gready"}, "greedy"),
        ({"member": PlainModule, "n": 2, "voting": "loud"}, "hard"),
        ({"member": PlainModule, "n": 2, "voting": "hard", "task": "regression"}, "no hard vote"),
        ({"member": PlainModule, "n": 2, "voting": "soft", "weights": [1.0, 2.0]}, "soft vote has no weights"),
        ({"member": PlainModule, "n": 2, "to_probabilities": ["softmax"]}, "1 entries for 2"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        EnsembleModule(**arguments)


def test_members_begin_with_seeds_of_their_own_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = EnsembleModule(member=PlainModule, n=3, seed=4), EnsembleModule(member=PlainModule, n=2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.members[0].head.weight, first.members[1].head.weight)
    assert_same(dict(first.members[1].state_dict()), dict(second.members[0].state_dict()))


class Numbers(LightningModule):
    """Regression of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch["x"]), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class Labels(Numbers):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch["x"]), batch["y"])


@pytest.mark.parametrize(("kind", "task"), [(Numbers, "regression"), (Labels, "multilabel")])
def test_regression_and_several_labels_in_dict_batches(kind: type, task: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 3)
    y = x[:, :2] + 1 if task == "regression" else (x[:, :2] > 0).float()
    loader = torch.utils.data.DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], 16)
    ensemble = EnsembleModule(member=kind, n=3, task=task, seed=0)
    trainer, _ = build(folder=tmp_path, module=ensemble, max_epochs=8)
    trainer.fit(ensemble, loader, loader)  # members have no validation_step
    assert ensemble.is_fitted
    (found,) = trainer.validate(ensemble, loader, verbose=False)
    parts = trainer.predict(ensemble, loader)
    if task == "regression":
        assert parts[0].keys() == {"mean", "variance", "within", "between"}
        mean = torch.cat([part["mean"] for part in parts])
        assert found["val_loss"] == pytest.approx(F.mse_loss(mean, y).item(), rel=1e-4)
        assert found["val_loss"] < 0.5
    else:
        assert found["val_acc"] > 0.8
        assert parts[0]["prediction"].dtype == torch.bool
        assert float(ensemble.vote_temperature) != 1


def test_first_two_lines_of_what_it_trains_with_our_own_classes(tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=lambda: ImageClassifier("resnet8", in_channels=1), n=2, seed=0)
    trainer, _ = build(folder=tmp_path, module=ensemble, max_epochs=1, limit_train_batches=4, limit_val_batches=2)
    trainer.fit(ensemble, datamodule=DigitsDataModule(batch_size=32))
    assert {"member_0/val_ece", "member_1/train_acc", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()
    assert all(member._trainer is None and "log" not in vars(member) for member in ensemble.members)


def test_with_offload_one_member_is_on_the_device_at_a_time(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.ensemble import voting_module

    torch.manual_seed(1)
    members: list[LightningModule] = [PlainModule(), Wide(), PlainModule()]
    images, labels = digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 20)
    expected = EnsembleModule(members, voting="soft").eval()(images).detach()
    ensemble = EnsembleModule(members, voting="soft", offload=True)
    moves: list[tuple[int, str]] = []
    move = voting_module._move

    def moved(member: nn.Module, device: Any) -> None:
        moves.append((members.index(member), device.type))  # type: ignore[arg-type]
        move(member, torch.device("cpu"))

    monkeypatch.setattr(voting_module, "_move", moved)
    trainer, _ = build(folder=tmp_path, module=ensemble)
    predicted = trainer.predict(ensemble, loader)
    torch.testing.assert_close(torch.cat([part["probabilities"] for part in predicted]), expected)
    assert [moves.count((index, "cpu")) > 4 for index in range(3)] == [True, True, True]
    (found,) = trainer.test(ensemble, loader, verbose=False)
    assert found["test_acc"] == pytest.approx((expected.argmax(1) == labels).float().mean().item())
    # A gradient after predict, which runs in inference mode.
    ensemble(images).sum().backward()
    assert members[0].head.weight.grad is not None  # type: ignore[union-attr]
    with pytest.raises(MisconfigurationException, match="offload=True goes with"):
        fit(ensemble, folder=tmp_path)


def test_to_another_type_goes_through_all_members_with_offload_too() -> None:
    ensemble = EnsembleModule(member=PlainModule, n=2, offload=True).double()
    assert {p.dtype for p in ensemble.parameters()} == {torch.float64}
    assert ensemble.vote_weights.dtype == torch.float64
    assert ensemble.members[1].dtype == torch.float64


def test_weights_are_refused_without_batches(tmp_path: Path) -> None:
    trainer, _ = build(folder=tmp_path, limit_val_batches=0)
    ensemble = EnsembleModule(member=PlainModule, n=2)
    with pytest.raises(ValueError, match="no batches"):
        ensemble.fit_weights_with(trainer, datamodule=PlainData())
    assert not ensemble.is_fitted


@pytest.mark.parametrize("weights", ["best", "fit", [1.0, 3.0]])
def test_one_validation_sample_leaves_the_weights_as_they_are_and_says_so(weights: Any, tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=PlainModule, n=2, weights=weights)
    before = ensemble.vote_weights.clone()
    trainer, _ = build(folder=tmp_path, module=ensemble, fast_dev_run=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits()), 1)
    with pytest.warns(UserWarning, match="no validation on two samples or more") as told:
        trainer.fit(ensemble, PlainData().train_dataloader(), loader)
    assert any("weigh the same" in str(warning.message) for warning in told) == isinstance(weights, str)
    assert torch.equal(ensemble.vote_weights, before)
    assert not ensemble.is_fitted
    assert trainer.callback_metrics["val_loss"] > 0
    with pytest.raises(ValueError, match="2 samples or more"):  # asked for, it is refused
        EnsembleModule(member=PlainModule, n=2).fit_weights([(digits()[0][:1], digits()[1][:1])])


def test_batches_without_targets_are_refused_with_what_to_do(tmp_path: Path) -> None:
    trainer, ensemble = build(folder=tmp_path, module=EnsembleModule(member=PlainModule, n=2))
    loader = torch.utils.data.DataLoader([{"image": image} for image in digits()[0]], 8)
    with pytest.raises(MisconfigurationException, match=r"EnsembleModule: Cannot tell .*target_key"):
        trainer.validate(ensemble, loader)
