"""Dense, slow float64 twins, written naively from the formulas, and the stored reference data.

Nothing here shares code with mupx: loops over samples and positions, whole Kronecker products, powers
by singular values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def golden_arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.tensor(archive[key]) for key in archive.files}


def golden_state(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}


def patches(layer: nn.Conv2d, image: Tensor) -> list[Tensor]:
    """Input patches of one image [C, H, W], position by position, each flattened channel first."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    channels, height, width = image.shape
    padded = image.new_zeros(channels, height + 2 * ph, width + 2 * pw)
    padded[:, ph : ph + height, pw : pw + width] = image
    rows = range(0, height + 2 * ph - kh + 1, sh)
    columns = range(0, width + 2 * pw - kw + 1, sw)
    return [padded[:, i : i + kh, j : j + kw].flatten() for i in rows for j in columns]


def _rows(layer: nn.Module, tensor: Tensor, is_input: bool) -> list[Tensor]:
    """Rows of one sample: positions of a convolution, tokens of a sequence, or the one vector."""
    if isinstance(layer, nn.Conv2d):
        if is_input:
            return patches(layer, tensor)
        return [tensor[:, i, j] for i in range(tensor.shape[1]) for j in range(tensor.shape[2])]
    return [tensor] if tensor.dim() == 1 else list(tensor)


