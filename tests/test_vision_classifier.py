"""The reference LightningModule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from torch import nn
from torch.utils.data import DataLoader

from lightning_tips.vision import (
    DigitsDataModule,
    ImageClassifier,
)

from vision_helpers import make_trainer, same_weights, small_classifier


def test_digits_are_learnt_and_logged():
    data = DigitsDataModule(batch_size=64)
    model = small_classifier(network_args=None, class_names=[f"digit {c}" for c in data.class_names])
    trainer = make_trainer(max_epochs=4)
    trainer.fit(model, data)
    logged = trainer.callback_metrics
    assert set(logged) == {
        *("train_loss", "train_loss_step", "train_acc"),
        *("val_loss", "val_acc", "val_balanced_acc", "val_ece"),
    }
    assert set(trainer.progress_bar_metrics) == {"val_loss", "val_acc"}
    assert logged["val_acc"] > 0.9
    assert model.val_recall_per_class.mean().item() == pytest.approx(logged["val_balanced_acc"].item())

    trainer.test(model, data, verbose=False)
    logged = trainer.callback_metrics
    assert {f"test_recall/digit {c}" for c in range(10)} | {"test_loss", "test_acc", "test_ece"} <= set(logged)
    probabilities = torch.cat(trainer.predict(model, data))
    targets = data.test_set.targets
    assert probabilities.sum(dim=1).allclose(torch.ones(359))
    right = probabilities.argmax(dim=1) == targets
    assert logged["test_acc"].item() == pytest.approx(right.float().mean().item())
    assert logged["test_recall/digit 3"].item() == pytest.approx(right[targets == 3].float().mean().item())
    loss = nn.functional.nll_loss(probabilities.log(), targets)
    assert logged["test_loss"].item() == pytest.approx(loss.item(), rel=1e-4)


class SaveEachEpoch(Callback):
    """Saves at both moments at which ModelCheckpoint may, without ModelCheckpoint's warnings about its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"validated-{trainer.current_epoch}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"trained-{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_at_an_epoch_boundary_is_exact(tmp_path, num_workers):
    def fit(epochs: int, folder: str, checkpoint: str | None = None) -> ImageClassifier:
        model = small_classifier()
        data = DigitsDataModule(batch_size=32, train_size=129, num_workers=num_workers)
        trainer = make_trainer(max_epochs=epochs, callbacks=[SaveEachEpoch(tmp_path / folder)])
        trainer.fit(model, data, ckpt_path=checkpoint and tmp_path / checkpoint)
        return model

    uninterrupted = fit(3, "long")
    assert not same_weights(uninterrupted, fit(2, "short"))
    for checkpoint in ("long/trained-0.ckpt", "long/validated-1.ckpt", "short/trained-1.ckpt"):
        assert same_weights(uninterrupted, fit(3, "resumed", checkpoint))


def dict_loader(**keys: str) -> DataLoader:
    return DataLoader([{keys["image"]: torch.rand(8, 1, 8, 8), keys["label"]: torch.arange(8) % 2}], batch_size=None)


@pytest.mark.parametrize("keys", [{"image": "image", "label": "label"}, {"image": "x", "label": "y"}])
def test_dict_batches(keys):
    model = small_classifier(num_classes=2, log_val_recall=True)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, dict_loader(**keys), dict_loader(**keys))
    assert {"val_recall/0", "val_recall/1", "val_acc"} <= set(trainer.callback_metrics)
    trainer.test(model, dict_loader(**keys), verbose=False)
    assert trainer.predict(model, dict_loader(**keys))[0].shape == (8, 2)


def test_classes_that_do_not_occur_have_no_recall():
    model = small_classifier(num_classes=3)
    trainer = make_trainer()
    trainer.test(model, dict_loader(image="x", label="y"), verbose=False)
    assert {key for key in trainer.callback_metrics if "recall" in key} == {"test_recall/0", "test_recall/1"}
    trainer.validate(model, dict_loader(image="x", label="y"), verbose=False)
    assert model.val_recall_per_class.isnan().tolist() == [False, False, True]


def test_probabilities_as_labels_train_like_the_classes_they_mean():
    model = small_classifier(label_smoothing=0.1)
    model.log = lambda *_, **__: None  # no Trainer here
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    soft = nn.functional.one_hot(labels, 10).float()
    hard_loss, soft_loss = model.training_step((images, labels), 0), model.training_step([images, soft], 0)
    assert soft_loss.item() == pytest.approx(hard_loss.item(), rel=1e-5)


