"""The layers of a network and its head, the inputs that its weights expect, and new classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_tips import TransferLearningCallback
from lightning_tips.transfer import (
    InputExpectation,
    check_images,
    find_head,
    layer_groups,
    load_with_new_classes,
    match_parameters,
    set_trainable,
)

from harness import PlainModule, fit


class Holder(LightningModule):
    """Keeps a network under a name that nobody would guess."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.quux = network


# ---- layers


@pytest.mark.parametrize(
    ("make", "head", "some"),
    [
        (lambda: timm.create_model("resnet18"), "fc", ["conv1", "layer1", "layer2", "layer3", "layer4", "head"]),
        (lambda: timm.create_model("tf_efficientnet_lite0"), "classifier", ["conv_stem", "blocks.1", "blocks.6"]),
        (lambda: timm.create_model("test_vit"), "head", ["blocks.0", "blocks.5", "head"]),
        (lambda: timm.create_model("test_convnext"), "head.fc", ["stem.0", "stages.0", "stages.3", "head"]),
        (torchvision.models.resnet18, "fc", ["conv1", "layer1", "layer2", "layer3", "layer4", "head"]),
        (torchvision.models.mobilenet_v3_small, "classifier.3", ["features.0", "features.12", "classifier.0", "head"]),
        (torchvision.models.squeezenet1_1, "classifier.1", ["features.0", "features.12", "head"]),
        (torchvision.models.regnet_y_400mf, "fc", ["stem", "trunk_output.block1", "head"]),
    ],
    ids=["resnet", "lite0", "vit", "convnext", "tv-resnet", "tv-mobilenet", "tv-squeezenet", "tv-regnet"],
)
def test_layers_of_a_network_in_a_module(make: Callable[[], nn.Module], head: str, some: list[str]) -> None:
    module = Holder(make())
    groups = layer_groups(module)
    names = [group.name for group in groups]
    assert [name for name in names if name in some] == some  # in this order
    assert names[-1] == "head"
    assert len(set(names)) == len(names)
    assert find_head(module) == [f"quux.{head}"]
    parameters = [name for group in groups for name in group.parameters]
    assert sorted(parameters) == sorted(name for name, _ in module.named_parameters())
    buffered = {n for n, m in module.named_modules() if list(m.buffers(recurse=False))}
    assert buffered <= {name for group in groups for name in group.modules}


def test_head_beside_a_network_without_one() -> None:
    module = LightningModule()
    module.backbone = timm.create_model("test_resnet", num_classes=0)
    module.mine = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    assert find_head(module) == ["mine"]
    assert find_head(module, backbone="back*") == ["mine"]
    assert next(iter(layer_groups(module))).name.startswith("backbone.")
    assert find_head(module, head="mine.2") == ["mine.2"]
    assert [g.name for g in layer_groups(module, head="mine.2")][-2:] == ["mine.0", "head"]


def test_frozen_teacher_beside_the_network_is_no_head() -> None:
    module = nn.ModuleDict({"student": timm.create_model("test_resnet"), "teacher": timm.create_model("test_resnet")})
    module["teacher"].requires_grad_(False)
    assert find_head(module, backbone="student") == ["student.fc"]


def test_tied_weights_belong_to_the_head() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    module["head"].weight = module["embedding"].weight
    groups = {group.name: group.parameters for group in layer_groups(module)}
    assert groups == {"body": ("body.weight", "body.bias"), "head": ("embedding.weight", "head.bias")}
    set_trainable(module, groups["head"])
    assert module["head"].weight.requires_grad
    assert not module["body"].weight.requires_grad


