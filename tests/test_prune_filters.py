"""`prune_filters` and `plan_filters`: targets, scopes, what survives, and errors that leave the network untouched."""

import copy
import io

import pytest
import timm
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_tips
from lightning_tips.pruning import PruningPlan, count_cost, plan_filters, prune_filters
from lightning_tips.pruning.filters.plan import SCOPES
from lightning_tips.pruning.networks.copies import copy_network
from lightning_tips.pruning.networks.runs import call
from lightning_tips.pruning.tracing.graph import analyse
from lightning_tips.vision.networks import cifar_resnet

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(depth: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return cifar_resnet(depth)


def bits(model: nn.Module) -> list[object]:
    """All that must not change when nothing is pruned."""
    state = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    flags = [(p.requires_grad, p.stride(), id(p)) for p in model.parameters()]
    return [state, flags, [m.training for m in model.modules()], torch.get_rng_state()]


def same_bits(one: list[object], other: list[object]) -> bool:
    states = zip(one[0], other[0], strict=True)  # type: ignore[call-overload]
    return (
        all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in states)
        and one[1:3] == other[1:3]
        and torch.equal(one[3], other[3])  # type: ignore[arg-type]
    )


def test_it_is_a_name_of_the_package():
    assert lightning_tips.prune_filters is prune_filters


@pytest.mark.parametrize("scope", SCOPES)
def test_target_is_met_closely_in_every_scope(scope):
    model = network()
    before = count_cost(model, IMAGES)
    report = prune_filters(model, IMAGES, target={"macs": 0.5}, scope=scope)
    after = count_cost(model, IMAGES)
    assert after == report.plan.after  # counted independently
    assert before == report.plan.before
    assert 0.49 < after.macs / before.macs <= 0.5
    assert model(IMAGES).shape == (4, 10)
    assert model.head.out_features == 10
    assert min(b for _, b in report.plan.channels.values()) >= 2  # the floor


@pytest.mark.parametrize("name", ["parameters", "params", "filters"])
def test_other_targets(name):
    model = network()
    report = prune_filters(model, IMAGES, target={name: 0.6})
    assert 0.58 < report.ratios["parameters" if name == "params" else name] <= 0.6


def test_two_targets_are_both_met():
    ratios = prune_filters(network(), IMAGES, target={"macs": 0.6, "params": 0.4}).ratios
    assert ratios["macs"] <= 0.6
    assert ratios["parameters"] <= 0.4


def test_at_most_m_filters_go_and_the_lowest_ones():
    model = network()
    weakest = model.stages[2][0].conv1
    with torch.no_grad():
        weakest.weight[[5, 9]] *= 1e-3
    report = prune_filters(model, IMAGES, filters=3, scope="global_raw", inner_only=True)
    assert report.plan.before.filters - report.plan.after.filters == 3
    kept = report.plan.kept["stages.2.0.conv1.weight"][0]
    assert 5 not in kept
    assert 9 not in kept


