"""The settings table: one row a tip. `test_every_tip*.py` drive each row through everything that holds for all tips.

A tip that is missing here breaks the collection of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

import lightning_tips
from lightning_tips.core import RemovedBlock, TipCallback, TipMixin
from lightning_tips.data import nested_subset

import harness


@dataclass(frozen=True)
class Setting:
    """How a tip is tested.

    Attributes:
        tip: The class: a callback, a mixin for DataModules, or a LightningModule.
        changed: Raises AssertionError unless the tip (its callback) did its work in this finished run of 6 epochs of
            4 steps.
        arguments: What a yaml would say under ``init_args``.
        second: What is different in a second one beside it; only callbacks can be given twice.
        warns: Pattern of what it may say about the company of other tips.
        module: Name in `harness.py` of the module that it trains, unless it is one.
        data: Name in `harness.py` of the DataModule that it trains on, or is mixed into.
    """

    tip: type
    changed: Callable[[Trainer, Any], None]
    arguments: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    warns: str = ""
    module: str = "PlainModule"
    data: str = "PlainData"

    @property
    def name(self) -> str:
        return self.tip.__name__

    @property
    def kind(self) -> type:
        """What the Trainer takes it for."""
        kinds = {Callback: Callback, TipMixin: LightningDataModule, LightningModule: LightningModule}
        return next(kind for base, kind in kinds.items() if issubclass(self.tip, base))

    @property
    def shown(self) -> str:
        """Its line in the tables."""
        return self.name if self.kind is Callback else self.make()[1].__class__.__name__

    def make(self, **changes: Any) -> tuple[list[Any], Any]:
        """See `make`, for this tip alone."""
        parts, (tip,) = make((self, changes))
        return parts, tip

    def config(self) -> dict[str, Any]:
        """What a yaml says of the tip, its module and its data, by their short names."""
        config: dict[str, Any] = {
            "trainer": {"callbacks": []},
            "model": {"class_path": f"harness.{self.module}"},
            "data": {"class_path": f"harness.{self.data}"},
        }
        if self.module == Setting.module:  # any will do: ours
            config["model"] = {"class_path": "ImageClassifier", "init_args": {"in_channels": 1}}
        if self.kind is Callback:
            config["trainer"]["callbacks"].append({"class_path": self.name, "init_args": self.arguments})
        elif self.kind is LightningModule:
            config["model"] = {"class_path": self.name, "init_args": self.arguments}
        else:
            config["data"] = {"class_path": f"settings.{_mixed(self).__name__}", "init_args": self.arguments}
        return config


def make(*wanted: tuple[Setting, dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Tips as a yaml would build them, and what they need beside them.

    Args:
        *wanted: Rows of the table, each with changes of its arguments.

    Returns:
        What `harness.fit` takes: callbacks, one DataModule, one module; and the callback of each tip, in the order of
        ``wanted``.
    """
    settings = [setting for setting, _ in wanted]
    arguments = [setting.arguments | changes for setting, changes in wanted]
    harness.seed_everything(0, verbose=False)  # a module among them starts from the same weights in each process
    parts: list[Any] = []
    tips: dict[int, Any] = {}
    for i, setting in enumerate(settings):
        if setting.kind is not LightningDataModule:
            path = f"{setting.tip.__module__}.{setting.name}"
            parts.append(_instantiate(setting.kind, path, arguments[i]))
            tips[i] = parts[-1] if setting.kind is Callback else parts[-1].tips[0]
    mixed = [i for i, setting in enumerate(settings) if setting.kind is LightningDataModule]
    if mixed:  # into one DataModule
        together = {key: value for i in mixed for key, value in arguments[i].items()}
        assert len(together) == sum(len(arguments[i]) for i in mixed), "two mixins have an argument of one name"
        data = _instantiate(LightningDataModule, f"settings.{_mixed(*(settings[i] for i in mixed)).__name__}", together)
        tips |= zip(reversed(mixed), data.tips, strict=True)  # the last base class is the first to bring its own
        parts.append(data)
    else:
        parts.append(getattr(harness, _special(settings, "data"))())
    if not any(isinstance(part, LightningModule) for part in parts):
        harness.seed_everything(0, verbose=False)
        parts.append(getattr(harness, _special(settings, "module"))())
    return parts, [tips[i] for i in range(len(wanted))]


