"""Checkpoints of pruned networks: they load everywhere, and a score in a name is that of the weights in the file."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from torch import nn

from lightning_tips import load_pruned

from harness import PlainData, PlainModule, assert_same, bits, every_step, fit
from prunable import InnerModule, Scripted, TestData, pruning, widths


def trained(folder: Path, **changes: Any) -> tuple[Trainer, Path]:
    keep = ModelCheckpoint(folder / "kept", filename="{epoch}", save_top_k=-1, monitor="val_acc", mode="max")
    trainer = fit(pruning(**changes), InnerModule(width=16), keep, data=TestData(), folder=folder)
    return trainer, folder / "kept" / "epoch=5.ckpt"


def test_test_validate_and_predict_take_pruned_and_unpruned_checkpoints(tmp_path: Path) -> None:
    trainer, pruned = trained(tmp_path)
    expected = trainer.test(ckpt_path=pruned, datamodule=TestData(), verbose=False)
    best = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert Path(best).name in {f"epoch={n}.ckpt" for n in range(2, 6)}  # of those that are pruned all the way
    trainer.validate(ckpt_path="best", datamodule=TestData(), verbose=False)
    unpruned = tmp_path / "kept" / "epoch=0.ckpt"

    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    fresh = Trainer(callbacks=[pruning()], logger=False, accelerator="cpu", enable_progress_bar=False)
    module = InnerModule(16)
    assert fresh.test(module, ckpt_path=pruned, datamodule=TestData(), verbose=False) == expected
    assert widths(module) == widths(trainer.lightning_module)
    fresh.validate(module, ckpt_path=unpruned, datamodule=TestData(), verbose=False)
    assert widths(module) == [16, 12]
    outputs = fresh.predict(module, ckpt_path=pruned, datamodule=TestData())
    assert outputs is not None
    assert widths(module) == widths(trainer.lightning_module)
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("kind", ["checkpoint", "weights only", "state dict", "unpruned"])
def test_load_pruned_needs_no_callback(kind: str, tmp_path: Path) -> None:
    trainer, pruned = trained(tmp_path)
    module = trainer.lightning_module
    if kind == "weights only":
        trainer.save_checkpoint(pruned := tmp_path / "small.ckpt", weights_only=True)
    elif kind == "state dict":
        torch.save(module.state_dict(), pruned := tmp_path / "small.pt")
    elif kind == "unpruned":
        pruned = tmp_path / "kept" / "epoch=0.ckpt"
    given = {"width": 16} if kind == "state dict" else {}
    for maker in (InnerModule, lambda **_: InnerModule(width=16)):
        loaded = load_pruned(pruned, maker, **given)
        assert isinstance(loaded, InnerModule)
        assert widths(loaded) == ([16, 12] if kind == "unpruned" else widths(module))
        if kind != "unpruned":
            assert_same(dict(loaded.state_dict()), dict(module.state_dict()))
        assert loaded.net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    if kind != "state dict":
        assert load_pruned(pruned, InnerModule).hparams.width == 16


def test_load_pruned_says_what_is_wrong(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    torch.save(InnerModule().state_dict(), tmp_path / "state.pt")
    for name, message in (("list", "holds a list"), ("dict", "neither a checkpoint")):
        with pytest.raises(TypeError, match=message):
            load_pruned(tmp_path / f"{name}.pt", InnerModule)
    with pytest.raises(TypeError, match="no argument depth"):
        load_pruned(tmp_path / "state.pt", InnerModule, depth=3)
    with pytest.raises(TypeError, match="Expected a LightningModule"):
        load_pruned(tmp_path / "state.pt", lambda: nn.Linear(1, 1))  # type: ignore[arg-type,return-value]
    with pytest.raises(RuntimeError, match="Missing key"):
        load_pruned(tmp_path / "state.pt", PlainModule)


def test_the_best_checkpoint_is_one_of_the_smallest_networks(tmp_path: Path) -> None:
    scores = [0.9, 0.8, 0.7, 0.72, 0.71, 0.6]
    for reset, expected in ((True, 3), (False, 0)):
        keep = ModelCheckpoint(tmp_path / str(reset), filename="{epoch}", monitor="val_acc", mode="max")
        stop = EarlyStopping("val_acc", mode="max", patience=3)
        trainer = fit(pruning(reset_best=reset), Scripted(scores), keep, stop, folder=tmp_path)
        assert Path(keep.best_model_path).name == f"epoch={expected}.ckpt"
        assert trainer.current_epoch == (6 if reset else 4)


def test_a_plateau_is_one_of_the_network_as_it_is_now(tmp_path: Path) -> None:
    class Plateau(Scripted):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_acc"}}

    for reset, rate in ((True, 0.1), (False, 0.01)):
        tip = pruning(schedule="one_shot", reset_best=reset)
        trainer = fit(tip, Plateau([0.9, 0.7, 0.72, 0.74]), folder=tmp_path, max_epochs=4)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


class Bare(InnerModule):
    """Has no optimizer of its own: LightningCLI makes one, before anything is loaded, and hands it out again."""

    configure_optimizers = LightningModule.configure_optimizers


def test_command_line_resumes_and_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    from lightning.pytorch.cli import LightningCLI

    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    flags = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    flags += ["--trainer.max_epochs=4", "--optimizer=torch.optim.Adam", "--optimizer.lr=0.01"]

    def run(command: str, keep: str, *more: str) -> LightningCLI:
        callbacks: list[Any] = [pruning(), every_step(tmp_path / keep)]
        defaults = {"callbacks": callbacks}
        arguments = [command, *(flags if command == "fit" else flags[:4]), *more]
        return LightningCLI(
            Bare,
            PlainData,
            args=arguments,
            trainer_defaults=defaults,
            save_config_callback=None,
            seed_everything_default=0,
        )

    whole = run("fit", "kept")
    expected = bits(whole.trainer)
    for step in (2, 9):
        checkpoint = str(tmp_path / "kept" / f"step-step={step}.ckpt")
        resumed = run("fit", "kept", f"--ckpt_path={checkpoint}")
        assert_same(bits(resumed.trainer), expected, str(step))
        held = {id(p) for group in resumed.trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in resumed.model.parameters()}
    validated = run("validate", "kept", f"--ckpt_path={tmp_path / 'kept' / 'step-step=16.ckpt'}")
    assert widths(validated.model) == widths(whole.model)