def test_groups_are_those_of_torch_pruning_where_it_is_right():
    for make in (
        lambda: network(20),
        lambda: torchvision.models.mobilenet_v2(width_mult=0.35),
        lambda: timm.create_model("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    ):
        model = make()
        graph = torch_pruning.DependencyGraph().build_dependency(copy.deepcopy(model), example_inputs=(IMAGES[:1],))
        theirs = set()
        for group in graph.get_all_groups():
            layers = {
                graph._module2name[dep.target.module]
                for dep, _ in group
                if isinstance(dep.target.module, (nn.Conv2d, nn.Linear))
                and graph.is_out_channel_pruning_fn(dep.handler)
            }
            theirs.add(frozenset(layers))
        found = analyse(copy_network(model), IMAGES[:1], call, float("inf"))
        ours = {frozenset(group.layers) for group in found.groups}
        heads = {group for group in theirs if group & set(found.fixed)}
        assert ours == theirs - heads
        assert len(heads) == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_runs_in_inference_and_no_grad_contexts(mode):
    model = network()
    with mode():
        report = prune_filters(model, IMAGES, target={"macs": 0.5})
    assert report.ratios["macs"] <= 0.5
    model(IMAGES).sum().backward()  # and can be trained afterwards


def test_what_surrounds_the_weights_survives():
    model = network().to(memory_format=torch.channels_last)
    model.train()
    model.stages[0].eval()
    model.stem[0].weight.requires_grad_(False)
    model.register_buffer("mine", torch.arange(3.0))
    calls = []
    model.stages[1].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    calls.clear()
    identities = [id(p) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    report = prune_filters(model, IMAGES, target={"macs": 0.5}, optimizers=[optimizer])
    assert not calls  # the hook is not for trials
    assert [id(p) for p in model.parameters()] == identities
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(random_state, torch.get_rng_state())
    assert not model.stem[0].weight.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in model.modules() if _is_conv(m))
    assert model.mine.tolist() == [0, 1, 2]
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    model(IMAGES).sum().backward()
    assert calls == [1]
    optimizer.step()
    assert report.seconds > 0


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def test_half_precision_and_a_model_in_bfloat16():
    model = network().bfloat16()
    prune_filters(model, IMAGES.bfloat16(), target={"macs": 0.5})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_tied_weights_stay_tied_and_parametrizations_work():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
            self.b.weight = self.a.weight
            self.c = parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))).mean((2, 3)))

    model = Tied()
    report = prune_filters(model, IMAGES, target={"macs": 0.8})
    assert model.a.weight is model.b.weight
    assert report.plan.channels["a"] == report.plan.channels["b"]
    assert "c" in report.plan.channels
    assert model.c.weight.shape == (report.plan.channels["c"][1], report.plan.channels["a"][1], 3, 3)
    assert model(IMAGES).shape == (4, 5)


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_round_to_gives_multiples_and_does_not_overshoot(multiple):
    plain = prune_filters(network(20), IMAGES, target={"macs": 0.5}).ratios["macs"]
    report = prune_filters(network(20), IMAGES, target={"macs": 0.5}, round_to=multiple)
    assert all(after % multiple == 0 for _, after in report.plan.channels.values())
    assert plain - 0.06 < report.ratios["macs"] <= 0.5


def test_inner_channels_only_on_request_and_always_for_apoz():
    sums = {"stem.0", "stages.0.0.conv2", "stages.1.0.conv2", "stages.1.0.shortcut.0", "stages.2.0.conv2"}
    inner = plan_filters(network(), IMAGES, target={"macs": 0.7}, inner_only=True)
    batches = [(IMAGES, torch.zeros(4, dtype=torch.long))]
    apoz = plan_filters(network(), IMAGES, "apoz", target={"macs": 0.7}, batches=batches)
    for plan in (inner, apoz):
        assert not sums & set(plan.channels)
        assert all("inner_only" in plan.left_out[layer] for layer in sums)
    assert sums <= set(plan_filters(network(), IMAGES, target={"macs": 0.5}).channels)


def test_protected_layers_floor_and_limits():
    options = {"floor": 0.5, "limits": {"stages.2.*": 0.25}, "protect": ["stages.0"]}
    plan = plan_filters(network(), IMAGES, target={"macs": 0.8}, **options)
    assert not any(layer.startswith("stages.0") for layer in plan.channels)
    assert plan.left_out["stages.0.0.conv1"] == "is protected"
    assert "goes together with" in plan.left_out["stem.0"]
    for layer, (before, after) in plan.channels.items():
        assert after >= before * (0.75 if layer.startswith("stages.2") else 0.5)


def test_floors_hold_over_several_steps():
    model = network()
    cost = count_cost(model, IMAGES)
    channels = {name: layer.out_channels for name, layer in model.named_modules() if _is_conv(layer)}
    for share in (0.8, 0.6, 0.45):
        report = prune_filters(
            model, IMAGES, target={"macs": share}, floor=0.5, reference=cost, channels=channels, scope="global_raw"
        )
        assert share - 0.04 < report.plan.after.macs / cost.macs <= share
    assert all(layer.out_channels >= channels[n] / 2 for n, layer in model.named_modules() if _is_conv(layer))


