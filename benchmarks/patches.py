"""What the factor A of a convolution takes from its patches, from shifts of its input, and from spectra.

    python benchmarks/patches.py                  # about two minutes on one core
    python benchmarks/patches.py --table          # print the committed results
    python benchmarks/patches.py --smoke          # small sizes, no CSV

Σ h hᵀ over the patches of a 3 by 3 convolution (stride 1, padding 1), float32, one thread. *patches*: laid
out in parts of 32 MiB, the symmetric product in strips; *shifts* and *spectra*: :mod:`mupx.patch_moments`
with its autocorrelation by one product per shift, and by cross-spectra; what mupx takes is marked. Inputs
are images of the embedded Fashion-MNIST, enlarged, behind a random convolution and a ReLU. All take turns;
times are medians of CPU time, *gain* is the median (quartiles) over turns of the patches' time over that of
what mupx takes. Errors are of (A + ρ)⁻¹ g for random g, with ρ a hundredth of A's mean eigenvalue, solved in
float64: what rounding in A alone does to an update; *inverse* is what float32 does to the exact A's inverse.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from sweeps import read_rows, set_threads, write_rows
from torch import Tensor, nn
from transfer import show

from mupx import autocorrelation
from mupx.datasets import DATASETS
from mupx.factor_sums import FactorSums
from mupx.layer_rows import UNFOLDED, input_rows, unfolded_bytes
from mupx.memory import keep_freed_memory
from mupx.patch_moments import moment_operations, patch_moment

HERE = Path(__file__).parent
FULL = [(3, 32, 64), (16, 32, 64), (64, 32, 64), (64, 16, 64), (128, 16, 64), (256, 8, 64), (512, 4, 64)]
FULL += [(256, 32, 16), (64, 56, 16), (64, 112, 16)]
SMOKE = [(3, 8, 4), (8, 8, 4)]
DAMPING = 0.01
WAYS = {"shifts": 1e9, "spectra": 0.0}  # how much slower an operation on spectra is taken to be


def by_patches(layer: nn.Conv2d, h: Tensor) -> Tensor:
    sums = FactorSums()
    parts = max(1, -(-unfolded_bytes(layer, len(h) * h.shape[2] * h.shape[3]) // UNFOLDED))
    for part in h.tensor_split(min(parts, len(h))):
        sums.add_inputs(input_rows(layer, part), None)
    assert sums.inputs is not None
    return sums.inputs


def by_way(slower: float) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    def moment(layer: nn.Conv2d, h: Tensor) -> Tensor:
        with patch.object(autocorrelation, "SLOWER", slower):
            return patch_moment(layer, h)

    return moment


def taken(layer: nn.Conv2d, h: Tensor) -> str:
    """Return what mupx takes for a layer."""
    if not moment_operations(layer, h):
        return "patches"
    with patch.object(autocorrelation, "_by_spectra", wraps=autocorrelation._by_spectra) as spectra:
        patch_moment(layer, h)
    return "spectra" if spectra.called else "shifts"


def inputs(channels: int, side: int, batch: int) -> Tensor:
    images = DATASETS.load("fashion-mnist-14")().train.inputs[:batch]
    enlarged = F.interpolate(images, size=(side, side), mode="bilinear")
    with torch.no_grad():
        return nn.Conv2d(images.shape[1], channels, 3, padding=1)(enlarged).relu()


def errors(found: dict[str, Tensor], exact: Tensor) -> dict[str, str]:
    """Return how far solutions with given factors are from that with the exact one, and one by an inverse."""
    d = len(exact)
    ridge, g = DAMPING * exact.trace() / d * torch.eye(d, dtype=exact.dtype), torch.randn(d, 16).double()
    right = torch.linalg.solve(exact + ridge, g)
    own = {name: torch.linalg.solve(A.double() + ridge, g) for name, A in found.items()}
    own["inverse"] = torch.cholesky_inverse(torch.linalg.cholesky((exact + ridge).float())) @ g.float()
    return {f"error, {name}": f"{float((x - right).norm() / right.norm()):.1e}" for name, x in own.items()}


def measured(channels: int, side: int, batch: int, turns: int) -> dict[str, str]:
    torch.manual_seed(0)
    layer, h = nn.Conv2d(channels, 1, 3, padding=1), inputs(channels, side, batch)
    ways = {"patches": by_patches} | {name: by_way(slower) for name, slower in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + turns):
        for name, way in ways.items():
            started = time.process_time()
            way(layer, h)
            if turn:
                times[name].append(1e3 * (time.process_time() - started))
    own = taken(layer, h)
    ratios = [one / other for one, other in zip(times["patches"], times[own], strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    row = {"channels": str(channels), "image": f"{side}×{side}", "batch": str(batch)}
    for name in ways:
        row[f"{name}, ms"] = f"{statistics.median(times[name]):.1f}" + " *" * (name == own)
    row["gain"] = f"{middle:.2f} ({lower:.2f} … {upper:.2f})"
    found = {name: way(layer, h) for name, way in ways.items()}
    return row | errors(found, by_patches(layer.double(), h.double()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "patches.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    print(set_threads(1))
    keep_freed_memory()
    rows = [
        measured(*case, 3 if arguments.smoke else arguments.turns)
        for case in (SMOKE if arguments.smoke else FULL)
    ]
    print(show(rows))
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
