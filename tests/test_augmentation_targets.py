"""Augmentation and what comes with the images: masks, boxes and other images; metrics that are given mixed targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_augmentation import Numbered, Watching, train
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, JaccardIndex, MetricCollection

from lightning_tips import BatchAugmentationCallback
from lightning_tips.core import inputs_of

from harness import build


class Parts(Numbered):
    """Images with something beside them that lies where their pixels lie."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__(size=16)
        self.make = form

    def __getitem__(self, n: int) -> Any:
        return self.make(self.images[n])


class Brightest(Watching):
    def training_step(self, batch: Any) -> Tensor:
        self.seen["train"].append(batch)
        return self(inputs_of(batch)).square().mean()


def mask(image: Tensor) -> Tensor:
    return (image[0] > 0.5).long()


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (lambda image: (image, mask(image)), "'1'"),
        (lambda image: (image, image), "'1'"),  # to be made again
        (lambda image: (image, mask(image)[::2, ::2]), "'1'"),
        (lambda image: {"image": image, "mask": mask(image).float()}, "'mask'"),
        (lambda image: {"image": image, "label": 1, "bbox_xyxy": torch.zeros(1, 4)}, "'bbox_xyxy'"),
        (lambda image: {"image": image, "target": {"boxes": torch.zeros(2, 4)}}, r"'target\.boxes'"),
    ],
)
def test_masks_and_boxes_do_not_stay_behind(form, name, tmp_path: Path) -> None:
    def run(policy: list[Any], module: Brightest) -> None:
        tip = BatchAugmentationCallback(policy, preview=False)
        trainer, _ = build(tip, folder=tmp_path, max_epochs=1, module=module)
        trainer.fit(module, DataLoader(Parts(form), 8), DataLoader(Parts(form), 8))

    for moving in ("HorizontalFlip", {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip"}):
        module = Brightest()
        with pytest.raises(MisconfigurationException, match=f"Flip would move the images, but not {name}"):
            run(["Brightness", moving], module)
        assert not module.seen["train"]
    run(["Brightness", "Erase"], module)  # moves nothing
    assert len(module.seen["train"]) == 2


def test_another_image_that_stays_behind_is_told_of(tmp_path: Path) -> None:
    data, module = Parts(lambda image: {"image": image, "label": 1, "clean": image}), Brightest()
    trainer, _ = build(BatchAugmentationCallback("light"), folder=tmp_path, max_epochs=1, module=module)
    with pytest.warns(UserWarning, match="move the images, but not 'clean'"):
        trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8))


class Measures(Watching):
    """With metrics of torchmetrics that take class indices; given rows of floats, some of them count nonsense."""

    def __init__(self) -> None:
        super().__init__()
        sort = {"task": "multiclass", "num_classes": 10}
        self.several = MetricCollection([Accuracy(**sort, average="micro"), JaccardIndex(**sort)])
        self.right: list[Tensor] = []

    def training_step(self, batch: Any) -> Tensor:
        images, targets = batch[:2]
        logits = self(images)
        self.several(logits, targets)
        self.right.append(logits.argmax(1) == targets.argmax(1))
        return F.cross_entropy(logits, targets)


def test_metrics_count_mixed_samples_for_their_larger_part(tmp_path: Path) -> None:
    module = Measures()
    train(BatchAugmentationCallback([], mixup=0.4, preview=False), tmp_path, module=module)
    found = module.several.compute()["MulticlassAccuracy"]
    assert 0 < found == torch.cat(module.right).float().mean()
    assert all("partial" not in repr(metric.update) for metric in module.several.values())