def _special(settings: list[Setting], field_name: str) -> str:
    """What one of them asks for, if any does."""
    usual = getattr(Setting, field_name)
    return next((name for s in settings if (name := getattr(s, field_name)) != usual), usual)


def _mixed(*settings: Setting) -> type:
    """The plain DataModule with their mixins, importable as a yaml needs it."""
    base = getattr(harness, _special(list(settings), "data"))
    name = base.__name__ + "With" + "And".join(setting.name for setting in settings)
    if name not in globals():
        own = {k: v for k, v in vars(base).items() if callable(v) and not k.startswith("__")}  # hide the mixins' own
        globals()[name] = type(name, (*(setting.tip for setting in settings), base), own | {"__module__": __name__})
    return globals()[name]


def _instantiate(kind: type, class_path: str, init_args: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "it")
    config = parser.parse_object({"it": {"class_path": class_path, "init_args": init_args}})
    return (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(config).it


def switched_to_sgd(trainer: Trainer, tip: Any) -> None:
    assert [type(o).__name__ for o in trainer.optimizers] == ["SGD"]
    assert len(tip.events) == 1
    assert tip.events[0].epoch == 2
    assert any("momentum_buffer" in state for state in trainer.optimizers[0].state.values())


def drew_classes_alike(trainer: Trainer, tip: Any) -> None:
    loader = trainer.train_dataloader
    drawn = loader.dataset.tensors[1][list(loader.sampler)].bincount()
    assert drawn.max() - drawn.min() <= 1
    assert [event.what for event in tip.events] == ["oversample"]


def weighted_the_loss(trainer: Trainer, tip: Any) -> None:
    assert [event.epoch for event in tip.events] == [1]
    assert tip.trained_prior.max() - tip.trained_prior.min() < 1e-6


def thawed_step_by_step(trainer: Trainer, tip: Any) -> None:
    assert [(event.epoch, event.what.split(":")[0]) for event in tip.events] == [
        (0, "head"),
        (1, "from features.3"),
        (2, "all"),
    ]
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(trainer.lightning_module.parameters()))


def augmented_each_sample(trainer: Trainer, tip: Any) -> None:
    assert [(event.what, event.step) for event in tip.events] == [
        ("standard, not in the last epoch", 0),
        ("off", 20),
    ]
    assert trainer.strategy.training_step.__self__ is trainer.strategy  # the step is as it was


def halved_the_operations(trainer: Trainer, tip: Any) -> None:
    assert [event.epoch for event in tip.events] == [1, 2]
    shares = [event.details["macs"] for event in tip.events]
    assert shares[0] > shares[1]
    assert 0.4 < shares[1] <= 0.6
    module = trainer.lightning_module
    assert module.features[0].weight.shape[0] == module.features[0].out_channels < 8
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert not module._load_state_dict_pre_hooks


def took_blocks_out(trainer: Trainer, tip: Any) -> None:
    assert [event.epoch for event in tip.events] == [1, 3]
    assert tip.events[1].details["macs"] <= 0.55 < tip.events[0].details["macs"] < 1
    module = trainer.lightning_module
    assert len(tip.removed) == 2
    assert all(isinstance(module.get_submodule(name), RemovedBlock) for name in tip.removed)
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert not module._load_state_dict_pre_hooks


def members_trained_and_voted(trainer: Trainer, tip: Any) -> None:
    ensemble = trainer.lightning_module
    assert [event.what for event in tip.events][:1] == ["3 members train together"]
    assert tip.events[-1].what == "weights of the vote"
    assert len(trainer.optimizers) == 3
    assert ensemble.is_fitted
    assert float(ensemble.vote_temperature) != 1.0
    assert len({member.head.bias[0].item() for member in ensemble.members}) == 3


def trained_on_a_part(trainer: Trainer, tip: Any) -> None:
    (part,) = tip.chosen
    labels = part.dataset.tensors[1]
    assert part.indices == nested_subset(labels, 128, 3).tolist()
    assert trainer.train_dataloader.dataset is part
    assert [event.details for event in tip.events] == [{"samples": 128, "of": len(labels)}]


def mixed_pseudo_labels_in(trainer: Trainer, tip: Any) -> None:
    rounds = [event for event in tip.events if event.what.startswith("pseudo-labels, round")]
    assert [event.epoch for event in rounds][:2] == [2, 4]
    assert all(event.details["accepted"] > 0 for event in rounds)
    assert 0 < rounds[0].details["share"] <= 0.25


