"""`LayerPruningCallback`: what is its own; what all tips have in common is in `test_every_tip.py`."""

import copy
import json
import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics.classification import MulticlassAccuracy

from lightning_tips import LayerPruningCallback, TransferLearningCallback, load_pruned
from lightning_tips.core import RemovedBlock
from lightning_tips.pruning import reestimate_batch_norm
from lightning_tips.pruning.blocks.find import put_in_place
from lightning_tips.pruning.fit.capture import call_network

from harness import PlainModule, ResidualModule, assert_same, bits, every_epoch, fit


def prune(**changes):
    return LayerPruningCallback(
        **{"target": {"macs": 0.55}, "steps": 2, "start_epoch": 1, "every_n_epochs": 2, "samples": 64} | changes
    )


def held(trainer):
    return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}


def removed_in(module):
    return [name for name, part in module.named_modules() if isinstance(part, RemovedBlock)]


class Scored(ResidualModule):
    """Its validation says what the test wants: bad as soon as two blocks are gone."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.9 if len(removed_in(self)) < 2 else 0.1)


class MadeBefore(ResidualModule):
    """With an optimizer that is made once, before any checkpoint is loaded, as LightningCLI's is."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def configure_optimizers(self):
        return self.optimizer


class GroupForEachBlock(Scored):
    """An optimizer's group for each block, by name, and a rate and a decay of its own for each."""

    def configure_optimizers(self):
        parts = [part for part in [*self.features, self.head] if list(part.parameters())]
        named = {id(p): name for name, p in self.named_parameters()}
        groups = [{"params": [(named[id(p)], p) for p in part.parameters()]} for part in parts]
        if torch.__version__ < "2.6":  # without names
            groups = [{"params": [p for _, p in group["params"]]} for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        decays = [lambda epoch, i=i: 0.9 ** (epoch * i) for i in range(len(groups))]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, decays)}


class OneBlocksOptimizer(ResidualModule):
    """With an optimizer for a block alone."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        block = list(self.features[4].parameters())
        rest = [p for p in self.parameters() if not any(p is other for other in block)]
        return torch.optim.SGD(block, lr=0.01), torch.optim.Adam(rest)


class Measured(ResidualModule):
    """Its network is inside, and its metric is a torchmetrics one or comes at the end of the epoch."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(self.features, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), self.head)
        del self.features, self.head
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.right = []

    def forward(self, images):
        return self.net(images)

    def validation_step(self, batch, _):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        if self.trainer.sanity_checking:
            return
        self.log("val_acc", self.accuracy)
        self.log("val_loss", torch.nn.functional.cross_entropy(logits, batch[1]))
        self.right.append(logits.argmax(1) == batch[1])

    def on_validation_epoch_end(self):
        if self.trainer.sanity_checking:
            return
        self.log_dict({"val_right": torch.cat(self.right).float().mean()})
        self.right.clear()


