"""The result of a comparison as a W&B run of its own, beside those of its fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["log_to_wandb", "wandb_arguments", "wandb_summary"]


def wandb_arguments(loggers: Any) -> dict[str, Any] | None:
    """The arguments of the WandbLogger among the loggers of a configuration, if there is one.

    Args:
        loggers: ``class_path`` and ``init_args``, a list of such, a boolean, or None.
    """
    for one in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(one, Mapping) and str(one.get("class_path", "")).endswith("WandbLogger"):
            return {k: v for k, v in (one.get("init_args") or {}).items() if v is not None}
    return None


def wandb_summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers for the summary of a run: ``<arm>/mean``, ``<arm>/difference``, ``<arm>/low`` and so on."""
    summary: dict[str, Any] = {}
    for row in result["arms"]:
        found = {"mean": row["mean"], "sd": row["sd"], "seconds": row["cost"]["seconds"]["mean"]}
        if row["difference"]:
            found |= {"difference": row["difference"]["mean"]}
            found |= {key: row["difference"][key] for key in ("low", "high", "p_holm")}
        summary |= {f"{row['name']}/{key}": value for key, value in found.items() if value is not None}
        summary[f"{row['name']}/verdict"] = row["verdict"]
    return summary


def log_to_wandb(
    result: Mapping[str, Any], arguments: Mapping[str, Any], folder: Path, files: Mapping[str, Path]
) -> None:
    """Logs the summary, a table and pictures as one run in the group of the fits; offline where the fits are.

    Args:
        result: From :func:`collect`.
        arguments: Of the WandbLogger, from :func:`wandb_arguments`.
        folder: Where the run's files go.
        files: PNG files, by name.
    """
    from lightning.pytorch.loggers import WandbLogger

    name = str(arguments.get("name") or folder.name)
    own = {k: v for k, v in arguments.items() if k not in ("id", "version", "name", "save_dir", "dir")}
    own = {"group": name, "job_type": "compare"} | own
    logger = WandbLogger(name=f"{name}-compare", save_dir=str(folder), **own)
    summary = wandb_summary(result)
    kinds = ["mean", "sd", "difference", "low", "high", "verdict", "seconds"]
    rows = [[row["name"], *(summary.get(f"{row['name']}/{kind}") for kind in kinds)] for row in result["arms"]]
    logger.log_table("compare/arms", columns=["arm", *kinds], data=rows)
    for key, path in files.items():
        logger.log_image(f"compare/{key}", [str(path)])
    logger.experiment.summary.update({f"compare/{key}": value for key, value in summary.items()})
    logger.experiment.finish()
