"""The order in width of every statistic an update divides by, and of its ridge (IK §4.1, Fig. 2).

Under μP activations are Θ(1) and back-propagated signals 1/r_out per entry, so λmax(A) ∝ r_in,
λmax(B) ∝ 1/r_out, λmax(F) of a Fisher or Gauss-Newton block r_in/r_out, Shampoo's λmax(L) = λmax(R) ∝
r_in/r_out, Adam's √v̂ ∝ 1/r_out and the norm ‖G‖_F of a matrix gradient ∝ (r_in/r_out)^½; in the eigenbasis
of L and R (SOAP) the largest √v̂ follows that norm too, with one side rotated less by the other's fan^½. n
blocks share ‖G‖²: λmax of one is 1/n of it. A ridge must follow its statistic: ρ/λmax flat in width. Symbols
are those of :meth:`mupx.optim.base.Base.scales`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mupx.blocks import count_blocks
from mupx.config import Experiment
from mupx.layers import Layer
from mupx.optim.adapter import Trainable
from mupx.scaling import Power

ORDERS: Mapping[str, Power] = {
    "A": Power(r_in=1),
    "B": Power(r_out=-1),
    "AB": Power(r_in=1, r_out=-1),
    "F": Power(r_in=1, r_out=-1),
    "L": Power(r_in=1, r_out=-1, blocks=-1),
    "R": Power(r_in=1, r_out=-1, blocks=-1),
    "v": Power(r_out=-1),
    "G": Power(r_in=0.5, r_out=-0.5),
    "w": Power(r_in=0.5, r_out=-0.5, blocks=-0.5),
    "wL": Power(r_out=-0.5, blocks=-0.5),
    "wR": Power(r_in=0.5, r_out=-1, blocks=-0.5),
}
TRACES = {"A": "tr(A)", "B": "tr(B)", "AB": "tr(A⊗B)", "F": "tr(F)", "L": "tr(L)", "R": "tr(R)"}
SIZES = {
    "A": "λmax(A)",
    "B": "λmax(B)",
    "AB": "λmax(A⊗B)",
    "F": "λmax(F)",
    "L": "λmax(L)",
    "R": "λmax(R)",
    "v": "√v",
    "G": "‖G‖",
    "w": "√v in Q_L, Q_R",
    "wL": "√v in Q_L",
    "wR": "√v in Q_R",
}
RIDGES = {"A": "ρ_A", "B": "ρ_B", "AB": "ρ", "F": "ρ", "L": "ρ_L", "R": "ρ_R"}
RIDGES |= dict.fromkeys(("v", "G", "w", "wL", "wR"), "eps")
# What an optimizer's eps stands beside, where it is not Adam's √v̂.
BESIDE_EPS = {"muon": "G", "soap": "w", "soap-left": "wL", "soap-right": "wR"}


Sizes = dict[str, dict[str, tuple[float | None, ...]]]


def count(experiment: Experiment, layer: Layer) -> int:
    """Return in how many blocks a tensor's statistics are kept."""
    rule, size = experiment.optimizer.scaling_rule, experiment.optimizer.blocks
    cut = size and rule.blocked and layer.optimizer == rule.algorithm
    return count_blocks(layer.shape, size, rule.sides) if cut else 1


def read(optimizer: Trainable) -> Sizes:
    """Return parameter name → symbol → (size, ridge, trace) as they stand after the last step."""
    return {
        name: {symbol: tuple(scale) for symbol, scale in optimizer.scales(parameter, group).items()}
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=True)
    }
