"""Verify that learning rate and damping transfer over width, and see a wrong rule fail.

    python examples/03_verify_a_model.py

K-FAC on a small MLP and synthetic data, in some seconds: trace damping under μP keeps every layer's
order; π-damping, which most K-FAC packages use, freezes the input layer as the network grows.
"""

from __future__ import annotations

import mupx
from mupx import config


def experiment(damping_rule: str) -> mupx.Experiment:
    return config.parse(
        {
            "model": {"name": "mlp", "args": {"activation": "tanh"}},
            "data": {"name": "synthetic"},
            "optimizer": {"name": "kfac", "damping_rule": damping_rule},
            "hyperparameters": {"lr": 0.05, "damping": 0.02},
            "scaling": {"base_width": 64, "width": 64},
            "train": {"threads": 1},
        }
    )


def main() -> None:
    for rule in ("trace", "pi"):
        # Slopes alone; sweeps=True also trains at each width and measures drift and regret.
        report = mupx.verify(experiment(rule), widths=(64, 128, 256, 512), sweeps=False)
        print(f"{rule} damping: {report.verdict}")
        for row in report.rows:
            if row.quantity == "own" and row.step == 1:
                print(f"  {row.name:<15} own movement ∝ width^{row.slope:+.2f}  {row.status}")
        for cause in report.causes:
            print(f"  because {cause}")


if __name__ == "__main__":
    main()
