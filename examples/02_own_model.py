"""Your own module in your own loop: mupx supplies the initial weights, the groups and the optimizer.

    python examples/02_own_model.py

The values are those of base width 32; the model is built at width 64. Nothing in the model knows of mupx.
"""

from __future__ import annotations

import torch
from torch import nn

import mupx
from mupx import training
from mupx.optim import KFAC


def build(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = training.load_data(mupx.Experiment())
    model, groups = mupx.parametrize(
        build, width=64, base_width=32, optimizer="kfac", lr=2**-4, damping=2**-3, damping_rule="absolute"
    )
    optimizer = KFAC(groups, model, damping_rule="absolute")
    loss = nn.CrossEntropyLoss()
    for step in range(20):
        inputs = data.train.inputs[64 * step : 64 * (step + 1)]
        targets = data.train.targets[64 * step : 64 * (step + 1)]
        optimizer.zero_grad()
        with optimizer.curvature(targets):
            value = loss(model(inputs), targets)
            value.backward()
        optimizer.step()
        print(f"step {step:2d}  loss {value.item():.4f}")


if __name__ == "__main__":
    main()
