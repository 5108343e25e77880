"""The reference data modules: splits, order, imbalance, files."""

import gzip
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_tips.vision import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    stratified_order,
)

from vision_helpers import labels_of


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


def test_unlabelled_images_are_those_that_are_left_out() -> None:
    data = DigitsDataModule(train_size=100, unlabelled_size=300)
    data.setup("fit")
    unlabelled = data.unlabelled_dataset()
    assert len(unlabelled) == 300
    used = set(data.train_set.indices.tolist()) | set(data.val_set.indices.tolist())
    assert not used & set(unlabelled.indices.tolist())
    assert len(DigitsDataModule(train_size=100).unlabelled_dataset()) == 1797 - len(used) - len(data.load_test())
    assert len(DigitsDataModule().unlabelled_dataset()) == 0
    binary = DigitsDataModule(train_size=50, positive_class=3).unlabelled_dataset()
    assert set(binary.targets.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="leave only"):
        DigitsDataModule(train_size=100, unlabelled_size=100_000).unlabelled_dataset()
