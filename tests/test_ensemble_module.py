"""What an EnsembleModule is given, what it predicts and tests, and how it refuses what cannot work."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import EnsembleModule
from lightning_tips.core import keep_indices
from lightning_tips.vision import DigitsDataModule, ImageClassifier

from harness import PlainData, PlainModule, assert_same, build, every_epoch, fit


class Wide(PlainModule):
    """Of another width, and its forward gives log-probabilities."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features[3] = nn.Conv2d(8, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).log_softmax(1)


class Fewer(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 11)


class Needing(PlainModule):
    def __init__(self, width: int) -> None:
        super().__init__()


class Broken(PlainModule):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


def saved(folder: Path, *modules: LightningModule) -> list[Path]:
    paths = []
    for index, module in enumerate(modules):
        trainer, _ = build(folder=folder, module=module)
        trainer.strategy.connect(module)
        module.trainer = trainer
        paths.append(folder / f"member-{index}.ckpt")
        trainer.save_checkpoint(paths[-1])
    return paths


def digits() -> tuple[Tensor, Tensor]:
    data = PlainData()
    return data.images[:64], data.labels[:64]


def by_hand(members: list[LightningModule], images: Tensor) -> Tensor:
    outputs = [member.eval()(images) for member in members]
    return torch.stack(
        [o.exp() if isinstance(m, Wide) else o.softmax(1) for m, o in zip(members, outputs, strict=True)]
    )


def test_from_checkpoints_of_several_classes_and_pruned_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, pruned, wide = PlainModule(), PlainModule(), Wide(width=14)
    keep_indices(pruned, {"features.3.weight": [[0, 2, 5], None, None, None], "features.3.bias": [[0, 2, 5]],
                          "head.weight": [None, [0, 2, 5]]})  # fmt: skip
    paths = saved(tmp_path, whole, pruned, wide)
    ensemble = EnsembleModule.from_checkpoints(paths, [PlainModule, PlainModule, Wide], voting="soft").eval()
    assert [type(member) for member in ensemble.members] == [PlainModule, PlainModule, Wide]
    assert ensemble.members[1].head.in_features == 3
    assert ensemble.members[2].head.in_features == 14
    images, _ = digits()
    expected = by_hand([whole, pruned, wide], images).mean(0)
    torch.testing.assert_close(ensemble(images), expected, atol=1e-6, rtol=0)
    by_factory = EnsembleModule.from_checkpoints(paths[:2], lambda: PlainModule())
    assert_same(dict(by_factory.members[1].state_dict()), dict(pruned.state_dict()))


def test_from_checkpoints_takes_the_snapshots_of_a_run(tmp_path: Path) -> None:
    fit(every_epoch(tmp_path / "kept"), folder=tmp_path, max_epochs=3)
    ensemble = EnsembleModule.from_checkpoints(tmp_path / "kept", PlainModule)
    assert len(ensemble.members) == 3
    assert not torch.equal(ensemble.members[0].head.weight, ensemble.members[2].head.weight)


def test_bad_checkpoints_are_named_by_member(tmp_path: Path) -> None:
    (good,) = saved(tmp_path, PlainModule())
    with pytest.raises(FileNotFoundError, match=r"member 1: there is no checkpoint .*Did you mean 'member-0.ckpt'"):
        EnsembleModule.from_checkpoints([good, tmp_path / "member-1.ckpt"], PlainModule)
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"member 1: .*cut.ckpt is damaged"):
        EnsembleModule.from_checkpoints([good, tmp_path / "cut.ckpt"], PlainModule)
    torch.save({"weights": torch.ones(2)}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"member 0: .* is no Lightning checkpoint"):
        EnsembleModule.from_checkpoints([tmp_path / "plain.ckpt"], PlainModule)
    with pytest.raises(ValueError, match=r"(?s)member 1: .*does not fit ImageClassifier.*its own class"):
        EnsembleModule.from_checkpoints([good, good], [PlainModule, ImageClassifier])
    with pytest.raises(ValueError, match=r"member 1: .*does not fit Needing.*save_hyperparameters"):
        EnsembleModule.from_checkpoints([good, good], [PlainModule, Needing])
    torch.save({"state_dict": PlainModule().state_dict()}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"member 0: .*pass a function"):
        EnsembleModule.from_checkpoints([tmp_path / "weights.ckpt"], PlainModule)
    EnsembleModule.from_checkpoints([tmp_path / "weights.ckpt"], lambda: PlainModule())
    (tmp_path / "whole").mkdir()
    (whole,) = saved(tmp_path / "whole", EnsembleModule([PlainModule()]))
    with pytest.raises(ValueError, match=r"member 0: .*is a whole ensemble"):
        EnsembleModule.from_checkpoints([whole], PlainModule)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        EnsembleModule.from_checkpoints(tmp_path / "empty", PlainModule)


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


