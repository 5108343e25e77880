"""Foreign networks asked for half of their multiplications: pruned and working, refused and untouched, or broken.

Each network of torchvision and timm, with random weights, runs in a process of its own with limits on CPU time and
memory. It counts as pruned only if afterwards: outputs have the same shapes in eval and in train mode, a backward pass
runs, and the independent count of multiplications is at most 0.55 of what it was. Refused means that an error came and
not one bit has changed; crashed, that the limit of time or memory ended the process.

Two tools: ``ours`` also has to report the multiplications that are counted, and its state has to load into a fresh,
unpruned network that then gives the same outputs. ``torch-pruning`` is used as a careful user would: its magnitude
pruner, global and isomorphic, L1, on copies, with every layer that gives the classes left alone, and the pruning ratio
found by bisection. It has no way to load a state of other shapes, so that this check is not made.

    python benchmarks/pruning/foreign.py              # all; resumes where it stopped
    python benchmarks/pruning/foreign.py --smoke      # three small ones
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import multiprocessing
import resource
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

from lightning_tips import prune_filters
from lightning_tips.core import accept_other_shapes
from lightning_tips.pruning import count_cost
from lightning_tips.pruning.tracing.operations import tensors_in

NETWORKS: dict[str, tuple[str, int]] = {  # name: (family, pixels)
    "torchvision/alexnet": ("plain", 96),
    "torchvision/vgg11_bn": ("plain", 64),
    "torchvision/resnet18": ("residual", 64),
    "torchvision/resnet50": ("residual", 64),
    "torchvision/wide_resnet50_2": ("residual", 64),
    "torchvision/resnext50_32x4d": ("group convolution", 64),
    "torchvision/regnet_y_400mf": ("group convolution", 64),
    "torchvision/densenet121": ("dense", 64),
    "torchvision/squeezenet1_1": ("convolution as head", 96),
    "torchvision/googlenet": ("inception, auxiliary heads", 96),
    "torchvision/inception_v3": ("inception, auxiliary heads", 299),
    "torchvision/mobilenet_v2": ("inverted residual", 96),
    "torchvision/mobilenet_v3_small": ("inverted residual", 96),
    "torchvision/efficientnet_b0": ("inverted residual", 96),
    "torchvision/mnasnet1_0": ("inverted residual", 96),
    "torchvision/shufflenet_v2_x1_0": ("channel shuffle", 96),
    "torchvision/convnext_tiny": ("ConvNeXt", 64),
    "torchvision/segmentation/fcn_resnet50": ("segmentation", 64),
    "torchvision/segmentation/deeplabv3_mobilenet_v3_large": ("segmentation", 64),
    "timm/resnet26d": ("residual", 64),
    "timm/resnetv2_50": ("residual, pre-activation", 64),
    "timm/resnetv2_50x1_bit": ("residual, weight standardisation, GroupNorm", 64),
    "timm/seresnet50": ("squeeze-excite", 64),
    "timm/ecaresnet26t": ("channel attention", 64),
    "timm/skresnet18": ("selective kernel", 64),
    "timm/resnest14d": ("split attention", 64),
    "timm/res2net50_26w_4s": ("static splits", 64),
    "timm/mixnet_s": ("mixed convolution", 96),
    "timm/mobilenetv3_large_100": ("inverted residual", 96),
    "timm/mobilenetv4_conv_small": ("inverted residual", 96),
    "timm/tf_efficientnet_lite0": ("inverted residual", 96),
    "timm/efficientnetv2_rw_t": ("inverted residual", 64),
    "timm/ghostnet_100": ("ghost", 96),
    "timm/repvgg_a0": ("re-parameterised", 64),
    "timm/mobileone_s0": ("re-parameterised", 64),
    "timm/convnext_atto": ("ConvNeXt", 64),
    "timm/convnextv2_atto": ("ConvNeXt", 64),
    "timm/cspresnet50": ("cross-stage partial", 64),
    "timm/cspdarknet53": ("cross-stage partial", 64),
    "timm/dla34": ("aggregation", 64),
    "timm/hrnet_w18_small": ("high resolution", 64),
    "timm/dm_nfnet_f0": ("normaliser-free", 64),
    "timm/nf_resnet50": ("normaliser-free", 64),
    "timm/ese_vovnet19b_dw": ("VoVNet", 64),
    "timm/regnetx_002": ("group convolution", 64),
    "timm/inception_v4": ("inception", 96),
    "timm/xception41": ("separable convolution", 96),
    "timm/dpn48b": ("dual path", 64),
    "timm/selecsls42b": ("concatenation", 64),
    "timm/hardcorenas_a": ("inverted residual", 96),
    "timm/rexnet_100": ("inverted residual, partial sums", 96),
    "timm/fbnetc_100": ("inverted residual", 96),
    "timm/gernet_s": ("residual", 64),
    "timm/tresnet_m": ("residual, space to depth", 64),
    "timm/lcnet_050": ("separable convolution", 96),
    "timm/edgenext_xx_small": ("hybrid", 96),
    "timm/vit_tiny_patch16_224": ("transformer", 224),
    "timm/deit_tiny_patch16_224": ("transformer", 224),
    "timm/swin_tiny_patch4_window7_224": ("transformer", 224),
    "timm/mobilevit_xxs": ("transformer, hybrid", 96),
    "timm/coatnet_nano_rw_224": ("transformer, hybrid", 224),
    "timm/mixer_s32_224": ("MLP mixer", 224),
    "torchvision/maxvit_t": ("transformer, hybrid", 224),
}
TRANSFORMERS = ("transformer", "MLP mixer")
SMOKE = ("torchvision/squeezenet1_1", "timm/lcnet_050", "timm/mobilenetv4_conv_small")
TOOLS = ("ours", "torch-pruning")
ENOUGH = 0.55
"""The share of multiplications that a network counts as pruned with."""
COLUMNS = (
    "tool",
    "name",
    "family",
    "result",
    "macs",
    "parameters",
    "cpu_seconds",
    "layers_pruned",
    "layers_left_out",
    "message",
)


def build(name: str) -> nn.Module:
    """The network, with random weights."""
    library, _, rest = name.partition("/")
    if library == "timm":
        return timm.create_model(rest, pretrained=False, num_classes=10)
    kwargs: dict[str, Any] = {"weights": None}
    if rest.startswith("segmentation/"):
        kwargs |= {"weights_backbone": None, "aux_loss": True, "num_classes": 5}
    elif rest in ("googlenet", "inception_v3"):
        kwargs |= {"init_weights": False, "aux_logits": True}
    return torchvision.models.get_model(rest.rpartition("/")[2], **kwargs)


def fingerprint(model: nn.Module) -> str:
    """All bits of the state, and all flags."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    flags = [(n, p.requires_grad, p.stride()) for n, p in model.named_parameters()]
    digest.update(repr((flags, [m.training for m in model.modules()])).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def classes_of(name: str) -> int:
    """How many classes the network has."""
    return 10 if name.startswith("timm/") else 5 if "segmentation" in name else 1000


def prune_with_torch_pruning(name: str, model: nn.Module, images: Tensor, full: float) -> nn.Module:
    """Bisects torch-pruning's ratio until at most half of the multiplications are left, or nearly.

    Raises:
        ValueError: If it fails, or does not get there.
    """
    low, high = 0.0, 1.0
    best: tuple[float, nn.Module] | None = None
    least = 1.0
    for _ in range(6):
        ratio = (low + high) / 2
        twin = copy.deepcopy(model)
        heads = [
            layer
            for layer in twin.modules()
            if classes_of(name) in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
        ]
        try:
            pruner = torch_pruning.MagnitudePruner(
                twin,
                (images,),
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=ratio,
                isomorphic=True,
                global_pruning=True,
                ignored_layers=heads,
                pruning_ratio_dict={},
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
                customized_pruners={},
            )
            pruner.step()
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        try:
            share = count_cost(twin, images).macs / full
        except Exception:  # it does not run: judged by the checks
            return twin
        least = min(least, share)
        if share > ENOUGH:
            low = ratio
        else:
            if best is None or share > best[0]:
                best = share, twin
            high = ratio
            if share > ENOUGH - 0.1:
                break
    if best is None:
        raise ValueError(f"at a ratio of {ratio:.3f} it gets to {least:.3f}")
    return best[1]


def check_works(name: str, model: nn.Module, images: Tensor, before: dict[str, list[Any]], reload: bool) -> None:
    """Raises if the pruned network does not work."""
    for mode in ("eval", "train"):
        model.train(mode == "train")
        shapes = [tuple(t.shape) for t in tensors_in(model(images))]
        if shapes != before[mode]:
            raise RuntimeError(f"{mode}: shapes {shapes} instead of {before[mode]}")
    torch.stack([t.float().mean() for t in tensors_in(model(images)) if t.requires_grad]).sum().backward()
    if not reload:
        return
    fresh = build(name)
    accept_other_shapes(fresh)
    fresh.load_state_dict(model.state_dict())
    fresh.eval()
    model.eval()
    with torch.no_grad():
        for one, other in zip(tensors_in(fresh(images)), tensors_in(model(images)), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """Output channels of convolutions and linear layers."""
    return {
        name: int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))
    }