def replayed_old_samples(trainer: Trainer, tip: Any) -> None:
    assert [event.what for event in tip.events][:2] == ["old samples are replayed", "before -> after"]
    assert "->" in tip.events[1].details["old val_acc"]
    new = len(trainer.train_dataloader.dataset) - 64
    assert sum(index >= new for index in tip.sampler) == len(tip.sampler) // 4
    assert tip.after["old"]["val_loss"] < tip.before["old"]["val_loss"]


SETTINGS = [
    Setting(
        lightning_tips.BatchAugmentationCallback,
        augmented_each_sample,
        {"policy": "standard", "last_epochs_off": 1},
    ),
    Setting(
        lightning_tips.ClassWeightCallback,
        weighted_the_loss,
        {"weights": "auto", "functional": True, "start_epoch": 1},
        second={"start_epoch": 2},
        warns=".*both balance the classes",
    ),
    Setting(
        lightning_tips.EnsembleModule,
        members_trained_and_voted,
        {"member": {"class_path": "harness.PlainModule"}, "n": 3, "weights": "fit"},
    ),
    Setting(
        lightning_tips.FilterPruningCallback,
        halved_the_operations,
        {"target": {"macs": 0.6}, "schedule": "linear", "steps": 2, "start_epoch": 1, "samples": 64},
    ),
    Setting(
        lightning_tips.ImbalancedSamplerCallback,
        drew_classes_alike,
        {"strategy": "oversample", "num_samples": 128},
        data="LoaderData",
    ),
    Setting(
        lightning_tips.ImbalancedSamplerMixin,
        drew_classes_alike,
        {"sampling": "oversample", "samples_per_epoch": 128},
        data="LoaderData",
    ),
    Setting(
        lightning_tips.LayerPruningCallback,
        took_blocks_out,
        {"target": {"macs": 0.55}, "steps": 2, "start_epoch": 1, "every_n_epochs": 2, "samples": 64},
        module="ResidualModule",
    ),
    Setting(
        lightning_tips.OptimizerSwitchCallback,
        switched_to_sgd,
        {
            "trigger": "epoch",
            "at": 2,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
        },
        second={"at": 4},
    ),
    Setting(
        lightning_tips.SubsetCallback,
        trained_on_a_part,
        {"size": 128, "seed": 3},
        data="LoaderData",
    ),
    Setting(
        lightning_tips.SubsetMixin,
        trained_on_a_part,
        {"subset_size": 128, "subset_seed": 3},
        data="LoaderData",
    ),
    Setting(
        lightning_tips.PseudoLabelCallback,
        mixed_pseudo_labels_in,
        {
            "start_epoch": 2,
            "every_n_epochs": 2,
            "share": 0.25,
            "threshold": 0.0,
            "top_share": 0.5,
            "align": True,
            "epoch_size": 128,
            "max_drop": 1.0,
        },
        data="LoaderData",
    ),
    Setting(
        lightning_tips.PseudoLabelMixin,
        mixed_pseudo_labels_in,
        {
            "pseudo_start_epoch": 2,
            "pseudo_every_n_epochs": 2,
            "pseudo_share": 0.25,
            "pseudo_threshold": 0.0,
            "pseudo_max_drop": 1.0,
            "pseudo_options": {
                "epoch_size": 128,
                "top_share": 0.5,
                "align": True,
                "reference": str(Path(__file__).with_name("supervised_metrics.csv")),
            },
        },
        data="LoaderData",
    ),
    Setting(
        lightning_tips.ReplayCallback,
        replayed_old_samples,
        {"share": 0.25, "epoch_size": 128},
        data="LoaderData",
    ),
    Setting(
        lightning_tips.ReplayMixin,
        replayed_old_samples,
        {"replay_share": 0.25, "replay_options": {"epoch_size": 128}},
        data="LoaderData",
    ),
    Setting(
        lightning_tips.TransferLearningCallback,
        thawed_step_by_step,
        {"schedule": "gradual", "phase_epochs": 1, "layer_decay": 0.5, "warmup_steps": 3, "l2_sp": 0.01},
    ),
]

NAMES = [setting.name for setting in SETTINGS]

_public = {
    name
    for name in lightning_tips.__all__
    if isinstance(cls := getattr(lightning_tips, name), type)
    and (issubclass(cls, TipCallback | TipMixin) or issubclass(cls, LightningModule))
}
if missing := _public - set(NAMES):
    raise RuntimeError(f"tests/settings.py has no row for {sorted(missing)}")
