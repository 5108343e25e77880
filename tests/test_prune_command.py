"""`lightning-tips prune`: a trained checkpoint in, a smaller one out, with exports and a report that tell the truth."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_tips import FilterPruningCallback, LayerPruningCallback, load_pruned
from lightning_tips.cli import main
from lightning_tips.pruning import count_cost, measure_latencies
from lightning_tips.pruning.command import export as exports
from lightning_tips.pruning.command.export import export_network
from lightning_tips.pruning.command.prune import load_weights, prune_checkpoint
from lightning_tips.pruning.fit import latency
from lightning_tips.vision import DigitsDataModule, ImageClassifier

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Runs `lightning-tips` with these arguments; returns exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lightning-tips", *arguments])
        try:
            code = main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capfd.readouterr()
        return code, out + err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ResNet-8 after two epochs of digits."""
    folder = tmp_path_factory.mktemp("trained")
    pl.seed_everything(0)
    trainer = pl.Trainer(max_epochs=2, enable_checkpointing=False, log_every_n_steps=5, **QUIET)
    trainer.fit(ImageClassifier("resnet8", in_channels=1), datamodule=DigitsDataModule(batch_size=64))
    trainer.save_checkpoint(folder / "base.ckpt")
    return folder / "base.ckpt"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    settings = {
        "trainer": {
            "max_epochs": 4,
            "log_every_n_steps": 5,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_acc", "mode": "max"}}],
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}},
        },
        "model": {"class_path": "ImageClassifier", "init_args": {"network": "resnet8", "in_channels": 1}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 64}},
    }
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


def test_a_smaller_checkpoint_with_exports_and_a_report(run, config: str, trained: Path, tmp_path: Path) -> None:
    options = ["--target.macs=0.5", "--steps=2", "--every_n_epochs=2", "--distill=1.0", "--max_drop=0.5"]
    extra = ["--keep=best", "--batch_sizes=[1,8]", "--repeats=5"]
    code, printed = run("prune", config, f"--ckpt_path={trained}", *options, *extra)
    assert code == 0, printed
    folder = tmp_path / "logs" / "lightning_logs" / "version_0" / "tips"
    written = {path.name for path in folder.iterdir()}
    assert written >= {"pruned.ckpt", "pruned.pt2", "pruned.onnx", "report.json", "report.md", "channels.png"}
    report = json.loads((folder / "report.json").read_text())

    # What it says of the networks is so.
    base = ImageClassifier.load_from_checkpoint(trained, map_location="cpu")
    small = load_pruned(folder / "pruned.ckpt", ImageClassifier)
    images = torch.rand(5, 1, 8, 8)
    for place, module in enumerate((base, small)):
        assert count_cost(module, images[:1]).macs == report["cost"]["macs"][place]
        assert sum(p.numel() for p in module.parameters()) == report["cost"]["parameters"][place]
        trainer = pl.Trainer(enable_checkpointing=False, **QUIET)
        (metrics,) = trainer.validate(module, datamodule=DigitsDataModule(batch_size=64), verbose=False)
        assert metrics["val_acc"] == pytest.approx(report["metrics"]["val_acc"][place])
    assert report["cost"]["macs"][1] <= 0.5 * report["cost"]["macs"][0]
    assert report["cost"]["file_bytes"][1] < report["cost"]["file_bytes"][0]
    assert [row["batch_size"] for row in report["measured"]] == [1, 8]
    for row in report["measured"]:
        assert row["device"] == "cpu"
        assert row["peak_bytes"][1] < row["peak_bytes"][0]
        assert row["before"]["low"] <= row["before"]["median"] <= row["before"]["high"]
    assert [step["epoch"] for step in report["steps"]] == [0, 2]  # it did not wait for a validation, as it had one
    assert all("val_acc" in step["fine_tuned"] for step in report["steps"])
    assert "the best val_acc" in report["run"]["weights"]

    # The exports compute what the module does.
    expected = small.eval()(images).detach()
    loaded = torch.export.load(str(folder / "pruned.pt2")).module()
    torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=0)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "pruned.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "images"
    (outputs,) = session.run(None, {given.name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), expected, atol=1e-5, rtol=0)

    # The same yaml, which knows nothing of pruning, tests it.
    code, printed = run("test", config, f"--ckpt_path={folder / 'pruned.ckpt'}", "--trainer.logger=false")
    assert code == 0, printed
    page = (folder / "report.md").read_text()
    assert "| MACs of one sample | " in page
    assert "time, batch 8" in printed + page


