"""The effective ratio of two classes under weights of 20 to 1: ours against torch's ``cross_entropy(weight=...)``.

    python benchmarks/imbalance/ratio.py

Samples are rare with probability 1/21. A loss is backpropagated to logits of zero; the gradient on a sample's own logit
then is its weight in the loss, over 2. The effective ratio is the mean weight of a rare sample over many batches to
that of a common one, with its standard error. On two ranks each has batches of its own and gradients are averaged, as
DDP does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tips.imbalance import class_weights, weighted_cross_entropy

RATIO = 20
Loss = Callable[[Tensor, Tensor], Tensor]


def effective_ratio(loss: Loss, batch_size: int, ranks: int, batches: int, seed: int = 0) -> tuple[float, float]:
    """The ratio and its standard error, from ``batches`` global batches."""
    generator = torch.Generator().manual_seed(seed)
    sums, numbers = torch.zeros(batches, 2), torch.zeros(batches, 2)
    for batch in range(batches):
        targets = (torch.rand(ranks, batch_size, generator=generator) < 1 / (RATIO + 1)).long()
        logits = torch.zeros(ranks, batch_size, 2, requires_grad=True)
        sum(loss(logits[rank], targets[rank]) / ranks for rank in range(ranks)).backward()  # type: ignore[union-attr]
        assert logits.grad is not None
        pull = -logits.grad.gather(2, targets[..., None]).flatten() * batch_size * ranks
        sums[batch].index_add_(0, targets.flatten(), pull)
        numbers[batch] = torch.bincount(targets.flatten(), minlength=2).float()
    common, rare = (sums.sum(0) / numbers.sum(0)).tolist()
    # The spread of a quotient of sums, by halves that were drawn apart.
    parts = [(s.sum(0) / n.sum(0)) for s, n in zip(sums.chunk(20), numbers.chunk(20), strict=True)]
    ratios = torch.stack([part[1] / part[0] for part in parts])
    return rare / common, float(ratios.std() / len(ratios) ** 0.5)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("ratio.json"))
    parser.add_argument("--samples", type=int, default=400_000, help="samples for each number")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    weights = class_weights([RATIO, 1])
    losses: dict[str, Loss] = {
        "ours": lambda logits, targets: weighted_cross_entropy(logits, targets, weights),
        "stock": lambda logits, targets: F.cross_entropy(logits, targets, weight=weights),
    }
    rows = []
    for ranks in (1, 2):
        for batch_size in (8, 32, 128):
            row: dict[str, Any] = {"ranks": ranks, "batch_per_rank": batch_size, "intended": RATIO}
            for name, loss in losses.items():
                ratio, error = effective_ratio(loss, batch_size, ranks, max(20, chosen.samples // batch_size // ranks))
                row |= {name: round(ratio, 3), f"{name}_standard_error": round(error, 3)}
            rows.append(row)
            print(row)
    result = {"samples": chosen.samples, "torch": str(torch.__version__), "rows": rows}
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
