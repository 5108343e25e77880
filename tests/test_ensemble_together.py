"""Members that train together end as each does alone: to the bit, whatever their optimizers, schedulers and losses."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips import (
    BatchAugmentationCallback,
    ClassReportCallback,
    EnsembleModule,
    OptimizerSwitchCallback,
    TransferLearningCallback,
)
from lightning_tips.core import parameter_hash
from lightning_tips.ensemble.members import build_members

from harness import STEPS_A_EPOCH, BranchingModule, PlainData, PlainModule, assert_same, every_step, fit
from processes import on_two_ranks


class Dropping(PlainModule):
    """Draws random numbers in each step, and looks at its Trainer in its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(12, 10))
        self.seen: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("batch", batch_idx, self.global_step, self.trainer.current_epoch))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(("step", type(optimizer).__name__, self.trainer.lightning_module is self))
        self.log("norm", self.features[0].weight.grad.norm())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.seen.append(("val_loss", float(self.trainer.callback_metrics.get("val_loss", -1))))

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.seen.append({k: float(metrics[k]) for k in ("train_loss", "val_loss", "val_acc")})


class OnPlateau(PlainModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class EachStep(PlainModule):
    """A scheduler by the step, built on the Trainer's estimate; a squared loss; a hook of its own for the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = (self(images).softmax(1) - F.one_hot(labels, 10)).square().sum(1).mean()
        self.log("train_loss", loss)
        return {"loss": loss, "more": 1}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **more: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val or 0.01, more["gradient_clip_algorithm"] or "value")


class EveryOther(PlainModule):
    """Schedulers by the step and by a plateau within the epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.RMSprop(self.parameters(), lr=1e-3)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return (
            [optimizer],
            [
                {"scheduler": by_step, "interval": "step", "frequency": 2},
                {"scheduler": plateau, "interval": "step", "monitor": "train_loss", "strict": False},
            ],
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Closures(PlainModule):
    """An optimizer that calls its closure many times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class TwoOptimizers(PlainModule):
    """Manual optimization with two optimizers that take turns, and schedulers stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                loss = F.cross_entropy(self(images), labels)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        first, second = torch.optim.SGD(self.features.parameters(), 0.1), torch.optim.Adam(self.head.parameters())
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 2)]


AUTOMATIC = [PlainModule, Dropping, OnPlateau, EachStep, EveryOther]


