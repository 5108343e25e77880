"""What an ensemble says: the vote of its members, its weights, and the network that it exports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from typing_extensions import Self

from lightning_tips.core import inputs_of, targets_of
from lightning_tips.ensemble.calibration import apply_temperature
from lightning_tips.ensemble.checks import Task
from lightning_tips.ensemble.evaluation import Combined, align_targets, combine, fit_vote, other_class_order, scores
from lightning_tips.ensemble.export import VoteNetwork, export_vote
from lightning_tips.ensemble.outputs import Outputs
from lightning_tips.ensemble.soup import greedy_soup
from lightning_tips.ensemble.together import Together
from lightning_tips.ensemble.vote import RegressionVote, Vote, Voting, votes_of
from lightning_tips.ensemble.weights import Method

__all__ = ["VotingModule"]


class VotingModule(pl.LightningModule):
    """The half of :class:`EnsembleModule` that votes; the other half trains."""

    members: nn.ModuleList
    vote_weights: Tensor
    vote_temperature: Tensor
    voting: Voting
    weights: Method | list[float]
    task: Task
    calibrate: bool
    return_members: bool
    input_key: str | None
    target_key: str | None
    member_scores: list[float] | None
    _fitted: Tensor
    _outputs: list[Outputs]
    _together: Together | None
    _refit: bool
    offload: bool
    _resident: int | None

    @property
    def _names(self) -> list[str]:
        return [type(member).__name__ for member in self.members]

    def call_members(self, names: Sequence[str]) -> None:
        """What errors call the members, in place of their numbers.

        Args:
            names: One for each.
        """
        for outputs, name, kind in zip(self._outputs, names, self._names, strict=True):
            outputs.name = f"{name} ({kind})"

    @property
    def _shares(self) -> Tensor:
        """(M,) what each member counts; in a soft vote the same, whatever weights a checkpoint brought."""
        return torch.full_like(self.vote_weights, 1 / len(self.members)) if self.voting == "soft" else self.vote_weights

    @property
    def is_fitted(self) -> bool:
        """Whether weights and temperature have been fitted to data."""
        return bool(self._fitted)

    # ---- where members are

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `to`, `cuda` and `double` are made of. With offload one member after the other goes and comes back.
        if not self.offload:
            return super()._apply(fn, recurse)
        super()._apply(fn, recurse=False)
        for member in self.members:
            member._apply(fn)
            _move(member, torch.device("cpu"))
        self._resident = None
        return self

    def _bring(self, index: int) -> None:
        """With ``offload`` puts a member on the device, and the one that was there on the CPU."""
        if not self.offload or self._resident == index:
            return
        if self._resident is not None:
            _move(self.members[self._resident], torch.device("cpu"))
        _move(self.members[index], self.vote_weights.device)
        self._resident = index

    # ---- the vote

    def probabilities_of(self, index: int, batch: Any) -> Tensor:
        """What one member predicts for a batch.

        Args:
            index: Its number.
            batch: ``(inputs, ...)``, a dict, or the inputs.

        Returns:
            ``(N, C, ...)`` probabilities; in regression what the member returns.

        Raises:
            TypeError: If it cannot be called with the inputs, or returns no tensor.
            ValueError: If it yields NaN, or no probabilities.
        """
        self._bring(index)
        part = self._together.part(batch, index) if self._together is not None else batch
        outputs = self._outputs[index]
        return outputs.read(outputs.run(self.members[index], part))

    def forward(self, inputs: Any) -> Tensor:
        """The vote's probabilities ``(N, C, ...)`` for a batch of inputs, at its temperature; or its mean ``(N, ...)``.

        Gradients flow through it. Nothing is kept but the sum.
        """
        total: Tensor | None = None
        for index, weight in enumerate(self._shares):
            probabilities = self.probabilities_of(index, inputs)
            if self.voting == "hard":
                probabilities = votes_of(probabilities, self.task)
            if total is not None and probabilities.shape != total.shape:
                self._refuse(index, probabilities, total)
            total = probabilities * weight if total is None else total + probabilities * weight
        assert total is not None
        return self._tempered(total)

    def _tempered(self, probabilities: Tensor) -> Tensor:
        if self.task == "regression" or self.voting == "hard" or not self.calibrate:
            return probabilities
        return apply_temperature(probabilities, float(self.vote_temperature), task=self.task)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """What the ensemble says of a batch, and how much its members agree. Labels in the batch are left alone.

        Nothing is kept but running sums, unless ``return_members`` asks for the members.

        Returns:
            ``prediction``, ``probabilities`` (at the temperature), ``votes``, ``entropy`` and ``disagreement``, see
            :class:`VoteResult`; in regression ``mean``, ``variance``, ``within`` and ``between``, see
            :class:`RegressionResult`. With ``return_members`` also ``members`` (N, M, ...).
        """
        together: Vote | RegressionVote
        together = RegressionVote(check=False) if self.task == "regression" else Vote(self.voting, self.task, False)
        kept: list[Tensor] = []
        for index, weight in enumerate(self._shares.tolist()):
            probabilities = self.probabilities_of(index, batch)
            together.add(probabilities, None if self.voting == "soft" else weight, name=self._outputs[index].name)
            if self.return_members:
                kept.append(probabilities)
        result = together.result()._asdict()
        if "probabilities" in result:
            result["probabilities"] = self._tempered(result["probabilities"])
        if kept:
            result["members"] = torch.stack(kept, 1)
        return result

    @torch.no_grad()
    def fit_weights(self, dataloader: Iterable[Any]) -> dict[str, float]:
        """Fits weights and temperature to a split of their own, which neither training nor checkpoints have used.

        Not for test data. Runs on the device where the ensemble is.

        Args:
            dataloader: Batches with targets.

        Returns:
            ``loss``, ``acc`` and ``ece`` of the vote, cross-fitted.

        Raises:
            ValueError: If the split is empty, or a member yields NaN or other classes than the rest.
        """
        seen: list[tuple[Tensor, Tensor]] = []
        with _evaluating(self):
            for batch in dataloader:
                batch = move_data_to_device(batch, self.device)
                members = self._stack([self.probabilities_of(i, batch) for i in range(len(self.members))])
                seen.append((members.cpu(), self._targets(batch, members[0])))
        if not seen:
            raise ValueError("The dataloader has no batches: weights need a split of their own to be fitted on.")
        fitted = self._fit_vote(torch.cat([p for p, _ in seen], 1), torch.cat([t for _, t in seen]), apart=True)
        self._take_up(fitted)
        return fitted["scores"]

    def fit_weights_with(
        self, trainer: pl.Trainer, dataloaders: Any = None, datamodule: Any = None
    ) -> dict[str, float]:
        """Fits weights and temperature in ``trainer.validate``: with its devices, precision and ranks.

        Args:
            trainer: Any.
            dataloaders: Of ``trainer.validate``.
            datamodule: Likewise.

        Returns:
            The metrics, cross-fitted.

        Raises:
            ValueError: If there are no batches.
        """
        self._refit = True
        try:
            found = trainer.validate(self, dataloaders, datamodule=datamodule, verbose=False)
        finally:
            self._refit = False
        if not found or "val_loss" not in found[0]:
            raise ValueError("The validation data have no batches: weights need a split of their own to be fitted on.")
        return dict(found[0])

    def _targets(self, batch: Any, prediction: Tensor) -> Tensor:
        """The targets of a batch on the CPU, in the form that belongs to one member's predictions."""
        return align_targets(targets_of(batch, self.target_key).detach(), prediction.shape, self.task).cpu()

    def _fit_vote(self, members: Tensor, targets: Tensor, apart: bool) -> dict[str, Any]:
        """Weights, temperature and scores, of members that may have been trained ``apart``."""
        names = self._names
        fitted = fit_vote(members, targets, self.weights, self.voting, self.task, self.calibrate, names=names)
        if apart and self.task == "multiclass" and members.ndim == 3:
            for index, member in enumerate(members):
                if (found := other_class_order(member, targets)) is not None:
                    rank_zero_warn(
                        f"{self._outputs[index].name} is right for {found[0]:.0%} of the samples, and would be for"
                        f" {found[1]:.0%} if its classes were {found[2]}: was it trained with its classes in another"
                        " order? Members must have the same ones in the same order; put its outputs in this order with"
                        " to_probabilities, or leave it out."
                    )
        key = "loss" if self.task == "regression" else "acc"
        return fitted | {"members": [scores(member, targets, self.task)[key] for member in members]}

    def _take_up(self, fitted: dict[str, Any]) -> None:
        self.vote_weights.copy_(torch.tensor(fitted["weights"], dtype=torch.float64))
        self.vote_temperature.fill_(fitted["temperature"])
        self._fitted.copy_(torch.tensor(True))
        self.member_scores = fitted["members"]

    def _stack(self, members: list[Tensor]) -> Tensor:
        """Puts predictions together, ``(M, N, C, ...)``.

        Raises:
            ValueError: With the names of two members that differ.
        """
        for index, member in enumerate(members):
            if member.shape != members[0].shape:
                self._refuse(index, member, members[0])
        return torch.stack(members)

    def _refuse(self, index: int, member: Tensor, first: Tensor) -> NoReturn:
        raise ValueError(
            f"{self._outputs[index].name} yields predictions of the shape {tuple(member.shape)}, and"
            f" {self._outputs[0].name} of {tuple(first.shape)}: members must agree in the number of classes and the"
            " kind of output to vote. Leave it out, or train it on the same classes."
        )

    # ---- one network in the place of several

    @torch.no_grad()
    def soup(
        self, dataloader: Iterable[Any], train_dataloader: Iterable[Any] | None = None, check: bool = True
    ) -> tuple[pl.LightningModule, list[int]]:
        """One network with the mean weights of members of one initialisation; costs what one member costs.

        See :func:`greedy_soup`. The score is the accuracy, in regression minus the squared error. Members stay as they
        are.

        Args:
            dataloader: Held-out batches with targets, read up to 3 times for each member.
            train_dataloader: Batches to estimate BatchNorm's running statistics on, anew for each mean. Needed where
                there is BatchNorm; without a random order the result is the same each time.
            check: Whether to refuse members of different initialisations.

        Returns:
            A copy of the best member with the mean weights, in eval mode, and the numbers of the members in the mean,
            the best one first.

        Raises:
            ValueError: Members of different initialisations or architectures, with what was measured; an empty split;
                or no ``train_dataloader`` with BatchNorm.
        """
        network = copy.deepcopy(self.members[0]).to(self.device)
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        if normed and train_dataloader is None:
            raise ValueError(
                "The members have BatchNorm, whose running statistics are not those of the mean network: pass"
                " train_dataloader to estimate them again."
            )

        def put(state: dict[str, Tensor]) -> None:
            network.load_state_dict(state)
            if normed:
                assert train_dataloader is not None
                device = self.device
                update_bn(
                    (move_data_to_device(inputs_of(b, self.input_key), device) for b in train_dataloader), network
                )
            network.eval()

        def score(state: dict[str, Tensor]) -> float:
            put(state)
            seen = []
            for batch in dataloader:
                batch = move_data_to_device(batch, self.device)
                read = self._outputs[0].read(self._outputs[0].run(network, batch))
                seen.append((read.cpu(), self._targets(batch, read)))
            if not seen:
                raise ValueError("The dataloader has no batches: a soup needs a split that can be read several times.")
            found = scores(torch.cat([p for p, _ in seen]), torch.cat([t for _, t in seen]), self.task)
            return -found["loss"] if self.task == "regression" else found["acc"]

        states = [member.state_dict() for member in self.members]
        mean, chosen = greedy_soup(states, score, check=check, names=self._names)
        network = copy.deepcopy(self.members[chosen[0]]).to(self.device)
        put(mean)
        assert isinstance(network, pl.LightningModule)
        return network, chosen

    # ---- export

    @torch.no_grad()
    def to_export(self, example: Any) -> VoteNetwork:
        """The vote as one network on the CPU, with the weights and temperature of now.

        Args:
            example: A batch, or its inputs: tells what the members return, where that is not known yet.

        Raises:
            ValueError: Members that disagree or yield NaN, by name.
        """
        with _evaluating(self):  # else BatchNorm would learn from the example
            batch = move_data_to_device(example, self.device)
            self._stack([self.probabilities_of(index, batch) for index in range(len(self.members))])
        network_members = [copy.deepcopy(member).cpu() for member in self.members]
        kinds = [outputs.convert for outputs in self._outputs]
        temperature = float(self.vote_temperature) if self.calibrate else 1.0
        return VoteNetwork(network_members, self._shares, kinds, temperature, self.voting, self.task)  # type: ignore[arg-type]

    def export(self, path: str | Path, example: Any, tolerance: float = 1e-6) -> float:
        """Writes the vote as one file for ``torch.export`` (``.pt2``) or ONNX (``.onnx``), for batches of any size.

        What was written is run and compared before this returns.

        Args:
            path: Its ending decides the format.
            example: A batch, or its inputs.
            tolerance: How far its probabilities may be from the members' loop.

        Returns:
            The largest difference found.

        Raises:
            ValueError: If the ending is another one, or the difference is larger.
        """
        return export_vote(self.to_export(example), Path(path), inputs_of(example, self.input_key), tolerance)

    # ---- scores

    def _combined(self, members: Tensor) -> Combined:
        temperature = float(self.vote_temperature) if self.calibrate else 1.0
        return combine(members, self._shares.cpu(), temperature, self.voting, self.task)

    def _scores(self, members: Tensor, targets: Tensor) -> dict[str, float]:
        return scores(self._combined(members), targets, self.task)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _move(member: nn.Module, device: torch.device) -> None:
    # Not as inference tensors, with which a member could be trained no more.
    with torch.inference_mode(False), torch.no_grad():
        member._apply(lambda tensor: tensor.to(device))
