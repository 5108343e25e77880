"""The networks of the reference model, by name."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_tips.vision import (
    CifarResNet,
    build_network,
    cifar_resnet,
    networks,
)


@pytest.mark.parametrize(("depth", "parameters"), [(8, 78_042), (20, 272_474), (56, 855_770)])
def test_cifar_resnet_has_its_size_and_takes_any_input_size(depth, parameters):
    network = cifar_resnet(depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len([m for m in layers if not (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))]) == depth
    for size in (8, 33):
        assert network(torch.rand(2, 3, size, size)).shape == (2, 10)


def test_networks_without_skips():
    plain, _ = build_network("cifar_plain20", 10, in_channels=1)
    residual, _ = build_network("resnet20", 10, in_channels=1)
    x = torch.rand(2, 1, 12, 12)
    block = plain.stages[0][0].eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        assert not block(torch.rand(2, 16, 4, 4)).any()  # nothing goes round it
    shapes = [p.shape for n, p in residual.named_parameters() if "shortcut" not in n]
    assert [p.shape for p in plain.parameters()] == shapes
    vgg, _ = build_network("cifar_vgg11_bn", 7, in_channels=1, width=4)
    assert vgg(x).shape == (2, 7)
    assert [m.out_channels for m in vgg.modules() if isinstance(m, nn.Conv2d)] == [4, 8, 16, 16, 32, 32, 32, 32]


@pytest.mark.parametrize(("depth", "nearest"), [(18, "14 and 20"), (50 + 3, "50 and 56"), (1, "8\\."), (9, "8 and 14")])
def test_wrong_depth_names_the_nearest_right_ones(depth, nearest):
    with pytest.raises(ValueError, match=rf"6n \+ 2, not {depth}; nearest to it: {nearest}"):
        CifarResNet(depth)


def test_names_mean_one_library_each():
    assert not any(timm.is_model(name) for name in networks.CIFAR_NAMES)
    assert not set(networks.CIFAR_NAMES) & set(torchvision.models.list_models())
    assert isinstance(build_network("resnet20", 5)[0], CifarResNet)
    assert isinstance(build_network("cifar_resnet26", 5, in_channels=1, width=4)[0], CifarResNet)
    assert isinstance(build_network("resnet18", 5)[0], timm.models.ResNet)
    assert isinstance(build_network("timm/resnet18.a1_in1k", 5)[0], timm.models.ResNet)
    assert isinstance(build_network("torchvision/resnet18", 5)[0], torchvision.models.ResNet)
    assert isinstance(build_network("squeezenet1_1", 5)[0], torchvision.models.SqueezeNet)  # timm has none


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet21", "resnet20"),
        ("cifar_resent20", "cifar_resnet20"),
        ("ResNet18", "resnet18"),
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("timm/squeezenet1_1", "timm/"),
        ("squeezenet1_2", "squeezenet1_1"),
        ("nothing/like/it!", "timm.list_models"),
    ],
)
def test_unknown_network_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"Unknown network '{name}'.*{nearest}"):
        build_network(name, 10)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 4])
def test_networks_without_weights_take_any_number_of_channels(name, channels):
    network, normalization = build_network(name, 7, in_channels=channels)
    assert network.eval()(torch.rand(2, channels, 64, 64)).shape == (2, 7)
    assert normalization == ((0.5,) * channels, (0.5,) * channels)


@pytest.mark.parametrize(("in_channels", "channels"), [(1, 3), (3, 3), (4, 4)])
def test_pretrained_timm_network_brings_weights_and_normalization(timm_weights, in_channels, channels):
    source, overlay = timm_weights
    network, normalization = build_network("mobilenetv3_small_050", 5, in_channels, pretrained=True, **overlay)
    assert torch.equal(network.blocks[1][0].conv_pw.weight, source.blocks[1][0].conv_pw.weight)
    assert network.get_classifier().out_features == 5
    config = source.pretrained_cfg
    assert config["mean"] != (0.5, 0.5, 0.5)  # else this test would not tell it from the default
    assert normalization.mean == tuple((*config["mean"], *config["mean"])[:channels])
    assert normalization.std == tuple((*config["std"], *config["std"])[:channels])


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet", "inception_v3"])
def test_pretrained_torchvision_network_brings_weights_and_normalization(monkeypatch, name):
    inception = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    source = torchvision.models.get_model(name, weights=None, **inception)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: source.state_dict())
    network, normalization = build_network(f"torchvision/{name}", 5, in_channels=1, pretrained=True)
    convolutions = [next(m for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (network, source)]
    assert torch.equal(convolutions[0].weight, convolutions[1].weight)
    assert network.train()(torch.rand(2, 3, 96, 96)).shape == (2, 5)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalization == (((0.5,) * 3, (0.5,) * 3) if inception else imagenet)


def test_no_weights_is_an_error():
    with pytest.raises(ValueError, match="no pretrained weights for the CIFAR network 'resnet8'"):
        build_network("resnet8", 10, pretrained=True)
    with pytest.raises(ValueError, match="not 4 channels"):
        build_network("torchvision/resnet18", 10, in_channels=4, pretrained=True)
    with pytest.raises(ValueError, match="at least 1"):
        build_network("resnet8", 0)


@pytest.mark.parametrize(("name", "where"), [("timm/test_resnet", "timm.create_model"), ("torchvision/resnet18", "")])
def test_weights_that_cannot_be_reached(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host.")

    monkeypatch.setattr(where or "torchvision.models.get_model", offline)
    with pytest.raises(ConnectionError, match=r"cannot be reached: no route to host. Train without .*pretrained false"):
        build_network(name, 10, pretrained=True)
