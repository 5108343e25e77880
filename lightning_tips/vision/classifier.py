"""The reference LightningModule: classifies images with a network chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassStatScores

from lightning_tips.core import inputs_of, targets_of
from lightning_tips.vision.networks import Normalization, build_network


class ImageClassifier(LightningModule):
    """An image classifier for any data module whose images are floats in [0, 1].

    The model normalises its input itself, with the mean and standard deviation of its network's weights, so that the
    data never has to know the network. Grey images are expanded to three channels where the network takes colour.

    Batches are `(images, labels)` or dicts with common keys such as `image` and `label`, or `x` and `y`. Images are
    (B, C, H, W) float; labels are (B,) integers, or (B, num_classes) probabilities, as mixup makes them.

    Logged for each of train, val and test: `*_loss` and `*_acc` (share of right answers); `train_loss` and `train_acc`
    are means over the epoch, `train_loss_step` is the loss of a step. For val and test also `*_balanced_acc` (mean of
    the classes' recalls) and `*_ece` (expected calibration error, 15 bins; Guo et al. 2017). `test_recall/CLASS` is
    the recall of each class that occurs; `val_recall/CLASS` likewise with `log_val_recall`. `val_loss` and `test_loss`
    are the plain cross-entropy, whatever `criterion` is, so that they can be compared between runs.

    `self.network` is the bare network, from normalised images to logits; as attributes, `mean` and `std` are persistent
    buffers of the shape (1, C, 1, 1): weights and normalisation belong together, and a wrong normalisation costs
    accuracy without an error. Checkpoints hold plain values only (`weights_only=True` loads them). One of a pretrained
    network rebuilds it without downloading the weights that it is about to replace. `optimizer` and `lr_scheduler` are
    functions and not in the checkpoint: pass them again to `load_from_checkpoint` to train on with other than Adam.

    Args:
        network: A name that `build_network` knows: `resnet8`, `cifar_resnet20`, `timm/resnet18`, `torchvision/vgg11`.
        num_classes: Number of classes, at least 2.
        in_channels: Channels of the images.
        pretrained: Load the network's weights.
        network_args: More arguments for `build_network`.
        optimizer: From the parameters to an optimizer; default Adam with learning rate 1e-3.
        lr_scheduler: From the optimizer to a scheduler; None: the learning rate stays. In yaml, ReduceLROnPlateau
            needs its full path, lightning.pytorch.cli.ReduceLROnPlateau, as torch has one of that name too.
        lr_scheduler_interval: Step the scheduler after each "epoch" or each "step".
        monitor: What torch's ReduceLROnPlateau watches. Lightning's own, of the CLI, brings its own `monitor`.
        label_smoothing: Of the training loss, in [0, 1].
        mean: Mean per channel (one value: of all channels) in place of the network's.
        std: Standard deviation, likewise.
        class_names: Names of the classes in the logs; None: their indices.
        log_val_recall: Log the recall of each class in validation too. It is in `val_recall_per_class` in any case.

    Attributes:
        criterion: The training loss, `nn.CrossEntropyLoss`.
        val_recall_per_class: (num_classes,) float, of the last validation; NaN for classes that did not occur. None
            before the first.

    Raises:
        ValueError: An argument out of its range, an unknown network, or a batch whose images or labels do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: str = "resnet8",
        num_classes: int = 10,
        in_channels: int = 3,
        pretrained: bool = False,
        network_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val_loss",
        label_smoothing: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        log_val_recall: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names for num_classes={num_classes}.")
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f'lr_scheduler_interval is "epoch" or "step", not {lr_scheduler_interval!r}.')
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.pretrained = pretrained
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.monitor = monitor
        self.class_names = tuple(class_names or map(str, range(num_classes)))
        self.log_val_recall = log_val_recall

        self.network, default = build_network(network, num_classes, in_channels, pretrained, **(network_args or {}))
        normalization = _override(default, mean, std)
        self.register_buffer("mean", torch.tensor(normalization.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(normalization.std).view(1, -1, 1, 1))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

        # Without validate_args: it looks at the values of every batch and so waits for the GPU.
        self.train_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_metrics = _metrics("val_", num_classes)
        self.test_metrics = _metrics("test_", num_classes)
        # Counts rather than MulticlassRecall, which calls the recall of a class that does not occur 0.
        self.val_counts = MulticlassStatScores(num_classes, average="none", validate_args=False)
        self.test_counts = MulticlassStatScores(num_classes, average="none", validate_args=False)
        self.val_recall_per_class: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), float in [0, 1], to logits (B, num_classes)."""
        channels = self.mean.shape[1]
        if images.ndim != 4 or images.shape[1] not in ({1, 3} if channels == 3 else {channels}):
            expected = "3 (or 1, grey)" if channels == 3 else str(channels)
            raise ValueError(
                f"Images are (B, C, H, W) with C = {expected} here, not {tuple(images.shape)}: pass the data's "
                "in_channels to ImageClassifier."
            )
        if not images.is_floating_point():
            raise ValueError(f"Images are floats in [0, 1], not {images.dtype}: pass images.float() / 255 if uint8.")
        # A single channel broadcasts against three means, which expands grey images.
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; log it and the accuracy."""
        images, labels = self._unpack(batch, check_values=batch_idx == 0)
        logits = self(images)
        loss: Tensor = self.criterion(logits, labels)
        self.train_acc.update(logits, _hard(labels))
        # Two names, as one that is logged for steps and epochs reaches loggers under suffixes only.
        self.log("train_loss_step", loss, on_step=True, on_epoch=False, batch_size=len(images))
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and metrics of a batch."""
        self._evaluate(batch, batch_idx, "val", self.val_metrics, self.val_counts)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and metrics of a batch."""
        self._evaluate(batch, batch_idx, "test", self.test_metrics, self.test_counts)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the probabilities (B, num_classes), float32, of a batch; labels in it are left alone."""
        probabilities: Tensor = self(inputs_of(batch)).float().softmax(dim=-1)
        return probabilities

    def _evaluate(
        self, batch: Any, batch_idx: int, stage: str, metrics: MetricCollection, counts: MulticlassStatScores
    ) -> None:
        images, labels = self._unpack(batch, check_values=batch_idx == 0)
        logits = self(images).float()
        loss = F.cross_entropy(logits, labels)
        hard = _hard(labels)
        metrics.update(logits.softmax(dim=-1), hard)
        counts.update(logits, hard)
        shown = stage == "val"
        self.log(
            f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=shown, sync_dist=True, batch_size=len(images)
        )
        for name, metric in metrics.items(keep_base=False, copy_state=False):
            self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name == "val_acc", batch_size=len(images))

    def on_validation_epoch_end(self) -> None:
        """Compute the recall of each class; log it if asked to."""
        self.val_recall_per_class = _recall(self.val_counts)
        if self.log_val_recall:
            self._log_recall("val", self.val_recall_per_class)

    def on_test_epoch_end(self) -> None:
        """Compute and log the recall of each class."""
        self._log_recall("test", _recall(self.test_counts))

    def _log_recall(self, stage: str, recall: Tensor) -> None:
        occurs = (~recall.isnan()).tolist()
        values = {
            f"{stage}_recall/{name}": value
            for name, value, here in zip(self.class_names, recall, occurs, strict=True)
            if here
        }
        # The metric has been reduced over ranks already; sync_dist only says so to Lightning.
        self.log_dict(values, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", self.monitor)
        config = {"scheduler": scheduler, "interval": self.lr_scheduler_interval, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint rebuild a pretrained network from its own weights, not from downloaded ones."""
        if self.pretrained and self.CHECKPOINT_HYPER_PARAMS_KEY in checkpoint:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {
                **checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY],
                "pretrained": False,
                "in_channels": self.mean.shape[1],
                "mean": self.mean.flatten().tolist(),
                "std": self.std.flatten().tolist(),
            }

    def _unpack(self, batch: Any, check_values: bool) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch, having checked what costs nothing; values only if asked to."""
        images, labels = inputs_of(batch), targets_of(batch)
        if labels.shape == (len(images), self.num_classes) and labels.is_floating_point():
            return images, labels
        if labels.shape != (len(images),) or labels.is_floating_point():
            raise ValueError(
                f"Labels are integers of the shape ({len(images)},) or probabilities of the shape ({len(images)}, "
                f"{self.num_classes}) here, not {labels.dtype} of the shape {tuple(labels.shape)}."
            )
        if check_values:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"Labels must lie in 0 ... {self.num_classes - 1}, but there are {low} ... {high}: pass the data's "
                    "num_classes to ImageClassifier, and count classes from 0."
                )
            # Far above 1, as augmentation may leave [0, 1] by a little.
            if images.is_floating_point() and float(images.max()) > 10:
                raise ValueError(f"Images must lie in [0, 1], but reach {float(images.max()):g}: divide them by 255.")
        return images, labels.long()


def _hard(labels: Tensor) -> Tensor:
    return labels.argmax(dim=1) if labels.ndim == 2 else labels


def _recall(counts: MulticlassStatScores) -> Tensor:
    """Return the recall of each class, reduced over ranks, NaN where it does not occur; and reset `counts`."""
    true_positives, _, _, _, support = counts.compute().unbind(dim=1)
    counts.reset()
    return true_positives / support


def _metrics(prefix: str, num_classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "balanced_acc": MulticlassAccuracy(num_classes, average="macro", validate_args=False),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False),
        },
        prefix=prefix,
    )


def _override(default: Normalization, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalization:
    channels = len(default.mean)
    parts = []
    for name, values, fallback in (("mean", mean, default.mean), ("std", std, default.std)):
        chosen = fallback if values is None else tuple(float(value) for value in values)
        chosen = chosen * channels if len(chosen) == 1 else chosen
        if len(chosen) != channels:
            raise ValueError(f"{name} has {len(chosen)} values, but the network takes {channels} channels.")
        parts.append(chosen)
    if min(parts[1]) <= 0:
        raise ValueError(f"std must be positive, not {parts[1]}.")
    return Normalization(*parts)
