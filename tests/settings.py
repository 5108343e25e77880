"""The settings table: one row a tip. `test_every_tip.py` drives each row through everything that holds for all tips.

A tip that is missing here breaks the collection of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer

import lightning_tips
from lightning_tips.core import TipCallback


@dataclass(frozen=True)
class Setting:
    """How a tip is tested.

    Attributes:
        tip: The class.
        changed: Raises AssertionError unless the tip did its work in this finished run of 6 epochs of 4 steps.
        arguments: What a yaml would say under ``init_args``.
        second: What is different in a second one beside it.
    """

    tip: type[TipCallback]
    changed: Callable[[Trainer, Any], None]
    arguments: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)

    @property
    def yaml(self) -> dict[str, Any]:
        return {"class_path": f"lightning_tips.{self.tip.__name__}", "init_args": self.arguments}

    def make(self, **changes: Any) -> Any:
        """The tip as a yaml would build it."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Callback, "tip")
        yaml = self.yaml | {"init_args": self.arguments | changes}
        config = parser.parse_object({"tip": yaml})
        return (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(config).tip


def switched_to_sgd(trainer: Trainer, tip: Any) -> None:
    assert [type(o).__name__ for o in trainer.optimizers] == ["SGD"]
    assert len(tip.events) == 1
    assert tip.events[0].epoch == 2
    assert any("momentum_buffer" in state for state in trainer.optimizers[0].state.values())


SETTINGS = [
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
]

NAMES = [setting.tip.__name__ for setting in SETTINGS]

_public = {
    name
    for name in lightning_tips.__all__
    if isinstance(cls := getattr(lightning_tips, name), type) and issubclass(cls, TipCallback)
}
if missing := _public - set(NAMES):
    raise RuntimeError(f"tests/settings.py has no row for {sorted(missing)}")
