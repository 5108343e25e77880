"""Features of frozen layers that are kept: computed once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import TransferLearningCallback
from lightning_tips.transfer import FeatureCache, Phase, where_to_cache
from lightning_tips.transfer.fingerprints import fingerprints

from harness import STEPS_A_EPOCH, PlainData, PlainModule, assert_same, bits, every_step, fit

EPOCHS = 3


def tip(**arguments: Any) -> TransferLearningCallback:
    return TransferLearningCallback("head_only", check_inputs=False, **arguments)


class Around(PlainModule):
    """Any network, fed with digits; counts the samples that its first layer sees in training."""

    def __init__(self, network: nn.Module, size: int = 32) -> None:
        super().__init__()
        del self.features, self.head
        self.inner, self.size, self.seen = network, size, 0
        first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
        first.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.seen += len(args[0]) * torch.is_grad_enabled()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(F.interpolate(images, size=(self.size, self.size)).expand(-1, 3, -1, -1))


def trained(make: Callable[[], LightningModule], folder: Path, cached: bool, **more: Any) -> tuple[Any, Trainer]:
    torch.manual_seed(0)
    module = make()
    trainer = fit(tip(cache_features=cached), folder=folder, module=module, max_epochs=EPOCHS, **more)
    return module, trainer


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm-resnet": (lambda: timm.create_model("test_resnet", num_classes=10), 32),
    "timm-efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=10), 32),
    "timm-vit": (lambda: timm.create_model("test_vit", num_classes=10, img_size=32), 32),
    "timm-convnext": (lambda: timm.create_model("test_convnext", num_classes=10), 32),
    "tv-resnet": (lambda: torchvision.models.resnet18(num_classes=10), 32),
    "tv-mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 32),  # with dropout in the head
    "tv-squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=10), 32),  # its head is a convolution
    "tv-shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_backbone_sees_each_sample_once_and_the_result_is_the_same(name: str, tmp_path: Path) -> None:
    make, size = NETWORKS[name]
    plain, _ = trained(lambda: Around(make(), size), tmp_path, False, limit_val_batches=1)
    cached, _ = trained(lambda: Around(make(), size), tmp_path, True, limit_val_batches=1)
    assert plain.seen == STEPS_A_EPOCH * 32 * EPOCHS
    assert cached.seen == STEPS_A_EPOCH * 32
    state = cached.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, state[key], atol=1e-5), key
    assert "forward" not in vars(cached.inner)


def test_equal_to_the_bit_and_each_sample_once(tmp_path: Path) -> None:
    expected = bits(trained(PlainModule, tmp_path, False)[1])
    calls: list[int] = []

    def counted() -> PlainModule:
        module = PlainModule()
        count = lambda m, a: calls.append(len(a[0])) if torch.is_grad_enabled() else None  # noqa: E731
        module.features[0].register_forward_pre_hook(count)
        return module

    module, trainer = trained(counted, tmp_path, True)
    assert_same(bits(trainer), expected)
    assert calls == [32] * STEPS_A_EPOCH
    assert "forward" not in vars(module.features)


class DictModule(PlainModule):
    """Batches are dicts, the network is called by keyword, optimization is manual, dropout and norm are in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.Dropout(0.5), nn.Linear(768, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(input=images))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(F.cross_entropy(self(batch["pixels"]), batch["digit"]))
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["pixels"], batch["digit"]), batch_idx)


class DictData(PlainData):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"pixels": batch[0], "digit": batch[1]}


def test_dict_batches_manual_optimization_and_a_head_with_dropout(tmp_path: Path) -> None:
    expected = bits(trained(DictModule, tmp_path, False, data=DictData())[1])
    assert_same(bits(trained(DictModule, tmp_path, True, data=DictData())[1]), expected)


def test_resumed_from_every_step(tmp_path: Path) -> None:
    def run(**resume: Any) -> dict[str, Any]:
        transfer = TransferLearningCallback("lp_ft", phase_epochs=2, cache_features=True)
        return bits(fit(transfer, every_step(tmp_path / "kept"), folder=tmp_path, max_epochs=3, **resume))

    expected = run()
    for step in range(1, 3 * STEPS_A_EPOCH):
        assert_same(run(ckpt_path=tmp_path / "kept" / f"step-step={step}.ckpt"), expected, str(step))


def test_only_while_the_head_trains_alone(tmp_path: Path) -> None:
    phases = [Phase(epochs=2), Phase(["all"], name="all")]
    module = PlainModule()
    installed: list[bool] = []
    module.on_train_batch_start = lambda *_: installed.append("forward" in vars(module.features))  # type: ignore
    fit(TransferLearningCallback(phases, cache_features=True), folder=tmp_path, module=module, max_epochs=3)
    assert installed == [True] * 2 * STEPS_A_EPOCH + [False] * STEPS_A_EPOCH


# ---- where it cannot work


