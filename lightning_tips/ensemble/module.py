"""`EnsembleModule`: several LightningModules that train together or come from checkpoints, and vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import Self

from lightning_tips.core import callbacks_of, reason_of, split_train_loader
from lightning_tips.core.lightning_private import forget_train_loaders
from lightning_tips.ensemble.callback import EnsembleCallback
from lightning_tips.ensemble.checkpoints import (
    Maker,
    find_checkpoints,
    give_what_they_added,
    load_member,
    what_it_adds,
)
from lightning_tips.ensemble.checks import Task, as_weights, check_choice, member_name
from lightning_tips.ensemble.data import MemberData, member_loaders
from lightning_tips.ensemble.evaluated_module import EvaluatedModule
from lightning_tips.ensemble.members import build_members, member_seed, twins
from lightning_tips.ensemble.outputs import OutputKind, Outputs
from lightning_tips.ensemble.together import Together
from lightning_tips.ensemble.vote import Voting
from lightning_tips.ensemble.weights import Method

__all__ = ["EnsembleModule"]


class EnsembleModule(EvaluatedModule):
    """Several LightningModules that vote: trained together in one fit, or taken from checkpoints.

    Members stay as they are, alike or different in network, optimizer and loss. Each trains as it would alone: its own
    optimizers and schedulers in any form that Lightning takes, automatic or manual optimization, the Trainer's gradient
    clipping and accumulation, its own gradient scaler and DDP wrapper, its own random numbers for dropout; with the
    same data it ends with the same bits. ``trainer.global_step`` counts one for each step that all members have made.

    Members' metrics are logged as ``member_0/val_loss`` and so on, which is also what their own schedulers monitor as
    ``val_loss``. The vote's are ``val_loss`` (negative log-likelihood; mean squared error in regression), ``val_acc``
    and ``val_ece`` (calibration error, 15 bins). After each validation of a fit weights and a temperature are fitted to
    it, so that every checkpoint holds those that belong to its members, and the metrics are cross-fitted: no sample is
    judged by weights that it was used to fit. For data of their own see :meth:`fit_weights`; test data never serve.

    Args:
        members: The members; give these, or ``member``.
        member: Makes an untrained member; in yaml a ``class_path`` with ``init_args``. Each gets an initialisation of
            its own, a function of ``seed`` and its number.
        n: How many of ``member``.
        voting: ``"soft"``: mean of the probabilities; ``"weighted"``: each member by its weight; ``"hard"``: each votes
            for its likeliest class, with its weight.
        weights: ``"uniform"``, ``"greedy"`` (Caruana et al. 2004), ``"fit"`` (on the simplex), ``"best"`` (greedy if it
            beats uniform on samples that it was not fitted on), or a list that stays; see :func:`ensemble_weights`.
        task: ``"multiclass"``, ``"multilabel"`` or ``"regression"``.
        to_probabilities: What makes probabilities of what a member's ``forward`` returns: ``"softmax"``, ``"sigmoid"``,
            ``"exp"``, ``"identity"``, a function, or a list of them, one for each member; None: found out from the
            first batch.
        calibrate: Whether to fit a temperature.
        member_data: ``"shared"``: all members see the same batches. ``"own_order"``: each the same samples, in an order
            of its own; ``"bootstrap"``: each a draw with replacement, the same in all epochs; ``"majority_subsets"``:
            each all samples of the rarest class and another part of the others. Then there is a DataLoader for each
            member, and data are loaded once for each; all follow from ``seed``, the member's number and the epoch.
        majority_ratio: For ``"majority_subsets"``: at most so many samples of a class for each of the rarest one.
        member_callbacks: For each member a copy of these runs inside of it, such as a BatchAugmentationCallback; one
            with a ``seed`` gets that plus the member's number. Members' own ``configure_callbacks`` run too.
        seed: Of members, their random numbers and data; None: that of ``seed_everything``.
        offload: Whether members rest on the CPU and come to the device one at a time, in ``validate``, ``test`` and
            ``predict``. Not in a fit, whose optimizers hold all of them; it may be set afterwards.
        return_members: Whether ``predict`` also returns the members' probabilities.
        input_key: Where batches are dicts: the key of the inputs, if it is none of the usual ones.
        target_key: Likewise of the targets.

    Attributes:
        members: ``nn.ModuleList``.
        vote_weights: (M,) float32 buffer, sum 1.
        vote_temperature: () float32 buffer.
        member_scores: Accuracy of each member (in regression, mean squared error) in the last validation, or None.

    Raises:
        ValueError: Arguments that do not fit.
        TypeError: A member that is no LightningModule.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> ensemble = EnsembleModule(member=BoringModel, n=3)
        >>> ensemble.vote_weights
        tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(
        self,
        members: list[pl.LightningModule] | None = None,
        member: Callable[[], pl.LightningModule] | None = None,
        n: int = 5,
        voting: Voting = "weighted",
        weights: Method | list[float] = "best",
        task: Task = "multiclass",
        to_probabilities: OutputKind | list[OutputKind] | Callable[[Any], Tensor] | None = None,
        calibrate: bool = True,
        member_data: MemberData = "shared",
        majority_ratio: float = 1.0,
        member_callbacks: list[pl.Callback] | None = None,
        seed: int | None = None,
        return_members: bool = False,
        offload: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("voting", voting, Voting)
        check_choice("task", task, Task)
        check_choice("member_data", member_data, MemberData)
        if isinstance(weights, str):
            check_choice("weights", weights, Method)
        if (members is None) == (member is None):
            raise ValueError("Give either members, a list of LightningModules, or member, which makes one.")
        if member is not None:
            members = build_members(member, n, seed)
        assert members is not None
        _check_members(members)
        if voting == "soft" and not isinstance(weights, str):
            raise ValueError("A soft vote has no weights: voting='weighted' goes with weights that are given.")
        if task == "regression" and voting == "hard":
            raise ValueError("There is no hard vote on numbers: voting is soft or weighted in regression.")
        self.members = nn.ModuleList(members)
        self.voting: Voting = voting
        self.weights: Method | list[float] = weights
        self.task: Task = task
        self.calibrate = calibrate
        self.member_callbacks = list(member_callbacks or [])
        self.member_data: MemberData = member_data
        self.majority_ratio = majority_ratio
        self.seed = seed
        self.return_members = return_members
        self.offload = offload
        self._resident: int | None = None
        self.input_key = input_key
        self.target_key = target_key
        given = None if isinstance(weights, str) else weights
        self.register_buffer("vote_weights", as_weights(given, len(members)).float())
        self.register_buffer("vote_temperature", torch.ones(()))
        self.register_buffer("_fitted", torch.zeros((), dtype=torch.bool))
        kinds = to_probabilities if isinstance(to_probabilities, list) else [to_probabilities] * len(members)
        if len(kinds) != len(members):
            raise ValueError(f"to_probabilities has {len(kinds)} entries for {len(members)} members.")
        self._outputs = [Outputs(member_name(i, self._names), task, kind, input_key) for i, kind in enumerate(kinds)]
        self._tip = EnsembleCallback(self)
        self._together: Together | None = None
        self._give_back: Callable[[], None] = _nothing
        self._restored: dict[str, Any] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._agreed = False
        self._refit = False
        self.member_scores: list[float] | None = None

    @classmethod
    def from_checkpoints(
        cls,
        paths: str | Path | Sequence[str | Path],
        module_class: Maker | Sequence[Maker],
        **arguments: Any,
    ) -> Self:
        """An ensemble of modules that were trained apart, or of the snapshots of one run.

        Checkpoints are read with ``weights_only=True``. Pruned ones keep their shapes.

        Args:
            paths: Checkpoints, one for each member; or a folder, all of whose ``*.ckpt`` but ``last.ckpt`` are taken.
            module_class: The members' class, made from the hyper-parameters in the checkpoint; or a function that makes
                the module; or a list of these, one for each.
            **arguments: Of :class:`EnsembleModule`.

        Raises:
            FileNotFoundError: With the member's number, if there is no such file.
            ValueError: Likewise, if it is damaged or of another module.
        """
        files = find_checkpoints(paths)
        makers = list(module_class) if isinstance(module_class, Sequence) else [module_class] * len(files)
        if len(makers) != len(files):
            raise ValueError(f"There are {len(files)} checkpoints and {len(makers)} classes: give one class for each.")
        members = [load_member(path, maker, i) for i, (path, maker) in enumerate(zip(files, makers, strict=True))]
        return cls(members, **arguments)

    # ---- what it is

    @property
    def tips(self) -> list[EnsembleCallback]:
        """The callback that it brings to the Trainer."""
        return [self._tip]

    def configure_callbacks(self) -> list[pl.Callback]:
        """The tip that records what happens, unless the Trainer has it from an earlier run."""
        there = [] if self._trainer is None else callbacks_of(self.trainer)
        return [] if self._tip in there else [self._tip]

    def extra_repr(self) -> str:
        """Voting and weights."""
        return f"voting={self.voting!r}, weights={self.weights!r}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_together": None, "_give_back": _nothing, "_trainer": None, "_seen": []}

    # ---- a Trainer comes and goes

    def check_before_training(self) -> None:
        """What can be known before there are batches.

        Raises:
            MisconfigurationException: If members cannot differ.
        """
        self._agreed = False
        pair = None if self.member_callbacks else twins(list(self.members))  # type: ignore[arg-type]
        if pair and self.member_data == "shared":
            rank_zero_warn(
                f"The members {pair[0]} and {pair[1]} begin with the same parameters and see the same data: unless"
                " dropout tells them apart they end as the same network. Make them with member=... and n=..., which"
                " gives each an initialisation of its own."
            )

    def setup(self, stage: str) -> None:
        """Lets each member see a Trainer of its own, then calls its ``setup``."""
        self.leave_trainer()
        if stage == "fit" and self.offload:
            raise MisconfigurationException(
                "offload=True goes with validate, test and predict: in a fit the optimizers hold all members on the"
                " device. Set ensemble.offload = True after it, or train the members apart."
            )
        if stage == "fit" and self.member_data != "shared" and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"overfit_batches repeats the first batches for all members, which leaves member_data="
                f"{self.member_data!r} nothing to choose. Leave out one of them, or use limit_train_batches."
            )
        members: list[Any] = list(self.members)
        self._together = Together(self.trainer, self, members, self.member_callbacks, self.seed, stage, self._bring)
        if stage == "fit" and self.member_data != "shared":
            self._together.split = True
            self._give_back = split_train_loader(self.trainer, self._split)
        self._restored = None
        self._seen.clear()
        self._together.each("setup", stage=stage)

    def _split(self, loader: Any) -> dict[str, Any]:
        seed = member_seed(self.seed, 0)
        try:
            return member_loaders(
                loader, self.member_data, len(self.members), seed, self.majority_ratio, self.target_key
            )
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"member_data={self.member_data!r}: {error}") from error

    def configure_model(self) -> None:
        """That of the members."""
        for index, member in enumerate(self.members):
            if is_overridden("configure_model", member):
                if self._together is None:
                    member.configure_model()  # type: ignore[operator]
                else:
                    with self._together.acting(index) as run:
                        run.call_module("configure_model")

    def teardown(self, stage: str) -> None:
        """Calls the members' ``teardown`` and leaves them as they were."""
        if self._together is not None:
            self._together.each("teardown", stage=stage)
        self.leave_trainer()

    def member_trainers(self) -> list[pl.Trainer]:
        """What each member sees as its Trainer; none outside of a run."""
        return [] if self._together is None else [run.trainer for run in self._together.runs]

    def leave_trainer(self) -> None:
        """Takes the members out of the Trainer."""
        if self._together is not None:
            self._together.close()
            self._together = None
        self._give_back()
        self._give_back = _nothing
        self.automatic_optimization = True
        self._seen.clear()

    def configure_optimizers(self) -> Any:
        """Those of all members."""
        # Manual it is here and where Lightning chooses the loop. Not elsewhere: Lightning refuses gradient clipping
        # and accumulation with it, which members do by themselves, and ModelCheckpoint warns of it.
        self.automatic_optimization = False
        return self._running.configure_optimizers()

    # ---- steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Calls that of every member. Before the first one, looks whether members agree."""
        self.automatic_optimization = False
        self._running.start_batch("on_train_batch_start", batch, batch_idx)
        if not self._agreed:
            self._check_agreement(batch)

    @torch.no_grad()
    def _check_agreement(self, batch: Any) -> None:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.autocast(self.device.type, enabled=False), self.trainer.precision_plugin.forward_context():
                self._stack([self._first_of(index, batch) for index in range(len(self.members))])
        except (KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(f"These members cannot vote: {reason_of(error)}") from error
        finally:
            for module, training in modes:
                module.training = training
        self._agreed = True

    def _first_of(self, index: int, batch: Any) -> Tensor:
        with self._running.acting(index):
            state = self._running.streams[index].state_dict()
            found = self.probabilities_of(index, batch)
        self._running.streams[index].load_state_dict(state)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step of every member. Returns their outputs, and the mean of their losses for callbacks."""
        result = self._running.train(batch, batch_idx)
        self.automatic_optimization = True
        return result

    # ---- checkpoints

    def on_fit_start(self) -> None:
        """Calls that of every member, with what a checkpoint says of it restored."""
        self.automatic_optimization = True
        if self._restored is not None:
            # A member that reads estimated_stepping_batches has had them made, too early for their state.
            forget_train_loaders(self.trainer)
            self._running.load_state_dict(self._restored["members"])
            self._restored = None
        self._running.each("on_fit_start")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what members need to go on, and what they add themselves."""
        members: list[Any] = list(self.members)
        own: dict[str, Any] = {"added": [what_it_adds(member, i, checkpoint) for i, member in enumerate(members)]}
        if self._together is not None and self.trainer.state.fn == "fit":
            own["members"] = self._together.state_dict()
        checkpoint["ensemble"] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives members what they added, and keeps the rest until the optimizers exist."""
        own = give_what_they_added(list(self.members), checkpoint)  # type: ignore[arg-type]
        self._restored = own if "members" in own else None


def _nothing() -> None:
    """Where there is nothing to give back."""


def _check_members(members: Sequence[Any]) -> None:
    if not members:
        raise ValueError("members is empty: an ensemble has at least one.")
    for index, member in enumerate(members):
        if not isinstance(member, pl.LightningModule):
            raise TypeError(f"member {index} is a {type(member).__name__}, not a LightningModule.")
        if any(member is other for other in members[:index]):
            raise ValueError(f"member {index} is the same object as another one: each needs a network of its own.")


def _relayed(hook: str) -> Callable[..., None]:
    def relay(self: EnsembleModule, *args: Any) -> None:
        if hook.endswith("_batch_start"):
            self._running.start_batch(hook, *args)
        elif hook.endswith("_batch_end"):
            self._running.end_batch(hook, *args[1:])  # each member gets outputs of its own
        else:
            self._running.each(hook, *args)

    relay.__name__, relay.__qualname__ = hook, f"EnsembleModule.{hook}"
    relay.__doc__ = f"Calls ``{hook}`` of every member and of its callbacks."
    return relay


for _stage in ("train", "validation", "test", "predict"):
    for _when in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end"):
        if (_hook := f"on_{_stage}_{_when}") not in vars(EvaluatedModule) | vars(EnsembleModule):
            setattr(EnsembleModule, _hook, _relayed(_hook))
setattr(EnsembleModule, "on_fit_end", _relayed("on_fit_end"))  # noqa: B010
