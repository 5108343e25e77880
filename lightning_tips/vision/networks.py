"""Image classification networks by name, each with the normalisation its weights expect."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from timm.data import resolve_data_config
from torch import Tensor, nn

# Bare names of the networks built here: He et al.'s depths and the small ResNet-8. Neither timm nor torchvision has a
# network of these names (a test checks it). Every other depth is reached by the prefix `cifar_`.
CIFAR_NAMES = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


class Normalization(NamedTuple):
    """What is subtracted from images in [0, 1], and by what they are then divided: one number per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution on the shortcut where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        skip: Without it there is no shortcut: the block of a plain network.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if skip and (stride != 1 or in_channels != out_channels):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + self.shortcut(x) if self.skip else out)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.

    A 3x3 `stem`, three `stages` of n blocks with 1, 2 and 4 times `width` channels at full, half and quarter
    resolution, global average pooling and a linear `head`: 6n + 2 layers with weights. Where the shape changes the
    shortcut is a 1x1 convolution (the paper's option B; its CIFAR networks use option A, which pads with zeros), as
    that is what pruning and tracing tools handle. ResNet-8 with 10 classes has 78,042 parameters.

    Args:
        depth: 6n + 2: 8, 14, 20, 26, 32, 38, 44, 50, 56 ...
        num_classes: Length of the output.
        in_channels: Channels of the input.
        width: Channels of the stem and of the first stage.
        skips: Without them it is the paper's plain network, which the residual one is compared with.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16, skips: bool = True
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            below = max(8, 6 * blocks + 2)
            nearest = str(below) if depth < 8 else f"{below} and {below + 6}"
            raise ValueError(f"A CIFAR ResNet has a depth of 6n + 2, not {depth}; nearest to it: {nearest}.")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages, channels = [], width
        for stage in range(3):
            out_channels = width * 2**stage
            stages.append(
                nn.Sequential(
                    BasicBlock(channels, out_channels, stride=1 if stage == 0 else 2, skip=skips),
                    *(BasicBlock(out_channels, out_channels, skip=skips) for _ in range(blocks - 1)),
                )
            )
            channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, in_channels, H, W) of any size to logits (B, num_classes)."""
        return self.head(self.pool(self.stages(self.stem(x))))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16, skips: bool = True
) -> CifarResNet:
    """Build a `CifarResNet`; see there for the arguments and the error."""
    return CifarResNet(depth, num_classes, in_channels, width, skips)


class CifarVGG(nn.Sequential):
    """VGG-11 with BatchNorm (Simonyan & Zisserman 2015, configuration A) for small images, with one linear layer.

    Eight 3x3 convolutions, each with BatchNorm and ReLU as one module `conv1` to `conv8`; the resolution is halved
    after the first, the second and the fourth (the paper's other two halvings would leave less than a pixel of 28);
    then global average pooling and a linear `head`. No skips.

    Args:
        num_classes: Length of the output.
        in_channels: Channels of the input.
        width: Channels of the first convolution; the following have 2, 4, 4, 8, 8, 8 and 8 times as many.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        channels = in_channels
        for i, factor in enumerate((1, 2, 4, 4, 8, 8, 8, 8), start=1):
            conv = nn.Conv2d(channels, factor * width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.add_module(f"conv{i}", nn.Sequential(conv, nn.BatchNorm2d(factor * width), nn.ReLU()))
            if i in (1, 2, 4):
                self.add_module(f"pool{i}", nn.MaxPool2d(2))
            channels = factor * width
        self.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.add_module("head", nn.Linear(channels, num_classes))


def build_network(
    name: str, num_classes: int, in_channels: int = 3, pretrained: bool = False, **kwargs: Any
) -> tuple[nn.Module, Normalization]:
    """Build a network by name, with the normalisation that its weights expect.

    Which library a name means:

    1. `cifar_resnetN`, and the bare `resnet8`, `resnet20`, `resnet32`, `resnet44`, `resnet56`, `resnet110`:
       `CifarResNet`. `cifar_plainN` is the same without skips, `cifar_vgg11_bn` a `CifarVGG`.
    2. `timm/NAME` and `torchvision/NAME`: that library's.
    3. Any other bare name: timm's if timm knows it, else torchvision's. So `resnet18` and `resnet50` are timm's.

    The length of the returned normalisation is the number of channels that the network takes. With `pretrained` that
    is not always `in_channels`: weights made for colour keep their three channels when `in_channels` is 1, and grey
    images have to be expanded to three (`ImageClassifier` does it), so that the weights see what they were trained
    on. For other numbers of channels timm adapts the weights of the first convolution.

    Args:
        name: See above.
        num_classes: Length of the output; a pretrained network gets a new head of this length.
        in_channels: Channels of the images.
        pretrained: Load ImageNet (or whatever the name's tag says) weights, downloading them if need be. For a local
            file of weights of a timm network, pass `pretrained_cfg_overlay={"file": path}` too.
        kwargs: Passed on to the network's own constructor, such as `width` for `CifarResNet` or `drop_rate` for timm.

    Returns:
        The network, mapping normalised (B, C, H, W) float images to (B, num_classes) logits, and its `Normalization`:
        that of the weights if `pretrained`, else mean 0.5 and std 0.5 for each channel.

    Raises:
        ConnectionError: The weights cannot be downloaded.
        ValueError: No library has `name` (the message lists the nearest names); `pretrained` for a network or a number
            of channels for which there are no weights; `num_classes` or `in_channels` below 1.
    """
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"num_classes and in_channels must be at least 1, not {num_classes} and {in_channels}.")
    library, bare = _resolve(name)
    if library == "timm":
        return _timm_network(bare, num_classes, in_channels, pretrained, kwargs)
    if library == "torchvision":
        return _torchvision_network(bare, num_classes, in_channels, pretrained, kwargs)
    if pretrained:
        raise ValueError(f"There are no pretrained weights for the CIFAR network {name!r}: pass pretrained=False.")
    if bare == "vgg11_bn":
        return CifarVGG(num_classes, in_channels, **kwargs), _default_normalization(in_channels)
    if bare.startswith("plain"):
        kwargs.setdefault("skips", False)
    depth = int(bare.removeprefix("resnet").removeprefix("plain"))
    return cifar_resnet(depth, num_classes, in_channels, **kwargs), _default_normalization(in_channels)


def _default_normalization(channels: int) -> Normalization:
    return Normalization((0.5,) * channels, (0.5,) * channels)


def _torchvision_names() -> list[str]:
    # Only the classifiers: list_models() without a module also has detection, video and segmentation.
    return torchvision.models.list_models(module=torchvision.models)


def _resolve(name: str) -> tuple[str, str]:
    """Return the library ("cifar", "timm" or "torchvision") and the name in it."""
    if re.fullmatch(r"cifar_((resnet|plain)\d+|vgg11_bn)", name):
        return "cifar", name.removeprefix("cifar_")
    if name in CIFAR_NAMES:
        return "cifar", name
    prefix, _, bare = name.rpartition("/")
    if prefix in ("", "timm") and timm.is_model(bare):
        return "timm", bare
    if prefix in ("", "torchvision") and bare in _torchvision_names():
        return "torchvision", bare

    known: dict[str, list[str]] = {"timm": timm.list_models(), "torchvision": _torchvision_names()}
    if prefix in known:
        candidates = {f"{prefix}/{known_name}": known_name for known_name in known[prefix]}
    else:
        ours = [*CIFAR_NAMES, *(f"cifar_{cifar_name}" for cifar_name in (*CIFAR_NAMES, "plain20", "vgg11_bn"))]
        candidates = {known_name: known_name for known_name in [*ours, *known["timm"], *known["torchvision"]]}
    close = difflib.get_close_matches(bare.lower(), candidates.values(), n=3)
    by_name = {known_name: full for full, known_name in candidates.items()}
    hint = (
        f"did you mean {', '.join(by_name[c] for c in close)}?" if close else "timm.list_models() lists timm's names."
    )
    raise ValueError(f"Unknown network {name!r}: {hint}")


def _timm_network(
    name: str, num_classes: int, in_channels: int, pretrained: bool, kwargs: dict[str, Any]
) -> tuple[nn.Module, Normalization]:
    channels = 3 if pretrained and in_channels == 1 else in_channels
    with _weights_reached(name):
        network = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **kwargs)
    if not pretrained:
        return network, _default_normalization(channels)
    config = resolve_data_config({}, model=network)
    return network, Normalization(_per_channel(config["mean"], channels), _per_channel(config["std"], channels))


