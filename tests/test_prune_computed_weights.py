"""Layers whose weight is computed from other tensors before each call: norms of weights and masks, old and new."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lightning_tips.core import accept_other_shapes
from lightning_tips.core.spectral_norms import spectral_norms
from lightning_tips.pruning import prune_filters

from harness import assert_same, bits, every_step, fit
from prunable import InnerModule, pruning, widths

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "old weight_norm": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "masks": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
SPECTRAL = ["old spectral_norm", "spectral_norm"]


class Network(nn.Module):
    """An ordinary, a transposed and a grouped convolution, and a linear layer after a flatten."""

    def __init__(self, way: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = way(nn.Conv2d(1, 16, 3, padding=1))
        transposed = nn.ConvTranspose2d(16, 12, 3, padding=1)
        self.b = transposed if "weight_norm" in way.__name__ else way(transposed)  # which has its norms along inputs
        self.c = way(nn.Conv2d(12, 12, 3, padding=1, groups=2))
        self.d = way(nn.Linear(12 * 16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = F.relu(layer(x))
        return self.head(F.relu(self.d(F.max_pool2d(x, 2).flatten(1))))


@pytest.mark.parametrize("name", WAYS)
def test_cut_twice_without_a_call_between_and_back_again(name: str) -> None:
    way = WAYS[name]
    model, whole = Network(way), Network(way)
    for target in (0.7, 0.7):
        model.train()(IMAGES).sum().backward()
        report = prune_filters(model, IMAGES, target={"macs": target})
        assert report.ratios["macs"] <= target
        layers = {key: getattr(model, key) for key in ("a", "b", "c", "d")}
        assert {"a", "b", "c"} <= set(report.plan.channels)
        for key, (_, after) in report.plan.channels.items():
            layer = layers[key]
            assert getattr(layer, "out_channels", getattr(layer, "out_features", 0)) == after
            assert after in layer.weight.shape[:2]
    fresh = Network(way)
    for target, source in ((fresh, model), (model, whole)):
        accept_other_shapes(target)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.eval()(IMAGES), source.eval()(IMAGES))


@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_left_is_divided_by_its_own_largest_singular_value(name: str) -> None:
    model = Network(WAYS[name]).eval()
    with torch.no_grad():
        for layer in (model.a, model.b, model.c, model.d):
            next(spectral_norms(layer)).weight.mul_(5)
    prune_filters(model, IMAGES, target={"macs": 0.5})
    model(IMAGES)
    for layer in (model.a, model.b, model.c, model.d):
        (norm,) = spectral_norms(layer)
        largest = torch.linalg.matrix_norm(norm.matrix, 2)
        torch.testing.assert_close(layer.weight, norm.weight / largest, rtol=0.05, atol=1e-3)
        assert (len(norm.u), len(norm.v)) == norm.matrix.shape


@pytest.mark.parametrize("name", WAYS)
def test_step_by_step_in_a_fit_that_resumes(name: str, tmp_path: Path) -> None:
    class Computed(InnerModule):
        def __init__(self) -> None:
            super().__init__()
            for place in (0, 3):
                WAYS[name](self.net[place])

    def run(**more: object):
        return fit(pruning(), Computed(), every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=3, **more)

    trainer = run()
    tip = trainer.callbacks[0]
    assert [event.epoch for event in tip.events] == [1, 2]
    assert widths(trainer.lightning_module) < [8, 12]
    assert_same(bits(run(ckpt_path=tmp_path / "kept" / "step-step=6.ckpt")), bits(trainer))