def test_time_and_sensitivity_with_an_optimizer_from_the_yaml(
    run, config: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LightningCLI gives the module a function that makes the optimizer, which no deepcopy can copy.
    def timed(models: list[nn.Module], inputs: tuple) -> list[SimpleNamespace]:  # whatever else the machine does
        return [SimpleNamespace(median=float(count_cost(model, inputs).macs)) for model in models]

    monkeypatch.setattr(latency, "measure_latencies", timed)
    given = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01", "--trainer.max_epochs=1"]
    options = ["--target.latency=0.9", "--steps=1", "--sensitivity=1.0", "--export=[]", "--batch_sizes=[1]"]
    code, printed = run("prune", config, f"--ckpt_path={trained}", *given, *options, "--repeats=1")
    assert code == 0, printed
    assert "filters taken out" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ckpt_path is missing"),
        (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        (["--ckpt_path={}", "--target.mac=0.5"], "Did you mean 'macs'?"),
        (["--ckpt_path={}", "--criterion=l3"], "criterion='l3' is unknown"),
        (["--ckpt_path={}", "--stepps=3"], "Did you mean '--steps'?"),
        (["--ckpt_path={}", "--export=[tflite]"], "'torch', 'onnx'"),
        (["--ckpt_path={}", "--start_epoch=4"], "first pruning step is due in epoch 4"),
        (  # the callback of the yaml is the one that is used
            ["--ckpt_path={}", "--trainer.callbacks+=FilterPruningCallback", "--trainer.callbacks.start_epoch=9"],
            "first pruning step is due in epoch 9",
        ),
        (["--ckpt_path={}", "--sensitivity=-1"], "must be 0 or more, not -1"),
        (["--ckpt_path={}", "--batch_sizes=[0]"], "must be 1 or more"),
        (
            ["--ckpt_path={}", "--trainer.callbacks+=FilterPruningCallback", "--steps=3"],
            "has a FilterPruningCallback already, so --steps would say nothing",
        ),
        (["--ckpt_path={}", "--target.macs=0.001", "--steps=2"], "cannot be reached"),
        (  # one alone, not in a list
            [
                "--ckpt_path={}",
                "--trainer.callbacks={{class_path: EarlyStopping, init_args: {{monitor: val_loss}}}}",
                "--target.macs=0.001",
                "--steps=2",
            ],
            "cannot be reached",
        ),
    ],
)
def test_what_cannot_work_is_said_before_training(
    run, config: str, trained: Path, arguments: list[str], message: str
) -> None:
    given = [argument.format(trained) for argument in arguments]
    code, printed = run("prune", config, "--trainer.logger=false", "--trainer.num_sanity_val_steps=0", *given)
    assert code != 0
    assert message in printed
    assert "filters taken out" not in printed