def test_weights_from_a_split_of_their_own_stay_in_the_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    good = PlainModule(scheduler=False)
    fit(folder=tmp_path, module=good, max_epochs=15, limit_val_batches=0)
    ensemble = EnsembleModule([PlainModule(), good, PlainModule()], weights="greedy").train()
    images, labels = PlainData().images[1000:], PlainData().labels[1000:]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 100)
    found = ensemble.fit_weights(loader)
    assert ensemble.training
    assert ensemble.vote_weights.argmax() == 1
    assert ensemble.vote_weights.sum() == pytest.approx(1)
    members = by_hand(list(ensemble.members), images)
    assert found["loss"] < F.nll_loss(members.mean(0).log(), labels)
    (path,) = saved(tmp_path, ensemble)
    again = EnsembleModule.load_from_checkpoint(path, members=[PlainModule() for _ in range(3)], weights_only=True)
    assert_same(dict(again.state_dict()), dict(ensemble.state_dict()))
    assert again.is_fitted
    with pytest.raises(ValueError, match="no batches"):
        ensemble.fit_weights([])


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


class Quick(PlainModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def test_members_of_one_network_become_a_soup_and_others_are_refused(tmp_path: Path) -> None:
    images, labels = PlainData().images, PlainData().labels
    data = torch.utils.data.TensorDataset(images[1000:], labels[1000:])
    loader = torch.utils.data.DataLoader(data, 200)
    torch.manual_seed(0)
    trained = Quick()
    fit(folder=tmp_path, module=trained, max_epochs=25, limit_val_batches=0)
    forks = [copy.deepcopy(trained) for _ in range(3)]
    for fork in forks:
        for parameter in fork.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    ensemble = EnsembleModule(forks)
    before = {k: v.clone() for k, v in ensemble.state_dict().items()}
    train = [(images[:1000], labels[:1000])]
    soup, chosen = ensemble.soup(loader, train)
    assert isinstance(soup, Quick)
    expected = torch.stack([forks[index].head.weight for index in chosen]).mean(0)
    torch.testing.assert_close(soup.head.weight, expected)

    def accuracy(module: nn.Module) -> float:
        return float((module.eval()(images[1000:]).argmax(1) == labels[1000:]).float().mean())

    assert accuracy(soup) > 0.4
    assert_same(dict(ensemble.state_dict()), before)
    torch.manual_seed(5)
    stranger = Quick()
    fit(folder=tmp_path, module=stranger, max_epochs=25, limit_val_batches=0)
    with pytest.raises(ValueError, match="do not seem to come from the same initialisation: the cosine similarity"):
        EnsembleModule([trained, stranger]).soup(loader, train)
    with pytest.raises(ValueError, match=r"member 1 .Wide. "):
        EnsembleModule([trained, Wide()]).soup(loader, train)
    normed = EnsembleModule(member=lambda: ImageClassifier("resnet8", in_channels=1), n=2)
    with pytest.raises(ValueError, match="pass train_dataloader"):
        normed.soup(loader)
    with pytest.raises(ValueError, match="no batches"):
        ensemble.soup([], train)


def test_soup_estimates_batch_norm_again() -> None:
    torch.manual_seed(0)
    first = ImageClassifier("resnet8", in_channels=1)
    ensemble = EnsembleModule([first, copy.deepcopy(first)])
    images, labels = digits()
    soup, _ = ensemble.soup([(images, labels)], [(images, labels)])
    normed = next(m for m in soup.modules() if isinstance(m, nn.BatchNorm2d))
    own = next(m for m in first.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(own.num_batches_tracked) == 0
    assert int(normed.num_batches_tracked) == 1
    assert not torch.equal(normed.running_mean, own.running_mean)
    assert not soup.training


def test_members_change_and_get_back_what_they_save(tmp_path: Path) -> None:
    class Saves(PlainModule):
        got = None

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 3
            checkpoint["state_dict"]["head.bias.old"] = checkpoint["state_dict"].pop("head.bias")

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.got = checkpoint["mine"]
            checkpoint["state_dict"]["head.bias"] = checkpoint["state_dict"].pop("head.bias.old")

    ensemble = EnsembleModule([PlainModule(), Saves()])
    (path,) = saved(tmp_path, ensemble)
    members = [PlainModule(), Saves()]
    again = EnsembleModule.load_from_checkpoint(path, members=members, weights_only=True)
    assert again.members[1].got == 3
    assert_same(dict(again.state_dict()), dict(ensemble.state_dict()))


def test_weights_are_refused_without_batches(tmp_path: Path) -> None:
    trainer, _ = build(folder=tmp_path, limit_val_batches=0)
    ensemble = EnsembleModule(member=PlainModule, n=2)
    with pytest.raises(ValueError, match="no batches"):
        ensemble.fit_weights_with(trainer, datamodule=PlainData())
    assert not ensemble.is_fitted
