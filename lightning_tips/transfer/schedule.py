"""The plan of a transfer: phases, each with the layers that train in it and what ends it. Plain data, in yaml too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from typing_extensions import Self

from lightning_tips.core import did_you_mean
from lightning_tips.transfer.freeze import BATCH_NORM_POLICIES, BatchNormPolicy
from lightning_tips.transfer.layers import HEAD, LayerGroup

PRESETS = ("head_only", "lp_ft", "gradual")
_RATES = ("lr", "layer_decay", "l2", "l2_sp", "min_delta")


@dataclass(frozen=True)
class Phase:
    """A part of the training in which the same layers train.

    It ends after ``epochs``, or when ``monitor`` has stopped improving, whichever comes first; the last one lasts to
    the end of the run.

    Attributes:
        train: The layers that train: names of groups, modules or parameters, or patterns for them; ``"all"``.
        name: What to call it.
        epochs: How long it lasts.
        start: The epoch at which it begins, instead of saying how long the one before it lasts.
        monitor: A logged metric that ends it.
        mode: ``"min"`` or ``"max"``, for ``monitor``.
        patience: For so many validations the metric does not get better than it was.
        min_delta: What counts as better.
        lr: Full learning rate of the head; a schedule of the module's comes on top. By default the optimizer's own.
        layer_decay: Each group before the head has this share of the rate of the one after it.
        batch_norm: Policy while it lasts, where it differs from the callback's.
        warmup_steps: Optimizer steps over which its learning rate rises from near 0.
        auto_rates: Each layer group gets a share of the rate by the relative norm of its gradient (auto-RGN).
        l2: Strength of a pull of the head's weights to zero.
        l2_sp: Strength of a pull of all other weights to where they started.
    """

    train: list[str] = field(default_factory=lambda: [HEAD])
    name: str = ""
    epochs: int | None = None
    start: int | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0
    lr: float | None = None
    layer_decay: float | None = None
    batch_norm: BatchNormPolicy | None = None
    warmup_steps: int = 0
    auto_rates: bool = False
    l2: float = 0.0
    l2_sp: float = 0.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """A phase from what a yaml says.

        Raises:
            ValueError: For an unknown key.
        """
        known = {f.name for f in fields(cls)}
        for key in data:
            if key not in known:
                raise ValueError(f"A phase has no {key!r}. {did_you_mean(str(key), known)}")
        train = data.get("train", [HEAD])
        train = train if isinstance(train, list | tuple) else [] if train is None else [train]
        numbers = {key: _number(data[key]) for key in _RATES if key in data}
        return cls(**data | numbers | {"train": [str(pattern) for pattern in train]})  # yaml reads a layer `3` as int

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data."""
        default = asdict(type(self)())
        return {k: v for k, v in asdict(self).items() if k in ("name", "train") or v != default[k]}

    def describe(self) -> str:
        """In a few words: what trains, how, and until when."""
        words = f"{self.name}: {', '.join(self.train)}"
        options = [f"lr {self.lr:g}" if self.lr is not None else ""]
        options += [f"layer decay {self.layer_decay:g}" if self.layer_decay not in (None, 1.0) else ""]
        options += [f"batch norm {self.batch_norm}" if self.batch_norm else ""]
        options += [f"{self.warmup_steps} steps of warm-up" if self.warmup_steps else ""]
        options += ["rates by gradient" if self.auto_rates else ""]
        options += [f"{key} {value:g}" for key, value in (("l2", self.l2), ("l2_sp", self.l2_sp)) if value]
        given = ", ".join(option for option in options if option)
        ends = [f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"] if self.epochs is not None else []
        ends += [f"until {self.monitor} stalls for {self.patience} validations"] if self.monitor else []
        return words + (f" ({given})" if given else "") + (f", {' or '.join(ends)}" if ends else "")


def preset_phases(
    name: str,
    groups: Sequence[LayerGroup],
    phase_epochs: int = 1,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    patience: int = 3,
    fine_tune_lr: float | None = None,
    warmup_steps: int = 0,
    probe_l2: float = 0.0,
    l2_sp: float = 0.0,
) -> list[Phase]:
    """The phases of a schedule that has a name.

    Args:
        name: ``"head_only"``, ``"lp_ft"`` (the head, then all) or ``"gradual"`` (the head, then with one group more in
            each phase, last to first).
        groups: The layers, first to last.
        phase_epochs: How long every phase but the last one lasts; with ``monitor`` the metric decides alone.
        monitor: A metric that ends them.
        mode: ``"min"`` or ``"max"``.
        patience: In validations.
        fine_tune_lr: Full rate of all phases but the first.
        warmup_steps: Steps of warm-up at the start of all phases but the first.
        probe_l2: Pull of the head to zero in the first phase.
        l2_sp: Pull of the other layers to where they started.

    Raises:
        ValueError: For an unknown name.

    Example:
        >>> layers = [LayerGroup(name, (), ()) for name in ("stem", "body", "head")]
        >>> for phase in preset_phases("gradual", layers, phase_epochs=2):
        ...     print(phase.describe())
        head: head, 2 epochs
        from body: head, body, 2 epochs
        all: all
    """
    if name not in PRESETS:
        raise ValueError(f"schedule={name!r} is neither a file nor known by name. {did_you_mean(name, PRESETS)}")
    end: dict[str, Any] = {"monitor": monitor, "mode": mode, "patience": patience} if monitor else {}
    end = end or {"epochs": phase_epochs}
    later: dict[str, Any] = {"lr": fine_tune_lr, "warmup_steps": warmup_steps, "l2_sp": l2_sp}
    if name == "head_only":
        return [Phase([HEAD], HEAD, l2=probe_l2)]
    if name == "lp_ft":
        return [Phase([HEAD], "linear probe", l2=probe_l2, **end), Phase(["all"], "fine-tune", **later)]
    phases = [Phase([HEAD], HEAD, l2=probe_l2, **end)]
    names = [group.name for group in groups][::-1]
    for depth in range(2, len(names)):
        phases.append(Phase(names[:depth], f"from {names[depth - 1]}", **end, **later))
    return [*phases, Phase(["all"], "all", **later)]


def read_plan(source: str | Path | Sequence[Phase | dict[str, Any]]) -> list[Phase]:
    """Phases from a yaml file (a list, or one under ``phases``), or from a list of phases and dicts; checked.

    Raises:
        ValueError: For a plan that cannot be carried out.
        FileNotFoundError: If there is no such file.
    """
    given: Any = source
    if isinstance(source, str | Path):
        try:
            given = yaml.safe_load(Path(source).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"The schedule {source} is no yaml: {error}") from error
        given = given.get("phases", given) if isinstance(given, dict) else given
    if not isinstance(given, list | tuple) or not all(isinstance(item, Phase | dict) for item in given):
        raise ValueError("A schedule is a list of phases, each a mapping with `train` and what ends it.")
    phases = [item if isinstance(item, Phase) else Phase.from_dict(item) for item in given]
    names = [phase.name or f"phase {number}" for number, phase in enumerate(phases, 1)]
    phases = [Phase(**asdict(phase) | {"name": name}) for phase, name in zip(phases, names, strict=True)]
    check_phases(phases)
    return phases


def write_plan(path: str | Path, phases: Sequence[Phase], groups: Sequence[LayerGroup] = ()) -> None:
    """Writes phases as yaml, to be edited and given to the callback as its schedule.

    Args:
        path: The file.
        phases: The plan.
        groups: The layers, listed in a comment for whoever edits it.
    """
    lines = ["# The phases of transfer learning, in their order. Layer groups, first to last:"] if groups else []
    lines += [f"#   {group.name} ({len(group.parameters)} parameters)" for group in groups]
    body = yaml.safe_dump([phase.to_dict() for phase in phases], sort_keys=False)
    Path(path).write_text("\n".join([*lines, body]))


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises ValueError for phases that make no sense by themselves or one after the other."""
    if not phases:
        raise ValueError("A schedule needs at least one phase.")
    names = [phase.name for phase in phases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two phases have the name {twice[0]!r}; give each its own.")
    for phase in phases:
        _check_phase(phase)
    begins: int | None = 0
    for phase, following in zip(phases, [*phases[1:], None], strict=True):
        if phase.start is not None:
            if phase is phases[0] and phase.start != 0:
                raise ValueError(f"The first phase, {phase.name!r}, starts with the run; take its start away.")
            begins = phase.start
        if following is None:
            continue
        ends = begins + phase.epochs if begins is not None and phase.epochs is not None else None
        if following.start is None:
            if phase.epochs is None and phase.monitor is None:
                raise ValueError(
                    f"The phase {phase.name!r} never ends, so {following.name!r} never begins. Give it epochs or a"
                    " monitor, or give the next one a start."
                )
            begins = ends if phase.monitor is None else None
            continue
        if phase.monitor is not None:
            raise ValueError(
                f"The phase {phase.name!r} ends by {phase.monitor!r} and also because {following.name!r} starts at"
                f" epoch {following.start}. Take one of the two away."
            )
        if begins is not None and following.start <= begins:
            raise ValueError(f"The phases {phase.name!r} and {following.name!r} overlap: both cover epoch {begins}.")
        if ends is not None and ends != following.start:
            how = "overlap" if ends > following.start else "leave a gap"
            raise ValueError(
                f"The phases {phase.name!r} and {following.name!r} {how}: one ends before epoch {ends}, the other"
                f" starts at epoch {following.start}. Give one of the two numbers only."
            )
        begins = following.start


def _check_phase(phase: Phase) -> None:
    where = f"The phase {phase.name!r}"
    if not phase.train:
        raise ValueError(f"{where} trains nothing; name layers, or 'all'.")
    for key, least in (("epochs", 1), ("start", 0), ("patience", 1), ("warmup_steps", 0)):
        value = getattr(phase, key)
        if value is not None and not (is_whole(value) and value >= least):
            raise ValueError(f"{where} has {key}={value!r}; it must be a whole number of {least} or more.")
    for key, above in (("lr", True), ("layer_decay", True), ("l2", False), ("l2_sp", False), ("min_delta", False)):
        value = getattr(phase, key)
        if value is not None and not (is_number(value) and (value > 0 if above else value >= 0)):
            raise ValueError(
                f"{where} has {key}={value!r}; it must be a number {'above' if above else 'of at least'} 0."
            )
    if phase.layer_decay is not None and phase.layer_decay > 1:
        raise ValueError(f"{where} has layer_decay={phase.layer_decay}: early layers would be faster than the head.")
    for key, known in (("mode", ("min", "max")), ("batch_norm", (*BATCH_NORM_POLICIES, None))):
        value = getattr(phase, key)
        if value not in known:
            raise ValueError(f"{where} has {key}={value!r}. {did_you_mean(str(value), [k for k in known if k])}")


def is_number(value: object) -> bool:
    """Whether it is a number, and a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """The number that is meant: yaml reads ``3e-4`` as text, for want of a point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