def factors(
    model: nn.Module, name: str, inputs: Tensor, signals: Callable[[Tensor, int], list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """A = mean over samples and positions of h hᵀ; B = mean over samples of the sum over positions of δ δᵀ.

    ``signals(output, n)`` lists vectors ∂loss/∂(model output) of sample n whose outer products are
    added up.
    """
    layer = model.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen["h"], seen["y"] = args[0], output

    handle = layer.register_forward_hook(keep)
    A, B, positions = 0.0, 0.0, 0
    for n in range(len(inputs)):
        output = model(inputs[n : n + 1])
        for h in _rows(layer, seen["h"][0].detach(), True):
            A, positions = A + torch.outer(h, h), positions + 1
        for signal in signals(output, n):
            (delta,) = torch.autograd.grad(output, seen["y"], signal, retain_graph=True)
            for d in _rows(layer, delta[0], False):
                B = B + torch.outer(d, d)
    handle.remove()
    return A / positions, B / len(inputs)


def label_signals(labels: Tensor) -> Callable[[Tensor, int], list[Tensor]]:
    """∂(−log p_y)/∂logits = p − e_y for the given labels (the targets, or sampled ones)."""

    def signals(logits: Tensor, n: int) -> list[Tensor]:
        p = torch.exp(logits - logits.exp().sum().log()).detach()
        p[0, labels[n]] -= 1
        return [p]

    return signals


def exact_signals(logits: Tensor, n: int) -> list[Tensor]:
    """√p_c (p − e_c) for every class c."""
    p = torch.exp(logits - logits.exp().sum().log()).detach()
    result = []
    for c in range(p.shape[1]):
        signal = p.clone()
        signal[0, c] -= 1
        result.append(signal * math.sqrt(p[0, c]))
    return result


def kronecker_update(A: Tensor, B: Tensor, G: Tensor, rho_A: float, rho_B: float) -> Tensor:
    """Solve ((B + ρ_B I) ⊗ (A + ρ_A I)) vec(U) = vec(G) with the whole matrix; vec stacks rows."""
    damped_A = A + rho_A * torch.eye(len(A), dtype=A.dtype)
    damped_B = B + rho_B * torch.eye(len(B), dtype=B.dtype)
    return torch.linalg.solve(torch.kron(damped_B, damped_A), G.flatten()).view_as(G)


def exact_update(A: Tensor, B: Tensor, G: Tensor, rho: float) -> Tensor:
    """Solve (B ⊗ A + ρ I) vec(U) = vec(G) with the whole matrix."""
    whole = torch.kron(B, A)
    return torch.linalg.solve(whole + rho * torch.eye(len(whole), dtype=A.dtype), G.flatten()).view_as(G)


def matrix_power(M: Tensor, power: float) -> Tensor:
    """M^power of a symmetric positive definite M by singular values."""
    U, S, Vh = torch.linalg.svd(M)
    return U @ torch.diag(S**power) @ Vh


def shampoo_update(G: Tensor, rho: float, relative: bool, power: float = -0.25) -> Tensor:
    """(L + ρ)^power G (R + ρ)^power of one gradient, ρ in units of λmax when ``relative``."""
    L, R = G @ G.T, G.T @ G
    unit = float(torch.linalg.matrix_norm(G, 2)) ** 2 if relative else 1.0
    eye_L, eye_R = torch.eye(len(L), dtype=G.dtype), torch.eye(len(R), dtype=G.dtype)
    return matrix_power(L + rho * unit * eye_L, power) @ G @ matrix_power(R + rho * unit * eye_R, power)


def adam_entries(gradients: list[list[float]], betas: tuple[float, float], eps: float) -> list[list[float]]:
    """Adam's directions entry by entry, in plain Python."""
    size = len(gradients[0])
    m, v, directions = [0.0] * size, [0.0] * size, []
    for t, gradient in enumerate(gradients, start=1):
        row = []
        for i, g in enumerate(gradient):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            row.append(m[i] / (1 - betas[0] ** t) / (math.sqrt(v[i] / (1 - betas[1] ** t)) + eps))
        directions.append(row)
    return directions


def orthogonalised(
    G: np.ndarray[Any, Any], steps: int, coefficients: tuple[float, float, float]
) -> np.ndarray[Any, Any]:
    """U q(Σ) Vᵀ of G / ‖G‖_F = U Σ Vᵀ, where q repeats σ → a σ + b σ³ + c σ⁵, by singular values."""
    a, b, c = coefficients
    U, sigma, Vh = np.linalg.svd(G / np.sqrt((G * G).sum()), full_matrices=False)
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return np.asarray(U @ np.diag(sigma) @ Vh)


def lion_entries(gradients: list[list[float]], betas: tuple[float, float]) -> list[list[float]]:
    """Lion's directions entry by entry, in plain Python."""
    m, directions = [0.0] * len(gradients[0]), []
    for gradient in gradients:
        mixed = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(m, gradient, strict=True)]
        directions.append([float((c > 0) - (c < 0)) for c in mixed])
        m = [betas[1] * a + (1 - betas[1]) * g for a, g in zip(m, gradient, strict=True)]
    return directions


def atan2_entries(
    gradients: list[list[float]], betas: tuple[float, float], a: float, b: float
) -> list[list[float]]:
    """Adam-atan2's directions entry by entry, in plain Python."""
    size = len(gradients[0])
    m, v, directions = [0.0] * size, [0.0] * size, []
    for t, gradient in enumerate(gradients, start=1):
        row = []
        for i, g in enumerate(gradient):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            row.append(a * math.atan2(m[i] / (1 - betas[0] ** t), b * math.sqrt(v[i] / (1 - betas[1] ** t))))
        directions.append(row)
    return directions


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram and Schmidt, column by column, each projected twice against rounding."""
    done: list[Tensor] = []
    for column in columns.T:
        rest = column
        for _ in range(2):
            for q in done:
                rest = rest - (q @ rest) * q
        done.append(rest / rest.norm())
    return torch.stack(done, dim=1)


def soap_path(
    gradients: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    refresh: int,
    skip_first: bool = True,
    statistics_first: bool = False,
    carry_mean: bool = True,
    reorder: bool = True,
) -> list[Tensor]:
    """SOAP's updates for one matrix, step by step as published (arXiv:2409.11321), m kept unrotated.

    The last four arguments make wrong variants: use the first gradient, take a gradient into the bases
    before its own step, leave m in the old basis, leave v in the old order.
    """
    rows, columns = gradients[0].shape
    L, R = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()
    P, Q = torch.eye(rows).double(), torch.eye(columns).double()
    m, v, t, updates = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), 0, []

    def observe(G: Tensor, first: bool) -> None:
        nonlocal L, R, P, Q, m, v
        L, R = decay * L + (1 - decay) * G @ G.T, decay * R + (1 - decay) * G.T @ G
        if first:
            P, Q = torch.linalg.svd(L)[0], torch.linalg.svd(R)[0]
        elif t % refresh == 0:
            left = sorted(range(rows), key=lambda i: -float(P[:, i] @ L @ P[:, i]))
            right = sorted(range(columns), key=lambda i: -float(Q[:, i] @ R @ Q[:, i]))
            old_P, old_Q = P, Q
            P, Q = _orthonormal(L @ P[:, left]), _orthonormal(R @ Q[:, right])
            if reorder:
                v = v[left][:, right]
            if not carry_mean:
                m = P @ old_P.T @ m @ old_Q @ Q.T

    for index, G in enumerate(gradients):
        if index == 0:
            observe(G, first=True)
            if skip_first:
                updates.append(torch.zeros_like(G))
                continue
        t += 1
        if statistics_first:
            observe(G, first=False)
        m = betas[0] * m + (1 - betas[0]) * G
        v = betas[1] * v + (1 - betas[1]) * (P.T @ G @ Q) ** 2
        size = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        updates.append(size * P @ ((P.T @ m @ Q) / (v.sqrt() + eps)) @ Q.T)
        if not statistics_first and index:
            observe(G, first=False)
    return updates


def psgd_update(Q_L: Any, Q_R: Any, G: Any) -> np.ndarray[Any, Any]:
    """P g with the whole matrix P = Qᵀ Q, Q = Q_L ⊗ Q_R; vec stacks rows."""
    Q = np.kron(Q_L, Q_R)
    return np.asarray((Q.T @ Q @ G.flatten()).reshape(G.shape))


def psgd_criterion(Q_L: Any, Q_R: Any, G: Any, V: Any) -> float:
    """c(P) = gᵀ P g + vᵀ P⁻¹ v with the whole matrix."""
    Q = np.kron(Q_L, Q_R)
    P = Q.T @ Q
    return float(G.flatten() @ P @ G.flatten() + V.flatten() @ np.linalg.solve(P, V.flatten()))


def psgd_norm(M: Any, steps: int) -> float:
    """The estimate of ‖M‖₂: power iteration from the longest row, in loops."""
    row = max(M, key=lambda r: sum(x * x for x in r))
    for _ in range(steps):
        row = M.T @ (M @ (row / np.sqrt(sum(x * x for x in row))))
    return float(np.linalg.norm(M @ row) / np.linalg.norm(row))


def psgd_fit(Q_L: Any, Q_R: Any, G: Any, V: Any, rate: float, steps: int) -> tuple[Any, Any]:
    """One step of the fit with explicit inverses; equal largest entries afterwards."""
    A = Q_L @ G @ Q_R.T
    B = np.linalg.inv(Q_L).T @ V @ np.linalg.inv(Q_R)
    found = []
    for Q, whitened, probed in ((Q_L, A @ A.T, B @ B.T), (Q_R, A.T @ A, B.T @ B)):
        slope = whitened - probed
        upper = [[slope[i, j] if j >= i else 0.0 for j in range(len(Q))] for i in range(len(Q))]
        found.append(Q - rate / psgd_norm(whitened + probed, steps) * np.array(upper) @ Q)
    c = math.sqrt(np.abs(found[0]).max() / np.abs(found[1]).max())
    return found[0] / c, found[1] * c
