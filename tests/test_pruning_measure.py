"""What a network costs, its BatchNorm statistics, its sensitivity, and learning from a teacher."""

import copy
import functools
import json
import math
import time

import matplotlib.image
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from lightning_tips.core import keep_indices
from lightning_tips.pruning import (
    SensitivityTable,
    count_cost,
    distillation_loss,
    measure_latencies,
    measure_latency,
    model_size,
    peak_memory,
    reestimate_batch_norm,
    sensitivity,
)

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(12, 3, 6, 6, generator=GENERATOR) * 3 + 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


# Statistics


def test_statistics_are_those_of_all_values_together():
    model = network()
    names = reestimate_batch_norm(model, IMAGES.split([5, 5, 2]))
    assert names == ["1", "5"]
    values = model[0](IMAGES).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, values.mean(1))
    torch.testing.assert_close(model[1].running_var, values.var(1))
    assert model[1].num_batches_tracked == 3
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)

    # What torch's own gives is not that: a short batch counts like a full one.
    other = network()
    update_bn(IMAGES.split([5, 5, 2]), other)
    assert not torch.allclose(other[1].running_var, values.var(1), rtol=1e-3)


def test_a_mean_far_from_zero_loses_no_variance():
    model = nn.Sequential(nn.BatchNorm1d(1))
    data = torch.randn(64, 1, generator=torch.Generator().manual_seed(1)) + 1e3
    reestimate_batch_norm(model, data.split(16))
    torch.testing.assert_close(model[0].running_var, data.double().var(0).float(), rtol=1e-4, atol=0)


def test_later_statistics_see_what_training_would_show_them_without_dropout():
    model = network()
    reestimate_batch_norm(model, [IMAGES])
    hidden = functional.relu(functional.batch_norm(model[0](IMAGES), None, None, *model[1].parameters(), training=True))
    values = model[4](hidden).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[5].running_mean, values.mean(1))


def test_two_ranks_together_are_one_with_all_batches():
    parts: list[torch.Tensor] = []
    batches = IMAGES.split([5, 5, 2])
    for share in (batches[:1], batches[1:]):
        reestimate_batch_norm(network(), share, reduce=lambda t: (parts.append(t.clone()), t)[1])
    one, both = network(), network()
    reestimate_batch_norm(one, batches)
    reestimate_batch_norm(both, batches[:1], reduce=lambda _: parts[0] + parts[1])
    for a, b in zip(one.buffers(), both.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_only_statistics_change(context):
    model = network().train()
    model.register_buffer("calls", torch.zeros(1))
    model.register_forward_hook(lambda module, *_: module.calls.add_(1) and None)
    model(IMAGES).sum().backward()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    gradients, hooks = [p.grad.clone() for p in model.parameters()], len(model[1]._forward_pre_hooks)
    state, buffers = torch.get_rng_state(), [id(b) for b in model.buffers()]
    with context():
        reestimate_batch_norm(model, [IMAGES])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert buffers == [id(b) for b in model.buffers()]
    assert hooks == len(model[1]._forward_pre_hooks)


def test_frozen_layers_are_left_alone():
    model = network().train()
    model[1].eval()
    assert reestimate_batch_norm(model, [IMAGES]) == ["5"]
    assert reestimate_batch_norm(model, [IMAGES], include_frozen=True) == ["1", "5"]
    assert not model[1].training
    assert reestimate_batch_norm(model.eval(), [IMAGES]) == ["1", "5"]  # nobody can tell
    assert reestimate_batch_norm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), [IMAGES]) == []


def test_a_batch_with_one_value_for_a_channel_is_skipped():
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    data = IMAGES[:, :, 0, 0]
    reestimate_batch_norm(model, [data[8:9], data[:8]])
    reestimate_batch_norm(other, [data[:8]])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    with pytest.raises(ValueError, match="No batch"):
        reestimate_batch_norm(model, [data[:1]])


def test_nan_changes_no_statistics():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="The inputs of 1 are not finite"):
        reestimate_batch_norm(model, [IMAGES, IMAGES * float("nan")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Cost


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), 2 * 25 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), (1, 4, 5, 5), 9 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 9 * 4 * 9),
        (nn.Conv1d(4, 6, 3), (1, 4, 5), 3 * 6 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 4),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 2 * 3 * 7 * 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operations_by_hand(layer, shape, macs, context):
    with context():
        assert count_cost(layer, torch.randn(shape)).macs == macs


