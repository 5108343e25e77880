"""Networks in another shape, on bare torch objects: nothing of pruning in sight."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from lightning_tips.core import RemovedBlock, accept_other_shapes, keep_indices, resize_to


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 2)
    )


KEPT = {
    "0.weight": [[0, 3, 7], None, None, None],
    "0.bias": [[0, 3, 7]],
    "1.weight": [[0, 3, 7]],
    "1.bias": [[0, 3, 7]],
    "1.running_mean": [[0, 3, 7]],
    "1.running_var": [[0, 3, 7]],
    "3.weight": [None, [0, 3, 7], None, None],
}
IMAGES = torch.randn(4, 3, 3, 3)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()


def same_without_the_others(model):
    """A network whose other channels are silent, which is what the smaller one must equal."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[3].weight[:, [1, 2, 4, 5, 6]] = 0
    return model


def test_the_cut_network_computes_what_the_kept_channels_did():
    model = network().eval()
    expected = same_without_the_others(model)(IMAGES)
    parameters = list(model.parameters())
    keep_indices(model, KEPT)
    torch.testing.assert_close(model(IMAGES), expected)
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (3, 3, 3)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        lambda p: timm.optim.Lion(p, lr=0.01),
    ],
    ids=["sgd", "adamw", "rmsprop", "lion"],
)
def test_the_momentum_of_what_stays_is_kept(make):
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer)
    before = {k: v.clone() for k, v in optimizer.state[model[3].weight].items() if isinstance(v, torch.Tensor)}
    gradient = model[3].weight.grad.clone()
    keep_indices(model, KEPT, [optimizer])
    for key, value in optimizer.state[model[3].weight].items():
        if isinstance(value, torch.Tensor) and value.ndim:
            assert torch.equal(value, before[key][:, [0, 3, 7]])
    assert torch.equal(model[3].weight.grad, gradient[:, [0, 3, 7]])
    held = model[0].weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(model[0].weight, held)


def test_factored_state_is_cut_along_the_dimensions_that_it_has():
    model = nn.Linear(6, 4)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    keep_indices(model, {"weight": [None, [0, 2]]}, [optimizer])
    state = optimizer.state[model.weight]
    assert (state["row_var"].shape, state["col_var"].shape) == ((4, 1), (1, 2))
    model(torch.randn(2, 2)).sum().backward()
    optimizer.step()


def test_nothing_is_changed_where_something_does_not_fit():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"3\.weight of shape \(4, 8, 1, 1\) has no indices \[9\]"):
        keep_indices(model, KEPT | {"3.weight": [None, [9], None, None]})
    with pytest.raises(KeyError):
        keep_indices(model, KEPT | {"x": [None]})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[3].weight]["odd"] = torch.ones(7)
    with pytest.raises(ValueError, match="SGD keeps 'odd' of shape"):
        keep_indices(model, KEPT, [optimizer])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tied_weights_are_cut_once_and_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    keep_indices(
        model, {"a.weight": [[0, 1], [0, 1]], "b.weight": [[0, 1], [0, 1]], "a.bias": [[0, 1]], "b.bias": [[0, 1]]}
    )
    assert model["a"].weight is model["b"].weight
    assert model["b"].weight.shape == (2, 2)


def test_layout_dtype_and_training_flags_survive():
    model = network().to(memory_format=torch.channels_last).double()
    model[0].weight.requires_grad_(False)
    keep_indices(model, KEPT)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.dtype == torch.float64
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]


def test_any_shape_loads_into_any_other():
    whole, cut = network(), network()
    keep_indices(cut, KEPT)
    for target, source in [(network(), cut), (copy.deepcopy(cut), whole)]:
        handle = accept_other_shapes(target)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.eval()(IMAGES), copy.deepcopy(source).eval()(IMAGES))
        assert target[0].out_channels == source[0].out_channels
        handle.remove()
    with pytest.raises(RuntimeError, match="size mismatch"):
        network().load_state_dict(cut.state_dict())


def test_depthwise_convolutions_follow():
    def separable():
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1))

    model = separable()
    pairs = [0, 1, 6, 7]
    keep_indices(
        model,
        {
            "0.weight": [[0, 3], None, None, None],
            "0.bias": [[0, 3]],
            "1.weight": [pairs, None, None, None],
            "1.bias": [pairs],
            "2.weight": [None, pairs, None, None],
        },
    )
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (2, 2, 4)
    other = separable()
    resize_to(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_depthwise_convolution_of_one_channel_can_grow_again(kind, tmp_path):
    def separable():
        return nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))

    whole, small = separable(), separable()
    one = [3]
    keep_indices(
        small,
        {
            "0.weight": [one, None, None, None],
            "0.bias": [one],
            "1.weight": [one, None, None, None],
            "1.bias": [one],
            "2.weight": [None, one, None, None],
        },
    )
    torch.save(small, tmp_path / "whole_module.pt")
    fresh = separable()
    resize_to(fresh, small.state_dict())
    fresh.load_state_dict(small.state_dict())
    pickled = torch.load(tmp_path / "whole_module.pt", weights_only=False)
    for model in (small, copy.deepcopy(small), pickled, fresh):
        assert model[1].groups == 1
        assert model(IMAGES).shape == whole(IMAGES).shape
        resize_to(model, whole.state_dict())
        model.load_state_dict(whole.state_dict())
        assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (8, 8, 8)
        torch.testing.assert_close(model(IMAGES), whole(IMAGES))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_block_whose_weights_a_hook_computes_can_be_removed_and_come_back():
    model = nn.Sequential(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3))), nn.Linear(3, 2))
    x = torch.randn(2, 3)
    expected, state = model(x), copy.deepcopy(model.state_dict())  # the weight is part of a graph now
    model[0] = RemovedBlock(model[0])
    resize_to(model, state)
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


def test_removed_blocks_are_taken_out_and_put_back_by_a_state_dict():
    def blocks():
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))

    whole, short = blocks(), blocks()
    short[1] = RemovedBlock(short[1])
    x = torch.randn(2, 3)
    assert torch.equal(short(x), short[2](short[0](x)))
    assert not any(p.numel() for p in short[1].parameters())

    target = blocks()
    accept_other_shapes(target)
    target.load_state_dict(short.state_dict())
    assert torch.equal(target(x), short(x))
    target.load_state_dict(whole.state_dict())
    assert torch.equal(target(x), whole(x))
    with pytest.raises(RuntimeError, match="Missing key"):  # a state that simply lacks the block
        target.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("1.")})


def test_somebody_who_holds_on_to_the_graph_does_not_keep_the_old_shape() -> None:
    layer = nn.Linear(4, 6)
    held = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]  # as torch.compile does
    keep_indices(layer, {"weight": [[0, 2], None], "bias": [[0, 2]]})
    layer(torch.rand(3, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (2, 4)
    assert held is not None