def test_every_layer_is_either_pruned_or_named_with_a_reason():
    model = network(20)
    plan = plan_filters(model, IMAGES, target={"macs": 0.95}, scope="global_raw")
    layers = {name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert set(plan.channels) | set(plan.left_out) == layers
    assert not set(plan.channels) & set(plan.left_out)
    assert "none of its channels are among the lowest" in plan.left_out.values()


def test_plan_is_plain_data():
    model = network()
    plan = plan_filters(model, IMAGES, target={"macs": 0.5})
    file = io.BytesIO()
    torch.save(plan.to_dict(), file)
    file.seek(0)
    again = PruningPlan.from_dict(torch.load(file, weights_only=True))
    assert again.to_dict() == plan.to_dict()
    assert plan.kept["head.weight"][0] is None
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), network().parameters(), strict=True))


def _late(model: nn.Module, inputs: object) -> Tensor:
    raise RuntimeError("no such input")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"macs": 0.001}}, r"cannot be reached: one gets to 0\.0"),
        ({"target": {"macs": 0.5}, "reference": 10**12}, "is met already"),
        ({"target": {"macs": 1.5}}, "between 0 and 1"),
        ({"target": {"mac": 0.5}}, "Did you mean 'macs'"),
        ({"target": {}}, "empty"),
        ({}, "either target"),
        ({"target": {"macs": 0.5}, "filters": 3}, "either target"),
        ({"target": {"macs": 0.5}, "scope": "locl"}, "Unknown scope"),
        ({"target": {"macs": 0.5}, "protect": ["stages.0.0.conv9"]}, "Did you mean 'stages.0.0.conv"),
        ({"target": {"macs": 0.5}, "limits": {"nothing*": 0.1}}, "is no layer"),
        ({"target": {"macs": 0.5}, "criterion": "taylor"}, "looks at data"),
        ({"target": {"macs": 0.5}, "criterion": "l7"}, "Unknown criterion"),
        ({"target": {"macs": 0.5}, "protect": ["*"]}, "Nothing in the network can be pruned"),
        ({"target": {"macs": 0.5}, "forward": _late}, "cannot be run on the example inputs"),
        ({"target": {"macs": 0.5}, "time_limit": 0.0}, "time limit"),
        ({"target": {"macs": 0.5}, "floor": 1.0}, "floor"),
        ({"target": {"macs": 0.5}, "round_to": 0}, "round_to"),
    ],
)
def test_bad_input_is_an_error_and_nothing_changes(options, message):
    model = network()
    model.stages[0].eval()
    if "reference" in options:
        options = options | {"reference": type(count_cost(model, IMAGES))(10**12, 1, 1)}
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        prune_filters(model, IMAGES, **options)
    assert same_bits(before, bits(model))


def test_networks_that_cannot_be_pruned():
    with pytest.raises(ValueError, match="no convolution"):
        prune_filters(nn.Linear(4, 4), torch.randn(1, 4), target={"macs": 0.5})
    with pytest.raises(ValueError, match=r"can be pruned; it is untouched(.|\n)*feeds the output"):
        prune_filters(nn.Conv2d(3, 8, 3), IMAGES, target={"macs": 0.5})


def test_layers_outside_of_the_forward_pass_are_named():
    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
            self.spare = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    plan = plan_filters(WithSpare(), IMAGES, target={"macs": 0.5})
    assert plan.left_out["spare"] == "is not reached by the forward pass"


def test_report_is_a_table_and_plain_data():
    report = prune_filters(network(), IMAGES, target={"macs": 0.5})
    text = str(report)
    assert "stages.2.0.conv1" in text
    assert "macs" in text
    assert "head: feeds the output of the network" in text
    assert report.to_dict()["ratios"]["macs"] <= 0.5
