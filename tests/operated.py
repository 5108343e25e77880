"""A small network, its groups and optimizers, for tests of optimizer surgery."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD


class OwnSGD(torch.optim.Optimizer):
    """Somebody's own optimizer, which passes its options on."""

    def __init__(self, params, lr=0.5, **options):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0} | options)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * (p.grad + group["weight_decay"] * p)


class OwnSGDSubclass(SGD):
    def __init__(self, params, **options):
        super().__init__(params, **options)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups(net: nn.Sequential, *options: dict) -> list[dict]:
    return [{"params": list(net[layer].parameters()), **o} for layer, o in zip((0, 2), options, strict=True)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    inputs = torch.linspace(-1, 1, 24).view(8, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(inputs), inputs[:, :2]).backward()
        optimizer.step()


def sgd(params) -> SGD:
    return SGD(params, lr=0.1, momentum=0.9)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]
