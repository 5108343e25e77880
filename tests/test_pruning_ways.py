"""The way of a layer's output through a network, to its BatchNorm and nonlinearity; importances of torch-pruning."""

import pytest
import timm
import torch
import torch_pruning
from torch import nn

from lightning_tips.pruning import channel_scores, following_norms, prune_filters
from lightning_tips.pruning.ranking.statistics import watch
from lightning_tips.vision.networks import cifar_resnet

from prunable import BATCHES, network

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "follower",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Threshold(0.0, 0.0), nn.Sequential(nn.MaxPool2d(2), nn.ReLU())],
    ids=str,
)
def test_all_sorts_of_rectifiers_are_found(follower):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), follower)
    outputs = [model.eval()(x) for x, _ in BATCHES]
    expected = torch.cat(outputs).ne(0).transpose(0, 1).flatten(1).float().mean(1)
    torch.testing.assert_close(channel_scores(model, ["0"], "apoz", BATCHES)["0"], expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "regnety_002", "ghostnet_100"])
def test_ways_through_foreign_networks(name):
    model = timm.create_model(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    seen = watch(model, layers, [torch.randn(1, 3, 64, 64)], statistic=torch.abs)
    assert all(seen.following[n].calls == 1 for n in layers)
    assert set(seen.sums) == set(layers)
    followed = [n for n in layers if seen.following[n].norm]
    assert len(followed) >= len(layers) // 2
    assert {seen.following[n].activation for n in layers} & {"relu", "relu6"}
    # These list their modules in the order in which they run, so that this is an independent answer.
    assert {n: seen.following[n].norm for n in followed} == following_norms(model, followed)


def test_a_nonlinearity_in_two_steps():
    class Swish(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Swish())
    expected = torch.cat([model(x).detach() for x, _ in BATCHES]).abs().mean((0, 2, 3))
    torch.testing.assert_close(channel_scores(model, ["0"], "mean_activation", BATCHES)["0"], expected)


def test_of_two_nonlinearities_the_first_counts():
    class Both(nn.Module):
        def forward(self, x):
            return x.relu() + x.tanh()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Both())
    expected = torch.cat([model[0](x).relu().detach() for x, _ in BATCHES]).mean((0, 2, 3))
    torch.testing.assert_close(channel_scores(model, ["0"], "mean_activation", BATCHES)["0"], expected)
    assert watch(model, ["0"], BATCHES).following["0"].rectifier


@pytest.mark.parametrize("follower", [nn.GLU(1), nn.Threshold(0.5, 0.0)], ids=str)
def test_what_only_looks_like_a_nonlinearity_of_each_channel(follower):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), follower)
    with pytest.raises(ValueError, match="no nonlinearity of its own follows 0"):
        channel_scores(model, ["0"], "apoz", BATCHES)
    expected = torch.cat([model[0](x).detach() for x, _ in BATCHES]).abs().mean((0, 2, 3))
    torch.testing.assert_close(channel_scores(model, ["0"], "mean_activation", BATCHES)["0"], expected)


def test_no_relu_of_its_own_is_an_error_for_apoz():
    with pytest.raises(ValueError, match=r"no nonlinearity of its own follows conv3"):
        channel_scores(network(), ["conv3"], "apoz", BATCHES)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GELU())
    with pytest.raises(ValueError, match="gelu follows 0"):
        channel_scores(model, ["0"], "apoz", BATCHES)


def test_bn_scale_by_the_way_of_data_or_the_order_of_modules():
    model = network()
    torch.testing.assert_close(channel_scores(model, ["conv2"], "bn_scale")["conv2"], model.bn2.weight.detach().abs())

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm_of_second, self.norm_of_first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm_of_second(self.second(self.norm_of_first(self.first(x)).relu()))

    odd = Odd()
    assert following_norms(odd, ["first"]) == {"first": None}  # another layer comes before a BatchNorm: not guessed
    assert following_norms(odd, ["first", "second"], example_inputs=BATCHES[0][0]) == {
        "first": "norm_of_first",
        "second": "norm_of_second",
    }
    with pytest.raises(ValueError, match="no BatchNorm follows head"):
        channel_scores(model, ["head"], "bn_scale")


LAYERS = ("stages.0.0.conv1", "stages.1.0.conv2", "head")


@pytest.mark.parametrize("name", ["Magnitude", "LAMP", "FPGM", "BNScale", "Random"])
def test_importances_of_torch_pruning_rank_filters(name):
    model = cifar_resnet(8)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    importance = getattr(torch_pruning.importance, f"{name}Importance")()
    state = torch.get_rng_state()
    scores = channel_scores(model, LAYERS[:2], importance)
    assert torch.equal(state, torch.get_rng_state())
    assert [len(score) for score in scores.values()] == [16, 32]
    again = channel_scores(model, LAYERS[:2], importance)
    assert all(torch.equal(one, other) for one, other in zip(scores.values(), again.values(), strict=True))
    report = prune_filters(model, IMAGES, importance, target={"macs": 0.5}, protect=["head"])
    assert 0.45 < report.ratios["macs"] <= 0.5


def test_magnitude_of_torch_pruning_agrees_with_its_own_groups():
    class Plain(nn.Sequential):
        pass

    torch.manual_seed(0)
    model = Plain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.uniform_(model[1].weight)
    # Only outputs and BatchNorm: of inputs, which torch-pruning adds to the group, our groups know nothing.
    importance = torch_pruning.importance.MagnitudeImportance(p=1, normalizer=None, group_reduction="sum")
    expected = model[0].weight.detach().abs().sum((1, 2, 3)) + model[1].weight.detach().abs()
    torch.testing.assert_close(channel_scores(model, ["0"], importance, example_inputs=IMAGES)["0"], expected)
    first = torch_pruning.importance.MagnitudeImportance(p=1, normalizer=None, group_reduction="first")
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=(IMAGES,))
    group = graph.get_pruning_group(model[0], torch_pruning.prune_conv_out_channels, idxs=list(range(8)))
    torch.testing.assert_close(channel_scores(model, ["0"], first)["0"], first(group))


def test_importance_by_gradients_says_that_it_needs_them_and_uses_them():
    model = cifar_resnet(8)
    importance = torch_pruning.importance.TaylorImportance()
    with pytest.raises(ValueError, match=r"needs gradients, and stages.0.0.conv1.weight has none: run loss.backward"):
        channel_scores(model, LAYERS[:2], importance)
    model(IMAGES).square().sum().backward()
    scores = channel_scores(model, LAYERS[:2], importance)
    weight = model.get_submodule(LAYERS[0]).weight
    assert torch.isfinite(scores[LAYERS[0]]).all()
    assert len(scores[LAYERS[0]]) == len(weight)
    prune_filters(model, IMAGES, importance, target={"macs": 0.6})


def test_importances_that_cannot_score_a_layer_alone_are_refused():
    model = cifar_resnet(8)
    with pytest.raises(ValueError, match="BNScaleImportance has no score for head, which no BatchNorm follows"):
        channel_scores(model, LAYERS, torch_pruning.importance.BNScaleImportance())
    model(IMAGES).sum().backward()
    with pytest.raises(ValueError, match=r"OBDCImportance cannot score .* prepared on this network first"):
        channel_scores(model, LAYERS, torch_pruning.importance.OBDCImportance(num_classes=10))
