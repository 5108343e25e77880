"""Reference model and data for examples, configs and tests. No tip needs them: bring your own."""

from lightning_tips.vision.classifier import ImageClassifier
from lightning_tips.vision.data import ImageDataModule, ImageDataset, stratified_order
from lightning_tips.vision.datasets import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
)
from lightning_tips.vision.networks import CifarResNet, CifarVGG, Normalization, build_network, cifar_resnet

__all__ = [
    "CIFAR10DataModule",
    "CifarResNet",
    "CifarVGG",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageClassifier",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolderDataModule",
    "Normalization",
    "build_network",
    "cifar_resnet",
    "stratified_order",
]
