"""PSGD: a Kronecker preconditioner fitted by multiplicative steps so that it whitens the gradient.

Update: U = Q_Lᵀ Q_L G Q_Rᵀ Q_R with upper triangular Q_L ``[d_out, d_out]`` and Q_R ``[d_in, d_in]``, that
is P g with P = Qᵀ Q and Q = Q_L ⊗ Q_R. One step of the fit goes down the gradient of

    c(P) = gᵀ P g + vᵀ P⁻¹ v,    v ~ N(0, I),

on the group of triangular matrices: with A = Q_L G Q_Rᵀ and B = Q_L⁻ᵀ V Q_R⁻¹

    Q_L ← Q_L − μ triu(A Aᵀ − B Bᵀ) Q_L / ‖A Aᵀ + B Bᵀ‖₂,    Q_R alike with Aᵀ A and Bᵀ B.

Its fixed point is P = (E g gᵀ)^-½. No matrix is inverted and no gradient differentiated again. Weights
are flattened after their first axis; what is no matrix, and embeddings, go to AdamW.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mupx.errors import UsageError
from mupx.linalg import Scalar, gram, over
from mupx.optim.base import DEFAULTS, Groups, sort_groups
from mupx.optim.divided import Divided, cubes_of
from mupx.triangular import both, left, right

POWER_STEPS = 4  # of the estimate of a spectral norm; it errs to the small side


def spectral_norm(matrix: Tensor) -> Tensor:
    """Return a lower bound of ‖M‖₂, ``[..., 1, 1]``, by power iteration from M's longest row.

    Args:
        matrix: M, ``[..., m, n]``.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    unit = _largest(matrix).clamp(min=tiny)
    scaled = matrix / unit  # squares of tiny entries would underflow
    longest = scaled.norm(dim=-1, keepdim=True).argmax(-2, keepdim=True)
    row = torch.take_along_dim(scaled, longest, -2)
    for _ in range(POWER_STEPS):
        row = normalize(row, dim=-1, eps=tiny) @ scaled.mT @ scaled
    size: Tensor = (normalize(row, dim=-1, eps=tiny) @ scaled.mT).norm(dim=-1, keepdim=True)
    return size * unit


def _largest(matrix: Tensor) -> Tensor:
    return torch.maximum(matrix.amax((-2, -1), keepdim=True), -matrix.amin((-2, -1), keepdim=True))