def test_functional_calls_and_attention_count():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x, scale):
            x = functional.conv2d(x, self.kernel, padding=1) * scale
            x = x.flatten(2).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    tokens = 16
    projections, products = 4 * tokens * 6 * 6, 2 * tokens * tokens * 6
    expected = tokens * 6 * 4 * 9 + projections + products
    model = Functional().train()
    cost = count_cost(model, (torch.randn(1, 4, 4, 4), torch.ones(1)))
    assert cost.macs == expected
    assert cost == count_cost(model, {"x": torch.randn(1, 4, 4, 4), "scale": torch.ones(1)})
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.training


def test_parameters_and_filters():
    model = network()
    model.again = model[9]  # tied
    cost = count_cost(model[:10], IMAGES)
    assert cost.filters == 14
    assert cost.parameters == sum(p.numel() for p in model[:10].parameters())
    assert json.loads(json.dumps(cost.to_dict())) == cost.to_dict()


def test_size_is_that_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200), nn.BatchNorm1d(200))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert model_size(model) == pytest.approx((tmp_path / "weights.pt").stat().st_size, rel=0.05)


def test_peak_memory_grows_with_the_batch_and_holds_the_outputs():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU())
    small, large = (peak_memory(model, torch.randn(n, 3, 32, 32)) for n in (2, 16))
    assert large >= 2 * 16 * 64 * 32 * 32 * 4  # before and after the ReLU
    assert 4 < large / small < 12


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.modes = seconds, []

    def forward(self, x):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        time.sleep(self.seconds)
        return x


def test_latency_of_two_networks_in_turns():
    slow, quick = Sleeper(0.01), Sleeper(0.002)
    one, two = measure_latencies([slow, quick], torch.ones(3, 1), repeats=5, warmup=1)
    assert 0.01 <= one.quartiles[0] <= one.median <= one.quartiles[1]
    assert 0.002 <= two.median < one.median
    assert (one.batch_size, one.device, one.repeats) == (3, "cpu", 5)
    assert slow.modes == [(False, True)] * 6
    assert slow.training
    assert json.loads(json.dumps(one.to_dict()))["quartiles"] == list(one.quartiles)
    assert measure_latency(quick, {"x": torch.ones(2, 1)}, repeats=1, warmup=0).batch_size == 2
    with pytest.raises(ValueError, match="repeats"):
        measure_latency(quick, torch.ones(1), repeats=0)


# Sensitivity


def planted() -> nn.Sequential:
    """Half of the first layer's filters have no part in the output, and little norm; all of the second's have."""
    model = network().eval()
    with torch.no_grad():
        model[0].weight[[1, 3, 4, 6]] *= 0.01
        model[4].weight[:, [1, 3, 4, 6]] = 0
    return model


