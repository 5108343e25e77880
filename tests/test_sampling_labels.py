"""What a sampler draws from: the shares that each mix gives, and labels in any form."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_tips.imbalance import (
    ImbalancedSampler,
    bin_targets,
    class_counts,
    default_num_samples,
    find_labels,
    target_mix,
)

from sampled import COUNTS, LABELS

# ---- shares


def test_mixes_are_those_of_the_papers() -> None:
    counts = np.array([1000, 100, 10])
    assert target_mix(counts, "sqrt") == pytest.approx(np.sqrt(counts) / np.sqrt(counts).sum())
    weights = (1 - 0.99) / (1 - 0.99**counts) * counts
    assert target_mix(counts, "effective", beta=0.99) == pytest.approx(weights / weights.sum())
    assert target_mix(counts, "effective", beta=0.0) == pytest.approx(counts / counts.sum())
    factors = np.maximum(1, np.sqrt(0.1 / (counts / 1110)))
    mix = target_mix(counts, "repeat_factor", threshold=0.1)
    assert mix == pytest.approx(counts * factors / (counts * factors).sum())
    assert default_num_samples(counts, mix, "repeat_factor") == int(np.ceil((counts * factors).sum()))
    assert target_mix(counts, [2, 1, 1]).tolist() == [0.5, 0.25, 0.25]
    assert target_mix(counts, {"0": 2, "1": 1, "2": 1}).tolist() == [0.5, 0.25, 0.25]
    assert target_mix([5, 0, 5], {0: 1, 2: 3}).tolist() == [0.25, 0, 0.75]


@pytest.mark.parametrize(
    ("counts", "arguments", "message"),
    [
        ([5, 0, 5], {"strategy": "sqrt"}, "Classes without samples: 1 of 3. Number the classes from 0 without gaps"),
        ([5], {"strategy": "sqrt"}, "one class only"),
        ([5, -1], {"strategy": "sqrt"}, "number of samples of each class, 0 or more"),
        ([5, 5], {"strategy": "oversampel"}, "Did you mean 'oversample'"),
        ([5, 5], {"strategy": "effective", "beta": 1.0}, "beta=1.0 must be at least 0 and below 1"),
        ([5, 5], {"strategy": "repeat_factor", "threshold": 0.0}, "threshold=0.0 must be above 0"),
        ([5, 5], {"strategy": {0: 1, 7: 1}}, r"names classes \[7\], but the labels only have 0 to 1"),
        ([5, 5], {"strategy": {0: 1, "cat": 1}}, "'cat' is no class id"),
        ([5, 5], {"strategy": {0: 1}}, "does not say how much of classes 1 to draw"),
        ([5, 5], {"strategy": {0: 1, 1: -1}}, "finite weights of 0 or more"),
        ([5, 5], {"strategy": [1, float("nan")]}, "finite weights of 0 or more"),
        ([5, 5], {"strategy": [1, 1, 1]}, "there are 2 classes: give one each"),
        ([5, 5], {"strategy": [0, 1]}, "fewer than two classes"),
        ([5, 0], {"strategy": [1, 1]}, "wants classes 1, which have no samples"),
    ],
)
def test_wrong_mixes_say_what_to_do(counts, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        target_mix(counts, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_replicas": 2, "rank": 2}, "rank=2 must be below num_replicas=2"),
        ({"num_replicas": 0}, "num_replicas=0 is too low"),
        ({"labels": [0, 2, 2]}, "Classes without samples: 1"),
        ({"labels": [0, 0, 0]}, "one class only"),
    ],
)
def test_wrong_arguments_say_so(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImbalancedSampler(**{"labels": LABELS} | arguments)
    with pytest.raises(ValueError, match="epoch=-1"):
        ImbalancedSampler(LABELS).set_epoch(-1)


# ---- labels


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
        (Kept("labels", np.eye(4, dtype=int)[LABELS], LABELS % 2), LABELS % 2),
        (Subset(Kept("targets", 3 - LABELS), range(0, 1000, 3)), LABELS[::3]),
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
    dataset = Kept("targets", LABELS)
    dataset.make = make
    assert find_labels(dataset).tolist() == LABELS.tolist()
    numbered = Kept("targets", LABELS, range(1000))
    assert find_labels(numbered).tolist() == LABELS.tolist()  # what stands second is the sample's number


def test_samples_are_read_again_when_they_have_changed() -> None:
    dataset = Plain([0, 1, 1, 0, 2])
    assert find_labels(dataset).tolist() == [0, 1, 1, 0, 2]
    dataset.hidden += [2, 2]
    assert find_labels(dataset).tolist() == [0, 1, 1, 0, 2, 2, 2]
    dataset.hidden[:] = [2, 1, 1, 2, 0, 0, 0]
    assert find_labels(dataset).tolist() == [2, 1, 1, 2, 0, 0, 0]


def test_what_samples_open_is_left_to_workers() -> None:
    class Opens(Kept):
        file = None

        def __getitem__(self, index: int) -> Any:
            self.file = self.file or object()
            return super().__getitem__(index)

    dataset = Opens("targets", LABELS)
    find_labels(Subset(dataset, [0, 5, 9]))
    assert dataset.file is None


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


def test_bins_of_regression_targets() -> None:
    values = np.random.default_rng(0).exponential(size=1000)
    assert class_counts(bin_targets(values, 4)).tolist() == [250] * 4
    wide = bin_targets(torch.from_numpy(values)[:, None], 4, "width")
    assert (np.diff(class_counts(wide)) < 0).all()
    assert bin_targets([0.0, 1.0, 2.0, 9.0], [0.5, 5.0]).tolist() == [0, 1, 1, 2]
    assert bin_targets([0.0, 0.0, 0.0, 9.0], 3, "width").tolist() == [0, 0, 0, 1]  # no gaps
    assert len(ImbalancedSampler(wide)) == 4 * class_counts(wide).max()
    for arguments in ({"bins": 1}, {"bins": [2, 1]}, {"method": "equal"}, {"values": [1.0, float("nan")]}):
        with pytest.raises(ValueError, match=r"."):
            bin_targets(**{"values": [1.0, 2.0]} | arguments)
    with pytest.raises(ValueError, match="one bin"):
        bin_targets([1.0, 1.0])
