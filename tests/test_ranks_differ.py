"""Ranks that log other metrics, or have other data, than the next: one answer on all of them, or all refuse."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_class_report import Clouds, Linear
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchmetrics import MeanMetric

from lightning_tips import ClassReportCallback, ClassWeightCallback, PseudoLabelCallback, ReplayCallback
from lightning_tips.core import Monitor

from harness import LoaderData, PlainModule, fit
from processes import on_two_ranks

RARELY: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 1, "check_val_every_n_epoch": 9}
TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp", "num_sanity_val_steps": 0}


def error_of(*tips: Any, **arguments: Any) -> str:
    """What a run ends with, as text; empty if nothing."""
    try:
        fit(*tips, **arguments)
    except Exception as error:  # whatever it is
        return f"{type(error).__name__}: {error}"
    return ""


# ---- scores of replay


class ByClass(PlainModule):
    """Logs a number and a metric for the classes that a batch has."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.sure = torch.nn.ModuleDict({str(c): MeanMetric() for c in range(4)})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        probabilities = self(batch[0]).softmax(1)
        for c in batch[1].unique().tolist():
            of_class = probabilities[batch[1] == c]
            self.log(f"first_{c}", of_class[:, 0].mean(), batch_size=len(of_class))
            self.sure[str(c)].update(of_class.amax(1))
            self.log(f"sure_{c}", self.sure[str(c)])


class Silent(PlainModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class AllOnOne(IterableDataset):
    """Of two ranks, one gets all samples."""

    def __init__(self, samples: TensorDataset, rank: int) -> None:
        self.samples, self.rank = samples, rank

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples if torch.distributed.get_rank() == self.rank else ())


class Sorted(LoaderData):
    """Of the validation samples that go to rank 0 all have even classes."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__()
        self.only = only

    def val_dataloader(self) -> DataLoader:
        known = [(self.labels == c).nonzero()[:8, 0] for c in range(4)]
        order = torch.stack([torch.cat([known[0], known[2]]), torch.cat([known[1], known[3]])], 1).flatten()
        samples: Any = TensorDataset(self.images[order], self.labels[order])
        if self.only is not None:
            samples = AllOnOne(samples, self.only)
        return DataLoader(samples, batch_size=3)


def scores(folder: Path) -> list[Any]:
    found: list[Any] = []
    for only in (None, 0, 1):
        tip = ReplayCallback(old_validation=None)
        fit(tip, folder=folder, data=Sorted(only), module=ByClass(), **RARELY, **TWO)
        found.append(tip.before["new"])
    tip = ReplayCallback(old_validation=None)
    return [*found, error_of(tip, folder=folder, data=Sorted(), module=Silent(), **RARELY, **TWO)]


def test_scores_where_ranks_log_other_names_are_those_of_one_rank(tmp_path: Path) -> None:
    tip = ReplayCallback(old_validation=None)
    fit(tip, folder=tmp_path, data=Sorted(), module=ByClass(), **RARELY)
    ranks = on_two_ranks(tmp_path, scores)
    assert ranks[0] == ranks[1]
    assert len(tip.before["new"]) == 8
    for found in ranks[0][:3]:
        assert found == pytest.approx(tip.before["new"])
    assert "Silent logs nothing in validation_step" in ranks[0][3]


# ---- pseudo-labels


class Split(LoaderData):
    """What is labelled, or what is not, is other on the second rank."""

    def __init__(self, differs: str) -> None:
        super().__init__()
        self.differs = differs

    def shift(self, what: str) -> int:
        return int(self.differs == what and torch.distributed.get_rank())

    def train_dataloader(self) -> DataLoader:
        start = 8 * self.shift("labelled")
        return DataLoader(Subset(self.train, range(start, start + 64)), batch_size=32, shuffle=True)

    def unlabelled_dataset(self) -> Any:
        whole = super().unlabelled_dataset()
        if self.differs == "random":
            return Noisy(whole.tensors[0])
        start = self.shift("first")  # all of them but one are there on both ranks
        places = [*range(start, 33), 32 + self.shift("place")]
        return Subset(whole, places[: len(places) - self.shift("length")])


class Noisy(TensorDataset):
    """Draws from a generator of its own: of the same place, another sample on each rank."""

    def __getitem__(self, index: int) -> Any:
        return self.tensors[0][index] + torch.rand((), generator=GENERATOR)


GENERATOR = torch.Generator()


def splits(folder: Path) -> list[str]:
    GENERATOR.seed()
    found = []
    for differs in ("nothing", "random", "labelled", "first", "place", "length"):
        tip = PseudoLabelCallback(start_epoch=1, max_drop=None)
        found.append(error_of(tip, folder=folder, data=Split(differs), max_epochs=1, limit_val_batches=0, **TWO))
    return found


def test_pseudo_labels_are_refused_where_ranks_have_other_samples(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, splits)
    assert first == second
    assert first[:2] == ["", ""]
    assert all("The ranks have different labelled or unlabelled data" in text for text in first[2:])
    assert all("A split without a seed does that" in text for text in first[2:])


# ---- counts of the classes


class Unlike(Clouds):
    """The second rank has more of the rare class, in training."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Clouds(60 + 30 * torch.distributed.get_rank()).sets[0], batch_size=40)


def counted(folder: Path) -> list[str]:
    def ended(*tips: Any) -> str:
        return error_of(
            *tips, folder=folder, data=Unlike(), module=Linear(), max_epochs=1, limit_train_batches=2, **TWO
        )

    return [
        ended(ClassWeightCallback()),
        ended(ClassWeightCallback(logit_adjustment=1.0)),
        ended(ClassWeightCallback([1.0, 9.0])),  # there the counts decide nothing
        ended(ClassWeightCallback([1.0, 9.0]), ClassReportCallback()),
    ]


def test_other_counts_on_another_rank_are_refused_where_they_decide(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, counted)
    assert first == second
    assert first[2] == ""
    for text, asker in ((first[0], "ClassWeight"), (first[1], "ClassWeight"), (first[3], "ClassReport")):
        assert f"different training labels, so {asker}Callback cannot go by how many there are" in text
        assert "A split without a seed does that" in text


# ---- a monitored metric


class OnOneRank(PlainModule):
    """Rank 0 logs nothing in validation, as where it gets no batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 1:
            self.log("val_loss", 0.5)


class Watching(Callback):
    def __init__(self, metric: str) -> None:
        self.metric = Monitor(metric, "Watching")
        self.seen: list[float | None] = []

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.metric.on_validation_start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append(self.metric.on_validation_end(trainer))


def monitored(folder: Path) -> list[Any]:
    warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\('val_loss', \.\.\., sync_dist=True\)`")
    options: dict[str, Any] = {"folder": folder, "module": OnOneRank(), "max_epochs": 2} | TWO
    options |= {"num_sanity_val_steps": 1}
    right, wrong = Watching("val_loss"), Watching("val_los")
    return [error_of(right, **options), right.seen, error_of(wrong, **options)]


def test_a_metric_that_one_rank_logs_is_seen_by_all(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, monitored)
    assert first == second
    assert first[:2] == ["", [None, 0.5, 0.5]]  # the sanity check first
    assert "waits for 'val_los', which nobody logs. Did you mean 'val_loss'?" in first[2]
