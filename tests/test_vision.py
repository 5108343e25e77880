"""The reference model and data: what examples, configs and the tests of the tips rely on."""

import gzip
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_tips.vision import (
    CIFAR10DataModule,
    CifarResNet,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageClassifier,
    ImageFolderDataModule,
    build_network,
    cifar_resnet,
    networks,
    stratified_order,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning 2.6 with torch 2.14
        "The '.*_dataloader' does not have many workers",  # Lightning's advice; these sets are small
        "This process .* is multi-threaded, use of fork",  # Python 3.12 and later: how a DataLoader starts its workers
    )
]


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share out between threads, which then only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(**kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **kwargs})


def small_classifier(**kwargs: Any) -> ImageClassifier:
    seed_everything(3, verbose=False)
    return ImageClassifier(**{"in_channels": 1, "network_args": {"width": 4}, **kwargs})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def labels_of(loader: DataLoader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


# ---------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(("depth", "parameters"), [(8, 78_042), (20, 272_474), (56, 855_770)])
def test_cifar_resnet_has_its_size_and_takes_any_input_size(depth, parameters):
    network = cifar_resnet(depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len([m for m in layers if not (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))]) == depth
    for size in (8, 33):
        assert network(torch.rand(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "nearest"), [(18, "14 and 20"), (50 + 3, "50 and 56"), (1, "8\\."), (9, "8 and 14")])
def test_wrong_depth_names_the_nearest_right_ones(depth, nearest):
    with pytest.raises(ValueError, match=rf"6n \+ 2, not {depth}; nearest to it: {nearest}"):
        CifarResNet(depth)


def test_names_mean_one_library_each():
    assert not any(timm.is_model(name) for name in networks.CIFAR_NAMES)
    assert not set(networks.CIFAR_NAMES) & set(torchvision.models.list_models())
    assert isinstance(build_network("resnet20", 5)[0], CifarResNet)
    assert isinstance(build_network("cifar_resnet26", 5, in_channels=1, width=4)[0], CifarResNet)
    assert isinstance(build_network("resnet18", 5)[0], timm.models.ResNet)
    assert isinstance(build_network("timm/resnet18.a1_in1k", 5)[0], timm.models.ResNet)
    assert isinstance(build_network("torchvision/resnet18", 5)[0], torchvision.models.ResNet)
    assert isinstance(build_network("squeezenet1_1", 5)[0], torchvision.models.SqueezeNet)  # timm has none


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet21", "resnet20"),
        ("cifar_resent20", "cifar_resnet20"),
        ("ResNet18", "resnet18"),
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("timm/squeezenet1_1", "timm/"),
        ("squeezenet1_2", "squeezenet1_1"),
        ("nothing/like/it!", "timm.list_models"),
    ],
)
def test_unknown_network_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"Unknown network '{name}'.*{nearest}"):
        build_network(name, 10)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 4])
def test_networks_without_weights_take_any_number_of_channels(name, channels):
    network, normalization = build_network(name, 7, in_channels=channels)
    assert network.eval()(torch.rand(2, channels, 64, 64)).shape == (2, 7)
    assert normalization == ((0.5,) * channels, (0.5,) * channels)