class ResidualMLP(PlainModule):
    """Has no convolution."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, x):
            return x + torch.relu(self.layer(x))

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Flatten(), *(self.Block() for _ in range(4)))
        self.head = torch.nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.features(images))


# --------------------------------------------------------------------------------------------------------- how much


def test_as_many_blocks_as_asked_for_until_the_target_is_met(tmp_path):
    tip = prune(target={"macs": 0.3}, blocks_per_step=2, every_n_epochs=1)
    trainer = fit(tip, ResidualModule(), folder=tmp_path)
    assert [len(event.what.split(": ")[1].split(", ")) for event in tip.events] == [2, 1]
    assert tip.events[-1].details["macs"] <= 0.3
    assert sorted(tip.removed) == removed_in(trainer.lightning_module)
    report = json.loads(next(tmp_path.rglob("blocks.json")).read_text())
    assert report["removed"] == tip.removed
    assert report["after"]["macs"] / report["before"]["macs"] == tip.events[-1].details["macs"]


@pytest.mark.parametrize("criterion", ["branch_norm", "outputs"])
def test_the_block_that_does_nothing_goes_first(criterion, tmp_path):
    module = ResidualModule()
    torch.nn.init.zeros_(module.features[4].norm2.weight)
    tip = prune(criterion=criterion, schedule="one_shot", target={"params": 0.9}, start_epoch=0)
    fit(tip, module, folder=tmp_path)
    assert tip.removed == ["features.4"]


def test_a_metric_of_ones_own_ranks(tmp_path):
    def without_the_last_one(network):
        return float(isinstance(network.features[6], RemovedBlock))

    tip = prune(criterion=without_the_last_one, schedule="one_shot", target={"macs": 0.9}, protect=["features.3"])
    fit(tip, ResidualModule(), folder=tmp_path)
    assert tip.removed == ["features.6"]


@pytest.mark.parametrize("metric", ["val_acc", "val_loss", "val_right"])
def test_the_modules_own_validation_ranks(metric, tmp_path):
    """As if one had validated the module itself without each block, and estimated the statistics anew."""
    mode = "min" if metric == "val_loss" else "max"
    tips = []

    def run(**more):
        tips.append(prune(criterion="metric", monitor=metric, mode=mode, samples=256, target={"macs": 0.8}, steps=1))
        return fit(tips[-1], Measured(), every_epoch(tmp_path / "kept"), folder=tmp_path, max_epochs=2, **more)

    expected = run()
    whole = load_pruned(tmp_path / "kept" / "epoch-epoch=0.ckpt", Measured)
    saved = torch.load(tmp_path / "kept" / "epoch-epoch=0.ckpt", weights_only=True)["callbacks"][tips[0].state_key]
    sample = saved["sample"]["batches"]  # of training
    scores = {}
    for block in ("0.3", "0.4", "0.5", "0.6"):
        module = copy.deepcopy(whole)
        put_in_place(module.net, {block: ""})
        reestimate_batch_norm(module.net, sample, forward=call_network)
        validator = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        scores[block] = validator.validate(module, datamodule=expected.datamodule, verbose=False)[0][metric]
    best = (min if mode == "min" else max)(scores, key=scores.get)
    assert tips[0].removed == [f"net.{best}"]

    again = run(ckpt_path=tmp_path / "kept" / "epoch-epoch=0.ckpt")
    assert_same(bits(again), bits(expected))


def test_a_metric_needs_what_it_looks_at(tmp_path):
    warnings.filterwarnings("ignore", "You passed in a `val_dataloader` but have no")

    class Blind(ResidualModule):
        validation_step = LightningModule.validation_step

    for changes, module, options, message in (
        ({"start_epoch": 0}, ResidualModule, {"num_sanity_val_steps": 0}, "looks at validation batches"),
        ({}, Blind, {}, "Blind has none"),
        ({"monitor": "val_f1"}, ResidualModule, {}, "'val_f1', which nobody logs"),
        ({"monitor": "train_loss"}, ResidualModule, {}, "validation_step does not log as a number.*val_loss"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(prune(criterion="metric", **changes), module(), folder=tmp_path, **options)
    tip = prune(criterion="metric", start_epoch=0)  # the sanity check shows them
    fit(tip, ResidualModule(), folder=tmp_path, max_epochs=3)
    assert [event.epoch for event in tip.events] == [0, 2]


def test_a_metric_that_is_no_number_ranks_nothing(tmp_path):
    with pytest.raises(MisconfigurationException, match="with all its blocks is not finite"):
        fit(prune(criterion=lambda _: math.nan), ResidualModule(), folder=tmp_path)


def test_blocks_without_convolutions(tmp_path):
    tip = prune()
    fit(tip, ResidualMLP(), folder=tmp_path)
    assert len(tip.removed) == 2


# ------------------------------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize("on_drop", ["stop", "smaller"])
def test_the_guard_puts_a_block_back_with_its_weights_momentum_and_place(on_drop, tmp_path):
    tip = prune(max_drop=0.05, on_drop=on_drop, every_n_epochs=1)
    kept = tmp_path / "kept"
    trainer = fit(tip, Scored(), every_epoch(kept), folder=tmp_path)
    module = trainer.lightning_module
    assert "back to the last good network" in tip.events[2].what
    assert len(tip.removed) == len(removed_in(module)) == 1
    assert held(trainer) == {id(p) for p in module.parameters()}
    assert all(p in trainer.optimizers[0].state for p in module.parameters())
    names = [n for n, p in module.named_parameters()]
    order = {id(p): n for n, p in module.named_parameters()}
    assert [order[id(p)] for p in trainer.optimizers[0].param_groups[0]["params"]] == names

    # And the run resumes to the same bits from before the step, between it and the way back, and after that.
    expected = bits(trainer)
    for checkpoint in [kept / f"epoch-epoch={epoch}.ckpt" for epoch in ((0, 1, 3) if on_drop == "stop" else (2,))]:
        tip = prune(max_drop=0.05, on_drop=on_drop, every_n_epochs=1)
        again = fit(tip, Scored(), every_epoch(kept), folder=tmp_path, ckpt_path=checkpoint)
        assert_same(bits(again), expected, checkpoint.stem)


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_load_without_the_callback_and_with_it(tmp_path):
    trainer = fit(prune(), ResidualModule(), every_epoch(tmp_path / "kept"), folder=tmp_path)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    images = torch.rand(3, 1, 8, 8)
    expected = trainer.lightning_module.eval()(images)
    module = load_pruned(checkpoints[-1], ResidualModule)
    assert torch.equal(module.eval()(images), expected)

    whole = ResidualModule()
    trainer.validate(whole, datamodule=trainer.datamodule, ckpt_path=str(checkpoints[-1]), verbose=False)
    assert torch.equal(whole.eval()(images), expected)
    trainer.validate(whole, datamodule=trainer.datamodule, ckpt_path=str(checkpoints[0]), verbose=False)
    assert removed_in(whole) == []


def test_an_optimizer_made_before_the_checkpoint_was_loaded_resumes_to_the_same_bits(tmp_path):
    trainer = fit(prune(), MadeBefore(), every_epoch(tmp_path / "kept"), folder=tmp_path)
    expected = bits(trainer)
    for checkpoint in sorted((tmp_path / "kept").glob("*.ckpt"))[1:4:2]:
        resumed = fit(prune(), MadeBefore(), every_epoch(tmp_path / "kept"), folder=tmp_path, ckpt_path=checkpoint)
        assert_same(bits(resumed), expected, checkpoint.stem)


def test_groups_of_removed_blocks_stay_and_come_back_with_a_checkpoint(tmp_path):
    def run(**more):
        tip = prune(max_drop=0.05, every_n_epochs=1)
        return fit(tip, GroupForEachBlock(), every_epoch(tmp_path / "kept"), folder=tmp_path, max_epochs=4, **more)

    expected = run()
    module, optimizer = expected.lightning_module, expected.optimizers[0]
    assert "back to" in expected.callbacks[0].events[-1].what
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == [0, 2, 2, 2, 6, 6, 6]
    names = {id(p): name for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        assert group.get("param_names", group["params"]) == (
            [names[id(p)] for p in group["params"]] if "param_names" in group else group["params"]
        )
    for epoch in (0, 1, 2):
        again = run(ckpt_path=tmp_path / "kept" / f"epoch-epoch={epoch}.ckpt")
        assert_same(bits(again), bits(expected), str(epoch))
        assert "configure_optimizers" not in vars(again.lightning_module)


def test_distillation_and_a_compiled_block(tmp_path):
    module = ResidualModule()
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")  # without the tip too
    module.features[4] = torch.compile(module.features[4], backend="eager")
    tip = prune(distill=1.0)
    trainer = fit(tip, module, folder=tmp_path)
    assert len(tip.removed) == 2
    assert held(trainer) == {id(p) for p in module.parameters()}


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "module", "message"),
    [
        ({}, OneBlocksOptimizer, r"One SGD holds .*\(features.4\), and an optimizer needs some"),
        ({}, PlainModule, "has no residual block that can be taken out"),
        ({"protect": ["features.*"]}, ResidualModule, "protected"),
        ({"target": {"macs": 0.001}}, ResidualModule, "out of reach: macs"),
        ({"target": {"params": 10**9}}, ResidualModule, "met already: params"),
        ({"module": "feature"}, ResidualModule, "no submodule 'feature'.*features"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(changes, module, message, tmp_path):
    network = module()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(prune(**changes), network, folder=tmp_path)
    assert_same(dict(network.state_dict()), before)


@pytest.mark.parametrize(
    "other", [lambda: TransferLearningCallback("gradual"), lambda: BackboneFinetuning(9)], ids=["ours", "lightning"]
)
def test_who_knows_layers_by_their_names_is_refused(other, tmp_path):
    with pytest.raises(MisconfigurationException, match="cannot work together"):
        fit(prune(), other(), ResidualModule(), folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": {"filters": 0.5}}, "target has no 'filters'"),
        ({"target": {"macs": 1.0}}, "must be a share"),
        ({"criterion": "output"}, "no criterion 'output'.*outputs"),
        ({"blocks_per_step": 0}, "at least 1"),
        ({"schedule": "quadratic"}, "schedule='quadratic' is unknown"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        LayerPruningCallback(**arguments)
