"""An EnsembleModule and checkpoints: members from them, soups of them, and what stays in its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_tips import EnsembleModule
from lightning_tips.core import keep_indices
from lightning_tips.vision import ImageClassifier

from ensembles import Wide, by_hand, digits, saved
from harness import PlainData, PlainModule, assert_same, every_epoch, fit


class Needing(PlainModule):
    def __init__(self, width: int) -> None:
        super().__init__()


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
