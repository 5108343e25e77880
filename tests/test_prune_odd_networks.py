"""Networks that are easily got wrong: shuffles, splits, shared layers, heads, odd groups, foreign families; limits."""

import copy
import sys
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tips.core import RemovedBlock, accept_other_shapes
from lightning_tips.pruning import count_cost, measure_latency, plan_filters, prune_filters, reestimate_batch_norm
from lightning_tips.pruning.networks import limits as limits_module
from lightning_tips.pruning.tracing.trace import without_modes

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


LARGE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Between(nn.Module):
    """Two blocks, something between or after them, and a head."""

    def __init__(self, outputs: int = 32, features: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = block(3, 16), block(16, outputs), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.b(self.a(x))).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        return x


class ChannelDropout(Between):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout2d(x, 0.3, self.training)


class StochasticDepth(Between):
    def between(self, x: Tensor) -> Tensor:
        return x * x.new_empty((len(x), 1, 1, 1)).bernoulli_(0.8) if self.training else x


class Normalised(Between):
    def between(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class PixelShuffle(Between):
    def __init__(self) -> None:
        super().__init__(32, 16)
        self.c = block(8, 16)

    def between(self, x: Tensor) -> Tensor:
        return self.c(F.pixel_shuffle(x, 2))


class Random(Between):
    """Not the same twice, by its own generator, so that outputs cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def between(self, x: Tensor) -> Tensor:
        Random.calls = getattr(Random, "calls", 0) + 1
        return x * (1 + Random.calls % 7)


@pytest.mark.parametrize("kind", [ChannelDropout, StochasticDepth, Normalised, PixelShuffle, Random])
def test_what_is_between_does_not_hold_channels(kind):
    model = kind()
    before = count_cost(model, IMAGES).macs
    report = prune_filters(model, IMAGES, target={"macs": 0.5})
    assert "b.0" in report.plan.channels
    assert not any("operation" in reason for reason in report.plan.left_out.values())
    assert 0.4 < count_cost(model, IMAGES).macs / before <= 0.5
    model.train()(IMAGES).sum().backward()
    assert model.a[0].weight.grad.shape == model.a[0].weight.shape


def test_channels_of_a_pixel_go_together():
    model = PixelShuffle().eval()
    kept = plan_filters(model, IMAGES, target={"macs": 0.5}).kept
    places = torch.tensor(kept["b.0.weight"][0]).reshape(-1, 4)
    assert torch.equal(places // 4, places[:, :1].expand(-1, 4) // 4)  # four in a row make one channel
    assert kept["c.0.weight"][1] == (places[:, 0] // 4).tolist()


def test_a_depthwise_convolution_may_go_down_to_one_channel():
    def separable() -> nn.Sequential:
        depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        return nn.Sequential(
            nn.Conv2d(3, 8, 1), depthwise, nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1)
        )

    model, whole = separable(), separable()
    plan = prune_filters(model, IMAGES, filters=14, floor=0.0, scope="layer", protect=["3"]).plan
    assert plan.channels == {"0": (8, 1), "1": (8, 1)}
    plan = prune_filters(model, IMAGES, filters=4, floor=0.0).plan  # and further, where it has that one already
    assert plan.channels == {"3": (16, 12)}
    accept_other_shapes(model)
    model.load_state_dict(whole.state_dict())
    torch.testing.assert_close(model(IMAGES), whole(IMAGES))


def test_masks_that_pick_entries_are_not_taken_for_labels():
    class Picks(Between):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.b(self.a(x)).mean((2, 3))
            scores = self.head(features)
            return scores, scores[scores > -1e9]

    plan = plan_filters(Picks(), IMAGES, target={"macs": 0.5})
    assert {"a.0", "b.0"} <= set(plan.channels)


def test_a_network_whose_backward_pass_never_worked_is_said_to_be_so():
    class InPlace(Between):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) * 1.0
            y = self.b[0](x)
            x += 1  # the convolution needs what was there
            return self.head(y.mean((2, 3)))

    with pytest.raises(ValueError, match=r"even before anything is removed: the backward pass fails(.|\n)*inplace"):
        prune_filters(InPlace(), IMAGES, target={"macs": 0.5})


def test_a_weight_used_outside_of_its_layer_is_named_as_such():
    class Functional(Between):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(32, 32)

        def between(self, x: Tensor) -> Tensor:
            return F.linear(x.permute(0, 2, 3, 1), self.spare.weight).permute(0, 3, 1, 2)

    plan = plan_filters(Functional(), IMAGES, target={"macs": 0.9})
    assert plan.left_out["spare"] == "its weight is used outside of its forward"


def test_no_float64_is_asked_of_a_device_that_may_not_have_it(monkeypatch):
    moved: list[Tensor] = []
    double, cpu = Tensor.double, Tensor.cpu

    def to_cpu(tensor: Tensor) -> Tensor:
        moved.append(cpu(tensor).clone())
        return moved[-1]

    def on_cpu_only(tensor: Tensor) -> Tensor:
        assert any(tensor is other for other in moved)  # MPS would raise
        return double(tensor)

    monkeypatch.setattr(Tensor, "cpu", to_cpu)
    monkeypatch.setattr(Tensor, "double", on_cpu_only)
    assert prune_filters(Between(), IMAGES, target={"macs": 0.5}).ratios["macs"] <= 0.5
    assert moved


@pytest.mark.parametrize("criterion", ["l1", "random", "bn_scale", "mean_activation", "taylor"])
def test_the_default_device_of_torch_may_be_another_one(criterion):
    model, batches = Between(), [(IMAGES, torch.arange(2))]
    expected = plan_filters(model, IMAGES, criterion=criterion, target={"macs": 0.5}, batches=batches)
    with torch.device("meta"):  # as torch.set_default_device; it holds no values
        plan = plan_filters(model, IMAGES, criterion=criterion, target={"macs": 0.5}, batches=batches)
        assert reestimate_batch_norm(model, batches) == ["a.1", "b.1"]
        assert measure_latency(model, IMAGES, repeats=1).median > 0
        removed = RemovedBlock(model.a)
    assert plan.kept == expected.kept
    assert removed.restored()(IMAGES).shape == model.a(IMAGES).shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_runs_in_full_precision_within_autocast(device):
    # On a machine without the device the state of its autocast can be set all the same.
    seen = []

    class Watch(Between):
        def between(self, x: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled(device), x.dtype))
            return x

    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        plan_filters(Watch(), IMAGES, target={"macs": 0.5})
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, before)
    assert set(seen) == {(False, torch.float32)}


def test_time_limit_holds_for_scores_too():
    def slow():
        while True:
            time.sleep(0.3)
            yield IMAGES, torch.zeros(2, dtype=torch.long)

    with pytest.raises(ValueError, match="time limit was reached while channels were scored"):
        plan_filters(Between(), IMAGES, "mean_activation", target={"macs": 0.5}, batches=slow(), time_limit=2)


def test_stops_where_memory_is_nearly_used_up(monkeypatch):
    monkeypatch.setattr(limits_module, "available_memory", lambda: 10 * 2**20)
    monkeypatch.setattr(limits_module, "_last_look", 0.0)
    model = Between()
    with pytest.raises(ValueError, match="only 10 MiB of memory are left while the network was analysed"):
        prune_filters(model, IMAGES, target={"macs": 0.5})
    assert model.b[0].out_channels == 32


def test_memory_that_is_left_is_a_number_of_bytes():
    left = limits_module.available_memory()
    if sys.platform == "linux":
        assert 2**20 < left < 2**50


def test_modes_do_not_see_what_runs_without_them():
    class Seen(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            return func(*args, **(kwargs or {}))

    with Seen() as mode:
        torch.ones(2) + 1
        before = mode.operations
        with without_modes():
            torch.ones(2) + 1
        assert mode.operations == before > 0
        torch.ones(2) + 1
    assert mode.operations == 2 * before


class Shuffled(nn.Module):
    """Concatenation, channel shuffle, chunk, shared layer, auxiliary head in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.mixed = nn.Conv2d(16, 16, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.auxiliary = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        middle = torch.relu(self.norm(self.mixed(x)))
        left, right = middle.chunk(2, 1)
        left, right = self.shared(left), self.shared(right)
        out = self.head(torch.cat([left, right], 1).mean((2, 3)))
        return (out, self.auxiliary(middle).mean((2, 3))) if self.training else out


class StaticSplit(nn.Module):
    """Its first layer is cut at a place that does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.left = nn.Conv2d(10, 12, 3)
        self.right = nn.Conv2d(6, 12, 3)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(torch.cat([self.left(x[:, :10]), self.right(x[:, 10:])], 1).relu().mean((2, 3)))


def test_shuffles_chunks_shared_layers_and_auxiliary_heads():
    model = Shuffled()
    report = prune_filters(model, LARGE, target={"macs": 0.6})
    assert [tuple(t.shape) for t in model.train()(LARGE)] == [(4, 5), (4, 5)]
    assert model.eval()(LARGE).shape == (4, 5)
    assert {"head", "auxiliary"} <= set(report.plan.left_out)
    assert report.plan.left_out["auxiliary"] == "feeds the output of the network"


def test_the_right_channels_meet():
    # The pruned network is the whole one with zeros in place of what has gone.
    model = Shuffled().eval()
    plan = plan_filters(model, LARGE, target={"macs": 0.6})
    masked = copy.deepcopy(model)
    for name, dims in plan.kept.items():
        tensor = masked.get_parameter(name) if name in dict(masked.named_parameters()) else masked.get_buffer(name)
        for dim, kept in enumerate(dims):
            if kept is not None:
                lost = [i for i in range(tensor.shape[dim]) if i not in kept]
                tensor.data.index_fill_(dim, torch.tensor(lost), 0)
    prune_filters(model, LARGE, target={"macs": 0.6})
    torch.testing.assert_close(model(LARGE), masked(LARGE), rtol=1e-4, atol=1e-5)


def test_a_group_that_breaks_the_network_is_left_out_and_named():
    model = StaticSplit()
    report = prune_filters(model, LARGE, target={"macs": 0.6})
    assert model.left.in_channels == 10  # those that the other part takes can go
    assert {"left", "right"} <= set(report.plan.channels)
    assert any("first" in note and "breaks the network" in note for note in report.plan.notes)
    assert "breaks the network" in str(report)
    assert model(LARGE).shape == (4, 5)


@pytest.mark.parametrize(
    ("name", "size"),
    [("regnetx_002", 64), ("mobilenetv4_conv_small", 64), ("ghostnet_050", 64), ("convnext_atto", 64)],
)
def test_foreign_networks(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    images = torch.randn(2, 3, size, size)
    before = count_cost(model, images)
    prune_filters(model, images, target={"macs": 0.5})
    assert 0.48 < count_cost(model, images).macs / before.macs <= 0.5
    model.train()(images).sum().backward()
    fresh = timm.create_model(name, num_classes=7)
    accept_other_shapes(fresh)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(images), model.eval()(images))


def test_grouped_convolutions_keep_equal_groups():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 4, 3))
    report = prune_filters(model, LARGE, target={"macs": 0.5})
    assert model[1].groups == 4
    assert model[0].out_channels % 4 == model[1].out_channels % 4 == 0
    assert model[0].out_channels >= 8  # with one channel a group it would be depthwise
    assert report.plan.left_out == {"3": "feeds the output of the network"}