class Seeds(Callback):
    """Alone, the member draws its random numbers from the global generator."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(self.seed)


def make(kinds: list[type], seed: int = 10) -> list[LightningModule]:
    return [build_members(kind, 1, seed=seed + i)[0] for i, kind in enumerate(kinds)]


def results(module: Any, optimizers: list[Any], configs: list[Any]) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizers": [o.state_dict() for o in optimizers],
        "schedulers": [c.scheduler.state_dict() for c in configs],
        "seen": getattr(module, "seen", None),
    }


def alone(members: list[LightningModule], folder: Path, **arguments: Any) -> list[dict[str, Any]]:
    found = []
    for index, member in enumerate(members):
        options = {k: v() if callable(v) else v for k, v in arguments.items()}
        trainer = fit(Seeds(index), folder=folder, module=copy.deepcopy(member), **options)
        found.append(results(trainer.lightning_module, trainer.optimizers, trainer.lr_scheduler_configs))
    return found


def together(members: list[LightningModule], folder: Path, **arguments: Any) -> list[dict[str, Any]]:
    ensemble = EnsembleModule(copy.deepcopy(members), seed=0)
    options = {k: v() if callable(v) else v for k, v in arguments.items()}
    kept: list[dict[str, Any]] = []

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept.extend((m.optimizers(False), m.trainer.lr_scheduler_configs) for m in pl_module.members)

    fit(ensemble, Keep(), folder=folder, **options)
    listed = [o if isinstance(o, list) else [o] for o, _ in kept]
    return [results(m, listed[i], kept[i][1]) for i, m in enumerate(ensemble.members)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 4},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3, "max_epochs": 3},
        {"val_check_interval": 0.5, "precision": "bf16-mixed", "max_epochs": 2},
        {
            "plugins": lambda: MixedPrecision(
                "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=3)
            ),
            "max_epochs": 2,
        },
        {"max_steps": 9, "max_epochs": -1},
        {"precision": "64-true", "max_epochs": 2},
    ],
    ids=["plain", "clipped and accumulated", "bf16", "fp16 with scalers", "max_steps", "float64"],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # a scaler leaves out the first step
def test_members_end_with_the_bits_of_those_that_train_alone(arguments: dict[str, Any], tmp_path: Path) -> None:
    members = make(AUTOMATIC)
    if "max_steps" not in arguments and "gradient_clip_val" not in arguments and "plugins" not in arguments:
        members += make([TwoOptimizers, Closures], 20)
    expected = alone(members, tmp_path, **arguments)
    for index, (found, right) in enumerate(zip(together(members, tmp_path, **arguments), expected, strict=True)):
        assert_same(found, right, type(members[index]).__name__)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_resumed_members_equal_the_uninterrupted_ones(tmp_path: Path) -> None:
    # Not ReduceLROnPlateau: Lightning leaves out its step on a resume, alone too. EachStep reads the Trainer's
    # estimate of steps, which has the loaders made before their state is there.
    kinds = [Dropping, PlainModule, EachStep, TwoOptimizers]
    members = make(kinds)
    whole = EnsembleModule(copy.deepcopy(members), seed=0)
    kept, kept_alone = tmp_path / "kept", tmp_path / "alone"
    fit(whole, every_step(kept), folder=tmp_path, max_epochs=3)

    def resumed(step: int) -> EnsembleModule:
        checkpoint = kept / f"step-step={step}.ckpt"
        torch.load(checkpoint, weights_only=True)
        again = EnsembleModule(copy.deepcopy(members), seed=5)  # the streams come from the checkpoint
        fit(again, every_step(kept), folder=tmp_path, max_epochs=3, ckpt_path=checkpoint)
        return again

    for step in (1, 2 * STEPS_A_EPOCH + 1):
        assert_same(dict(resumed(step).state_dict()), dict(whole.state_dict()), f"step {step}")

    # On a resume from the last step of an epoch Lightning leaves out on_train_epoch_end, in which TwoOptimizers steps
    # its scheduler. So it does not end as if uninterrupted, but with the bits that it has then alone.
    again = resumed(STEPS_A_EPOCH)
    for index in range(3):
        assert_same(dict(again.members[index].state_dict()), dict(whole.members[index].state_dict()), f"{index}")
    fit(every_step(kept_alone), folder=tmp_path, max_epochs=3, module=copy.deepcopy(members[3]))
    alone_again = copy.deepcopy(members[3])
    last = kept_alone / f"step-step={2 * STEPS_A_EPOCH}.ckpt"  # alone, each of its optimizers counts
    fit(every_step(kept_alone), folder=tmp_path, max_epochs=3, module=alone_again, ckpt_path=last)
    assert_same(dict(again.members[3].state_dict()), dict(alone_again.state_dict()))
    assert not torch.equal(alone_again.head.weight, whole.members[3].head.weight)


def apart_and_together(folder: Path) -> dict[str, Any]:
    members = make([Dropping, OnPlateau, TwoOptimizers, BranchingModule])
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "max_epochs": 2}
    ensemble = EnsembleModule(copy.deepcopy(members), seed=0)
    trainer = fit(ensemble, folder=folder, **options)
    found = [parameter_hash(member) for member in ensemble.members]
    right = []
    for index, member in enumerate(members):
        fit(Seeds(index), folder=folder, module=member, **options)
        right.append(parameter_hash(member))
    result = {
        "found": found, "right": right, "weights": ensemble.vote_weights.tolist(), "step": trainer.global_step,
        "temperature": float(ensemble.vote_temperature), "val_loss": float(trainer.callback_metrics["val_loss"]),
    }  # fmt: skip

    # Predictions and tests: a part on each rank, and the numbers of the whole on all.
    warnings.filterwarnings("ignore", ".*DistributedSampler.*")
    images, labels = PlainData().images[:63], PlainData().labels[:63]  # Lightning repeats one for the second rank
    loader = DataLoader(TensorDataset(images, labels), 8)
    probabilities = torch.cat([part["probabilities"] for part in trainer.predict(ensemble, loader)])
    (tested,) = trainer.test(ensemble, loader, verbose=False)
    whole = ensemble.eval()(images).detach()
    torch.testing.assert_close(probabilities, whole[trainer.global_rank :: 2], atol=1e-6, rtol=0)
    assert abs(tested["test_acc"] - (whole.argmax(1) == labels).float().mean()) < 1e-6
    one = ensemble.members[1](images).softmax(1).detach()
    assert abs(tested["test_loss/member_1"] - F.nll_loss(one.log(), labels)) < 1e-5
    return result


def test_on_two_ranks_members_end_as_alone_on_two_ranks(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, apart_and_together)
    assert first == second
    assert first["found"] == first["right"]
    assert first["step"] == 2 * STEPS_A_EPOCH


class Stopping(PlainModule):
    """Brings its own early stopping, on a metric of its own."""

    def configure_callbacks(self) -> Any:
        return [EarlyStopping("val_loss", patience=1, min_delta=10.0)]

    def on_train_epoch_end(self) -> None:
        self.last = (self.trainer.current_epoch, self.head.weight.detach().clone())


def test_a_member_that_stops_early_keeps_its_weights_and_the_others_go_on(tmp_path: Path) -> None:
    stopping, plain = make([Stopping, PlainModule])
    (alone_stopping, alone_plain) = alone([stopping, plain], tmp_path, max_epochs=4)
    found = together([stopping, plain], tmp_path, max_epochs=4)
    assert_same(found[0]["weights"], alone_stopping["weights"])
    assert_same(found[1]["weights"], alone_plain["weights"])
    assert not torch.equal(found[0]["weights"]["head.weight"], stopping.head.weight)


def test_loggers_checkpoints_and_steps_count_the_ensemble_as_one(tmp_path: Path) -> None:
    ensemble = EnsembleModule(make([PlainModule, OnPlateau, TwoOptimizers]))
    logger = CSVLogger(tmp_path, name="logs")
    kept = ModelCheckpoint(tmp_path / "kept", filename="{step}", monitor="val_loss", every_n_epochs=1, save_top_k=-1)
    trainer = fit(
        ensemble, kept, LearningRateMonitor("epoch"), folder=tmp_path, logger=logger, max_steps=10, max_epochs=-1,
        log_every_n_steps=1,
    )  # fmt: skip
    assert trainer.global_step == 10
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step=10.ckpt", "step=4.ckpt", "step=8.ckpt"]
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"member_0/lr", "member_1/lr", "member_0/val_loss", "val_acc"} <= set(lines[0].split(","))
    assert kept.best_model_score is not None


@pytest.mark.parametrize("tip", [OptimizerSwitchCallback(trigger="epoch", at=1), TransferLearningCallback("head_only")])
def test_tips_for_one_network_are_refused(tip: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Train the members apart"):
        fit(EnsembleModule(make([PlainModule, PlainModule])), tip, folder=tmp_path)
    with pytest.raises(MisconfigurationException, match="train the members apart"):
        fit(EnsembleModule(make([PlainModule, PlainModule]), member_callbacks=[tip]), folder=tmp_path)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averages_of_weights_over_time_are_refused_as_the_vote_would_not_be_theirs(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="average the weights and the temperature of the vote"):
        fit(EnsembleModule(make([PlainModule, PlainModule])), EMAWeightAveraging(), folder=tmp_path)
    with pytest.raises(MisconfigurationException, match="EMAWeightAveraging validates the averaged weights"):
        fit(EnsembleModule(make([PlainModule] * 2), member_callbacks=[EMAWeightAveraging()]), folder=tmp_path)


def test_a_class_report_beside_it_is_refused_before_the_first_step(tmp_path: Path) -> None:
    ensemble = EnsembleModule(make([PlainModule, PlainModule]))
    with pytest.raises(MisconfigurationException, match="ensemble calls its members instead"):
        fit(ensemble, ClassReportCallback(), folder=tmp_path, num_sanity_val_steps=0)
    assert ensemble.trainer.global_step == 0


def test_what_a_member_cannot_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"member 1 .TwoOptimizers. optimizes manually"):
        fit(EnsembleModule(make([PlainModule, TwoOptimizers])), folder=tmp_path, gradient_clip_val=1.0)
    ensemble = EnsembleModule(make([PlainModule, PlainModule]))
    ensemble.configure_optimizers = lambda: torch.optim.SGD(ensemble.parameters(), 0.1)  # as LightningCLI does
    with pytest.raises(MisconfigurationException, match="Give it to the members"):
        fit(ensemble, folder=tmp_path)
    (one,) = make([PlainModule])
    with pytest.warns(UserWarning, match="members 0 and 1 begin with the same parameters"):
        fit(EnsembleModule([one, copy.deepcopy(one)]), folder=tmp_path, max_epochs=1)


def test_the_trainer_and_the_members_come_out_as_they_went_in(tmp_path: Path) -> None:
    class Fails(PlainModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("no memory")

    ensemble = EnsembleModule(make([PlainModule, Fails]))
    with pytest.raises(RuntimeError, match="no memory"):
        fit(ensemble, folder=tmp_path)
    assert all(member._trainer is None and "log" not in vars(member) for member in ensemble.members)
    assert ensemble.automatic_optimization
    copy.deepcopy(ensemble)
    ensemble = EnsembleModule(make([PlainModule]))
    trainer = fit(ensemble, folder=tmp_path, max_epochs=1)
    assert "update_lr_schedulers" not in vars(trainer.fit_loop.epoch_loop)
    fit(folder=tmp_path, module=ensemble.members[0], max_epochs=1)  # alone again


class Switches(PlainModule):
    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def configure_callbacks(self) -> Any:
        return [BatchAugmentationCallback([{"Shift": {"by": 1}}], last_epochs_off=self.epoch, preview=False)]


@pytest.mark.parametrize(("epochs", "names"), [([1, 1], ["each"]), ([1, 2], ["0", "1"])])
def test_tips_of_members_stand_in_the_tables_of_the_run(epochs: Any, names: Any, tmp_path: Path, capfd) -> None:
    fit(folder=tmp_path, module=EnsembleModule([Switches(epoch) for epoch in epochs], seed=0), max_epochs=3)
    printed = capfd.readouterr().out
    assert (printed.count("What the tips did"), printed.count("Tips in the order")) == (1, 1)
    for name in names:
        assert printed.count(f"{name}: BatchAugmentationCallback") == 3  # its plan, on, off