@pytest.fixture
def timm_weights(tmp_path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A timm network, and the arguments that make timm find its weights on disk rather than download them."""
    source = timm.create_model("mobilenetv3_small_050")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    return source, {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}


@pytest.mark.parametrize(("in_channels", "channels"), [(1, 3), (3, 3), (4, 4)])
def test_pretrained_timm_network_brings_weights_and_normalization(timm_weights, in_channels, channels):
    source, overlay = timm_weights
    network, normalization = build_network("mobilenetv3_small_050", 5, in_channels, pretrained=True, **overlay)
    assert torch.equal(network.blocks[1][0].conv_pw.weight, source.blocks[1][0].conv_pw.weight)
    assert network.get_classifier().out_features == 5
    config = source.pretrained_cfg
    assert config["mean"] != (0.5, 0.5, 0.5)  # else this test would not tell it from the default
    assert normalization.mean == tuple((*config["mean"], *config["mean"])[:channels])
    assert normalization.std == tuple((*config["std"], *config["std"])[:channels])


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet", "inception_v3"])
def test_pretrained_torchvision_network_brings_weights_and_normalization(monkeypatch, name):
    inception = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    source = torchvision.models.get_model(name, weights=None, **inception)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: source.state_dict())
    network, normalization = build_network(f"torchvision/{name}", 5, in_channels=1, pretrained=True)
    convolutions = [next(m for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (network, source)]
    assert torch.equal(convolutions[0].weight, convolutions[1].weight)
    assert network.train()(torch.rand(2, 3, 96, 96)).shape == (2, 5)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalization == (((0.5,) * 3, (0.5,) * 3) if inception else imagenet)


def test_no_weights_is_an_error():
    with pytest.raises(ValueError, match="no pretrained weights for the CIFAR ResNet 'resnet8'"):
        build_network("resnet8", 10, pretrained=True)
    with pytest.raises(ValueError, match="not 4 channels"):
        build_network("torchvision/resnet18", 10, in_channels=4, pretrained=True)
    with pytest.raises(ValueError, match="at least 1"):
        build_network("resnet8", 0)


# -------------------------------------------------------------------------------------------------------- classifier


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


# -------------------------------------------------------------------------------------------------------------- data


def test_every_beginning_of_the_order_is_stratified():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3] * 2)[torch.randperm(101)]
    order = stratified_order(labels, seed=1)
    assert order.sort().values.equal(torch.arange(101))
    assert set(labels[order[:4]].tolist()) == set(labels[order[-4:]].tolist()) == {0, 1, 2, 3}
    for n in range(8, 94):
        shares = torch.bincount(labels[order[:n]], minlength=4) - n * torch.bincount(labels) / 101
        assert shares.abs().max() < 2
    assert not order.equal(stratified_order(labels, seed=2))


def test_split_is_fixed_disjoint_and_stratified():
    def parts(seed: int, noise: int) -> list[list[int]]:
        torch.manual_seed(noise)
        data = DigitsDataModule(seed=seed, val_fraction=0.2)
        data.setup()
        return [part.subset(torch.arange(len(part))) for part in (data.train_set, data.val_set, data.test_set)]

    train, val, test = parts(0, 0)
    state = torch.get_rng_state()
    again = parts(0, 1)
    assert [part.indices.tolist() for part in again] == [part.indices.tolist() for part in (train, val, test)]
    together = torch.cat([train.indices, val.indices, test.indices])
    assert together.sort().values.equal(torch.arange(1797))
    assert (len(train), len(val), len(test)) == (1150, 288, 359)
    for part in (val, test):
        shares = torch.bincount(part.targets) / len(part) - torch.bincount(train.labels) / 1797
        assert shares.abs().max() < 1 / len(part) + 1e-6
    other = parts(1, 0)
    assert not other[1].indices.equal(val.indices)
    assert other[2].indices.equal(test.indices)  # the test part is nobody's choice
    torch.set_rng_state(state)
    DigitsDataModule().train_dataloader()
    labels_of(DigitsDataModule().val_dataloader())
    assert torch.get_rng_state().equal(state)  # loaders leave the generator of the training alone


def test_train_size_is_nested_stratified_and_keeps_the_validation_part():
    sets = {}
    for size in (10, 55, 500, None):
        data = DigitsDataModule(train_size=size)
        data.setup("fit")
        sets[size] = set(data.train_set.indices.tolist())
        assert len(sets[size]) == (size or 1294)
        assert not sets[size] & set(data.val_set.indices.tolist())
        assert len(data.val_set) == 144
        if size in (10, 55):
            counts = torch.bincount(data.train_set.targets)
            assert counts.min() >= size // 10 - 1
            assert counts.max() <= size // 10 + 2
    assert sets[10] < sets[55] < sets[500] < sets[None]


def test_items_and_batches():
    data = DigitsDataModule(batch_size=100)
    loader = data.train_dataloader()
    images, labels = next(iter(loader))
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (100, 1, 8, 8), torch.int64)
    assert (images.min().item(), images.max().item()) == (0, 1)
    image, label = data.train_set[5]
    assert image.shape == (1, 8, 8)
    assert label == data.train_set.targets[5]
    with pytest.raises(IndexError):
        data.train_set[len(data.train_set)]
    # Somebody else's loader and wrappers, without our collate function, give the same batches.
    positions = [3, 1, 2]
    expected = data.train_set.__getitems__(positions)
    for dataset in (Subset(data.train_set, positions), ConcatDataset([Subset(data.train_set, positions)])):
        images, labels = next(iter(DataLoader(dataset, batch_size=3)))
        assert torch.equal(images, expected.images)
        assert torch.equal(labels, expected.labels)


def test_images_are_resized():
    data = DigitsDataModule(image_size=20)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (128, 1, 20, 20)
    assert 0 <= images.min() < images.max() <= 1


def test_train_order_depends_on_seed_and_epoch_only():
    def order(seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1) -> list[int]:
        data = DigitsDataModule(seed=0, batch_size=16)
        data.seed, data.train_set = seed, DigitsDataModule().train_dataloader().dataset
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, strategy=strategy)
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert order() == first
    assert sorted(first) == list(range(1294))
    assert order(epoch=1) != first
    assert order(seed=1) != first
    assert [order(rank=0, world_size=2), order(rank=1, world_size=2)] == [first[0::2], first[1::2]]


@pytest.mark.parametrize(("train_size", "batch_size", "sizes"), [(65, 32, [32, 32]), (66, 32, [32, 32, 2])])
def test_a_last_batch_of_one_image_is_dropped(train_size, batch_size, sizes):
    loader = DigitsDataModule(train_size=train_size, batch_size=batch_size).train_dataloader()
    assert [len(labels) for _, labels in loader] == sizes


def test_batches_of_one_image_are_kept():
    assert len(DigitsDataModule(train_size=11, batch_size=1).train_dataloader()) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"val_fraction": 0.0}, "between 0 and 1"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"num_workers": -1}, "num_workers"),
        ({"image_size": 0}, "image_size"),
        ({"train_size": 9}, "pass at least 10"),
        ({"train_size": 5000}, "has 1294 samples"),
    ],
)
def test_wrong_data_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments).setup("fit")


def write_idx(path: Path, values: np.ndarray, compress: bool = True) -> None:
    data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes() + values.tobytes()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(data)) if compress else path.write_bytes(data)


@pytest.mark.parametrize(("folder", "compress"), [(".", True), ("FashionMNIST/raw", False)])
def test_fashion_mnist_from_files(tmp_path, folder, compress):
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(place / f"{part}-images-idx3-ubyte", pixels, compress)
        write_idx(place / f"{part}-labels-idx1-ubyte", (np.arange(100) % 10).astype(np.uint8), compress)
    data = FashionMNISTDataModule(str(tmp_path), download=False, batch_size=100)
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (90, 10, 100)
    images, labels = next(iter(data.test_dataloader()))
    assert torch.equal(images[:, 0], torch.from_numpy(pixels).float() / 255)
    assert labels.tolist() == [index % 10 for index in range(100)]

    write_idx(place / "train-labels-idx1-ubyte", np.zeros(0, dtype=np.uint8), compress)
    name = place / ("train-images-idx3-ubyte" + ".gz" * compress)
    cut = (gzip.decompress(name.read_bytes()) if compress else name.read_bytes())[:-1]
    name.write_bytes(gzip.compress(cut) if compress else cut)
    with pytest.raises(ValueError, match="declares the shape"):
        FashionMNISTDataModule(str(tmp_path), download=False).setup("fit")


def test_missing_fashion_mnist_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(FashionMNISTDataModule, "system_root", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"Debian package dataset-fashion-mnist, or let torchvision download"):
        FashionMNISTDataModule(str(tmp_path), download=False).prepare_data()
    with pytest.raises(FileNotFoundError, match="Debian package"):
        FashionMNISTDataModule(str(tmp_path)).setup("test")

    def no_network(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    with pytest.raises(FileNotFoundError, match="Debian package"):
        FashionMNISTDataModule(str(tmp_path)).prepare_data()


@pytest.mark.skipif(not Path(FashionMNISTDataModule.system_root).is_dir(), reason="needs dataset-fashion-mnist")
def test_real_fashion_mnist():
    data = FashionMNISTDataModule("nowhere")
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (54_000, 6_000, 10_000)
    assert torch.bincount(data.val_set.targets).tolist() == [600] * 10
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 54_000


def test_cifar10_from_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .* pass download=True"):
        CIFAR10DataModule(str(tmp_path), download=False).prepare_data()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [index % 10 for index in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10DataModule.class_names)}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = CIFAR10DataModule(str(tmp_path), val_fraction=0.2, image_size=16)
    data.prepare_data()
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (80, 20, 20)
    assert next(iter(data.train_dataloader()))[0].shape == (80, 3, 16, 16)
    whole = CIFAR10DataModule(str(tmp_path))
    whole.setup("test")
    assert torch.equal(whole.test_set[0][0], torch.from_numpy(pixels[0].reshape(3, 32, 32)).float() / 255)


def make_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> None:
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_one_folder_is_split(tmp_path, memory_limit):
    make_folder(tmp_path, {"cat": 20, "dog": 10})
    data = ImageFolderDataModule(str(tmp_path), image_size=8, test_fraction=0.2, memory_limit=memory_limit)
    assert (data.class_names, data.num_classes) == (("cat", "dog"), 2)
    data.setup()
    sizes = [torch.bincount(part.targets).tolist() for part in (data.train_set, data.val_set, data.test_set)]
    assert sizes == [[15, 7], [1, 1], [4, 2]]
    assert isinstance(data.train_set.images, Tensor) == (memory_limit > 0)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (22, 3, 8, 8)
    assert 0 <= images.min() < images.max() <= 1


def test_images_are_the_same_from_memory_and_from_disk(tmp_path):
    make_folder(tmp_path, {"cat": 5, "dog": 5})
    loaders = [ImageFolderDataModule(str(tmp_path), 8, memory_limit=n).train_dataloader() for n in (0, 2**30)]
    for disk, memory in zip(*loaders, strict=True):
        assert torch.equal(disk[0], memory[0])
        assert torch.equal(disk[1], memory[1])


def test_folder_of_parts(tmp_path):
    make_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    data = ImageFolderDataModule(str(tmp_path), image_size=8)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (6, 2)
    with pytest.raises(FileNotFoundError, match="no folder test"):
        data.setup("test")
    make_folder(tmp_path / "val", {"dog": 3})
    make_folder(tmp_path / "test", {"dog": 2, "cat": 1})
    data = ImageFolderDataModule(str(tmp_path), image_size=8)
    data.setup()
    assert (len(data.train_set), data.val_set.targets.tolist()) == (8, [1, 1, 1])
    assert data.test_set.targets.tolist() == [0, 1, 1]
    make_folder(tmp_path / "val", {"cow": 1})
    with pytest.raises(ValueError, match="classes that the training part has not: cow"):
        ImageFolderDataModule(str(tmp_path), image_size=8).setup("fit")


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        ImageFolderDataModule(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no subfolders"):
        ImageFolderDataModule(str(tmp_path))
    with pytest.raises(ValueError, match="test_fraction"):
        ImageFolderDataModule(str(tmp_path), test_fraction=1.5)
    make_folder(tmp_path, {"cat": 5, "dog": 1})
    with pytest.raises(ValueError, match=r"at least 2 samples .* dog \(1\)"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_class_counts_make_data_imbalanced_and_validation_keeps_the_shares() -> None:
    data = DigitsDataModule(class_counts={0: 100, 1: 20, 7: 4}, val_fraction=0.25)
    data.setup()
    assert data.train_set.targets.bincount(minlength=10).tolist() == [100, 20, 0, 0, 0, 0, 0, 4, 0, 0]
    val = data.val_set.targets.bincount(minlength=10)
    assert 25 <= val[0] <= 40
    assert val[0] // 5 <= val[1] + 1
    assert val[7] >= 1
    assert set(data.test_set.targets.tolist()) == {0, 1, 7}
    again = DigitsDataModule(class_counts=[100, 20, 1, 1, 1, 1, 1, 4, 1, 1], val_fraction=0.25)
    again.setup("fit")
    assert again.train_set.targets.bincount().tolist() == [100, 20, 1, 1, 1, 1, 1, 4, 1, 1]
    with pytest.raises(ValueError, match="0 to 9"):
        DigitsDataModule(class_counts={10: 5}).setup()


@pytest.mark.parametrize("positive", [3, "3"])
def test_one_class_against_all_others(positive: int | str) -> None:
    plain, data = DigitsDataModule(), DigitsDataModule(positive_class=positive)
    for module in (plain, data):
        module.setup()
    assert data.num_classes == 2
    assert torch.equal(data.train_set.targets, (plain.train_set.targets == 3).long())
    assert torch.equal(data.train_set[5][0], plain.train_set[5][0])
    with pytest.raises(ValueError, match="none of 0, 1, 2"):
        DigitsDataModule(positive_class="three").setup()
