"""Where the labels of a dataset come from: what it keeps, or its samples, read without a trace."""

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_tips.core.apart import look_apart
from lightning_tips.imbalance import (
    ImbalancedSampler,
    class_counts,
    find_labels,
)

from sampled import COUNTS, LABELS

# ---- shares


class Plain(Dataset):
    """Keeps its labels to itself, and draws random numbers for each sample."""

    def __init__(self, labels, make=lambda x, y: (x, y)) -> None:
        self.hidden, self.make, self.reads = list(labels), make, 0

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.make(torch.rand(2) + random.random() + np.random.rand(), self.hidden[index])


class Kept(Plain):
    def __init__(self, name, labels, given=LABELS) -> None:
        super().__init__(given)
        setattr(self, name, labels)


class Overrides(Kept):
    """Inherits labels, and may give out others: there is reason to look."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.tolist(),
        LABELS.astype(np.uint8),
        LABELS.astype(np.int16)[:, None],
        LABELS.astype(np.uint64),
        torch.from_numpy(LABELS).int(),
        torch.from_numpy(LABELS).to(torch.uint8),
        [torch.tensor(int(label)) for label in LABELS],
    ],
)
def test_labels_in_any_form(labels) -> None:
    for dataset in (Kept("targets", labels), Kept("labels", labels)):
        assert find_labels(dataset).tolist() == LABELS.tolist()
        assert not dataset.reads
    assert ImbalancedSampler(labels).indices(0).tolist() == ImbalancedSampler(LABELS).indices(0).tolist()
    assert class_counts(labels).tolist() == COUNTS


def test_labels_of_two_classes_as_bool_and_as_a_binary_loss_wants_them() -> None:
    for labels in ([True, False, False], torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[1], [0], [0]]).bfloat16()):
        assert class_counts(labels).tolist() == [2, 1]


def test_labels_of_combined_datasets() -> None:
    tensors = TensorDataset(torch.zeros(len(LABELS), 2), torch.from_numpy(LABELS))
    both = ConcatDataset(
        [Subset(tensors, range(0, 100, 2)), Kept("targets", LABELS), Subset(Subset(tensors, [5, 4]), [1])]
    )
    expected = [*LABELS[:100:2], *LABELS, LABELS[4]]
    assert find_labels(both).tolist() == expected
    assert find_labels(Subset(both, torch.tensor([49, 50]))).tolist() == expected[49:51]
    hidden = Plain([0, 1, 1, 0, 2])
    assert find_labels(Subset(hidden, [4, 1]), progress=False).tolist() == [2, 1]
    assert hidden.reads == 2


class Wrapped(Dataset):
    """Passes on what it does not know, and gives out other labels, as wrappers do."""

    def __init__(self, base, change) -> None:
        self.base, self.change = base, change

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        image, label = self.base[index]
        return image, self.change(label)

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Wrapped(Kept("targets", LABELS), lambda label: 3 - label), 3 - LABELS),
        (Wrapped(Kept("targets", LABELS), lambda label: int(label == 3)), LABELS == 3),  # 7 of 1000
        (Overrides("labels", np.eye(4, dtype=int)[LABELS], LABELS % 2), LABELS % 2),
        (Subset(Overrides("targets", 3 - LABELS), range(0, 1000, 3)), LABELS[::3]),
        (ConcatDataset([Overrides("targets", 3 - LABELS), Kept("targets", LABELS)]), [*LABELS, *LABELS]),
        (Kept("labels", ["cat", "dog", "cat"], [0, 1, 0]), [0, 1, 0]),  # names
        (Kept("targets", [0, 1], [0, 1, 1]), [0, 1, 1]),
        (Kept("targets", [0.25, 0.5, 0.75], [0, 0, 1]), [0, 0, 1]),
    ],
)
def test_labels_are_those_of_the_samples_where_others_are_kept(dataset, expected) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert find_labels(dataset).tolist() == list(expected)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: x,  # no label
        lambda x, y: 1 / 0,
        lambda x, y: (x, x),  # two views
        lambda x, y: (x, "cat"),
        lambda x, y: (x, torch.eye(4)[y]),
        lambda x, y: (x, 0.7 * torch.eye(4)[y]),  # soft
        lambda x, y: {"a": x, "b": y},
    ],
)
def test_kept_labels_hold_where_samples_have_none_or_the_same_in_another_form(make) -> None:
    dataset = Overrides("targets", LABELS)
    dataset.make = make
    assert find_labels(dataset).tolist() == LABELS.tolist()
    numbered = Overrides("targets", LABELS, range(1000))
    assert find_labels(numbered).tolist() == LABELS.tolist()  # what stands second is the sample's number


class Keeper(Dataset):
    """A data set as libraries have them."""

    def __init__(self, labels) -> None:
        self.images, self.targets = torch.zeros(len(labels), 1), list(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.targets[index]


class Relabelled(Keeper):
    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.targets[index] == 3)


class KeepsItsOwn(Keeper):
    """Whose samples nobody needs to look at."""

    def __init__(self, labels) -> None:
        super().__init__(labels)
        self.targets = [3 - label for label in self.targets]

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("no sample is to be read")


class Changed(Subset):
    def __getitem__(self, index: Any) -> Any:
        return 0, 3 - super().__getitem__(index)[1]

    def __getitems__(self, indices: list[int]) -> Any:  # torch wants both
        return [self[index] for index in indices]


class ChangedTensors(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return 0, 3 - super().__getitem__(index)[1]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Keeper(LABELS), LABELS),
        (Relabelled(LABELS), LABELS == 3),
        (KeepsItsOwn(LABELS), 3 - LABELS),
        (Changed(Keeper(LABELS), range(0, 1000, 3)), 3 - LABELS[::3]),
        (ChangedTensors(torch.zeros(1000), torch.from_numpy(LABELS)), 3 - LABELS),
    ],
)
def test_a_class_that_gives_out_what_it_inherits_otherwise_is_looked_at(dataset, expected) -> None:
    assert find_labels(dataset).tolist() == list(expected)


@pytest.mark.parametrize("cls", [Kept, Overrides])
@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (torch.arange(6), torch.tensor([1, 1, 1, 1, 0, 0]), y),  # ids, attention mask
        lambda x, y: (x, y % 2, torch.tensor(y)),  # which domain it is from
        lambda x, y: (x, y % 2, "cat.png"),  # who knows which it is
        lambda x, y: (y, x.mean() > 0),
        lambda x, y: {"image": x, "label": y % 2, "grade": y},
    ],
)
def test_kept_labels_hold_where_any_part_agrees_or_none_is_told(cls, make) -> None:
    dataset = cls("labels", LABELS)
    dataset.make = make
    assert find_labels(dataset).tolist() == LABELS.tolist()
    if not isinstance(dataset[0], dict):  # a key does not tell anything there
        assert find_labels(dataset, "label").tolist() == LABELS.tolist()


def test_a_part_that_is_asked_for_by_name_counts_for_more_than_what_is_kept() -> None:
    dataset = Overrides("labels", LABELS)
    dataset.make = lambda x, y: {"image": x, "coarse": y % 2, "label": y}
    assert find_labels(dataset).tolist() == LABELS.tolist()
    assert find_labels(dataset, "coarse").tolist() == (LABELS % 2).tolist()


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random, np.random.rand])
def test_kept_labels_hold_where_samples_come_with_another_each_time(draw) -> None:
    dataset = Overrides("targets", LABELS)
    dataset.make = lambda x, y: (x, 3 - y if draw() < 0.5 else y)
    assert find_labels(dataset).tolist() == LABELS.tolist()


def test_kept_labels_hold_where_samples_cannot_be_read() -> None:
    dataset = Overrides("targets", LABELS)
    dataset.make = lambda x, y: os._exit(1)
    assert find_labels(dataset).tolist() == LABELS.tolist()


def test_reading_takes_no_longer_than_it_may() -> None:
    with pytest.raises(TimeoutError, match="within"):
        look_apart(lambda dataset: time.sleep(60), [], seconds=0.1)
    with pytest.raises(ZeroDivisionError):
        look_apart(lambda dataset: 1 / 0, [])


def test_samples_are_read_again_when_they_have_changed() -> None:
    dataset = Plain([0, 1, 1, 0, 2])
    assert find_labels(dataset).tolist() == [0, 1, 1, 0, 2]
    dataset.hidden += [2, 2]
    assert find_labels(dataset).tolist() == [0, 1, 1, 0, 2, 2, 2]
    dataset.hidden[:] = [2, 1, 1, 2, 0, 0, 0]
    assert find_labels(dataset).tolist() == [2, 1, 1, 2, 0, 0, 0]


class Store:
    """Opens its file with the first sample, as readers of HDF5 and LMDB do."""

    file = None

    def read(self, index: int) -> int:
        self.file = self.file or open(__file__, "rb", buffering=0)  # noqa: SIM115
        self.file.seek(index)
        return self.file.read(1)[0]


class Stored(Keeper):
    def __init__(self, labels) -> None:
        super().__init__(labels)
        self.store = Store()

    def __getitem__(self, index: int) -> Any:
        return self.store.read(index), self.targets[index]


class StoredAgain(Stored):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)


class StoredOtherwise(Stored):
    def __getitem__(self, index: int) -> Any:
        return self.store.read(index), 3 - self.targets[index]


class Closing(StoredOtherwise):
    def __del__(self) -> None:
        if self.store.file:
            self.store.file.close()


@pytest.mark.parametrize(
    ("make", "turned"),
    [
        (Stored, False),
        (StoredAgain, False),
        (StoredOtherwise, True),
        (lambda labels: Wrapped(Stored(labels), lambda label: 3 - label), True),
        (Closing, True),
    ],
)
@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_what_samples_open_is_left_to_workers(make, turned: bool, platform: str, monkeypatch) -> None:
    if platform != "linux" and make is Closing:
        turned = False  # no copy can be had: what is kept is believed
    elif platform == "linux" and not sys.platform.startswith("linux"):
        pytest.skip("no fork that is safe")
    monkeypatch.setattr("lightning_tips.core.apart.sys.platform", platform)
    dataset = make(LABELS)
    for whole in (dataset, Subset(dataset, range(0, 1000, 2))):
        expected = LABELS[:: 1000 // len(whole)]
        for _ in range(2):
            assert find_labels(whole).tolist() == (3 - expected if turned else expected).tolist()
    assert dataset.store.file is None


def test_labels_of_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for name, number in (("cat", 3), ("dog", 1)):
        (tmp_path / name).mkdir()
        for i in range(number):
            Image.new("L", (2, 2)).save(tmp_path / name / f"{i}.png")
    folder = ImageFolder(str(tmp_path))
    assert find_labels(folder).tolist() == [0, 0, 0, 1]
    del folder.targets
    assert find_labels(folder).tolist() == [0, 0, 0, 1]
    turned = ImageFolder(str(tmp_path), target_transform=lambda label: 1 - label)
    assert find_labels(turned).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda x, y: (x, y), None),
        (lambda x, y: [x, torch.tensor(y)], None),
        (lambda x, y: {"image": x, "label": y}, None),
        (lambda x, y: {"image": x, "kind": np.int64(y)}, "kind"),
    ],
)
def test_hidden_labels_are_read_once_and_leave_the_generators_alone(make, key) -> None:
    dataset = Plain([0, 1, 1, 0, 2], make)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in range(2):
        assert find_labels(dataset, key).tolist() == [0, 1, 1, 0, 2]
    assert dataset.reads == 5
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


class Named(Plain):
    labels = ("cat", "dog")

    def __getitem__(self, index: int) -> Any:
        return 0, index % 2, self.hidden[index]


class Rude(dict):
    """Has no message for what it does not have."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(0, 1)])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (Stream(), TypeError, "IterableDataset, whose samples cannot be chosen"),
        (Kept("targets", [0, 1], ["cat"] * 1000), ValueError, "Kept has 1000 samples but 2 targets"),
        (Plain([0, 1], lambda x, y: x), ValueError, "No labels can be found in Plain: a sample is a Tensor"),
        (Plain([0, 1], lambda x, y: {"image": x, "z": y}), ValueError, "No labels can be found in Plain: Cannot tell"),
        (Plain([0, 1], lambda x, y: Rude(y=y)), ValueError, r"No labels can be found in Plain: KeyError\(\)"),
        (Named([0, 1]), TypeError, "labels of type str such as 'cat'"),  # three parts: which is the label?
        (TensorDataset(torch.zeros(3)), ValueError, "inputs only"),
        ([0.5, 1.5], TypeError, "bin_targets"),
        (["cat", "dog"], TypeError, "labels of type str such as 'cat' are no class ids"),
        ([0, -1], ValueError, "negative class ids, -1"),
        ([[0, 2], [1, 0]], ValueError, "must be 0 or 1"),
        ([[0], [1, 0]], ValueError, "ragged"),
        (np.zeros((2, 2, 2), int), ValueError, "shape"),
        ([], ValueError, "no labels"),
        (np.array([1j, 2]), TypeError, "dtype complex128"),
        ([0, 1, 10**12], ValueError, "class id 1000000000000 is too high"),
        (object(), TypeError, "object is no dataset"),
    ],
)
def test_wrong_labels_say_what_to_do(labels, error, message) -> None:
    with pytest.raises(error, match=f"(?i){message}"):
        ImbalancedSampler(labels)
