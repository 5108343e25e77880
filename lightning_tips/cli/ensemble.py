"""`lightning-tips ensemble`: members trained apart, weighed and joined."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips import EnsembleModule
from lightning_tips.cli.held_out import held_out_data, moves_with_seed
from lightning_tips.cli.run import BuildCLI
from lightning_tips.core import Fit, devices, render_table, run_fits
from lightning_tips.ensemble import plot_weights
from lightning_tips.ensemble.checkpoints import load_member


def train_ensemble(arguments: list[str]) -> int:
    """Trains members apart and joins them: ``lightning-tips ensemble --config run.yaml --members 5``.

    Takes what ``fit`` takes; each member is an ordinary fit of it, with the seed ``seed_everything`` plus its number,
    in a process and a folder of its own. What is done is skipped, what was interrupted goes on, and a failed member
    costs no other; one whose weights are not finite counts as failed. In the end weights and temperature are fitted to
    the validation data, on one device, and ``ensemble.ckpt`` is written.
    """
    own = argparse.ArgumentParser(prog="lightning-tips ensemble", allow_abbrev=False)
    own.add_argument("--members", type=int, default=5, help="how many (default: 5)")
    own.add_argument("--workers", type=int, help="how many at once (default: one a GPU, or 1)")
    own.add_argument("--out", type=Path, default=Path("runs/members"), help="folder (default: runs/members)")
    own.add_argument("--voting", choices=["weighted", "soft", "hard"], default="weighted")
    own.add_argument("--weights", choices=["best", "uniform", "greedy", "fit"], default="best")
    own.add_argument("--task", choices=["multiclass", "multilabel", "regression"], default="multiclass")
    own.add_argument("--input_key", help="where batches are dicts: the key of the inputs, if it is none of the usual")
    own.add_argument("--target_key", help="likewise of the targets")
    own.add_argument("--seed_everything", type=int, help="seed of member 0 (default: that of the yaml, or 0)")
    chosen, rest = own.parse_known_args(arguments)
    if chosen.members < 1 or (chosen.workers is not None and chosen.workers < 1):
        sys.exit("error: --members and --workers are at least 1.")
    sys.argv = [sys.argv[0], *rest]
    cli = _JoinCLI(run=False, save_config_callback=None)  # a yaml that is wrong ends here
    found = cli.config.seed_everything
    seed = chosen.seed_everything if chosen.seed_everything is not None else int(found) if found else 0
    keys = ("voting", "weights", "task", "input_key", "target_key")
    how: dict[str, Any] = {key: getattr(chosen, key) for key in keys}
    try:
        EnsembleModule([copy.deepcopy(cli.model)], **how)  # what cannot vote ends here, before hours of training
        held_out = held_out_data(cli.model, cli.datamodule)
        if chosen.members > 1:
            _refuse_moving_split(cli, rest, seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    out = chosen.out.resolve()
    fits = [Fit.make(f"member_{i}", out, rest, seed + i, cli.loggers) for i in range(chosen.members)]
    places = devices()
    try:
        failed = run_fits(fits, chosen.workers or len(places), places)
        trained: dict[str, pl.LightningModule] = {}
        for index, fit in enumerate(fits):
            if fit.name not in failed:
                member = load_member(fit.checkpoint, lambda: copy.deepcopy(cli.model), index)
                if _is_finite(member):
                    trained[fit.name] = member
                else:
                    failed[fit.name] = f"its weights are not finite. Train it again in another way; see {fit.folder}"
                    print(f"{fit.name} is left out: {failed[fit.name]}", flush=True)
        if not trained:
            sys.exit("error: no member finished; see the log.txt of each.")
        names = list(trained)
        ensemble = EnsembleModule(list(trained.values()), **how)
        ensemble.call_members(names)
        ensemble.fit_weights_with(cli.trainer, **held_out)
        cli.trainer.strategy.connect(ensemble)
        cli.trainer.save_checkpoint(out / "ensemble.ckpt")
    except (ValueError, FileNotFoundError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
    plot_weights(ensemble.vote_weights, out / "weights.png", names, ensemble.member_scores, "validation accuracy")
    score = "val_loss" if ensemble.task == "regression" else "val_acc"
    rows = [
        [name, f"{value:.4f}", f"{weight:.3f}"]
        for name, value, weight in zip(names, ensemble.member_scores or [], ensemble.vote_weights.tolist(), strict=True)
    ]
    rows.append(["vote", f"{float(cli.trainer.callback_metrics[score]):.4f}", ""])
    rows += [[name, "failed", ""] for name in failed]
    print(render_table(["", score, "weight"], rows))
    print(f"{out / 'ensemble.ckpt'}: {len(names)} members, temperature {float(ensemble.vote_temperature):.3f}")
    return 1 if failed else 0


class _JoinCLI(BuildCLI):
    """Builds what joins the members, on one device: the members themselves take as many as the yaml says."""

    def before_instantiate_classes(self) -> None:
        """Takes the loggers and the strategy away."""
        super().before_instantiate_classes()
        trainer = self.config.trainer
        trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"


def _refuse_moving_split(cli: BuildCLI, arguments: list[str], seed: int) -> None:
    """Looks whether members would be trained on other splits than the one that weighs them."""
    if cli.datamodule is None:
        return
    sys.argv = [sys.argv[0], *arguments, f"--seed_everything={seed + 1}"]
    other = _JoinCLI(run=False, save_config_callback=None)
    cli.datamodule.prepare_data()
    moves = moves_with_seed(cli.datamodule, other.datamodule, (seed, seed + 1), cli.trainer)
    pl.seed_everything(seed, verbose=False)
    kind = type(cli.datamodule).__name__
    if moves:
        raise ValueError(
            f"{kind} splits off other validation data under another seed_everything, and each member has its own: they"
            " would be weighed on what they were trained on. Give its split a seed that stays, such as"
            " random_split(..., generator=torch.Generator().manual_seed(0))."
        )
    if moves is None:
        rank_zero_warn(
            f"The validation samples of {kind} look different under another seed_everything. If that is not for random"
            " transforms but for its split, members are weighed on what they were trained on: give the split a seed"
            " that stays."
        )


def _is_finite(member: pl.LightningModule) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in member.parameters() if p.is_floating_point())