def run_one(tool: str, name: str) -> dict[str, Any]:
    """Prunes one network and looks at what came out."""
    torch.manual_seed(0)
    family, pixels = NETWORKS[name]
    model = build(name)
    images = torch.randn(2, 3, pixels, pixels)
    before: dict[str, list[Any]] = {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        before[mode] = [tuple(t.shape) for t in tensors_in(model(images))]
    cost = count_cost(model, images)
    sizes = layer_sizes(model)
    held = fingerprint(model)
    row: dict[str, Any] = {"tool": tool, "name": name, "family": family}
    reported = None
    start = time.process_time()
    try:
        if tool == "ours":
            reported = prune_filters(model, images[:1], target={"macs": 0.5}).ratios["macs"]
        else:
            model = prune_with_torch_pruning(name, model, images, cost.macs)
    except ValueError as error:
        untouched = tool != "ours" or fingerprint(model) == held  # the other one works on copies
        row["cpu_seconds"] = round(time.process_time() - start, 2)
        return row | {"result": "refused" if untouched else "broken", "message": str(error).splitlines()[0]}
    row["cpu_seconds"] = round(time.process_time() - start, 2)
    try:
        check_works(name, model, images, before, tool == "ours")
        after = count_cost(model, images)
        changed = [layer for layer, size in layer_sizes(model).items() if size != sizes[layer]]
        row |= {
            "macs": round(after.macs / cost.macs, 4),
            "parameters": round(after.parameters / cost.parameters, 4),
            "layers_pruned": len(changed),
            "layers_left_out": len(sizes) - len(changed),
        }
        if reported is not None and abs(after.macs / cost.macs - reported) > 0.005:
            raise RuntimeError(f"MACs {row['macs']} counted, {reported:.4f} reported")
    except Exception as error:
        return row | {"result": "broken", "message": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row | {"result": "pruned", "message": ""}


def child(tool: str, name: str, seconds: int, gigabytes: float, answer: Connection) -> None:
    """Runs one network in a process of its own."""
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answer.send(run_one(tool, name))


def run_apart(tool: str, name: str, seconds: int, gigabytes: float) -> dict[str, Any]:
    """What happened to a network, whatever it does to its process."""
    row = {"tool": tool, "name": name, "family": NETWORKS[name][0], "result": "crashed"}
    context = multiprocessing.get_context("fork")  # what is imported need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(tool, name, seconds, gigabytes, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(20 * seconds):  # in case it sleeps; what counts is CPU time
            return receiver.recv()
        return row | {"message": f"more than {20 * seconds} seconds"}
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return row | {"message": f"more than {seconds} seconds of CPU time"}
        return row | {"message": f"exit code {process.exitcode}, such as of too little memory ({gigabytes:.0f} GB)"}
    finally:
        process.kill()
        process.join()


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table: what became of the networks, by tool."""
    lines = ["| tool | networks | pruned | refused | crashed | broken |", "|---|---|---|---|---|---|"]
    for tool in TOOLS:
        for kind in ("convolutional", "transformers"):
            mine = [
                row
                for row in rows
                if row["tool"] == tool and (kind == "transformers") == row["family"].startswith(TRANSFORMERS)
            ]
            numbers = [
                sum(row["result"] == result for row in mine) for result in ("pruned", "refused", "crashed", "broken")
            ]
            if mine:
                lines.append(f"| {tool} | {len(mine)} {kind} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--smoke", action="store_true", help="three small networks")
    parser.add_argument("--only", nargs="*", help="names, such as timm/resnet26d")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=TOOLS)
    parser.add_argument("--seconds", type=int, default=60, help="limit of CPU time for each network")
    parser.add_argument("--gigabytes", type=float, default=12, help="limit of memory for each network")
    arguments = parser.parse_args(argv)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if arguments.out.exists():
        with arguments.out.open() as file:
            rows = {(row["tool"], row["name"]): row for row in csv.DictReader(file)}
    for tool in arguments.tools:
        for name in arguments.only or (SMOKE if arguments.smoke else NETWORKS):
            if (tool, name) in rows and not arguments.only:
                continue
            rows[tool, name] = row = run_apart(tool, name, arguments.seconds, arguments.gigabytes)
            numbers = f"{row['result']:8} {row.get('macs', '')} {row.get('cpu_seconds', '')}"
            print(f"{tool:14}{name:55} {numbers} {row.get('message', '')[:150]}", flush=True)
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows[t, n] for t in TOOLS for n in NETWORKS if (t, n) in rows)
    print(summary(list(rows.values())))


if __name__ == "__main__":
    main()
