"""Duplicates, label errors, folds: what `lightning-tips quality` finds, and how it reads."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_tips import SubsetCallback
from lightning_tips.data import FoldCallback, find_duplicates, find_label_errors, stratified_folds
from lightning_tips.data.duplicates import Duplicate, groups_of_copies
from lightning_tips.data.label_errors import class_thresholds
from lightning_tips.data.quality_report import Copies, draw_duplicates
from lightning_tips.data.reading import class_names, file_of, read_dataset

from harness import assert_same, bits, every_step, fit
from noisy_digits import DIGITS, IMAGES, LABELS, noisy

# ---- duplicates


def test_planted_duplicates_are_found_and_strangers_are_not() -> None:
    base, strangers = IMAGES[:800], IMAGES[800:1000]
    second = torch.cat([strangers, base[[5]], noisy(base[[7, 300, 650]])])
    found = find_duplicates(base, second)
    assert {(pair.first, pair.second, pair.exact) for pair in found if pair.second >= 200} == {
        (5, 200, True), (7, 201, False), (300, 202, False), (650, 203, False),
    }  # fmt: skip
    assert len(found) <= 4 + 2  # of 200 strangers, who have similar ones among 800
    assert found[0] == Duplicate(5, 200, 1.0, True)
    similarities = [pair.similarity for pair in found]
    assert similarities == sorted(similarities, reverse=True)
    assert [pair for pair in found if pair.exact] == find_duplicates(base, second, threshold=1.0, ratio=0)


def test_duplicates_within_a_data_set_are_named_once() -> None:
    data = torch.cat([IMAGES[:300], IMAGES[[4, 4]], noisy(IMAGES[[9]])])
    found = find_duplicates(data)
    assert {(pair.first, pair.second) for pair in found if pair.second >= 300} == {(4, 300), (4, 301), (9, 302)}
    assert all(pair.first < pair.second for pair in found)
    assert groups_of_copies([p for p in found if p.second >= 300], len(data)) == [[4, 300, 301], [9, 302]]


def test_size_type_and_colours_of_images_do_not_matter() -> None:
    base = IMAGES[:400]
    large = torch.nn.functional.interpolate(base[[3]].float(), scale_factor=3, mode="bilinear")
    odd = [large[0].expand(3, -1, -1) / 255, noisy(base[[8]])[0], torch.full((1, 5, 5), 7.0)]
    assert {(pair.first, pair.second) for pair in find_duplicates(base, odd)} >= {(3, 0), (8, 1)}
    assert not [pair for pair in find_duplicates(base, odd) if pair.second == 2]  # one colour is like nothing
    blank = torch.zeros(12, 1, 8, 8)
    assert len(find_duplicates(blank)) == 11  # but identical it may be


def test_mirror_images_are_found_when_asked_for() -> None:
    base = IMAGES[:500]
    mirrored = base[[11, 40]].flip(-1)
    assert (11, 0) not in {(pair.first, pair.second) for pair in find_duplicates(base, mirrored)}
    found = [pair for pair in find_duplicates(base, mirrored, mirrored=True) if pair.mirrored]
    assert {(pair.first, pair.second) for pair in found} == {(11, 0), (40, 1)}


def test_blocks_do_not_change_what_is_found(monkeypatch) -> None:
    data = torch.cat([IMAGES[:150], noisy(IMAGES[:30])])
    whole = find_duplicates(data)
    monkeypatch.setattr("lightning_tips.data.duplicates.QUERIES", 7)
    monkeypatch.setattr("lightning_tips.data.duplicates.COLUMNS", 13)
    assert find_duplicates(data) == whole
    assert len(whole) >= 28


def test_features_of_any_data_are_compared_by_their_cosine() -> None:
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    second = torch.stack([features[3] * 2 + 0.01, features[5], torch.zeros(16)])
    found = find_duplicates(features.numpy(), second, threshold=0.99)
    assert [(pair.first, pair.second, pair.exact) for pair in found] == [(5, 1, True), (3, 0, False)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.rand(4, 8),), "threshold"),
        ((torch.rand(4, 8, 8),), r"\(N, C, H, W\)"),
        ((torch.full((2, 1, 8, 8), torch.nan),), "not finite, the first at 0"),
        ((torch.rand(2, 1, 8, 8), torch.rand(2, 4)), "one of the two|images and the other"),
        ((torch.rand(2, 4), torch.rand(2, 5)), "4 and 5 numbers"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_duplicates(*arguments, threshold=0.9 if "numbers" in words else None)


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"threshold": 1.5}, {"ratio": 1.0}, {"ratio": -0.1}])
def test_thresholds_lie_in_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        find_duplicates(IMAGES[:3], **wrong)


# ---- label errors


def test_planted_label_errors_head_the_list() -> None:
    rng = np.random.default_rng(0)
    given = DIGITS.target.copy()
    wrong = rng.choice(len(given), 60, replace=False)
    given[wrong] = (given[wrong] + rng.integers(1, 10, 60)) % 10
    dealt = stratified_folds(given, 3)
    probabilities = np.empty((len(given), 10))
    for fold in range(3):
        judge = LogisticRegression(max_iter=200).fit(DIGITS.data[dealt != fold] / 16, given[dealt != fold])
        probabilities[dealt == fold] = judge.predict_proba(DIGITS.data[dealt == fold] / 16)
    found = find_label_errors(probabilities, torch.from_numpy(given))
    places = [error.place for error in found]
    assert len(set(places) & set(wrong.tolist())) >= 36  # recall
    assert len(set(places[:30]) & set(wrong.tolist())) >= 28  # precision at the head
    right = [error.suggested == DIGITS.target[error.place] for error in found if error.place in wrong]
    assert np.mean(right) > 0.9
    assert [e.score for e in found] == sorted((e.score for e in found), reverse=True)
    assert all(error.suggested_confidence > error.given_confidence for error in found)


def test_a_class_that_is_hard_to_tell_has_a_low_bar() -> None:
    probabilities = [[0.55, 0.45], [0.55, 0.45], [0.05, 0.95], [0.1, 0.9], [0.56, 0.44], [0.4, 0.6]]
    labels = [0, 0, 1, 1, 1, 0]
    assert class_thresholds(probabilities, labels).tolist() == pytest.approx([0.5, (0.95 + 0.9 + 0.44) / 3])
    # 0.56 is much for class 0; 0.6 is little for class 1.
    assert [(error.place, error.suggested) for error in find_label_errors(probabilities, labels)] == [(4, 0)]


def test_a_class_without_samples_is_never_suggested() -> None:
    probabilities = [[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]
    assert class_thresholds(probabilities, [0, 0, 1])[2] == np.inf
    assert find_label_errors(probabilities, [0, 0, 1]) == []


@pytest.mark.parametrize(
    ("probabilities", "labels", "words"),
    [
        ([[0.5, 0.5]], [0, 1], "1 rows of probabilities but 2 labels"),
        ([[2.0, -1.0]], [0], "Are these logits"),
        ([[0.5, 0.2]], [0], "sums to 0.7"),
        ([[np.nan, 1.0]], [0], "not finite, the first of sample 0"),
        ([0.3, 0.7], [0, 1], "two classes or more"),
        ([[1.0], [1.0]], [0, 0], "two classes or more"),
        ([[0.5, 0.5]], [2], "a label 2, but the probabilities are of 2 classes"),
        ([[0.5, 0.5]], [[0, 1]], "one class a sample"),
        ([[0.5, 0.5]], [-1], "negative class ids"),
    ],
)
def test_what_are_no_probabilities_or_labels_is_said(probabilities: Any, labels: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_label_errors(np.array(probabilities), labels)


# ---- folds


def test_folds_hold_out_every_sample_once_and_every_class_in_proportion() -> None:
    labels = [0] * 100 + [1] * 31 + [2] * 4 + [3]
    dealt = stratified_folds(labels, 5, seed=3)
    assert (dealt == stratified_folds(torch.tensor(labels), 5, seed=3)).all()
    assert (dealt != stratified_folds(labels, 5, seed=4)).any()
    assert np.ptp(np.bincount(dealt)) <= 1
    for label in range(4):
        counts = Counter(dealt[np.array(labels) == label].tolist())
        assert max(counts.values()) - (min(counts.values()) if len(counts) == 5 else 0) <= 1
    for wrong in ({"folds": 1}, {"folds": 200}, {"folds": 5, "seed": -1}):
        with pytest.raises(ValueError, match=r"folds|seed"):
            stratified_folds(labels, **wrong)


class FewDigits(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.train = TensorDataset(IMAGES[:150].float() / 255, LABELS[:150])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(IMAGES[150:200].float() / 255, LABELS[150:200]), 32)


def test_a_fit_without_a_fold_resumes_with_the_same_bits(tmp_path: Path) -> None:
    held_out = FoldCallback(1, 3, seed=2)
    whole = fit(held_out, every_step(tmp_path), folder=tmp_path, data=FewDigits(), max_epochs=2)
    (part,) = held_out.chosen
    assert part.indices == np.flatnonzero(stratified_folds(LABELS[:150], 3, 2) != 1).tolist()
    assert [event.details for event in held_out.events] == [{"samples": 100, "of": 150}]
    again = fit(
        FoldCallback(1, 3, seed=2), every_step(tmp_path / "b"), folder=tmp_path, data=FewDigits(), max_epochs=2,
        ckpt_path=tmp_path / "step-step=2.ckpt",
    )  # fmt: skip
    assert_same(bits(whole), bits(again))


def test_folds_refuse_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fold=3 must be a number from 0 to 2"):
        FoldCallback(3, 3)
    with pytest.raises(ValueError, match="folds=1"):
        FoldCallback(0, 1)
    with pytest.raises(MisconfigurationException, match="a part of the training data"):
        fit(FoldCallback(0, 2), SubsetCallback(10), folder=tmp_path, data=FewDigits(), max_epochs=1)


# ---- reading


class Shaky(Dataset):
    """Like a folder of images of torchvision, with a transform that draws."""

    def __init__(self, transform: Any = None) -> None:
        self.transform = transform
        self.samples = [(f"folder/{number}.png", int(LABELS[number])) for number in range(40)]
        self.classes = [f"digit {number}" for number in range(10)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Any:
        image = Image.fromarray(IMAGES[place, 0].numpy())
        return {"image": image if self.transform is None else self.transform(image), "label": self.samples[place][1]}


def test_what_changes_at_random_is_read_with_the_transform_of_the_validation_data() -> None:
    shaky = Shaky(lambda image: image.rotate(float(torch.rand(1)) * 180))
    train = Subset(shaky, range(5, 40))
    read = read_dataset("train", DataLoader(train, 8), like=Subset(Shaky(), [0]), progress=False)
    assert not read.is_random
    assert "with the transform of the validation data" in " ".join(read.notes)
    assert read.labels is not None
    assert read.labels.tolist() == LABELS[5:40].tolist()
    still = read_dataset("val", DataLoader(Shaky(), 8), progress=False)
    assert still.notes == []
    assert read.prints.hashes == still.prints.hashes[5:]
    assert train.dataset.transform is shaky.transform
    assert file_of(read.dataset, 3) == "folder/8.png"
    assert class_names(read.dataset)[2] == "digit 2"
    alone = read_dataset("train", DataLoader(train, 8), progress=False)
    assert alone.is_random
    assert "Only one draw" in alone.notes[0]


def test_samples_that_are_no_images_are_compared_byte_by_byte(tmp_path: Path) -> None:
    rows = torch.rand(30, 6)
    data = TensorDataset(torch.cat([rows, rows[[2]]]), torch.rand(31))
    read = read_dataset("train", DataLoader(data, 4), progress=False)
    assert not read.has_images
    assert read.labels is None
    assert len(read.notes) == 2
    assert "floats" in read.notes[0]
    assert "only identical ones" in read.notes[1]
    copies = Copies(read, read, [Duplicate(2, 30, 1.0, True)])
    assert copies.summary()["pairs_of_different_labels"] is None
    assert draw_duplicates([copies], tmp_path / "none.png", []) == 0
    assert not (tmp_path / "none.png").exists()
