"""Scores of channels: right by hand, and no trace left in the network."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_tips.pruning import NEEDS_BATCHES, channel_scores

from prunable import BATCHES, network

CRITERIA = ["l1", "l2", "geometric_median", "bn_scale", "random", "mean_activation", "apoz", "taylor"]


def test_norms_of_filters():
    layer = nn.Sequential(nn.Conv2d(4, 3, 2, groups=1))
    w = layer[0].weight.detach()
    torch.testing.assert_close(channel_scores(layer, ["0"], "l1")["0"], w.abs().sum((1, 2, 3)))
    torch.testing.assert_close(channel_scores(layer, ["0"], "l2")["0"], w.square().sum((1, 2, 3)).sqrt())


def test_a_transposed_grouped_filter_is_what_makes_its_channel():
    layer = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    scores = channel_scores(layer, ["0"], "l1")["0"]
    for channel in range(6):
        silent = copy.deepcopy(layer)
        with torch.no_grad():
            silent[0].weight.view(2, 2, 3, 3, 3)[channel // 3, :, channel % 3] = 0
            silent[0].bias.zero_()
        assert silent(torch.ones(1, 4, 2, 2))[:, channel].abs().max() == 0
        torch.testing.assert_close(scores[channel], layer[0].weight.abs().sum() - silent[0].weight.abs().sum())


def test_the_filter_in_the_middle_of_the_others_is_the_one_to_go():
    layer = nn.Sequential(nn.Linear(1, 5))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[9.0], [10.0], [11.0], [0.0], [20.0]]))
    scores = channel_scores(layer, ["0"], "geometric_median")["0"]
    assert scores.tolist() == [23.0, 22.0, 23.0, 50.0, 50.0]  # l1 would drop the fourth


def test_random_scores_come_from_seed_and_name_alone():
    model = network()
    both = channel_scores(model, ["conv1", "conv2"], "random", seed=3)
    assert torch.equal(both["conv2"], channel_scores(model, ["conv2"], "random", seed=3)["conv2"])
    assert not torch.equal(both["conv1"], both["conv2"])
    assert not torch.equal(both["conv2"], channel_scores(model, ["conv2"], "random", seed=4)["conv2"])


def activations(model, batches):
    """What conv1 and conv2 make after their ReLU, and conv3 before the sum, written down by hand."""
    model = copy.deepcopy(model).eval()
    rows = []
    for x, _ in batches:
        a = model.bn1(model.conv1(x)).clamp(min=0)
        b = model.bn2(model.conv2(a)).clamp(min=0)
        rows.append((a, b, model.bn3(model.conv3(b))))
    return [torch.cat(values).detach().transpose(0, 1).flatten(1) for values in zip(*rows, strict=True)]


def test_mean_activation_and_zeros_after_the_relu_that_follows():
    model = network()
    one, two, three = activations(model, BATCHES)
    scores = channel_scores(model, ["conv1", "conv2", "conv3"], "mean_activation", BATCHES)
    for name, expected in zip(("conv1", "conv2", "conv3"), (one, two, three), strict=True):
        torch.testing.assert_close(scores[name], expected.abs().mean(1))
    scores = channel_scores(model, ["conv1", "conv2"], "apoz", BATCHES)
    torch.testing.assert_close(scores["conv1"], (one > 0).float().mean(1))
    torch.testing.assert_close(scores["conv2"], (two > 0).float().mean(1))
    assert 0 < scores["conv2"].min() < scores["conv2"].max() < 1


def test_a_dead_filter_is_the_last_by_its_activations_and_gradients():
    model = network()
    with torch.no_grad():
        model.bn2.weight[4], model.bn2.bias[4] = 1.0, -1e3  # large weights, but its ReLU never opens
        model.conv2.weight[4] *= 10
    for criterion in ("apoz", "mean_activation", "taylor"):
        scores = channel_scores(model, ["conv2"], criterion, BATCHES)["conv2"]
        assert scores.argmin() == 4
        assert scores[4] == 0
    assert channel_scores(model, ["conv2"], "l1")["conv2"].argmax() == 4


def test_taylor_is_gradient_times_weight_of_each_batch():
    model = network()
    model.conv2.weight.requires_grad_(False)
    by_hand = copy.deepcopy(model).eval().requires_grad_()
    expected = torch.zeros(6)
    for x, y in BATCHES:
        by_hand.zero_grad()
        functional.cross_entropy(by_hand(x), y).backward()
        expected += (by_hand.conv2.weight.grad * by_hand.conv2.weight).detach().square().sum((1, 2, 3)) / len(BATCHES)
    torch.testing.assert_close(channel_scores(model, ["conv2"], "taylor", BATCHES)["conv2"], expected)
    assert not model.conv2.weight.requires_grad


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        str(np.random.get_state()),
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_nothing_of_the_model_changes(criterion, context):
    model = network().train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model(BATCHES[0][0]).sum().backward()
    x, y = torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES])
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)  # draws from the global generator
    before = snapshot(model)
    with context():
        scores = channel_scores(model, ["conv1", "conv2"], criterion, loader)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert equal(before, snapshot(model))
    for score in scores.values():
        assert score.shape == (6,)
        assert score.dtype == torch.float32
        assert not score.requires_grad


def test_batches_made_in_inference_mode_will_do_for_taylor():
    model = network()
    with torch.inference_mode():
        scores = channel_scores(model, ["conv2"], "taylor", [(x * 1, y * 1) for x, y in BATCHES])
    expected = channel_scores(model, ["conv2"], "taylor", BATCHES)
    assert torch.equal(scores["conv2"], expected["conv2"])


def test_a_failing_batch_leaves_the_model_as_it_was():
    model = network().train()
    before = snapshot(model)
    for criterion in sorted(NEEDS_BATCHES):
        with pytest.raises(RuntimeError):
            channel_scores(model, ["conv1"], criterion, [*BATCHES, (torch.ones(2, 7, 5, 5), torch.zeros(2))])
        assert equal(before, snapshot(model))


@pytest.mark.parametrize("criterion", sorted(NEEDS_BATCHES))
def test_ranks_agree_on_the_scores_of_all_data(criterion):
    model, layers = network(), ["conv1", "conv2"]
    parts: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        parts.append(tensor.clone())
        return tensor

    for share in (BATCHES[:1], BATCHES[1:]):
        channel_scores(model, layers, criterion, share, reduce=collect)
    assert len(parts) == 2
    together = channel_scores(model, layers, criterion, BATCHES[:1], reduce=lambda _: parts[0] + parts[1])
    expected = channel_scores(model, layers, criterion, BATCHES)
    for name in layers:
        torch.testing.assert_close(together[name], expected[name])


def test_batches_of_other_forms():
    model = network()
    expected = channel_scores(model, ["conv2"], "taylor", BATCHES)["conv2"]
    dicts = [{"image": x, "label": y} for x, y in BATCHES]
    assert torch.equal(channel_scores(model, ["conv2"], "taylor", dicts)["conv2"], expected)
    odd = [{"a": {"x": x}, "b": y} for x, y in BATCHES]
    own = channel_scores(
        model, ["conv2"], "taylor", odd, loss=lambda m, b: functional.cross_entropy(m(b["a"]["x"]), b["b"])
    )["conv2"]
    assert torch.equal(own, expected)
    seen = channel_scores(model, ["conv2"], "apoz", odd, forward=lambda m, b: m(b["a"]["x"]))["conv2"]
    assert torch.equal(seen, channel_scores(model, ["conv2"], "apoz", BATCHES)["conv2"])


def test_an_ambiguous_loss_is_asked_for():
    several_labels = [(x, torch.ones(len(x), 3)) for x, _ in BATCHES]
    with pytest.raises(TypeError, match="pass loss="):
        channel_scores(network(), ["conv1"], "taylor", several_labels)


def test_an_own_criterion():
    model = network()
    scores = channel_scores(model, ["conv1"], lambda name, layer: layer.weight.amax((1, 2, 3)))
    torch.testing.assert_close(scores["conv1"], model.conv1.weight.detach().amax((1, 2, 3)))
    with pytest.raises(ValueError, match=r"scores of shape \(6, 2\), not \(6,\)"):
        channel_scores(model, ["conv1"], lambda name, layer: layer.weight.amax((2, 3)))


@pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {"random", "apoz"}))
def test_nan_is_an_error_that_names_the_layer(criterion):
    model = network()
    with torch.no_grad():
        model.conv2.weight[1, 0, 0, 0] = float("nan")
        model.bn2.weight[1] = float("nan")
    with pytest.raises(ValueError, match=r"of the 6 channels of conv2 is not finite"):
        channel_scores(model, ["conv2"], criterion, BATCHES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["conv1"], "l3"), ValueError, "Unknown criterion 'l3'"),
        ((["conv9"], "l1"), ValueError, "no layer 'conv9'"),
        ((["bn1"], "l1"), TypeError, "bn1 is a BatchNorm2d"),
        ((["conv1"], "apoz"), ValueError, "looks at data"),
        ((["conv1"], "taylor", []), ValueError, "the batches are empty"),
        ((["conv1"], "apoz", []), ValueError, "the batches are empty"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        channel_scores(network(), *arguments)


def test_layers_that_do_not_run():
    model = network()
    model.spare = nn.Conv2d(2, 2, 1)
    with pytest.raises(ValueError, match="spare did not run"):
        channel_scores(model, ["spare"], "mean_activation", BATCHES)
    with pytest.raises(ValueError, match="does not depend on spare"):
        channel_scores(model, ["spare"], "taylor", BATCHES)


def test_half_precision_weights_and_autocast():
    model = network()
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(
        channel_scores(half, ["conv1"], "l2")["conv1"],
        channel_scores(model, ["conv1"], "l2")["conv1"],
        rtol=0.01,
        atol=0,
    )
    for criterion in sorted(NEEDS_BATCHES):
        with torch.autocast("cpu", torch.bfloat16):
            scores = channel_scores(model, ["conv1"], criterion, BATCHES)["conv1"]
        expected = channel_scores(model, ["conv1"], criterion, BATCHES)["conv1"]
        torch.testing.assert_close(scores, expected, rtol=0.1, atol=0.02)


def test_networks_that_are_compiled():
    model = network().eval()
    layers = ["conv1", "conv2"]
    expected = {criterion: channel_scores(model, layers, criterion, BATCHES) for criterion in NEEDS_BATCHES}
    model.compile(backend="eager")
    model(BATCHES[0][0])
    for criterion, scores in expected.items():
        again = channel_scores(model, layers, criterion, BATCHES)
        assert all(torch.equal(scores[name], again[name]) for name in layers)


def test_weights_that_are_computed_from_others():
    model = network()
    nn.utils.parametrizations.weight_norm(model.conv2)
    weight = model.conv2.weight.detach()
    torch.testing.assert_close(channel_scores(model, ["conv2"], "l1")["conv2"], weight.abs().sum((1, 2, 3)))
    assert channel_scores(model, ["conv2"], "apoz", BATCHES)["conv2"].max() > 0
    with pytest.raises(ValueError, match="weight of conv2 is computed from others"):
        channel_scores(model, ["conv2"], "taylor", BATCHES)
