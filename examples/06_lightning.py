"""Tune a narrow model with mupx, train the wide one with Lightning: the recipe's groups, K-FAC, its loop.

    pip install lightning
    python examples/06_lightning.py

K-FAC sees the forward and the backward pass, so optimization is manual: four lines. AdamW, SGD and Shampoo
work with Lightning's automatic optimization; `configure_optimizers` is the same.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mupx
from mupx.optim import KFAC
from mupx.parametrization import initialise
from mupx.training import load_data


def build(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(196, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


class Classifier(lightning.LightningModule):
    def __init__(self, recipe: mupx.Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe = recipe
        self.model = build(recipe.experiment.scaling.width)
        initialise(self.model, recipe.layers)  # for a model that is to be trained from its start

    def configure_optimizers(self) -> Any:
        optimizer = KFAC(self.recipe.apply(self.model), self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
        return [optimizer], [schedule]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        inputs, targets = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with optimizer.optimizer.curvature(targets):  # Lightning wraps it
            loss = F.cross_entropy(self.model(inputs), targets)
            self.manual_backward(loss)
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        if index % 10 == 9:
            print(f"step {index + 1:3d}  loss {loss.item():.4f}")


def main() -> None:
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # advice on workers and loggers
    data = load_data(mupx.Experiment())
    train, validation = data.train, data.validation
    with tempfile.TemporaryDirectory() as folder:
        found = mupx.tune(
            build,
            data=((train.inputs, train.targets), (validation.inputs, validation.targets)),
            run_dir=f"{folder}/run",
            optimizer="kfac",
            base_width=16,
            lr=(1e-2, 1.0),
            damping=(1e-3, 1e-1),
            trials=4,
            steps=20,
        )
        wide = mupx.transfer(found, 64)
    loader = DataLoader(TensorDataset(train.inputs, train.targets), 64, shuffle=True)
    trainer = lightning.Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(wide), loader)


if __name__ == "__main__":
    main()
