"""Your own model, data and optimizer on the whole road: tune, transfer, train, verify.

    python examples/04_own_optimizer.py

The first half is what you would write; nothing in it knows of mupx but the one line that names the width
rule the optimizer follows. The second half types the four commands, each of which names this file.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn


def build(width, depth=3):
    layers = [nn.Linear(16, width), nn.Tanh()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def load():
    x = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, :4] + x[:, 4:8] * x[:, 8:12]).argmax(1)
    cuts = {"train": slice(4000), "validation": slice(4000, 4500), "test": slice(4500, None)}
    return {name: (x[cut], y[cut]) for name, cut in cuts.items()}


class SignMomentum(torch.optim.Optimizer):
    rule = "lion"  # its width rule, one of `mupx rules`

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(group["lr"] * mean.lerp_(p.grad, 1 - group["beta"]).sign())


def mupx(*words: str) -> None:
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    print("$ mupx", shlex.join(shown), flush=True)
    subprocess.run([sys.executable, "-m", "mupx", *words], check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    own = {part: f"{Path(__file__).resolve()}:{part}" for part in ("build", "load", "SignMomentum")}
    names = ["--model", own["build"], "--data", own["load"], "--optimizer", own["SignMomentum"]]
    # A recipe may come from somebody else: the code it names is imported only if you say so.
    allowed = [word for name in own.values() for word in ("--allow-code", name)]
    with TemporaryDirectory() as folder:
        run, wide = f"{folder}/run", f"{folder}/wide.toml"
        search = ["--width", "16", "--trials", "12", "--lr", "1e-4:0.1", "--threads", "1"]
        mupx("tune", *names, *search, "--run-dir", run)
        mupx("transfer", run, "--width", "256", "-o", wide)
        mupx("train", wide, *allowed, "--run-dir", f"{folder}/wide")
        mupx("verify", wide, *allowed, "--quick", "--threads", "1", "--run-dir", f"{folder}/verify")


if __name__ == "__main__":
    main()
