"""Residual blocks: found by what they compute, ranked, taken out; bare torch objects."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_tips.core import RemovedBlock, accept_other_shapes
from lightning_tips.pruning import find_blocks, rank_blocks, remove_blocks
from lightning_tips.vision import cifar_resnet

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """``activation(x + f(x))``, as anybody would write it."""

    def __init__(self, width=6, activation=None):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.activation = activation

    def forward(self, x):
        x = x + self.branch(x)
        return x if self.activation is None else self.activation(x)


class Handmade(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.ModuleList([Residual(activation=activation) for _ in range(3)])
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def small_resnet(width=4):
    torch.manual_seed(0)
    return cifar_resnet(14, width=width)


def removable(model, x=X):
    return [block.name for block in find_blocks(model, x) if block.removable]


def same_state(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())


# ------------------------------------------------------------------------------------------------------------ finding


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: cifar_resnet(20, width=4), ["stages.0.0", "stages.0.1", "stages.0.2", "stages.1.1"]),
        (lambda: torchvision.models.resnet18(num_classes=4), ["layer1.0", "layer1.1", "layer2.1"]),
        (lambda: torchvision.models.mobilenet_v2(width_mult=0.35), ["features.3", "features.5", "features.6"]),
        (lambda: timm.create_model("test_resnet"), ["layer1.0"]),
        (lambda: timm.create_model("test_convnext"), ["stages.0.blocks.0", "stages.1.blocks.0"]),
        (lambda: timm.create_model("efficientnet_lite0"), ["blocks.1.1", "blocks.2.1"]),
        (Handmade, ["blocks.0", "blocks.1", "blocks.2"]),
    ],
    ids=["ours", "torchvision resnet", "mobilenet", "timm resnet", "convnext", "mbconv", "by hand"],
)
def test_blocks_are_found_whatever_they_are_called(make, expected):
    model = make()
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    found = find_blocks(model, x)
    names = [block.name for block in found if block.removable]
    assert set(expected) <= set(names)
    assert model.training
    assert same_state(model, state)
    for block in found:
        assert block.removable or "changes the shape" in block.reason
    report = remove_blocks(model, x, names)
    assert report.after.macs < report.before.macs
    assert model.eval()(x).isfinite().all()


def test_attention_blocks_are_found():
    model = timm.create_model("test_vit")
    assert removable(model, torch.randn(2, 3, 160, 160)) == [f"blocks.{i}" for i in range(6)]


def test_without_its_branch_a_block_is_what_stands_in_its_place():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    silent = copy.deepcopy(model)
    nn.init.zeros_(silent.layer1[0].bn2.weight)
    nn.init.zeros_(silent.layer1[0].bn2.bias)
    remove_blocks(model, X, ["layer1.0"])
    assert torch.equal(model(X), silent(X))


@pytest.mark.parametrize(
    ("activation", "stays"),
    [
        (None, ""),
        (nn.ReLU(inplace=True), "relu"),
        (torch.nn.functional.silu, "silu"),
        (nn.LeakyReLU(0.3), ".activation"),
    ],
    ids=["none", "relu", "silu", "leaky"],
)
def test_the_activation_after_the_addition_stays_where_it_does_something(activation, stays):
    model = Handmade(activation).eval()
    silent = copy.deepcopy(model)
    for parameter in silent.blocks[0].branch[1].parameters():
        nn.init.zeros_(parameter)
    blocks = {block.name: block.activation for block in find_blocks(model, X)}
    # The stem gives both signs; after the first ReLU another one does nothing.
    assert blocks["blocks.0"] == stays
    assert blocks["blocks.1"] == ("" if stays == "relu" else stays)
    remove_blocks(model, X, ["blocks.0"])
    stem = model.stem(X)
    before = stem.clone()
    torch.testing.assert_close(model(X), silent(X))
    model.blocks[0](stem)
    assert torch.equal(stem, before)  # also an activation in place leaves its input alone

    target = Handmade(activation)
    accept_other_shapes(target)
    target.load_state_dict(model.state_dict())
    assert target.blocks[0].activation == stays
    assert torch.equal(target.eval()(X), model(X))


def test_what_only_looks_like_a_block_is_none():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.conv(x))

    model = nn.Sequential(nn.Conv2d(3, 6, 1), Gate(), nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), nn.PReLU(6))
    assert find_blocks(model, X) == []
    assert find_blocks(cifar_resnet(8, width=4, skips=False), X) == []


def test_weight_normalisation_and_stochastic_depth_are_no_hindrance():
    model = Handmade()
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.branch[0])
    assert len(removable(model)) == 3
    model = torchvision.models.convnext_tiny(stochastic_depth_prob=0.9, num_classes=2)
    del model.features[3:]
    model.classifier = nn.Flatten()
    report = remove_blocks(model, torch.randn(2, 3, 16, 16), ["features.1.0"])
    assert list(report.removed) == ["features.1.0"]
    assert isinstance(model.features[1][0], RemovedBlock)


# ----------------------------------------------------------------------------------------------------- what has to stay


def test_shared_and_tied_blocks_are_refused_with_the_reason():
    model = Handmade()
    model.blocks[1] = model.blocks[0]
    reasons = {block.name: block.reason for block in find_blocks(model, X)}
    assert reasons == {"blocks.0": "it runs 2 times in one pass", "blocks.2": ""}

    model = Handmade()
    model.blocks[1].branch[0].weight = model.blocks[0].branch[0].weight
    reasons = {block.name: block.reason for block in find_blocks(model, X)}
    assert reasons["blocks.0"] == "it shares a tensor with blocks.1.branch.0.weight"
    with pytest.raises(ValueError, match=r"blocks\.0 cannot be taken out: it shares a tensor"):
        remove_blocks(model, X, ["blocks.0"])

    model = Handmade()
    model.also = model.blocks[1]
    assert "shared, under the names blocks.1, also" in {b.name: b.reason for b in find_blocks(model, X)}["blocks.1"]


def test_a_block_whose_inside_others_read_stays():
    class Nosy(Handmade):
        def forward(self, x):
            return super().forward(x) + self.blocks[1].branch[0].weight.sum()

    reasons = {block.name: block.reason for block in find_blocks(Nosy(), X)}
    assert reasons["blocks.0"] == reasons["blocks.2"] == ""
    assert reasons["blocks.1"].startswith("the network fails without it: AttributeError")


def test_nothing_to_take_out_is_said_and_nothing_changes():
    plain = cifar_resnet(8, width=4, skips=False)
    state = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match=r"CifarResNet has no residual block.*x \+ f\(x\).*prune_filters"):
        remove_blocks(plain, X, count=1)
    assert same_state(plain, state)


def test_bad_wishes_are_refused_and_leave_the_network_untouched():
    model = small_resnet()
    state = copy.deepcopy(model.state_dict())
    batches = [X]
    for arguments, message in [
        ({}, "by their names in blocks"),
        ({"count": 1, "blocks": ["stages.0.0"]}, "by their names in blocks"),
        ({"blocks": ["stages.0.7"]}, r"no residual block 'stages\.0\.7'.*stages\.0\."),
        ({"blocks": ["stages.1.0"]}, r"stages\.1\.0 cannot be taken out: it changes the shape from \(4, 16, 16\)"),
        ({"blocks": ["stages.0.0"], "protect": ["stages.0.*"]}, "protected"),
        ({"count": 9, "criterion": "outputs", "batches": batches}, "only 4 blocks can be taken out"),
        ({"count": 1}, "needs evaluate"),
        ({"count": 1, "evaluate": lambda _: 0.0}, "pass training batches"),
        ({"count": 1, "criterion": "branch_norm"}, "pass batches"),
        ({"count": 1, "criterion": "metrics"}, "no criterion 'metrics'"),
        ({"target": {"filters": 0.5}}, "target has no 'filters'"),
        ({"target": {"macs": 0.05}, "criterion": "outputs", "batches": batches}, "out of reach: macs"),
        ({"target": {"macs": 1e12}, "criterion": "outputs", "batches": batches}, "met already: macs"),
    ]:
        with pytest.raises(ValueError, match=message):
            remove_blocks(model, X, **arguments)
    with pytest.raises(TypeError, match=r"\['stages\.0\.0'\]"):
        remove_blocks(model, X, "stages.0.0")
    assert same_state(model, state)


# ------------------------------------------------------------------------------------------------- ranking and removing


def muted(factor):
    """A network in which the second block hardly does anything."""
    model = small_resnet()
    with torch.no_grad():
        model.stages[0][1].bn2.weight.mul_(factor)
    return model


@pytest.mark.parametrize("criterion", ["metric", "outputs", "branch_norm"])
def test_the_block_that_does_least_is_ranked_lowest(criterion):
    model = muted(0.001)
    with torch.no_grad():
        target = copy.deepcopy(model).eval()(X)
    state = copy.deepcopy(model.state_dict())

    def evaluate(network):
        assert not network.training
        return -float((network(X) - target).square().mean())

    scores = rank_blocks(model, find_blocks(model, X), criterion, evaluate=evaluate, batches=[X], recalibrate=False)
    assert min(scores, key=scores.get) == "stages.0.1"
    assert scores.keys() == {"stages.0.0", "stages.0.1", "stages.1.1", "stages.2.1"}
    assert same_state(model, state)
    if criterion == "metric":
        worse = rank_blocks(
            model, find_blocks(model, X), evaluate=lambda n: -evaluate(n), mode="min", recalibrate=False
        )
        assert worse == scores


def test_until_a_target_is_met_and_statistics_are_those_of_what_is_left():
    model = muted(0.001)
    report = remove_blocks(model, X, target={"macs": 0.8}, criterion="outputs", batches=[X])
    assert next(iter(report.removed)) == "stages.0.1"
    assert report.ratios["macs"] <= 0.8
    assert "stages.0.1" in str(report)
    assert report.to_dict()["before"]["macs"] == report.before.macs
    seen = []
    model.stages[1][0].bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.train()(X)
    model = muted(0.001)
    remove_blocks(model, X, list(report.removed), batches=[X])
    torch.testing.assert_close(model.stages[1][0].bn1.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_removed_parameters_leave_the_optimizers_and_the_others_keep_their_momentum(named):
    model = small_resnet()
    gone = list(model.stages[0][1].parameters())
    named = named and torch.__version__ >= "2.6"
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    groups = [{"params": rest if named else [p for _, p in rest]}]
    head = list(model.head.named_parameters()) if named else list(model.head.parameters())
    optimizer = torch.optim.Adam([*groups, {"params": head, "lr": 0.1}])
    model(X).square().sum().backward()
    optimizer.step()
    kept = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    remove_blocks(model, X, ["stages.0.1"], optimizers=[optimizer])
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert not any(p in optimizer.state for p in gone)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], kept[id(p)]) for p in held)
    if named:
        assert len(optimizer.param_groups[0]["param_names"]) == len(optimizer.param_groups[0]["params"])
    model(X).square().sum().backward()
    optimizer.step()
    fresh = torch.optim.Adam(
        [{"params": rest}, {"params": head}] if named else [{"params": held[:-2]}, {"params": head}]
    )
    if not named:
        fresh.load_state_dict(optimizer.state_dict())  # as in a resumed run

    lone = torch.optim.SGD(model.stages[0][0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD holds parameters of the removed blocks only"):
        remove_blocks(model, X, ["stages.0.0"], optimizers=[lone])
    assert not isinstance(model.stages[0][0], RemovedBlock)


def test_the_network_learns_without_its_blocks_and_flags_survive():
    # Width 8: in channels_last, the backward pass of a 1x1 convolution of stride 2 with fewer inputs writes where it
    # must not, in torch 2.14 on CPUs with AVX2, whoever calls it.
    model = small_resnet(width=8).to(memory_format=torch.channels_last)
    model.head.bias.requires_grad_(False)
    model.stages[1].eval()
    remove_blocks(model, X, ["stages.0.0", "stages.1.1"])
    assert not model.head.bias.requires_grad
    assert [stage.training for stage in model.stages] == [True, False, True]
    assert model.stages[2][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_it_works_in_inference_mode_and_twice():
    model = small_resnet()
    with torch.inference_mode():
        remove_blocks(model, X, ["stages.0.0"])
    remove_blocks(model, X, ["stages.0.1"])
    assert removable(model) == ["stages.1.1", "stages.2.1"]


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_states_of_shortened_networks_load_into_whole_ones_and_back(tmp_path):
    short, whole = small_resnet(), small_resnet()
    remove_blocks(short, X, ["stages.0.1", "stages.2.1"])
    torch.save(short.state_dict(), tmp_path / "short.pt")
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    target = small_resnet().eval()
    accept_other_shapes(target)
    for name, source in [("short", short), ("whole", whole), ("short", short)]:
        target.load_state_dict(torch.load(tmp_path / f"{name}.pt", weights_only=True))
        assert torch.equal(target(X), source.eval()(X))


def test_buffers_that_no_state_holds_come_back_with_their_block():
    class WithTable(Residual):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(6.0), persistent=False)

        def forward(self, x):
            return x + self.branch(x) * self.table[:, None, None]

    model = Handmade()
    model.blocks[1] = WithTable()
    whole = copy.deepcopy(model).eval()
    remove_blocks(model, X, ["blocks.1"])
    accept_other_shapes(model)
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model.eval()(X), whole(X))


def test_a_shortened_network_can_be_exported_and_copied():
    model = Handmade(nn.SiLU()).eval()
    remove_blocks(model, X, ["blocks.1"])
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