class Pair(pl.LightningModule):
    """Somebody's module: dict batches, its network called by name, no forward of its own."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Residual(channels)

    def _loss(self, batch: dict) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(picture=batch["x"]), batch["y"])

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return self._loss(batch)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader:
        data = torch.Generator().manual_seed(0)
        rows = [{"x": torch.rand(3, 8, 8, generator=data), "y": i % 2} for i in range(16)]
        return DataLoader(rows, batch_size=8)

    val_dataloader = train_dataloader


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU())
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(3)])
        self.head = nn.Linear(channels, 2)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(picture)).mean((2, 3)))


def _pair_checkpoint(folder: Path, channels: int = 8) -> Path:
    path = folder / f"pair{channels}.ckpt"
    module = Pair(channels)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {"channels": channels}}, path)
    return path


def test_from_python_on_a_network_by_name_with_blocks_removed(tmp_path: Path) -> None:
    tip = LayerPruningCallback(target={"macs": 0.7}, steps=1, monitor="val_loss", mode="min")
    trainer = pl.Trainer(max_epochs=2, callbacks=[tip], enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    report = prune_checkpoint(
        trainer, Pair(), _pair_checkpoint(tmp_path), export=["torch"], batch_sizes=[2], repeats=2, out=tmp_path / "out"
    )
    assert len(tip.removed) >= 1
    assert tip.reached
    assert report["run"]["target"] == "reached"
    assert report["run"]["network"] == "net, called with float32 (B, 3, 8, 8)"
    gone = [name for name, (_, after) in report["channels"].items() if after == 0]
    assert gone == [f"{name}.body.{place}" for name in sorted(tip.removed) for place in (0, 3)]
    small = load_pruned(tmp_path / "out" / "pruned.ckpt", Pair).eval()
    images = torch.rand(4, 3, 8, 8)
    loaded = torch.export.load(str(tmp_path / "out" / "pruned.pt2")).module()
    torch.testing.assert_close(loaded(picture=images), small.net(images), atol=1e-5, rtol=0)
    assert list(report["files"]) == ["pruned.ckpt", "pruned.pt2"]
    assert sorted(path.name for path in (tmp_path / "out").glob("pruned.*")) == ["pruned.ckpt", "pruned.pt2"]


def test_no_layer_loses_more_than_the_sensitivity_analysis_allows(tmp_path: Path) -> None:
    own = {"stem.0": 0.0, "blocks.1.body.0": 0.25}
    tip = FilterPruningCallback(target={"macs": 0.8}, steps=1, monitor="val_loss", mode="min", plan={"limits": own})
    trainer = pl.Trainer(max_epochs=1, callbacks=[tip], enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    path, out = _pair_checkpoint(tmp_path), tmp_path / "out"
    report = prune_checkpoint(
        trainer, Pair(), path, sensitivity_drop=0.01, export=[], out=out, batch_sizes=[2], repeats=1
    )
    table = json.loads((out / "sensitivity.json").read_text())
    assert list(table["scores"]) == list(report["channels"])
    assert len(table["scores"]) == 7
    assert (out / "sensitivity.png").exists()
    assert tip.plan["limits"] == table["limits"] | own  # the user's own hold
    lost = {name: 1 - after / before for name, (before, after) in report["channels"].items()}
    assert max(lost.values()) > 0
    assert all(share <= tip.plan["limits"][name] + 1e-9 for name, share in lost.items())


def test_what_the_guard_took_back_is_not_called_pruned(tmp_path: Path) -> None:
    tip = FilterPruningCallback(steps=1, monitor="val_loss", mode="min", max_drop=0.0, reference=-1.0)
    trainer = pl.Trainer(max_epochs=2, callbacks=[tip], enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    with pytest.raises(MisconfigurationException, match="each step cost more than max_drop of val_loss"):
        prune_checkpoint(trainer, Pair(), _pair_checkpoint(tmp_path), export=[], out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert not tip.reached


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"another network .*: net.stem.0.weight is \(16, 3, 3, 3\)"):
        load_weights(Pair(8), _pair_checkpoint(tmp_path, 16))
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="another network"):
        load_weights(Pair(8), tmp_path / "a.ckpt")
    torch.save({"state_dict": Pair(8).state_dict(), "thing": Path}, tmp_path / "things.ckpt")
    with pytest.raises(MisconfigurationException, match="holds objects"):
        load_weights(Pair(8), tmp_path / "things.ckpt")
    load_weights(Pair(8), tmp_path / "things.ckpt", weights_only=False)
    module = Pair(8)
    load_weights(module, _pair_checkpoint(tmp_path, 4))  # smaller: it may be pruned
    assert module.net.stem[0].weight.shape == (4, 3, 3, 3)


def test_no_callback_and_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="There is no FilterPruningCallback"):
        prune_checkpoint(pl.Trainer(**QUIET), Pair(), "x.ckpt")
    monkeypatch.setitem(exports.NEEDED, "onnx", ("no_such_package",))
    assert exports.choose_kinds(None) == (["torch"], {"onnx": exports.missing_for("onnx")})
    with pytest.raises(ValueError, match=r"no_such_package missing: pip install 'lightning-tips\[onnx\]'"):
        exports.choose_kinds(["onnx"])


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x


class Drifting(nn.Module):
    """What it computes is not what was exported."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Drifting.calls += 1
        return x + Drifting.calls


def test_an_export_that_cannot_be_right_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be exported"):
        export_network(Fixed(), torch.ones(2, 3), tmp_path / "fixed.pt2")
    with pytest.raises(ValueError, match="outputs differ from the network's"):
        export_network(Drifting(), torch.ones(2, 3), tmp_path / "drifting.pt2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_network(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "net.onnx")


def test_latencies_are_taken_in_random_order_and_leave_random_numbers_alone() -> None:
    order: list[int] = []

    class Noted(nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.place = place

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.place)
            return x

    before = torch.random.get_rng_state()
    measure_latencies([Noted(i) for i in range(3)], torch.ones(1), repeats=20, warmup=0)
    turns = [tuple(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len(set(turns)) == 6
    assert torch.equal(before, torch.random.get_rng_state())
