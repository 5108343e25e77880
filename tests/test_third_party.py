"""The optimizer switch in modules that others wrote: Lightning's demos and a trainer of torchgeo, all unedited."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_tips import OptimizerSwitchCallback, TransferLearningCallback

from harness import PlainData, ResumableLoader, assert_same, bits, build, every_epoch, every_step

EPOCHS = 4
STEPS_A_EPOCH = 16


@pytest.fixture
def random_data() -> dict[str, DataLoader]:
    """What the boring modules take, the same in each run."""
    torch.manual_seed(0)
    return {
        "train_dataloaders": DataLoader(RandomDataset(32, 4 * STEPS_A_EPOCH), batch_size=4),
        "val_dataloaders": DataLoader(RandomDataset(32, 8), batch_size=4),
    }


def to_adam(**options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(partial(AdamW, lr=0.01), **options)


# ---- Lightning's demos


def test_boring_model_goes_on_with_its_schedule(random_data, tmp_path: Path) -> None:
    switch = to_adam(trigger="epoch", at=2)
    trainer, module = build(switch, folder=tmp_path, max_epochs=EPOCHS, module=BoringModel())
    trainer.fit(module, **random_data)
    (adam,) = trainer.optimizers
    assert isinstance(adam, AdamW)
    assert {float(state["step"]) for state in adam.state.values()} == {2.0 * STEPS_A_EPOCH}
    assert (switch.events[0].epoch, switch.events[0].step) == (2, 2 * STEPS_A_EPOCH)
    # its StepLR takes a tenth each epoch: two of them before the switch, two after it
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.optimizer is adam
    assert adam.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**4)


@pytest.mark.parametrize("at", [1, 3])
def test_boring_model_resumes_exactly(at: int, random_data, tmp_path: Path) -> None:
    def fit(module: LightningModule, **resume: Any) -> Any:
        switch = to_adam(trigger="epoch", at=2)
        trainer, _ = build(switch, every_epoch(tmp_path), folder=tmp_path, max_epochs=EPOCHS, module=module)
        trainer.fit(module, **random_data, **resume)
        return bits(trainer)

    whole = fit(BoringModel())
    assert whole["kinds"] == ["AdamW"]
    assert_same(fit(BoringModel(), ckpt_path=tmp_path / f"epoch-epoch={at - 1}.ckpt"), whole)


def test_boring_model_logs_nothing_so_a_metric_trigger_says_so(random_data, tmp_path: Path) -> None:
    trainer, module = build(to_adam(trigger="plateau"), folder=tmp_path, max_epochs=9, module=BoringModel())
    with pytest.raises(MisconfigurationException, match="waits for 'val_loss', which nobody logs"):
        trainer.fit(module, **random_data)
    assert trainer.global_step == STEPS_A_EPOCH


@pytest.mark.parametrize("trigger", [{"trigger": "epoch", "at": 2}, {"trigger": "step", "at": 2 * STEPS_A_EPOCH + 5}])
def test_manual_optimization(trigger: dict[str, Any], random_data, tmp_path: Path) -> None:
    switch = to_adam(**trigger)
    trainer, module = build(switch, folder=tmp_path, max_epochs=EPOCHS, module=ManualOptimBoringModel())
    trainer.fit(module, **random_data)
    (adam,) = trainer.optimizers
    assert isinstance(adam, AdamW)
    at = switch.events[0].step
    assert at == (trigger["at"] if trigger["trigger"] == "step" else 2 * STEPS_A_EPOCH)
    assert {float(state["step"]) for state in adam.state.values()} == {float(EPOCHS * STEPS_A_EPOCH - at)}


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True.*:UserWarning")  # torch, of Lightning's transformer
def test_transformer_demo(tmp_path: Path) -> None:
    # A text where the demo would otherwise download one.
    text = Path("data", "wikitext-2.txt")
    text.parent.mkdir()
    text.write_text(load_digits().DESCR)
    switch = to_adam(trigger="step", at=5)
    module = LightningTransformer(vocab_size=WikiText2().vocab_size)
    trainer, _ = build(switch, folder=tmp_path, max_epochs=2, module=module)
    trainer.fit(module)
    (adam,) = trainer.optimizers
    assert (switch.events[0].what, switch.events[0].step) == ("SGD -> AdamW", 5)
    steps = {float(state["step"]) for state in adam.state.values()}
    assert steps == {float(trainer.global_step - 5)}
    assert len(adam.state) == len(list(module.parameters()))


# ---- torchgeo


class DictLoader(ResumableLoader):
    """Batches as torchgeo's datasets give them."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"image": images, "label": labels} for images, labels in super().__iter__())


