"""Running averages of Kronecker factors kept as a product with a fixed random matrix.

A factor's average M = Σ wₜ Fₜ Fₜᵀ is linear in what comes in, and so is its image Y = M Z under a fixed
Gaussian Z ``[d, k]``: a step adds F (Fᵀ Z), 4 d n k operations, whatever the rank of M has grown to.
Nothing is ever truncated, so nothing that grows slowly is lost. Zᵀ M Z is averaged along, as a step adds
(Fᵀ Z)ᵀ (Fᵀ Z) to it, 2 n k² operations. When M is needed, Nyström's approximation

    M ≈ Y (Zᵀ M Z)⁻¹ Yᵀ  ⪯  M

(Gittens & Mahoney 2013, arXiv:1303.1849; streaming: Tropp et al. 2017, arXiv:1706.05736; with a ridge:
Frangella et al. 2021, arXiv:2110.02820) gives its columns, which :mod:`mupx.lowrank` applies. The error
is E = M − M̂ ⪰ 0; :data:`PROBES` more columns of Z, which take no part in the approximation, measure it:
for Gaussian z, mean ‖E z‖² = ‖E‖_F² ≥ ‖E‖₂².
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mupx.linalg import Scalar, damped_cholesky, gram, trace
from mupx.lowrank import Columns, Spanned, function_in, kept_in
from mupx.triangular import solve_right

RANK = 192  # columns of the approximation
PROBES = 16  # columns that measure its error
SMALLEST = 512  # from this size on a sketch costs less than a dense inverse, however seldom either is renewed
LARGEST_ERROR = 0.1  # root mean square over all directions, relative to 1/ρ: above, a sketch is given up


class Sketch(NamedTuple):
    """A factor M, seen through Z.

    Attributes:
        image: M Z, ``[d, k]``.
        test: Z, ``[d, k]``, the last :data:`PROBES` columns for the error alone.
        core: Zᵀ M Z, ``[k, k]``.
        trace: tr(M), exactly, a scalar.
    """

    image: Tensor
    test: Tensor
    core: Tensor
    trace: Tensor


def pays(d: int, n: int, r: int, solver: str, ema: float) -> bool:
    """Whether a factor is averaged as a sketch: where it is told to, or wide and of no low rank.

    Args:
        d: Size of the factor.
        n: New columns per refresh.
        r: Columns kept so far: while all fit into a sketch they cost less than one, and miss less.
        solver: ``sketch``, ``auto`` or another, for which there is none.
        ema: Decay of the running average; 0 for the batch alone, whose columns are exact and as few.
    """
    wanted = solver == "sketch" or (solver == "auto" and ema > 0 and d >= SMALLEST and n + r > RANK)
    return wanted and d > RANK + PROBES


def begun(old: Columns | Spanned | None, new: Tensor) -> Sketch:
    """Return the sketch of the average so far, zero if there is none, for new columns ``[d, n]``."""
    test = _test(new.shape[0], RANK + PROBES).to(new)
    if old is None:
        return Sketch(torch.zeros_like(test), test, new.new_zeros(2 * test.shape[1:]), new.new_zeros(()))
    seen = old.columns.mT @ test
    return Sketch(old.columns @ seen, test, gram(seen), old.trace)


@cache
def _test(d: int, k: int) -> Tensor:
    # From the CPU's generator, so that a seed means the same matrix on every device.
    return torch.randn(d, k, generator=torch.Generator().manual_seed(d))


def averaged(old: Sketch, new: Tensor, keep: float, weight: Scalar) -> Sketch | None:
    """Return the sketch of keep · M + weight · F Fᵀ, or None where that is not finite.

    Args:
        old: The average so far.
        new: F, ``[d, n]``.
        keep: Weight of the old average.
        weight: Weight of the new columns; what F is yet to be divided by belongs in it.
    """
    total = keep * old.trace + weight * torch.linalg.vector_norm(new).square()
    seen = new.mT @ old.test
    weighted = weight * seen
    core = torch.addmm(old.core, seen.mT, weighted, beta=keep)
    # With both traces finite every entry is, also of the image.
    if not bool((total + trace(core)).isfinite()):
        return None
    # Column after column: that is how the rows in F come, and what recovers M is quicker for it.
    image = torch.addmm(old.image.mT, weighted.mT, new.mT, beta=keep).mT
    return Sketch(image, old.test, core, total)


def recovered(sketch: Sketch) -> Spanned:
    """Return Nyström's approximation, its ``dropped`` the measured ‖M − C Cᵀ‖_F."""
    Y, core = sketch.image[:, :-PROBES], sketch.core[:-PROBES, :-PROBES]
    # Rounding makes a core of low rank indefinite; a ridge on it only makes the approximation smaller.
    lower, _ = damped_cholesky(core, torch.finfo(core.dtype).eps * trace(core))
    lower = lower.to(Y.dtype)
    C = solve_right(Y, lower.mT)
    # Of the probes P, Cᵀ P is the whitened Yᵀ P = Zᵀ M P.
    crossed = torch.linalg.solve_triangular(lower, sketch.core[:-PROBES, -PROBES:], upper=False)
    missed = torch.addmm(sketch.image[:, -PROBES:], C, crossed, alpha=-1)
    return Spanned(C, gram(C), missed.norm() / PROBES**0.5, sketch.trace)


def solver_error(factor: Columns | Spanned, ridge: Tensor) -> Tensor:
    """Return at most ‖(M + ρ)⁻¹ − (M̂ + ρ)⁻¹‖_F in units of √d/ρ: a root mean square over all directions.

    Args:
        factor: As :func:`recovered` returns it, ``[d, k]``.
        ridge: ρ in the units of M.
    """
    d: int = factor.columns.shape[-2]
    return factor.dropped / (ridge * math.sqrt(d))


def sketch_in(state: Mapping[str, Tensor], side: str) -> Sketch | None:
    """Return the sketch in an optimizer's state, or None."""
    if f"image_{side}" not in state:
        return None
    image, test, trace_ = (state[f"{key}_{side}"] for key in ("image", "test", "trace"))
    core = state.get(f"core_{side}")  # not there where it was written before there was one
    return Sketch(image, test, test.mT @ image if core is None else core, trace_)


def state_of(side: str, sketch: Sketch) -> dict[str, Tensor]:
    """Return the tensors of a sketch by the names an optimizer's state gives them.

    Its trace is stored with the columns it is recovered as.
    """
    return {f"{key}_{side}": value for key, value in sketch._asdict().items()}


def too_thin(state: Mapping[str, Any], solver: Mapping[str, Tensor], side: str) -> bool:
    """Whether the inverse built from a state's sketch misses more than :data:`LARGEST_ERROR` allows.

    Args:
        state: The weight's state, which holds the sketch if there is one.
        solver: As :func:`mupx.lowrank.state_of` returns it, of the inverse.
        side: ``"A"`` or ``"B"``.
    """
    function, factor = function_in(solver, side), kept_in(solver, side)
    if f"image_{side}" not in state or function is None or factor is None:
        return False
    # Outside the columns the inverse is 1/ρ; zero where there is no step.
    error = solver_error(factor, 1 / function.rest)
    return bool(error > LARGEST_ERROR)


def give_up(state: dict[str, Any], side: str) -> None:
    """Remove a sketch for good: what is averaged from then on is exact."""
    for key in ("image", "test", "core"):
        state.pop(f"{key}_{side}", None)
    state[f"exact_{side}"] = True


def was_given_up(state: Mapping[str, Any], side: str) -> bool:
    """Whether :func:`give_up` was called."""
    return f"exact_{side}" in state
