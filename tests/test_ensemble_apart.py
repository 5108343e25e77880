"""Members that train apart, by the command; and the vote as one exported file."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_tips import EnsembleModule
from lightning_tips.cli.held_out import moves_with_seed

from harness import PlainData, PlainModule, assert_same
from processes import Fits

CONFIG = {
    "trainer": {"accelerator": "cpu", "max_epochs": 2, "limit_val_batches": 1, "enable_progress_bar": False},
    "model": {"class_path": "harness.PlainModule"},
    "data": {"class_path": "harness.PlainData"},
}


class KilledOnce(Callback):
    """Of the members with an odd seed, the first time, in the second epoch."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and os.environ["PL_GLOBAL_SEED"] == "4" and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_command_trains_weighs_and_skips_what_is_done(tmp_path: Path, monkeypatch, capfd) -> None:
    from lightning_tips.cli import main

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parent.parent}")
    trainer = CONFIG["trainer"] | {
        "logger": [
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "here", "name": "mine"}}
        ],
        "callbacks": [
            {"class_path": "test_ensemble_apart.KilledOnce", "init_args": {"marker": str(tmp_path / "once")}}
        ],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"trainer": trainer}))

    def ensemble(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-tips", "ensemble", *arguments])
        assert main() == code, capfd.readouterr()
        return capfd.readouterr().out

    arguments = ["--config=run.yaml", "--members=2", "--workers=2", "--out=out", "--seed_everything=3"]
    printed = ensemble(*arguments, code=1)  # the second member is killed in its second epoch
    assert "member_0 has finished" in printed
    assert "member_1 failed (-9)" in printed
    assert (tmp_path / "once").exists()
    monkeypatch.setattr("lightning_tips.core.fits.FitServer", Fits)  # the first had a server of its own
    printed = ensemble(*arguments)
    assert "member_0 is done already" in printed
    assert "member_1 goes on" in printed
    assert "member_1 has finished" in printed
    assert (tmp_path / "out" / "member_1" / "mine").is_dir()  # the logger of the yaml, in the member's folder
    assert not (tmp_path / "here").exists()
    checkpoint = torch.load(tmp_path / "out" / "ensemble.ckpt", weights_only=True)
    joined = EnsembleModule(member=PlainModule, n=2)
    joined.load_state_dict(checkpoint["state_dict"])
    assert joined.is_fitted
    assert not torch.equal(joined.members[0].head.weight, joined.members[1].head.weight)

    printed = ensemble(*arguments)
    assert "member_0 is done already" in printed
    assert "has finished" not in printed
    assert_same(torch.load(tmp_path / "out" / "ensemble.ckpt", weights_only=True)["state_dict"],
                checkpoint["state_dict"])  # fmt: skip

    # The second member is the fit with the next seed, to the bit.
    monkeypatch.setattr(
        sys, "argv", ["lightning-tips", "fit", "--config=run.yaml", "--seed_everything=4", "--trainer.logger=false"]
    )
    assert main() == 0
    (alone,) = (torch.load(path, weights_only=True) for path in tmp_path.glob("checkpoints/*.ckpt"))
    assert_same(dict(alone["state_dict"]), dict(joined.members[1].state_dict()))


def test_what_cannot_vote_ends_the_command_before_the_training(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.cli import main

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = ["ensemble", "--config=run.yaml", "--out=out", "--task=regression", "--voting=hard"]
    monkeypatch.setattr(sys, "argv", ["lightning-tips", *arguments])
    with pytest.raises(SystemExit, match="no hard vote on numbers"):
        main()
    assert not (tmp_path / "out").exists()


class Splits(LightningDataModule):
    """Splits at random, as tutorials do; with a seed of its own if it is given one."""

    def __init__(self, seed: int | None = None, at_once: bool = False, copies: bool = False) -> None:
        super().__init__()
        self.seed, self.copies = seed, copies
        self.val: Any = self.split() if at_once else None

    def split(self) -> Any:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        data = TensorDataset(PlainData().images, PlainData().labels)
        val = random_split(data, [len(data) - 90, 90], generator=generator)[1]
        return TensorDataset(*(tensor[val.indices] for tensor in data.tensors)) if self.copies else val

    def setup(self, stage: str) -> None:
        self.val = self.val or self.split()

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 30)


@pytest.mark.parametrize(
    ("arguments", "moves"),
    [({}, True), ({"at_once": True}, True), ({"seed": 1}, False), ({"copies": True}, None),
     ({"copies": True, "seed": 1}, False)],
)  # fmt: skip
def test_a_split_that_moves_with_the_seed_is_found_out(arguments: dict[str, Any], moves: Any) -> None:
    made = []
    for seed in (0, 1):
        seed_everything(seed, verbose=False)
        made.append(Splits(**arguments))
    assert moves_with_seed(made[0], made[1], (0, 1)) is moves
    assert (made[0].val is None) is not arguments.get("at_once", False)


def test_members_are_never_weighed_on_what_they_were_trained_on(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.cli import main

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"data": {"class_path": "test_ensemble_apart.Splits"}}))
    monkeypatch.setattr(sys, "argv", ["lightning-tips", "ensemble", "--config=run.yaml", "--out=out"])
    with pytest.raises(SystemExit, match=r"Splits splits off other validation data.*generator="):
        main()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("voting", ["weighted", "hard"])
@pytest.mark.parametrize("name", ["vote.pt2", "vote.onnx"])
def test_the_exported_vote_equals_the_loop_over_members(name: str, voting: Any, tmp_path: Path) -> None:
    ensemble = EnsembleModule(member=PlainModule, n=3, voting=voting, weights=[0.5, 0.0, 0.5], seed=0)
    ensemble.vote_temperature.fill_(0.7)
    images = PlainData().images[:6]
    assert ensemble.export(tmp_path / name, images) <= 1e-6
    if name.endswith("pt2"):
        loaded = torch.export.load(tmp_path / name).module()
        for batch in (images, PlainData().images[:50]):
            torch.testing.assert_close(loaded(batch), ensemble.eval()(batch), atol=1e-6, rtol=0)
        assert len(ensemble.to_export(images).members) == 2  # without the one of no weight
    with pytest.raises(ValueError, match=r"must end in .pt2"):
        ensemble.export(tmp_path / "vote.bin", images)