class DictData(PlainData):
    """Real digits; few of them for training, so that the validation loss stalls soon."""

    def train_dataloader(self) -> DictLoader:
        return DictLoader(self.images[:256], self.labels[:256], 64, shuffle=True)

    def val_dataloader(self) -> DictLoader:
        return DictLoader(self.images[-256:], self.labels[-256:], 128, shuffle=False)


@pytest.fixture(scope="module")
def classification_task() -> Any:
    return pytest.importorskip("torchgeo.trainers").ClassificationTask  # not above: importing it takes seconds


def train_task(
    classification_task: Any, *callbacks: Callback, patience: int, ckpt_path: Path | None = None, **arguments: Any
) -> Trainer:
    torch.manual_seed(0)
    module = classification_task("test_resnet", weights=None, in_channels=1, num_classes=10, patience=patience)
    trainer, _ = build(*callbacks, module=module, **arguments)
    trainer.fit(module, datamodule=DictData(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def torchgeo_run(classification_task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Any]:
    switch = OptimizerSwitchCallback(partial(SGD, lr=0.05, momentum=0.9))  # when val_loss stalls
    folder = tmp_path_factory.mktemp("torchgeo")
    return train_task(classification_task, switch, patience=1, folder=folder, max_epochs=16), switch


def test_torchgeo_switches_when_its_validation_loss_stalls(torchgeo_run) -> None:
    trainer, switch = torchgeo_run
    (event,) = switch.events
    assert event.what == "AdamW -> SGD"
    assert event.step == event.epoch * 4 > 0
    (sgd,) = trainer.optimizers
    assert type(sgd) is SGD
    assert len(sgd.state) == len(list(trainer.lightning_module.model.parameters()))


def test_torchgeo_scheduler_goes_on_reducing_the_new_rate(torchgeo_run) -> None:
    trainer, switch = torchgeo_run
    (sgd,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    assert type(config.scheduler) is ReduceLROnPlateau
    assert config.scheduler.optimizer is sgd
    assert (config.monitor, config.reduce_on_plateau) == ("val_loss", True)
    assert switch.events[0].details["lr"] == 0.05
    assert sgd.param_groups[0]["lr"] in [pytest.approx(0.05 * 0.1**times) for times in range(1, 12)]


def test_torchgeo_weight_decay_is_translated(torchgeo_run) -> None:
    trainer, switch = torchgeo_run
    # AdamW's 0.01 at a rate of 0.001 shrinks a weight by 1e-5 a step, and so does SGD's at 0.05 with momentum 0.9.
    decay = trainer.optimizers[0].param_groups[0]["weight_decay"]
    assert decay * 0.05 / (1 - 0.9) == pytest.approx(0.01 * 0.001)
    assert switch.events[0].details["weight_decay"] == "0.01 decoupled -> 2e-05 L2"


def test_torchgeo_resumed_in_mid_epoch_equals_the_uninterrupted_run(classification_task, tmp_path: Path) -> None:
    def run(**resume: Any) -> dict[str, Any]:
        switch = OptimizerSwitchCallback(partial(SGD, lr=0.05, momentum=0.9), trigger="epoch", at=3)
        # A resumed Lightning never steps ReduceLROnPlateau at the end of its first epoch, with or without a switch. So
        # the rate must not hang on it here, and its own state is no part of the comparison.
        arguments = {"patience": 100, "folder": tmp_path, "max_epochs": 6} | resume
        result = bits(train_task(classification_task, switch, every_step(tmp_path), **arguments))
        assert len(result.pop("schedulers")) == 1
        return result

    whole = run()
    assert whole["kinds"] == ["SGD"]
    for step in (9, 14):  # before and after the switch in step 12
        assert_same(run(ckpt_path=tmp_path / f"step-step={step}.ckpt"), whole, f"resumed from step {step}")


def test_torchgeo_is_thawed(classification_task, tmp_path: Path) -> None:
    transfer = TransferLearningCallback("lp_ft", phase_epochs=2, layer_decay=0.5, warmup_steps=0, check_inputs=False)
    frozen: list[dict[str, Tensor]] = []

    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            frozen.append({k: v.clone() for k, v in pl_module.model.state_dict().items() if not k.startswith("fc.")})

    trainer = train_task(classification_task, transfer, Keep(), patience=100, folder=tmp_path, max_epochs=4)
    assert [event.epoch for event in transfer.events] == [0, 2]
    assert_same(frozen[2], frozen[0])
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.lightning_module.model.parameters())
    assert trainer.lr_scheduler_configs[0].scheduler.min_lrs == [0] * len(trainer.optimizers[0].param_groups)
    moved = [k for k, v in trainer.lightning_module.model.state_dict().items() if k in frozen[0]]
    assert any(not torch.equal(trainer.lightning_module.model.state_dict()[k], frozen[0][k]) for k in moved)
