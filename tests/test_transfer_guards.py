"""What a module may do that would make a transfer something else than it says, without a word."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tips import TransferLearningCallback
from lightning_tips.transfer import FeatureCache

from harness import PlainModule, fit


class Unfreezes(PlainModule):
    """As somebody would who thaws by hand."""

    def on_train_epoch_start(self) -> None:
        self.unfreeze()


def test_what_the_module_thaws_stays_frozen(tmp_path: Path) -> None:
    module = Unfreezes()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.warns(UserWarning, match="lets 6 frozen parameters train, features"):
        fit(TransferLearningCallback("head_only"), folder=tmp_path, module=module, max_epochs=2)
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["head.weight", "head.bias"]


class StepsByHand(PlainModule):
    """Steps torch's own optimizer, so Lightning knows of no step."""

    raw = True

    def __init__(self) -> None:
        super().__init__(scheduler=False)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.raw)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class StepsByLightning(StepsByHand):
    raw = False


def test_steps_that_lightning_does_not_know_of(tmp_path: Path) -> None:
    """A warm-up would never end: the rate would stay at a twentieth of what was asked for."""
    with pytest.raises(MisconfigurationException, match="steps its optimizer past Lightning"):
        fit(TransferLearningCallback(), folder=tmp_path, module=StepsByHand(), max_epochs=2)
    fit(TransferLearningCallback(), folder=tmp_path, module=StepsByLightning(), max_epochs=2)
    without = TransferLearningCallback(probe_l2=0, warmup_steps=0)
    fit(without, folder=tmp_path, module=StepsByHand(), max_epochs=2)


def test_a_head_that_is_none_is_told_of(tmp_path: Path) -> None:
    module = PlainModule()
    module.teacher_head = nn.Linear(12, 10)  # nobody calls it
    with pytest.raises(MisconfigurationException, match=r"has a part in the loss: teacher_head\.weight.*Pass head="):
        fit(TransferLearningCallback(head="teacher_head"), folder=tmp_path, module=module, max_epochs=2)


def test_a_thaw_of_what_the_module_froze_is_told_of(tmp_path: Path) -> None:
    module = PlainModule()
    module.features.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"'fine-tune' nothing trains that did not before.*other 6 parameters"):
        fit(TransferLearningCallback(), folder=tmp_path, module=module, max_epochs=2)


class Beside(PlainModule):
    """A network without a head, kept in eval mode by the module, beside a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.features
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        self.backbone.eval()
        return self.head(self.backbone(x=F.interpolate(images, 64).expand(-1, 3, -1, -1)))


def test_inputs_of_a_backbone_beside_its_head_are_looked_at(tmp_path: Path) -> None:
    module = Beside()
    with pytest.warns(UserWarning, match="not normalised"):
        fit(TransferLearningCallback("head_only"), folder=tmp_path, module=module, max_epochs=1)
    assert not any(part._forward_pre_hooks for part in module.modules())


class Ends(nn.Module):
    """A network that does more with the output of its head, in the memory of that."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body, self.fc, self.end = nn.Linear(6, 4), nn.Linear(4, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(self.body(x)))


@pytest.mark.parametrize(
    ("end", "shape", "kept"),
    [
        (lambda out: out, (5, 6), True),
        (lambda out: out.mul_(0.5), (5, 6), False),
        (lambda out: out.transpose(1, 2), (5, 3, 6), False),  # (5, 3, 3): of the same shape
    ],
)
def test_what_follows_the_head_in_its_memory_is_not_lost(end: Any, shape: tuple[int, ...], kept: bool) -> None:
    network = Ends(end)
    network.body.requires_grad_(False)
    nn.init.zeros_(network.fc.weight)  # as heads often begin: all outputs are equal
    said: list[str] = []
    cache = FeatureCache(network, "", ["fc"], 1e9, say=said.append)
    images = torch.rand(shape)
    cache.install()
    network(images)
    nn.init.normal_(network.fc.weight)
    cached = network(images)
    cache.remove()
    assert torch.allclose(cached, network(images), atol=1e-6)
    assert bool(said) != kept