def test_what_has_no_part_can_go():
    model = planted()
    reference = model(IMAGES)
    before = copy.deepcopy(model.state_dict())
    table = sensitivity(
        model,
        IMAGES,
        lambda m: -float(functional.mse_loss(m(IMAGES), reference)),
        shares=(0.75, 0.25, 0.5),
    )
    assert table.shares == (0.25, 0.5, 0.75)
    assert table.base == 0
    assert table.scores["0"][:2] == (0, 0)
    assert table.scores["0"][2] < 0
    assert table.scores["4"][0] < 0
    assert table.channels == {"0": 8, "4": 6}
    limits = table.limits(-table.scores["0"][2] / 2)
    assert limits["0"] == pytest.approx(0.625)
    assert limits["4"] < 0.625
    assert table.limits(math.inf) == {"0": 0.75, "4": 0.75}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_taking_away_is_what_a_cut_does():
    model = network().eval()
    nn.init.constant_(model[1].bias, 0.5)  # what a BatchNorm makes of zeros
    reestimate_batch_norm(model, [IMAGES])
    seen = []
    batches = iter(IMAGES.split([7, 5]))  # kept as a list
    table = sensitivity(
        model, IMAGES, lambda m: float(seen.append(m(IMAGES)) or 0.0), shares=(0.5,), layers=["0"], batches=batches
    )
    assert table.base == 0
    kept = sorted(model[0].weight.detach().abs().sum((1, 2, 3)).argsort(stable=True)[4:].tolist())
    cut = copy.deepcopy(model)
    rows = {name: [kept] for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")}
    keep_indices(cut, {**rows, "0.weight": [kept, None, None, None], "4.weight": [None, kept, None, None]})
    reestimate_batch_norm(cut, IMAGES.split([7, 5]))
    torch.testing.assert_close(seen[1], cut(IMAGES))
    assert not torch.allclose(seen[0], seen[1])


class WithGivenOptimizer(LightningModule):
    """Holds what LightningCLI gives it for an optimizer: nothing that a deepcopy can copy."""

    def __init__(self):
        super().__init__()
        numbers = (i for i in range(3))
        self.network, self.optimizer = network(), functools.partial(lambda _, parameters: None, numbers)

    def forward(self, x):
        return self.network(x)


def test_a_lightning_module_may_hold_what_cannot_be_copied():
    table = sensitivity(WithGivenOptimizer(), IMAGES, lambda m: float(m(IMAGES).mean()), shares=(0.5,))
    assert table.channels == {"network.0": 8, "network.4": 6}


def test_a_table_is_plain_data_and_a_picture(tmp_path):
    table = SensitivityTable(0.9, (0.25, 0.5), {"a": (0.88, 0.5), "b": (0.95, float("nan"))}, {"a": 8, "b": 4})
    again = SensitivityTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.drops()["a"] == table.drops()["a"] == (pytest.approx(0.02), pytest.approx(0.4))
    limits = table.limits(0.02 + 1e-9)
    assert limits["a"] == pytest.approx(0.25)
    assert limits["b"] == 0.25  # what is not a number is too much
    lower_is_better = SensitivityTable(1.0, (0.5,), {"a": (3.0,)}, mode="min")
    assert lower_is_better.limits(1.0) == {"a": pytest.approx(0.25)}
    table.plot(tmp_path / "sensitivity.png")
    assert matplotlib.image.imread(tmp_path / "sensitivity.png").std() > 0.01
    with pytest.raises(ValueError, match="max_drop"):
        table.limits(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": (0.5, 1.0)}, "between 0 and 1"),
        ({"mode": "most"}, "'max' or 'min'"),
        ({"criterion": "apoz"}, "looks at data"),
        ({"layers": ["nope"]}, "no layer 'nope'"),
    ],
)
def test_bad_input_of_sensitivity(arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(network(), IMAGES, lambda m: 0.0, **arguments)
    with pytest.raises(ValueError, match="no convolution"):
        sensitivity(nn.Linear(2, 2), torch.ones(1, 2), lambda m: 0.0)


# Distillation


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR) * 3


def test_divergence_by_hand():
    student, teacher = logits(5, 4).requires_grad_(), logits(5, 4).requires_grad_()
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    loss = distillation_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, 2 * (q - p).detach() / 5)


def test_gradients_at_a_high_temperature_match_logits():
    # Hinton et al. 2015, equations 3 and 4: (z - v) / C for logits of mean 0, whatever the temperature.
    student, teacher = logits(1, 4), logits(1, 4)
    student, teacher = (student - student.mean()).requires_grad_(), teacher - teacher.mean()
    distillation_loss(student, teacher, temperature=1e3).backward()
    torch.testing.assert_close(student.grad, ((student - teacher) / 4).detach(), rtol=1e-2, atol=1e-3)


def test_a_label_is_a_choice_of_two():
    student, teacher = logits(6, 3), logits(6, 3)
    pairs = [torch.stack([x, torch.zeros_like(x)], -1).flatten(0, 1) for x in (student, teacher)]
    expected = distillation_loss(*pairs, temperature=3.0)
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0, "multilabel"), expected)
    far = torch.full((2, 2), 200.0)
    assert torch.isfinite(distillation_loss(far, -far, 1.0, "multilabel"))


def test_dense_outputs_and_regression():
    student, teacher = logits(2, 4, 3, 3), logits(2, 4, 3, 3)
    flat = [x.movedim(1, -1).flatten(0, 2) for x in (student, teacher)]
    torch.testing.assert_close(distillation_loss(student, teacher), distillation_loss(*flat))
    torch.testing.assert_close(
        distillation_loss(student, teacher, task="regression"), (student - teacher).pow(2).mean()
    )
    for task in ("multiclass", "multilabel", "regression"):
        assert distillation_loss(student, student.clone(), task=task).abs() < 1e-6
    assert distillation_loss(student.half(), teacher.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), "student"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, "ranking"), "Unknown task"),
    ],
)
def test_bad_input_of_distillation(arguments, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*arguments)