def started(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return multiples of the identity Q_L, Q_R under which ‖P G‖₂ is one.

    An absolute start would be a trap: the wider the net, the smaller the gradient, the longer the way.

    Args:
        gradient: G, ``[..., d_out, d_in]``, not zero.
    """
    size = spectral_norm(gradient) ** -0.25
    d_out, d_in = gradient.shape[-2:]
    eye_L, eye_R = (torch.eye(d, dtype=gradient.dtype, device=gradient.device) for d in (d_out, d_in))
    return size * eye_L, size * eye_R


def fitted(gradient: Tensor, Q_L: Tensor, Q_R: Tensor, probe: Tensor, rate: Scalar) -> tuple[Tensor, Tensor]:
    """Return Q_L and Q_R after one step of the fit.

    Args:
        gradient: G, ``[..., d_out, d_in]``.
        Q_L: ``[..., d_out, d_out]``, upper triangular.
        Q_R: ``[..., d_in, d_in]``, upper triangular.
        probe: V, standard normal, of G's shape.
        rate: μ, broadcastable against ``[...]``; 1 would be the whole way to a singular Q.
    """
    A = right(left(Q_L, gradient), Q_R, transposed=True)
    # Both from the right: on a CPU twice as quick as from the left.
    B = torch.linalg.solve_triangular(Q_L, probe.mT, upper=True, left=False).mT
    B = torch.linalg.solve_triangular(Q_R, B, upper=True, left=False)
    Q_L = _stepped(Q_L, gram(A.mT), gram(B.mT), rate)
    Q_R = _stepped(Q_R, gram(A), gram(B), rate)
    # P is the same for c Q_L and Q_R / c: equal largest entries keep both far from overflow.
    balance = (_largest(Q_L) / _largest(Q_R)).sqrt()
    return Q_L.div_(balance), Q_R.mul_(balance)


def _stepped(Q: Tensor, whitened: Tensor, probed: Tensor, rate: Scalar) -> Tensor:
    norm = spectral_norm(whitened + probed)
    slope = both(whitened.sub_(probed).triu_(), Q)
    return slope.mul_(-over(rate, norm) / norm).add_(Q)


def preconditioned(gradient: Tensor, Q_L: Tensor, Q_R: Tensor) -> Tensor:
    """Return Q_Lᵀ Q_L G Q_Rᵀ Q_R."""
    whitened = right(left(Q_L, gradient), Q_R, transposed=True)
    return right(left(Q_L, whitened, transposed=True), Q_R)


def cut(update: Tensor, limit: Scalar) -> Tensor:
    """Return U · min(1, limit / ‖U‖₂), with :func:`spectral_norm`'s estimate of ‖U‖₂."""
    return update * (over(limit, update) / spectral_norm(update)).clamp(max=1.0)


class PSGD(Divided):
    """Preconditioned SGD with a whitening Kronecker preconditioner.

    Width rule (derived: of P's fixed point P G has a spectral norm of order one): lr × (r_out/r_in)^½. A fit
    of n steps has not reached the directions that no gradient has shown when n is below d, and until then
    P G is larger, the more so the wider the layer; ``clip`` holds its spectral norm at the order of the
    fixed point, at any width. (The customary limit on the root mean square of P G's entries would not:
    at equal RMS a wide matrix of low rank has a spectral norm √(r_in·r_out) times as large.)

    The random numbers of a step depend on ``seed`` and on the number of steps a weight has done, both kept
    in the state dict, so that a resumed run continues to the last bit and ranks agree.

    Args:
        params: Parameters or groups; tensors with fewer than two axes go to AdamW. Without groups an
            embedding's weight cannot be told from a matrix: give it a group with ``"algorithm": "adamw"``.
        lr: Learning rate.
        momentum: Heavy-ball momentum on the preconditioned update.
        preconditioner_lr: μ of the fit, in (0, 1).
        iterations: Steps of the fit per step of training that fits, each with a probe of its own.
        update_probability: Probability that a step of training fits; the first one always does.
        clip: Largest spectral norm of P G.
        seed: Of probes and choices.
        fallback_lr: AdamW's learning rate for biases and gains.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.

    Raises:
        UsageError: A hyperparameter is out of range.

    Source: X.-L. Li, "Preconditioned Stochastic Gradient Descent", arXiv:1512.04202, and "Preconditioner on
    Matrix Lie Group for SGD", arXiv:1809.10232; whitening: O. Pooladzandi and X.-L. Li, arXiv:2402.04553.
    """

    algorithm = "psgd"
    kept = ("preconditioner_lr", "iterations", "update_probability", "clip")

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 0.05,
        *,
        momentum: float = 0.9,
        preconditioner_lr: float = 0.1,
        iterations: int = 1,
        update_probability: float = 1.0,
        clip: float = 1.0,
        seed: int = 0,
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        _require(preconditioner_lr, iterations, update_probability, clip, seed)
        self.preconditioner_lr, self.iterations = preconditioner_lr, iterations
        self.update_probability, self.clip = update_probability, clip
        defaults = {
            **DEFAULTS,
            "lr": lr,
            "momentum": momentum,
            "seed": seed,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(sort_groups(params, fallback_lr, lambda p: p.dim() >= 2), defaults)

    def cost(self, parameter: Tensor) -> float:
        """Return Σ d³ over both factors."""
        return cubes_of(parameter, "LR")

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the momentum of P G, fitted to G first where this step fits."""
        state, matrix = self.state[parameter], gradient.flatten(1)
        step = state["step"] = state.get("step", 0) + 1
        if "Q_L" not in state and bool(matrix.any()):  # of a gradient of zeros there is nothing to learn
            state["Q_L"], state["Q_R"] = started(matrix)
        if "Q_L" not in state:
            return self.momentum(parameter, torch.zeros_like(gradient), group)
        self._fit(state, matrix, int(group["seed"]), step)
        update = cut(preconditioned(matrix, state["Q_L"], state["Q_R"]), self.clip)
        return self.momentum(parameter, update.view_as(gradient), group)

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v, not cut, or P⁻¹ v by triangular solves."""
        if group["algorithm"] != self.algorithm:
            return super().precondition(parameter, vector, group, inverse=inverse)
        state = self.state.get(parameter, {})
        if "Q_L" not in state:
            return None
        matrix, Q_L, Q_R = vector.flatten(1), state["Q_L"], state["Q_R"]
        if not inverse:
            return preconditioned(matrix, Q_L, Q_R).view_as(vector)
        half = torch.cholesky_solve(matrix, Q_L, upper=True)
        return torch.cholesky_solve(half.mT, Q_R, upper=True).mT.view_as(vector)

    def _fit(self, state: dict[str, Any], matrix: Tensor, seed: int, step: int) -> None:
        # Weights of one shape share their probes: their fits do not meet.
        choice = np.random.default_rng((seed, step))
        if step > 1 and choice.random() >= self.update_probability:
            return
        generator = torch.Generator(matrix.device).manual_seed(int(choice.integers(2**32)))
        for _ in range(self.iterations):
            probe = torch.empty_like(matrix).normal_(generator=generator)
            state["Q_L"], state["Q_R"] = fitted(
                matrix, state["Q_L"], state["Q_R"], probe, self.preconditioner_lr
            )


def _require(rate: float, iterations: int, probability: float, clip: float, seed: int) -> None:
    if not 0 < rate < 1 or iterations < 1 or not 0 < probability <= 1:
        raise UsageError(
            "preconditioner_lr must be > 0 and < 1, iterations ≥ 1 and update_probability > 0 and ≤ 1, got "
            f"preconditioner_lr={rate}, {iterations=}, update_probability={probability}"
        )
    if not (math.isfinite(clip) and clip > 0) or seed < 0:
        raise UsageError(f"clip must be a finite number > 0 and seed ≥ 0, got {clip=}, {seed=}")
