"""Is a resumed run the run that was not interrupted? The largest difference of any weight, from every checkpoint.

    python benchmarks/optimizer/resume.py

ResNet-8 on Fashion-MNIST, Adam to SGD on the SWATS rate with warm-up at epoch 3 of 6. One run keeps a checkpoint of
each epoch; a new process-fresh module, data module and trainer resume from each of them and train to the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tips import OptimizerSwitchCallback
from lightning_tips.vision import DigitsDataModule, FashionMNISTDataModule, ImageClassifier

EPOCHS, SWITCH = 6, 3


def train(data: LightningDataModule, kept: Path, seed: int, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    seed_everything(seed, verbose=False)
    module = ImageClassifier("resnet8", in_channels=1)
    switch = OptimizerSwitchCallback(
        lambda p: torch.optim.SGD(p, momentum=0.9), trigger="epoch", at=SWITCH, lr="auto", warmup_steps=20
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[switch, ModelCheckpoint(kept, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("resume.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, for a quick look")
    chosen = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*exists and is not empty.*")
    torch.set_num_threads(1)

    result: dict[str, Any] = {
        "epochs": EPOCHS,
        "switch_epoch": SWITCH,
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "max_abs_dw": {},
    }
    for seed in chosen.seeds:
        data: LightningDataModule
        if chosen.digits:
            data = DigitsDataModule(batch_size=32, seed=seed, train_size=256)
        else:
            data = FashionMNISTDataModule(batch_size=64, train_size=chosen.images, val_fraction=0.01, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            whole = train(data, Path(folder), seed)
            for epoch in range(EPOCHS - 1):
                resumed = train(data, Path(folder), seed, Path(folder) / f"epoch={epoch}.ckpt")
                difference = max(float((resumed[name].double() - whole[name].double()).abs().max()) for name in whole)
                result["max_abs_dw"][f"seed {seed}, resumed after epoch {epoch}"] = difference
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
