"""The arms of a comparison, from one configuration: without its tips, with each of them alone, with all.

Pure functions on plain data, as in the yaml.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = ["Arm", "Overlay", "Plan", "callbacks_in", "find_tips_in", "parse_overlay", "plan_arms"]

Plan = Literal["each", "minus_one"]
BASELINE, ALL = "baseline", "all"


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: Its name, which is fit for a folder.
        config: What ``fit`` gets, as in a yaml.
        tips: Names of the tips in it.
        change: What was changed, in a few words.
    """

    name: str
    config: dict[str, Any]
    tips: tuple[str, ...] = ()
    change: str = ""


@dataclass(frozen=True)
class Overlay:
    """An arm that a user names: what is laid over the reference arm.

    Attributes:
        name: Of the arm.
        arguments: As behind ``lightning-tips fit``.
    """

    name: str
    arguments: tuple[str, ...]


@dataclass
class _Tip:
    name: str
    index: int | None  # among the callbacks; None: it is the model
    inner: dict[str, Any] = field(default_factory=dict)


def find_tips_in(
    config: Mapping[str, Any], is_tip: Callable[[str], bool], wrappers: Mapping[str, str] | None = None
) -> list[str]:
    """Names of the tips in a configuration, in their order.

    Args:
        config: With ``trainer.callbacks`` and ``model``.
        is_tip: Whether the class of a ``class_path`` is a tip.
        wrappers: Models that are tips: ``class_path`` to the argument that holds the model without the tip.
    """
    return [tip.name for tip in _tips(config, is_tip, wrappers or {})]


def plan_arms(
    config: Mapping[str, Any],
    plan: Plan,
    is_tip: Callable[[str], bool],
    wrappers: Mapping[str, str] | None = None,
) -> list[Arm]:
    """The arms of a plan; the first is the reference, with which the others are compared.

    Args:
        config: The whole configuration, as in a yaml; it stays as it is.
        plan: ``"each"``: without its tips (``baseline``), with each tip alone, and with ``all``. ``"minus_one"``: with
            ``all``, without each one, and without any (``baseline``).
        is_tip: Whether the class of a ``class_path`` is a tip. Other callbacks stay in each arm.
        wrappers: See :func:`find_tips_in`.

    Raises:
        ValueError: If there is no tip.

    Example:
        >>> config = {"trainer": {"callbacks": [{"class_path": "my.SwitchCallback"}, {"class_path": "my.Timer"}]}}
        >>> arms = plan_arms(config, "each", is_tip="my.SwitchCallback".__eq__)
        >>> [(arm.name, len(arm.config["trainer"]["callbacks"])) for arm in arms]
        [('baseline', 1), ('Switch', 2)]
    """
    if plan not in get_args(Plan):
        raise ValueError(f"There is no plan {plan!r}; there are {' and '.join(get_args(Plan))}.")
    tips = _tips(config, is_tip, wrappers or {})
    if not tips:
        raise ValueError(
            "There is no tip in the configuration, so nothing to compare. Put tips under trainer.callbacks"
            " (`lightning-tips tips` lists them), or name arms of your own: --arms 'sgd: --model.init_args...'."
        )
    every = [tip.name for tip in tips]
    some: list[tuple[str, list[str], str]]
    if plan == "each":
        some = [(name, [name], f"{name} alone") for name in every]
        wanted = [(BASELINE, [], "no tip"), *some]
        wanted += [(ALL, every, "all tips")] if len(every) > 1 else []
    else:
        some = [(f"without_{name}", [n for n in every if n != name], f"all but {name}") for name in every]
        wanted = [(ALL, every, "all tips")]
        wanted += [*some, (BASELINE, [], "no tip")] if len(every) > 1 else [(BASELINE, [], "no tip")]
    return [Arm(name, _only(config, tips, kept), tuple(kept), change) for name, kept, change in wanted]


def callbacks_in(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a configuration has under ``trainer.callbacks``, which may also be one alone, or a name."""
    given = (config.get("trainer") or {}).get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    return [{"class_path": one} if isinstance(one, str) else one for one in given]


def _tips(config: Mapping[str, Any], is_tip: Callable[[str], bool], wrappers: Mapping[str, str]) -> list[_Tip]:
    found: list[_Tip] = []
    model = config.get("model") or {}
    if (key := wrappers.get(model.get("class_path", ""))) is not None:
        inner = (model.get("init_args") or {}).get(key)
        if isinstance(inner, Mapping) and "class_path" in inner:
            found.append(_Tip(_short(model["class_path"]), None, dict(inner)))
    for index, callback in enumerate(callbacks_in(config)):
        if is_tip(callback["class_path"]):
            found.append(_Tip(_short(callback["class_path"]), index))
    for number, tip in enumerate(found):  # two of one class
        before = sum(re.sub(r"_\d+$", "", other.name) == tip.name for other in found[:number])
        tip.name += f"_{before + 1}" if before else ""
    return found


def _short(class_path: str) -> str:
    return re.sub(r"(?<=.)(Callback|Module)$", "", class_path.rpartition(".")[2])


def _only(config: Mapping[str, Any], tips: Sequence[_Tip], kept: Sequence[str]) -> dict[str, Any]:
    """The configuration with those tips and no others."""
    left = copy.deepcopy(dict(config))
    gone = {tip.index for tip in tips if tip.name not in kept and tip.index is not None}
    left["trainer"] = dict(left.get("trainer") or {})
    left["trainer"]["callbacks"] = [one for index, one in enumerate(callbacks_in(left)) if index not in gone]
    for tip in tips:
        if tip.index is None and tip.name not in kept:
            left["model"] = copy.deepcopy(tip.inner)
    return left


def parse_overlay(text: str) -> Overlay:
    """An arm as a user writes it.

    Args:
        text: ``"sgd: --model.init_args.optimizer=torch.optim.SGD"``, ``"sgd: more.yaml --trainer.max_epochs=5"`` or
            ``"sgd.yaml"``, whose name is that of the file. What stands there is what ``fit`` would get behind its other
            arguments; a yaml alone is a ``--config``.

    Raises:
        ValueError: If there is no name, or nothing that changes.

    Example:
        >>> parse_overlay("sgd: fast.yaml --trainer.max_epochs=5").arguments
        ('--config=fast.yaml', '--trainer.max_epochs=5')
    """
    form = "an arm is `each`, `minus_one`, a yaml file, or 'name: --some.argument=value ...'"
    match = re.match(r"\s*([^\s:]+)\s*:(?:\s+(.*))?$", text, re.S)
    if match:
        name, rest = match.group(1), match.group(2) or ""
    elif _is_yaml(text):
        name, rest = re.sub(r"\.ya?ml$", "", text.replace("\\", "/").rpartition("/")[2]), shlex.quote(text)
    else:
        raise ValueError(f"{text!r}: {form}.")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{name!r} names a folder, so it may hold letters, digits and _ . + - only.")
    words = shlex.split(rest)
    if not words:
        raise ValueError(f"{text!r} changes nothing: {form}.")
    if not words[0].startswith("--") and not _is_yaml(words[0]):
        raise ValueError(f"{words[0]!r} is neither an argument, which begins with --, nor a yaml file: {form}.")
    return Overlay(name, tuple(f"--config={w}" if _is_yaml(w) and not w.startswith("--") else w for w in words))


def _is_yaml(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))