def test_grey_images_are_expanded_and_normalised_by_the_model(timm_weights):
    _, overlay = timm_weights
    model = ImageClassifier("timm/mobilenetv3_small_050", in_channels=1, pretrained=True, network_args=overlay).eval()
    grey = torch.rand(2, 1, 32, 32)
    assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))
    mean, std = (torch.tensor(model.network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(model(grey), model.network((grey - mean) / std))


def test_normalization_can_be_overridden():
    model = ImageClassifier(mean=[0.1, 0.2, 0.3], std=[0.5])
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == [0.5] * 3
    with pytest.raises(ValueError, match="mean has 2 values, but the network takes 3"):
        ImageClassifier(mean=[0.1, 0.2])
    with pytest.raises(ValueError, match="std must be positive"):
        ImageClassifier(std=[0.0])


def test_checkpoint_is_plain_and_loads(tmp_path):
    model = small_classifier(
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        class_names=[f"digit {index}" for index in range(10)],
        mean=(0.3,),
    )
    data = DigitsDataModule(train_size=64)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert "optimizer" not in content["hyper_parameters"]
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert same_weights(model, loaded)
    assert loaded.class_names[3] == "digit 3"


def test_checkpoint_of_a_pretrained_network_needs_no_weights(tmp_path, timm_weights):
    _, overlay = timm_weights
    model = ImageClassifier("timm/mobilenetv3_small_050", in_channels=1, pretrained=True, network_args=overlay)
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(model, DigitsDataModule(image_size=32))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    Path(overlay["pretrained_cfg_overlay"]["file"]).unlink()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert same_weights(model, loaded)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(model.eval()(images), loaded.eval()(images))
    assert model.hparams["pretrained"] is True  # what loggers show is what was asked for


def test_command_line_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what jsonargparse 5 drops
    monkeypatch.setattr("sys.argv", ["fit"])  # LightningCLI warns when it finds arguments in both places

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            for name in ("num_classes", "in_channels", "class_names"):
                parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def run(args: list[str]) -> LightningCLI:
        return CLI(ImageClassifier, DigitsDataModule, run=False, args=args, save_config_callback=None)

    trainer_args = ["accelerator=cpu", "logger=false", "max_epochs=1", "limit_train_batches=2", "limit_val_batches=1"]
    trainer_args += ["enable_progress_bar=false", "enable_model_summary=false", "enable_checkpointing=false"]
    first = run(
        [
            *(f"--trainer.{arg}" for arg in trainer_args),
            "--seed_everything=1",
            *("--model.network_args.width=4", "--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau"),
            *("--model.lr_scheduler.monitor=val_acc", "--data.train_size=100", "--data.val_fraction=0.2"),
        ]
    )
    config = first.parser.dump(first.config)
    assert "class_path: torch.optim.Adam" in config
    (tmp_path / "config.yaml").write_text(config)
    second = run(["--config", "config.yaml"])
    assert second.parser.dump(second.config) == config
    assert (second.model.in_channels, second.model.class_names) == (1, second.datamodule.class_names)
    assert len(second.datamodule.train_dataloader().dataset) == 100

    second.trainer.fit(second.model, second.datamodule)
    assert second.trainer.lr_scheduler_configs[0].monitor == "val_acc"
    second.trainer.save_checkpoint("model.ckpt")
    torch.load("model.ckpt", weights_only=True)
    assert same_weights(second.model, ImageClassifier.load_from_checkpoint("model.ckpt", weights_only=True))


@pytest.mark.parametrize(
    ("scheduler", "monitor"),
    [
        (lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_acc"), "val_acc"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "val_ece"),
    ],
)
def test_plateau_scheduler_has_its_monitor(scheduler, monitor):
    config = small_classifier(lr_scheduler=scheduler, monitor="val_ece").configure_optimizers()["lr_scheduler"]
    assert (config["monitor"], config["interval"]) == (monitor, "epoch")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long()), "images.float\\(\\) / 255"),
        ((torch.full((4, 1, 8, 8), 200.0), torch.zeros(4).long()), "divide them by 255"),
        ((torch.zeros(4, 3, 8, 8), torch.zeros(4).long()), "C = 1 here, not \\(4, 3, 8, 8\\)"),
        ((torch.zeros(4, 8, 8), torch.zeros(4).long()), "\\(B, C, H, W\\)"),
        ((torch.zeros(4, 1, 8, 8), torch.full((4,), 10)), "0 ... 9, but there are 10 ... 10"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4)), "Labels are integers"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4, 1).long()), "Labels are integers"),
        ((torch.zeros(4, 1, 8, 8),), "Expected a batch of"),
        ({"picture": torch.zeros(4, 1, 8, 8)}, "picture.* holds the input"),
    ],
)
def test_wrong_batches_say_what_to_pass(batch, message):
    model = small_classifier()
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        model.training_step(batch, 0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="class_names has 2 names for num_classes=10"):
        ImageClassifier(class_names=["a", "b"])
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        ImageClassifier(num_classes=1)
    with pytest.raises(ValueError, match='"epoch" or "step"'):
        ImageClassifier(lr_scheduler_interval="batch")
