"""Data modules for digits (embedded), Fashion-MNIST, CIFAR-10 and folders of images."""

from __future__ import annotations

import gzip
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader
from torchvision.transforms import functional as TF

from lightning_tips.vision.data import ImageDataModule, ImageDataset


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, 10 classes; no download.

    The data has no official test part: a stratified fifth (359 images) is set apart, the same for every seed.

    Args: see `ImageDataModule`.
    """

    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    in_channels = 1

    def load_train(self) -> tuple[ImageDataset, None]:
        """Return the 1,438 images that are not in the test part."""
        return self._load()[1], None

    def load_test(self) -> ImageDataset:
        """Return the 359 images of the test part."""
        return self._load()[0]

    def _load(self) -> tuple[ImageDataset, ImageDataset]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
        data = ImageDataset(images, torch.from_numpy(digits.target).long(), scale=16.0, image_size=self.image_size)
        return self._cut(data, fraction=0.2, seed=0)


class FashionMNISTDataModule(ImageDataModule):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey images of 28x28 pixels, 10 classes.

    The four idx files, gzipped or not, are looked for in `root`, in `root/FashionMNIST/raw` (where torchvision puts
    them) and in the folder of the Debian package `dataset-fashion-mnist`; if they are in none, torchvision downloads
    them to `root`.

    Args:
        root: Folder of the data.
        download: Download the data if it is not found.
        kwargs: See `ImageDataModule`.

    Raises:
        FileNotFoundError: On `prepare_data` or `setup`: the data is neither found nor downloaded.
        ValueError: On `setup`: a file is not an idx file, or is cut short.
    """

    class_names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    in_channels = 1
    system_root = "/usr/share/datasets/fashion-mnist"  # of the Debian package

    def __init__(self, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download the data if it is not found."""
        if self._find() is not None:
            return
        if not self.download:
            raise self._missing()
        try:
            torchvision.datasets.FashionMNIST(self.root, download=True)
        except (RuntimeError, OSError) as error:
            raise self._missing() from error

    def load_train(self) -> tuple[ImageDataset, None]:
        """Return the 60,000 training images."""
        return self._load("train"), None

    def load_test(self) -> ImageDataset:
        """Return the 10,000 test images."""
        return self._load("t10k")

    def _load(self, part: str) -> ImageDataset:
        folder = self._find()
        if folder is None:
            raise self._missing()
        images = read_idx(folder / f"{part}-images-idx3-ubyte")[:, None]
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte").long()
        return ImageDataset(images, labels, image_size=self.image_size)

    def _find(self) -> Path | None:
        names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        for folder in (Path(self.root), Path(self.root, "FashionMNIST", "raw"), Path(self.system_root)):
            if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
                return folder
        return None

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(
            f"Fashion-MNIST is neither in {self.root!r} nor in {self.system_root!r}. Either install the Debian package "
            "dataset-fashion-mnist, or let torchvision download it (download=True, with access to the internet); "
            "`root` may also name a folder with the four files (train|t10k)-(images-idx3|labels-idx1)-ubyte.gz."
        )


def read_idx(path: str | Path) -> Tensor:
    """Read an idx file of unsigned bytes, the format of MNIST (http://yann.lecun.com/exdb/mnist/).

    Args:
        path: Of the file; `path` with `.gz` appended is read if there is no file `path`.

    Returns:
        uint8 tensor of the shape that the file declares.

    Raises:
        ValueError: The file does not start as an idx file of bytes does, or has not the length that it declares.
    """
    path = Path(path)
    data = path.read_bytes() if path.is_file() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    # Two zeros, 8 for unsigned bytes, the number of dimensions; then each dimension as a big-endian int32.
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes.")
    start = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:start], dtype=">i4").tolist())
    if len(data) - start != int(np.prod(shape)):
        raise ValueError(f"{path} declares the shape {shape}, but has {len(data) - start} bytes of data.")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy())


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32 pixels, 10 classes; through torchvision.

    Args:
        root: Folder of the data, as torchvision lays it out (`root/cifar-10-batches-py`).
        download: Download the data if it is not there.
        kwargs: See `ImageDataModule`.

    Raises:
        FileNotFoundError: On `prepare_data` or `setup`: the data is neither there nor downloaded.
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    in_channels = 3

    def __init__(self, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download the data if it is not there."""
        self._open(train=True, download=self.download)

    def load_train(self) -> tuple[ImageDataset, None]:
        """Return the 50,000 training images."""
        return self._load(train=True), None

    def load_test(self) -> ImageDataset:
        """Return the 10,000 test images."""
        return self._load(train=False)

    def _load(self, train: bool) -> ImageDataset:
        data = self._open(train, download=False)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return ImageDataset(images, torch.tensor(data.targets), image_size=self.image_size)

    def _open(self, train: bool, download: bool) -> Any:
        try:
            with warnings.catch_warnings():
                # NumPy 2.4.0 to 2.4.4 find fault with how one of 2009 pickled the files.
                warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
                return torchvision.datasets.CIFAR10(self.root, train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {self.root!r}: pass download=True (with access to the internet), or as `root` "
                "the folder that holds cifar-10-batches-py."
            ) from error


class ImageFolderDataModule(ImageDataModule):
    """Any folder of images, a subfolder per class; JPEG, PNG and what else torchvision's ImageFolder reads.

    Two layouts: `root/train/CLASS/*`, with `root/val` and `root/test` beside it if you have them (without `val` it is
    split off the training part); or `root/CLASS/*`, of which `test_fraction` and `val_fraction` are split off, the
    test part being the same for every seed.

    Images are read as colour, their shorter side is resized to `image_size`, and the middle square is taken. They are
    kept in memory as uint8 if all of a part fit into `memory_limit`; else each batch is read from disk.

    Args:
        root: The folder.
        image_size: Height and width of the images.
        test_fraction: Share that becomes the test part if there is no `root/train`, in (0, 1).
        memory_limit: Bytes per part (training and validation, test) that may stay in memory; default 1 GiB.
        kwargs: See `ImageDataModule`.

    Raises:
        FileNotFoundError: The folder is missing or has no class folders, or a class folder has no images; `root/train`
            exists without `root/test`, and the test part is asked for.
        ValueError: `root/val` or `root/test` has a class that `root/train` has not; an argument out of its range.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        test_fraction: float = 0.1,
        memory_limit: int = 2**30,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, **kwargs)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction is a share between 0 and 1, such as 0.1, not {test_fraction}.")
        if not Path(root).is_dir():
            raise FileNotFoundError(f"There is no folder {root!r}: pass as `root` a folder with a subfolder per class.")
        self.root = root
        self.test_fraction = test_fraction
        self.memory_limit = memory_limit
        self.has_parts = Path(root, "train").is_dir()
        self.class_names = _subfolders(Path(root, "train") if self.has_parts else Path(root))
        if not self.class_names:
            raise FileNotFoundError(
                f"{root!r} has no subfolders: put the images of each class into a folder of its own."
            )

    def load_train(self) -> tuple[ImageDataset, ImageDataset | None]:
        """Return the training part, and `root/val` if there is one."""
        if not self.has_parts:
            return self._keep(self._cut(self._files(""), self.test_fraction, seed=0)[1]), None
        val = self._keep(self._files("val")) if Path(self.root, "val").is_dir() else None
        return self._keep(self._files("train")), val

    def load_test(self) -> ImageDataset:
        """Return `root/test`, or the split-off test part."""
        if not self.has_parts:
            return self._keep(self._cut(self._files(""), self.test_fraction, seed=0)[0])
        if not Path(self.root, "test").is_dir():
            raise FileNotFoundError(f"{self.root!r} has a folder train but no folder test: add one to test on.")
        return self._keep(self._files("test"))

    def _files(self, part: str) -> ImageDataset:
        folder = Path(self.root, part)
        strange = set(_subfolders(folder)) - set(self.class_names)
        if strange:
            raise ValueError(
                f"{str(folder)!r} has classes that the training part has not: {', '.join(sorted(strange))}."
            )
        classes = {name: index for index, name in enumerate(self.class_names)}
        # A class may be missing where a part is only measured on, never where the network is to learn it.
        samples = make_dataset(str(folder), classes, IMG_EXTENSIONS, allow_empty=part in ("val", "test"))
        if not samples:
            raise FileNotFoundError(f"{str(folder)!r} has no images: add some, or remove the folder.")
        assert self.image_size is not None
        files = ImageFiles([path for path, _ in samples], self.image_size)
        return ImageDataset(files, torch.tensor([label for _, label in samples], dtype=torch.int64))

    def _keep(self, data: ImageDataset) -> ImageDataset:
        """Read the images into memory if they fit."""
        assert self.image_size is not None
        assert isinstance(data.images, ImageFiles)
        if len(data) * 3 * self.image_size**2 > self.memory_limit:
            return data
        return ImageDataset(data.images(data.indices.numpy()), data.targets)


class ImageFiles:
    """Image files, read when asked for.

    Args:
        paths: Of the files.
        image_size: The shorter side is resized to this (bilinear, antialiased); then the middle square is taken.
    """

    def __init__(self, paths: Sequence[str], image_size: int) -> None:
        self.paths = np.array(paths)  # an array, since workers would copy a list, object by object
        self.image_size = image_size

    def __call__(self, positions: np.ndarray) -> Tensor:
        """Return the images at `positions` (B,) as (B, 3, image_size, image_size) uint8."""
        images = torch.empty(len(positions), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for image, path in zip(images, self.paths[positions], strict=True):
            image.copy_(TF.pil_to_tensor(TF.center_crop(TF.resize(pil_loader(path), self.image_size), self.image_size)))
        return images


def _subfolders(folder: Path) -> tuple[str, ...]:
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return tuple(sorted(names))
