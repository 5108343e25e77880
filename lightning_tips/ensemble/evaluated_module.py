"""The half of an ensemble that is evaluated by a Trainer: members' steps, and what their vote is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_tips.core import log_picture, on_rank_zero, reason_of, report_folder, targets_of
from lightning_tips.ensemble.calibration import reliability
from lightning_tips.ensemble.evaluation import combine, scores, whole_split
from lightning_tips.ensemble.outputs import watched_forward
from lightning_tips.ensemble.plots import plot_reliability
from lightning_tips.ensemble.together import Together
from lightning_tips.ensemble.voting_module import VotingModule

__all__ = ["EvaluatedModule"]


class EvaluatedModule(VotingModule):
    """Validates and tests; :class:`EnsembleModule` adds the training."""

    _seen: list[tuple[Tensor, Tensor]]

    @property
    def _running(self) -> Together:
        if self._together is None:
            raise RuntimeError("The ensemble is not attached to a Trainer: this is called by one.")
        return self._together

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """That of every member, and what the vote needs of them."""
        self._evaluate("validation_step", batch, batch_idx, dataloader_idx, self.trainer.num_val_batches)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """That of every member, and what the vote needs of them."""
        self._evaluate("test_step", batch, batch_idx, dataloader_idx, self.trainer.num_test_batches)

    def _evaluate(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int, loaders: Sequence[Any]) -> None:
        running = self._running
        try:
            targets = targets_of(batch, self.target_key)
        except (KeyError, TypeError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {reason_of(error)}") from error
        members: list[Tensor] = []
        for index, member in enumerate(self.members):
            self._bring(index)
            with running.acting(index) as run, watched_forward(member) as seen:
                part = running.part(batch, index)
                if is_overridden(step, member):
                    more = (dataloader_idx,) if len(loaders) > 1 else ()
                    running.outputs[index] = run.evaluate(step, part, batch_idx, *more)
                # A step that called forward once has done the vote's work too.
                once = len(seen) == 1 and isinstance(seen[0], Tensor) and seen[0].shape[:1] == targets.shape[:1]
                output = seen[0] if once else self._outputs[index].run(member, part)
                members.append(self._outputs[index].read(output, len(targets)))
        if dataloader_idx == 0:
            self._seen.append((self._stack(members).detach().cpu(), self._targets(batch, members[0])))

    def on_validation_epoch_end(self) -> None:
        """Fits the weights and logs what the vote is worth."""
        self._running.each("on_validation_epoch_end")
        seen = self._gather_seen(self.trainer.val_dataloaders)
        if seen is None:
            return
        # On one sample (as in fast_dev_run) there is nothing to fit; the callback says so at the end of training.
        fits = self._refit or (self.trainer.state.fn == "fit" and len(seen[1]) > 1)
        if fits and not self.trainer.sanity_checking:
            fitted = on_rank_zero(self.trainer, lambda: self._fit_vote(*seen, self._refit))
            self._take_up(fitted)
            found = fitted["scores"]
        else:
            found = self._scores(*seen)
        for name, value in found.items():
            self.log(f"val_{name}", value, prog_bar=name != "ece", sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Logs what each member and the vote are worth, and draws the reliability diagram."""
        self._running.each("on_test_epoch_end")
        seen = self._gather_seen(self.trainer.test_dataloaders)
        if seen is None:
            return
        for name, value in self._scores(*seen).items():
            self.log(f"test_{name}", value, sync_dist=True)
        members, targets = seen
        for index, member in enumerate(members):
            for name, value in scores(member, targets, self.task).items():
                self.log(f"test_{name}/member_{index}", value, sync_dist=True)
        if self.task != "regression" and self.trainer.is_global_zero:
            curves = {"vote": reliability(self._combined(members).probabilities, targets, task=self.task)}
            if self.voting != "hard" and self.calibrate and self.is_fitted:
                untempered = combine(members, self._shares.cpu(), 1.0, self.voting, self.task)
                curves["without temperature"] = reliability(untempered.probabilities, targets, task=self.task)
            curves["member 0"] = reliability(members[0], targets, task=self.task)
            path = report_folder(self.trainer) / "ensemble_reliability.png"
            plot_reliability(curves, path)
            log_picture(self.trainer, "tips/ensemble/reliability", path)

    def _gather_seen(self, loaders: Any) -> tuple[Tensor, Tensor] | None:
        """(M, N, C, ...) and targets of all ranks, on each of them: as one rank would have them, if that can be."""
        seen, self._seen = self._seen, []
        mine = (torch.cat([p for p, _ in seen], 1), torch.cat([t for _, t in seen])) if seen else None
        if self.trainer.world_size == 1:
            return mine
        ranks: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(ranks, mine)
        return whole_split(ranks, _samples_in_turns(loaders, self.trainer.world_size))


def _samples_in_turns(loaders: Any, world_size: int) -> int | None:
    """How many samples the first loader has, if ranks take turns at them; None if their order is another one."""
    loader = CombinedLoader(loaders, "sequential").flattened[0]
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or type(loader.batch_sampler) is not BatchSampler:
        return None
    in_turns = not sampler.shuffle and not sampler.drop_last and sampler.num_replicas == world_size
    return len(sampler.dataset) if in_turns else None  # type: ignore[arg-type]
