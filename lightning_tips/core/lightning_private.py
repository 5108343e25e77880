"""Every use of a private attribute of Lightning, one of torch's loaders, and nothing else.

Those that the members of an ensemble take are in `lightning_private_members.py`, those of who keeps scores in
`lightning_private_scores.py`. `tests/test_lightning_private*.py` fails when Lightning changes one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _reinstantiate_wrapped_cls, get_all_subclasses
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.data import _get_dataloader_init_args_and_kwargs
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's folder that holds everything but the tensors (``_METADATA_FILENAME``)."""


def logging_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs at this moment.

    It differs from ``trainer.global_step`` with several optimizers. Loggers such as W&B drop what comes with an
    earlier step, so an event has to use Lightning's own count.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def change_train_loaders(trainer: pl.Trainer, change: Callable[[Any], Any], first: bool = False) -> Callable[[], None]:
    """Passes the training loaders through ``change`` whenever the Trainer asks for them, wherever they come from.

    Args:
        trainer: The trainer, from ``setup`` on.
        change: Takes and returns loaders.
        first: Whether it comes before the changes that are there already: for what decides which samples there are.

    Returns:
        A function that takes the change back.
    """
    source = trainer.fit_loop._data_source
    changes: list[Callable[[Any], Any]] | None = getattr(source.dataloader, "changes", None)
    if changes is None:
        changes, before = [], source.dataloader

        def dataloader() -> Any:
            try:
                loaders = before()
                for change_them in changes:
                    loaders = change_them(loaders)
            except BaseException:
                restore_loader_classes()
                raise
            return loaders

        dataloader.changes = changes  # type: ignore[attr-defined]
        source.dataloader = dataloader  # type: ignore[method-assign]
    changes.insert(0 if first else len(changes), change)

    def take_back() -> None:  # in whatever order: tips are torn down in the order in which they were set up
        if change in changes:
            changes.remove(change)

    return take_back


class IndexSource(DataLoader[Any]):
    """A loader that draws the indices of its samples from what `index_source` makes of its batch sampler."""

    def index_source(self, source: Any) -> Any:
        """What to draw from in place of ``source``, the batch sampler."""
        return source

    @property
    def _index_sampler(self) -> Any:
        return self.index_source(super()._index_sampler)


def reads_index_source(kind: type[DataLoader[Any]]) -> bool:
    """Whether a class of loaders iterates as torch's own one does, which reads what :class:`IndexSource` changes."""
    names = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
    return all(getattr(kind, name, None) is getattr(DataLoader, name) for name in names)


def member_prefix(trainer: pl.Trainer) -> str:
    """What metrics of a member of an ensemble begin with, if it is such a one's view of a Trainer; else empty."""
    return str(vars(trainer).get("_member_prefix", ""))


def restore_loader_classes() -> None:
    """Gives DataLoader, BatchSampler and their subclasses their own methods back.

    While Lightning asks for loaders it replaces these methods, in order to see the arguments. It does not take that
    back if an error comes out of there, and every loader of the process that is made afterwards is taken for one that
    comes from a hook: later runs fail over arguments given twice.
    """
    for base in (DataLoader, BatchSampler):
        for kind in get_all_subclasses(base) | {base}:
            for name in ("__setattr__", "__delattr__", "__init__"):
                if f"__old{name}" in vars(kind):
                    setattr(kind, name, getattr(kind, f"__old{name}"))
                    delattr(kind, f"__old{name}")


def with_sampler(loader: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """A loader of the same class, with the same arguments, that draws from ``sampler``."""
    return _made_anew(loader, sampler, {})


def with_dataset(
    loader: DataLoader[Any], dataset: Any, sampler: Sampler[Any], drop_last: bool | None = None
) -> DataLoader[Any]:
    """A loader of the same class, with the same arguments, that draws from ``sampler`` in another dataset.

    Args:
        loader: What it is like.
        dataset: The other dataset.
        sampler: Of that one.
        drop_last: None: as ``loader`` has it.

    Raises:
        MisconfigurationException: If the class of the loader makes its dataset, or its batches, itself.
    """
    return _made_anew(loader, sampler, {"dataset": dataset} | ({} if drop_last is None else {"drop_last": drop_last}))


def _made_anew(loader: DataLoader[Any], sampler: Sampler[Any], changed: dict[str, Any]) -> DataLoader[Any]:
    given, found = _get_dataloader_init_args_and_kwargs(loader, sampler)
    names, arguments, keywords = tuple(getattr(loader, "__pl_saved_arg_names", ())), list(given), dict(found)
    parameters = inspect.signature(type(loader).__init__).parameters
    batches = loader.batch_sampler
    if loader.batch_size is None and type(batches) is BatchSampler:
        # Lightning takes batch_sampler= away, and the size of the batches with it: they would be of one sample.
        changed = {"batch_size": batches.batch_size, "drop_last": batches.drop_last} | changed
    for name, value in (keywords | changed).items():
        passed_on = name != "dataset" and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name in names:
            arguments[names.index(name)] = value
            keywords.pop(name, None)
        elif name in keywords or name in parameters or passed_on:
            keywords[name] = value
        else:
            raise MisconfigurationException(
                f"{type(loader).__name__} has no argument {name!r}, so it cannot be made anew with other data. Return a"
                " torch.utils.data.DataLoader from train_dataloader()."
            )
    return _reinstantiate_wrapped_cls(loader, *arguments, **keywords)


def forget_train_loaders(trainer: pl.Trainer) -> None:
    """Lets loaders that exist before the loops are restored be made anew.

    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes them; the state of loaders in the
    checkpoint is then never given to any.
    """
    trainer.fit_loop._combined_loader = None


def is_epoch_finished(trainer: pl.Trainer) -> bool:
    """Whether the last batch that was trained, perhaps before a resume, was the last one of its epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def count_epoch_start(trainer: pl.Trainer) -> None:
    """Counts the start of an epoch where Lightning left it out.

    After a resume from the last batch of an epoch it does, and every later checkpoint of the middle of an epoch then
    says that no epoch has begun: a second resume repeats batches.
    """
    progress = trainer.fit_loop.epoch_progress
    if progress.current.ready == progress.current.processed:  # type: ignore[attr-defined]
        progress.increment_ready()
        progress.increment_started()


def delay_static_graph_again(strategy: DDPStrategy) -> None:
    """Lets a freshly wrapped module with a static graph start as the first one did.

    With manual optimization Lightning puts off the reducer's first pass, and does so once only; without it the ranks
    silently come apart.
    """
    strategy._pl_static_graph_delay_done = False


def epoch_of_samplers(trainer: pl.Trainer) -> int:
    """The epoch that Lightning is about to give to ``set_epoch``.

    While loaders are made on resume ``trainer.current_epoch`` still lags behind it.
    """
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def batch_on_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch as a step gets it: in the precision in use, through the hooks before and after the transfer."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def load_validation(trainer: pl.Trainer) -> None:
    """Makes the validation loaders of a fit now, where its first validation is far off."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        stage = trainer.state.stage
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
        trainer.state.stage = stage


def is_redirected(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs a whole step at this moment, instead of its ``forward``.

    A strategy that wraps the module (DDP) sends steps through it, so that the wrapper sees them.
    """
    return (
        getattr(vars(module).get("forward"), "__qualname__", "")
        == "_ForwardRedirection.__call__.<locals>.wrapped_forward"
    )


def starts_processes(strategy: Strategy) -> bool:
    """Whether the strategy trains in child processes and brings only the weights back (``ddp_spawn``, ``ddp_fork``)."""
    return getattr(strategy, "_start_method", "popen") != "popen"
