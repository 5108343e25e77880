"""What the network does with each class, and its probabilities brought back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import confusion_matrix as expected_confusion

from lightning_tips import ClassReportCallback, ClassWeightCallback, ImbalancedSamplerCallback
from lightning_tips.imbalance.class_report import confusion_matrix, recalls

from harness import build, every_epoch, fit


class Clouds(LightningDataModule):
    """Two overlapping clouds in the plane; of the second class few."""

    def __init__(self, rare: int = 60, common: int = 1140) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.sets = []
        for _ in range(2):
            points = torch.randn(common + rare, 2, generator=random)
            labels = torch.tensor([0] * common + [1] * rare)
            self.sets.append(TensorDataset(points + 1.5 * labels[:, None], labels))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[0], batch_size=40, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[1], batch_size=100)

    predict_dataloader = val_dataloader


class Linear(LightningModule):
    """Returns (N, 2) logits, or with `single` one for the second class."""

    def __init__(self, single: bool = False) -> None:
        super().__init__()
        self.single = single
        self.layer = torch.nn.Linear(2, 1 if single else 2)
        self.criterion = torch.nn.BCEWithLogitsLoss() if single else torch.nn.CrossEntropyLoss()

    def forward(self, points: Tensor) -> Tensor:
        return self.layer(points)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self(batch[0]), batch[1]
        return self.criterion(logits[:, 0], labels.float()) if self.single else self.criterion(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return logits[:, 0].sigmoid() if self.single else logits.softmax(1)[:, 1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def balanced(*tips: Any, folder: Path, **arguments: Any) -> Trainer:
    report = ClassReportCallback(correct=True)
    return fit(report, *tips, **{"folder": folder, "data": Clouds(), "module": Linear(), "max_epochs": 4} | arguments)


def rare_probability(trainer: Trainer, **arguments: Any) -> float:
    return float(torch.cat(trainer.predict(trainer.lightning_module, Clouds(), **arguments)).mean())


PREVALENCE = 60 / 1200


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("make", [ImbalancedSamplerCallback, ClassWeightCallback])
def test_mean_probability_comes_back_to_the_prevalence(make, single, tmp_path: Path, capsys) -> None:
    trainer = balanced(make(), every_epoch(tmp_path / "kept"), folder=tmp_path, module=Linear(single))
    report = next(c for c in trainer.callbacks if isinstance(c, ClassReportCallback))
    shown = capsys.readouterr().out
    assert "prevalence" in shown
    assert "Best threshold of the corrected probability of 1" in shown
    corrected = rare_probability(trainer)
    assert corrected == pytest.approx(PREVALENCE, rel=0.2)
    report.correct = False
    assert rare_probability(trainer) > 3 * PREVALENCE
    # and from the checkpoint alone, without the tip
    fresh, module = build(ClassReportCallback(correct=True), folder=tmp_path, module=Linear(single))
    path = tmp_path / "kept" / "epoch-epoch=3.ckpt"
    again = float(torch.cat(fresh.predict(module, Clouds(), ckpt_path=path)).mean())
    assert again == pytest.approx(corrected, rel=1e-5)
    assert "forward" not in vars(module)


def test_sampler_and_weights_together_are_undone_together(tmp_path: Path) -> None:
    tips = ImbalancedSamplerCallback("sqrt"), ClassWeightCallback(scheme="sqrt")
    with pytest.warns(UserWarning, match="both balance the classes"):
        trainer = balanced(*tips, folder=tmp_path)
    assert rare_probability(trainer) == pytest.approx(PREVALENCE, rel=0.2)


def test_metrics_are_logged_and_can_be_monitored(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="best", monitor="classes/balanced_accuracy", mode="max")
    trainer = balanced(ImbalancedSamplerCallback(), keep, folder=tmp_path, logger=CSVLogger(tmp_path))
    logged = trainer.callback_metrics
    recall = [float(logged[f"classes/recall_{c}"]) for c in range(2)]
    assert float(logged["classes/balanced_accuracy"]) == pytest.approx(sum(recall) / 2)
    assert min(recall) > 0.7
    logits, labels = trainer.lightning_module(Clouds().sets[1].tensors[0]), Clouds().sets[1].tensors[1]
    expected = expected_confusion(logits.argmax(1), labels, "binary")
    report = next(c for c in trainer.callbacks if isinstance(c, ClassReportCallback))
    assert torch.equal(report.confusion, expected)
    assert list(Path(trainer.log_dir).rglob("confusion.png"))
    assert keep.best_model_score is not None


def test_plain_training_is_reported_without_a_correction(tmp_path: Path, capsys) -> None:
    trainer = balanced(folder=tmp_path)
    shown = capsys.readouterr().out
    assert "Classes in the last validation" in shown
    assert "corrected" not in shown
    with pytest.warns(UserWarning, match="no correction to apply"):
        rare_probability(trainer)


def test_a_module_that_does_not_call_itself_is_told(tmp_path: Path) -> None:
    class Direct(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.layer(batch[0])

    with pytest.raises(MisconfigurationException, match="does not call self"):
        balanced(folder=tmp_path, module=Direct())


def test_confusion_and_recall() -> None:
    logits, targets = torch.eye(3)[[0, 1, 1, 2, 0]], torch.tensor([0, 1, 0, -1, 0])
    confusion = confusion_matrix(logits, targets)
    assert confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert recalls(confusion)[:2].tolist() == pytest.approx([2 / 3, 1.0])
    assert recalls(confusion)[2].isnan()


def test_report_changes_nothing_of_the_training(tmp_path: Path) -> None:
    with_report = balanced(folder=tmp_path, module=torch.manual_seed(1) and Linear())
    without = fit(folder=tmp_path, data=Clouds(), module=torch.manual_seed(1) and Linear(), max_epochs=4)
    assert torch.equal(with_report.lightning_module.layer.weight, without.lightning_module.layer.weight)


def test_what_is_logged_can_be_summed_up_on_any_device(tmp_path: Path, monkeypatch) -> None:
    # A tensor would be on the CPU, for which a process group of GPUs has no backend; numbers go to the module's device.
    logged: list[Any] = []
    monkeypatch.setattr(Linear, "log", lambda self, name, value, **_: logged.append(value))
    monkeypatch.setattr(Linear, "log_dict", lambda self, values, **_: logged.extend(values.values()))
    balanced(folder=tmp_path, max_epochs=1)
    assert [type(value) for value in logged] == [float] * 3


class Diverged(Linear):
    def forward(self, points: Tensor) -> Tensor:
        logits = super().forward(points)
        return logits if self.training or self.trainer.sanity_checking else logits / 0.0


def test_logits_that_are_not_finite_are_told_of_and_the_run_goes_on(tmp_path: Path, recwarn) -> None:
    trainer = balanced(ImbalancedSamplerCallback(), folder=tmp_path, module=Diverged(), max_epochs=2)
    assert trainer.current_epoch == 2
    told = [str(warning.message) for warning in recwarn if "cannot correct" in str(warning.message)]
    assert len(told) == 1
    assert "not finite" in told[0]
    report = next(c for c in trainer.callbacks if isinstance(c, ClassReportCallback))
    assert report.correction is None
    with pytest.warns(UserWarning, match="no correction to apply"):
        rare_probability(trainer)


def test_a_class_that_was_never_predicted_has_a_dash(tmp_path: Path, capsys) -> None:
    module = Linear()
    module.layer.bias.data = torch.tensor([100.0, 0.0])
    balanced(folder=tmp_path, module=module, max_epochs=1)
    shown = capsys.readouterr().out
    assert "nan" not in shown
    assert " - " in shown


def test_batches_without_targets_are_refused_with_what_to_do(tmp_path: Path) -> None:
    class Points(Clouds):
        def val_dataloader(self) -> DataLoader:
            return DataLoader([{"points": p} for p in self.sets[1].tensors[0]], batch_size=100)

    class Named(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch["points"])

    with pytest.raises(MisconfigurationException, match=r"ClassReportCallback: Cannot tell .*target_key"):
        balanced(folder=tmp_path, module=Named(), data=Points())


def test_a_copy_made_during_validation_is_a_plain_module(tmp_path: Path) -> None:
    class Copies(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            copied = copy.deepcopy(self)
            assert torch.equal(copied(batch[0]), self.layer(batch[0]))
            self.made = True

    trainer = balanced(folder=tmp_path, module=Copies(), max_epochs=1)
    assert trainer.lightning_module.made
    assert "forward" not in vars(trainer.lightning_module)