class Noisy(PlainModule):
    """Augments in its own training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(self.global_step))
        return F.cross_entropy(self(images + noise), labels)


class Averaged(PlainModule):
    """Other weights for each validation, as averaging of weights does it."""

    def on_validation_start(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.clone())


class Dropping(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.features.append(nn.Dropout(0.2))


class Aside(PlainModule):
    """Calls parts of its network, not the network."""

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.features:
            images = layer(images)
        return self.head(images.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Noisy, "the inputs are others in each epoch"),
        (Averaged, "something writes to the frozen weights"),
        (Dropping, "dropout, stochastic depth or noise"),
        (Aside, "nothing calls features"),
        (lambda: Around(torchvision.models.resnet18(num_classes=10)), ""),
        (lambda: Around(_Scaled()), "does more with the output of its head"),
    ],
    ids=["augmented", "averaged", "dropout", "aside", "control", "scaled"],
)
def test_gives_up_with_a_reason_and_trains_the_same(make: Any, message: str, tmp_path: Path, recwarn: Any) -> None:
    plain = bits(trained(make, tmp_path, False)[1])
    recwarn.clear()
    cached = bits(trained(make, tmp_path, True)[1])
    said = [str(w.message) for w in recwarn if "not cached" in str(w.message)]
    assert len(said) == bool(message)
    assert not message or message in said[0]
    assert_same(cached, plain)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(images)).mean((2, 3))) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": [Phase(["all"])]}, "each trains more than the head"),
        ({"batch_norm": "stats"}, "batch_norm='stats' changes them"),
    ],
)
def test_refused_before_the_first_step(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(TransferLearningCallback(cache_features=True, **arguments), folder=tmp_path, max_epochs=2)


def test_warns_that_one_epoch_gains_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="gains nothing in a phase of one epoch"):
        fit(TransferLearningCallback("lp_ft", cache_features=True), folder=tmp_path, max_epochs=2)
    with pytest.raises(ValueError, match="cache_gigabytes=0"):
        TransferLearningCallback(cache_gigabytes=0)


def test_what_does_not_fit_is_computed(tmp_path: Path) -> None:
    expected = bits(trained(PlainModule, tmp_path, False)[1])
    transfer = tip(cache_features=True, cache_gigabytes=50 * 12 * 64 * 4 / 2**30)
    with pytest.warns(UserWarning, match="50 samples' features, 0.146 MB are kept, and the rest is computed"):
        trainer = fit(transfer, folder=tmp_path, max_epochs=EPOCHS)
    assert_same(bits(trainer), expected)


# ---- without Lightning


def cache_of(module: nn.Module, **more: Any) -> tuple[FeatureCache, list[str]]:
    said: list[str] = []
    cache = FeatureCache(module, *where_to_cache(module), limit=more.pop("limit", 1e9), say=said.append, **more)
    cache.install()
    return cache, said


def frozen(network: nn.Module, head: nn.Module) -> nn.Module:
    network.requires_grad_(False).eval()
    head.requires_grad_(True)
    return network


def test_features_are_forgotten_when_weights_change() -> None:
    network: Any = torchvision.models.resnet18(num_classes=3)
    frozen(network, network.fc)
    cache, _ = cache_of(network)
    images = torch.rand(4, 3, 32, 32)
    first = network(images)
    assert torch.equal(first, network(images))
    assert cache.describe().startswith("4 samples")
    with torch.no_grad():
        network.conv1.weight.mul_(1.5)
    assert not torch.equal(first, network(images))
    cache.remove()
    assert torch.allclose(cache_free := network(images), network(images))
    assert cache_free.requires_grad


def test_new_samples_alone_are_computed_on_several_ranks() -> None:
    network: Any = torchvision.models.resnet18(num_classes=3)
    frozen(network, network.fc)
    seen: list[int] = []
    network.conv1.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    images = torch.rand(8, 3, 32, 32)
    expected = network(images[2:])
    cache, _ = cache_of(network, ranks=2)
    network(images[:6])
    seen.clear()
    assert torch.allclose(network(images[2:]), expected, atol=1e-5)
    assert seen == [2]
    assert cache.describe().startswith("8 samples")


def test_statistics_of_the_batch_are_noticed() -> None:
    network: Any = torchvision.models.resnet18(num_classes=3)
    frozen(network, network.fc).train()
    cache, said = cache_of(network)
    network(torch.rand(8, 3, 32, 32) * torch.arange(8).reshape(8, 1, 1, 1))
    assert "depends on the others in the batch" in cache.off
    assert len(said) == 1


def test_what_trains_is_noticed() -> None:
    network = torchvision.models.resnet18(num_classes=3).eval()
    cache, _ = cache_of(network)
    network(torch.rand(2, 3, 32, 32))
    assert "requires a gradient" in cache.off


def test_looking_does_not_draw_random_numbers_nor_move_the_statistics_of_the_head() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        network = _Whole(body, head)
        network.requires_grad_(False).train()
        head.requires_grad_(True)
        head[0].reset_running_stats()
        if cached:
            cache, _ = cache_of(network)
        torch.manual_seed(1)
        results.append((network(torch.rand(6, 3, 8, 8)), head[0].running_mean.clone()))
    assert_same(results[0], results[1])
    assert not cache.off


class _Whole(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 3, 1), body, head
        nn.init.ones_(self.stem.weight)
        nn.init.zeros_(self.stem.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_fingerprints_tell_every_bit_apart(dtype: torch.dtype) -> None:
    values = torch.zeros(3, 5, dtype=dtype)
    values[1, 3] = 1
    first, second, third = fingerprints((values,))
    assert first == third != second
    assert fingerprints((values[1:],)) == [second, third]
    assert fingerprints((values.reshape(3, 5, 1),))[0] != first
    assert fingerprints((values,), {"mask": None})[0] != first
    assert fingerprints((values,), {}, True)[0] != first


def test_fingerprints_of_what_is_no_batch() -> None:
    for args in ((), (3,), ([torch.zeros(2)],), (torch.zeros(2, 1), torch.zeros(3, 1)), (torch.zeros(()),)):
        with pytest.raises(ValueError, match="it is "):
            fingerprints(args)


def test_where_to_cache() -> None:
    beside = nn.ModuleDict({"body": timm.create_model("test_resnet", num_classes=0), "head": nn.Linear(8, 3)})
    assert where_to_cache(beside) == ("body", [])
    assert where_to_cache(timm.create_model("test_convnext")) == ("", ["head.fc", "head"])
    assert where_to_cache(nn.ModuleDict({"net": torchvision.models.vit_b_16()})) == (
        "net",
        ["net.heads.head", "net.heads"],
    )