def test_patterns() -> None:
    module = Holder(timm.create_model("test_resnet"))
    groups = layer_groups(module)
    assert match_parameters(groups, ["head"], "quux") == ["quux.fc.weight", "quux.fc.bias"]
    assert match_parameters(groups, ["quux.fc.bias"], "quux") == ["quux.fc.bias"]
    assert len(match_parameters(groups, ["all"])) == len(list(module.parameters()))
    assert all(name.startswith("quux.layer2.") for name in match_parameters(groups, ["layer2"], "quux"))
    assert match_parameters(groups, ["*.bn1"], "quux")
    convnext = Holder(timm.create_model("test_convnext"))  # in its `head` is a norm, which is none of the head
    assert match_parameters(layer_groups(convnext), ["head"], "quux") == ["quux.head.fc.weight", "quux.head.fc.bias"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "quuxx"}, "Did you mean 'quux'"),
        ({"head": "quux.fd"}, "Did you mean 'quux.fc'"),
        ({"head": "quux"}, "no layers with weights beside its head"),
    ],
)
def test_unknown_parts(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_groups(Holder(timm.create_model("test_resnet")), **arguments)


def test_single_layer_has_no_head() -> None:
    with pytest.raises(ValueError, match="no layers with weights"):
        layer_groups(Holder(nn.Linear(2, 2)))


# ---- inputs


IMAGENET = InputExpectation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224))
HALF = InputExpectation((0.5,) * 3, (0.5,) * 3, (224, 224))


def images(mean: Any, std: Any, size: int = 224) -> Tensor:
    raw = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return (raw - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)


def test_right_inputs_are_passed() -> None:
    assert check_images(images(IMAGENET.mean, IMAGENET.std), IMAGENET) == []
    assert check_images(images(HALF.mean, HALF.std, 128), HALF) == []
    assert check_images(torch.zeros(2, 5), HALF) == []  # no images


@pytest.mark.parametrize(
    ("given", "expected", "words"),
    [
        (images([0.0], [1.0]), IMAGENET, "from 0 to 1 that are not normalised"),
        (images([0.0], [1.0]), HALF, "from 0 to 1 that are not normalised"),
        (images([0.0], [1 / 255]), IMAGENET, "from 0 to 255"),
        (images(IMAGENET.mean, IMAGENET.std), HALF, "ImageNet's mean and std"),
        (images(HALF.mean, HALF.std), IMAGENET, "mean 0.5 and std 0.5"),
        (images(HALF.mean, HALF.std, 28), HALF, "28x28"),
    ],
)
def test_wrong_inputs_are_told(given: Tensor, expected: InputExpectation, words: str) -> None:
    (finding,) = check_images(given, expected)
    assert words in finding


class TinyTimm(PlainModule):
    """A timm network inside, fed with digits as they are."""

    def __init__(self) -> None:
        super().__init__()
        del self.features, self.head
        self.inner = timm.create_model("test_resnet", num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(nn.functional.interpolate(images, size=(64, 64)).expand(-1, 3, -1, -1))


def test_first_batch_is_looked_at(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not normalised"):
        fit(TransferLearningCallback("head_only"), folder=tmp_path, module=TinyTimm(), max_epochs=1)
    module = TinyTimm()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit(TransferLearningCallback("head_only", check_inputs=False), folder=tmp_path, module=module, max_epochs=1)
    moved = [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["inner.fc.weight", "inner.fc.bias"]


# ---- new classes


def test_old_rows_are_kept_when_classes_come_on() -> None:
    old, new = PlainModule(), PlainModule()
    new.head = nn.Linear(12, 13)
    fresh = new.head.weight[10:].clone()
    assert load_with_new_classes(new, old.state_dict()) == ["head.weight", "head.bias"]
    assert torch.equal(new.head.weight[:10], old.head.weight)
    assert torch.equal(new.head.weight[10:], fresh)
    assert torch.equal(new.features[0].weight, old.features[0].weight)
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(new.eval()(images)[:, :10], old.eval()(images), atol=1e-6)
    with pytest.raises(ValueError, match="Only the last layer may have more rows"):
        load_with_new_classes(old, new.state_dict())
    with pytest.raises(ValueError, match="those of another module"):
        load_with_new_classes(old, {})