@contextmanager
def _weights_reached(name: str) -> Iterator[None]:
    """Says what to do where weights cannot be downloaded."""
    try:
        yield
    except OSError as error:  # of urllib, and of what the Hugging Face Hub's client raises
        raise ConnectionError(
            f"The weights of {name} cannot be reached: {error} Train without them by pretrained=False"
            " (--model.pretrained false), or give timm a file of them:"
            " network_args={'pretrained_cfg_overlay': {'file': PATH}}."
        ) from error


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    # timm fills additional input channels with copies of the colour channels' weights, in their order.
    return tuple(float(values[channel % len(values)]) for channel in range(channels))


def _torchvision_network(
    name: str, num_classes: int, in_channels: int, pretrained: bool, kwargs: dict[str, Any]
) -> tuple[nn.Module, Normalization]:
    kwargs = dict(kwargs)
    is_inception = name in ("googlenet", "inception_v3")
    if is_inception:
        # Their weights come with a forward that turns ImageNet's normalisation into 0.5 / 0.5. Doing without it, and
        # normalising so from the start, keeps the network the same when a checkpoint rebuilds it without weights.
        kwargs.setdefault("transform_input", False)
        kwargs.setdefault("init_weights", not pretrained)  # None warns of a change to come
        if not pretrained:
            kwargs.setdefault("aux_logits", False)
    if not pretrained:
        network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
        if in_channels != 3:
            _replace_first_conv(network, in_channels)
        return network, _default_normalization(in_channels)

    if in_channels not in (1, 3):
        raise ValueError(
            f"torchvision's weights take colour or (expanded) grey images, not {in_channels} channels: pass "
            "pretrained=False, or take a timm network, which adapts its weights."
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with _weights_reached(name):
        network = torchvision.models.get_model(name, weights=weights, **kwargs)
    _replace_head(network, len(weights.meta["categories"]), num_classes)
    if is_inception:
        # Weights insist on the auxiliary heads, with which a network in training returns a tuple.
        network.aux_logits = False
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
        return network, _default_normalization(3)
    transform = weights.transforms()
    return network, Normalization(tuple(transform.mean), tuple(transform.std))


def _replace_first_conv(network: nn.Module, in_channels: int) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            network.set_submodule(name, conv)
            return
    raise ValueError(f"{type(network).__name__} has no convolution to adapt to {in_channels} channels.")


def _replace_head(network: nn.Module, old_classes: int, num_classes: int) -> None:
    """Replace the last layer with `old_classes` outputs: a linear one, or SqueezeNet's 1x1 convolution."""
    for name, module in reversed(list(network.named_modules())):
        if isinstance(module, nn.Linear) and module.out_features == old_classes:
            network.set_submodule(name, nn.Linear(module.in_features, num_classes, bias=module.bias is not None))
            return
        if isinstance(module, nn.Conv2d) and module.out_channels == old_classes:
            network.set_submodule(name, nn.Conv2d(module.in_channels, num_classes, module.kernel_size))  # type: ignore[arg-type]
            return
    raise ValueError(f"{type(network).__name__} has no layer with {old_classes} outputs to replace by a new head.")
