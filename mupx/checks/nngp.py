"""One K-FAC step from a zero read-out is kernel ridge regression on the untrained features.

With H [N, M] the read-out's input on the first batch, zero read-out weights, no bias, loss ½‖f − y‖²
summed over outputs and averaged over samples, exact Fisher (B = I), ρ_B = 0 and lr = 1, the step gives

    W = (1/N) Yᵀ H (HᵀH/N + ρ_A I)⁻¹,  that is  f(x) = K(x, X) (K(X, X) + ρ_A N I)⁻¹ Y  with  K = H Hᵀ.

Below a zero read-out δ = 0: those layers do not move, K-FAC counts them in ``skipped``. Under μP
(ρ_A ∝ width) f tends to ridge regression with the analytic NNGP kernel, at a distance ∝ width^-½, if the
weights of the input layer are Gaussian (Ishikawa & Karakida 2024, arXiv:2312.12226, §4.3).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.run import Run


@torch.no_grad()
def read_out(model: nn.Module, inputs: Tensor, name: str | None = None) -> tuple[str, Tensor]:
    """Return the read-out's name and its input h ``[N, M]``.

    Args:
        model: Called once, in the mode it is in.
        inputs: One batch.
        name: The read-out; None takes the last Linear layer that runs.

    Raises:
        UsageError: There is no such layer, or it does not run.
    """
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for own, module in model.named_modules():

        def keep(_: nn.Module, args: tuple[Tensor, ...], __: Tensor, own: str = own) -> None:
            seen.append((own, args[0].detach()))

        if isinstance(module, nn.Linear) if name is None else own == name:
            handles.append(module.register_forward_hook(keep))
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        what = "no Linear layer runs" if name is None else f"no layer named {name!r} runs"
        raise UsageError(f"{what} in a forward pass; give the name of the read-out")
    return seen[-1]


def features(model: nn.Module, inputs: Tensor, name: str | None = None) -> Tensor:
    """Return the read-out's input h ``[N, M]``; arguments as for :func:`read_out`."""
    return read_out(model, inputs, name)[1]


def ridge_prediction(cross: Tensor, kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return K(test, train) (K(train, train) + ridge·I)⁻¹ y, ``[T, C]``.

    Args:
        cross: K(test, train), ``[T, N]``.
        kernel: K(train, train), ``[N, N]``.
        targets: y, ``[N, C]``.
        ridge: In the units of K.
    """
    damped = kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    prediction: Tensor = cross @ torch.linalg.solve(damped, targets)
    return prediction


def kernel_ridge(features_train: Tensor, targets: Tensor, features_test: Tensor, ridge: float) -> Tensor:
    """Return the :func:`ridge_prediction` of the finite-width kernel K = H Hᵀ, ``[T, C]``.

    Args:
        features_train: H, ``[N, M]``.
        targets: y, ``[N, C]``.
        features_test: ``[T, M]``.
        ridge: ρ_A·N for what one K-FAC step does.
    """
    kernel = features_train @ features_train.mT
    return ridge_prediction(features_test @ features_train.mT, kernel, targets, ridge)


def nngp_kernel(
    x1: Tensor,
    x2: Tensor,
    hidden_layers: int,
    weight_variance: float,
    bias_variance: float = 0.0,
    activation: str = "relu",
) -> Tensor:
    """Return lim H₁ H₂ᵀ / M, the NNGP kernel of the last hidden layer's activations, ``[N1, N2]``.

    Each layer: Σ = σ_b² + σ_w² K, then K ← √(Σ₁₁ Σ₂₂)/(2π) · (sin θ + (π − θ) cos θ) with
    cos θ = Σ₁₂/√(Σ₁₁ Σ₂₂); before the first layer K = x₁ x₂ᵀ/d. On the diagonal K = Σ/2.

    Args:
        x1: ``[N1, …]``, flattened to ``[N1, d]``.
        x2: ``[N2, …]``.
        hidden_layers: Layers with an activation: a network of depth L has L − 1.
        weight_variance: σ_w² = fan_in · variance of a weight.
        bias_variance: σ_b².
        activation: Only ``relu`` has its kernel here.

    Source: Cho & Saul 2009; Lee et al. 2018, arXiv:1711.00165, Eq. 5 and 11.
    """
    if activation != "relu" or hidden_layers < 1:
        raise UsageError(
            f"the analytic kernel needs activation 'relu' and ≥ 1 hidden layer, got {activation!r} and "
            f"{hidden_layers}; for anything else compare with kernel_ridge"
        )
    a, b = x1.flatten(1), x2.flatten(1)
    kernel, own1, own2 = a @ b.mT / a.shape[1], a.square().mean(1), b.square().mean(1)
    tiny = torch.finfo(kernel.dtype).tiny
    for _ in range(hidden_layers):
        kernel, own1, own2 = (bias_variance + weight_variance * k for k in (kernel, own1, own2))
        scale = (own1[:, None] * own2[None, :]).sqrt()
        cosine = (kernel / scale.clamp_min(tiny)).clamp(-1, 1)
        theta = cosine.acos()
        kernel = scale / (2 * math.pi) * (theta.sin() + (math.pi - theta) * cosine)
        own1, own2 = own1 / 2, own2 / 2
    return kernel


def one_hot(run: Run, targets: Tensor) -> Tensor:
    """Return class labels ``[N]`` as regression targets ``[N, C]`` in the run's precision."""
    return F.one_hot(targets, run.data.classes).to(run.dtype)


def kernel_solution(run: Run, inputs: Tensor) -> Tensor:
    """Return the finite-width kernel ridge on the run's coming batch with ridge ρ_A·N, ``[T, C]``.

    ρ_A is the read-out's ``damping_A``, so this is meant for ``damping_rule = "absolute"``.
    """
    x, y = run.batch()
    name, train = read_out(run.model, x)
    (group,) = (g for g in run.optimizer.param_groups if f"{name}.weight" in g["param_names"])
    return kernel_ridge(
        train, one_hot(run, y), features(run.model, inputs, name), group["damping_A"] * len(x)
    )


def one_step_distance(run: Run, inputs: Tensor, solution: Tensor | None = None) -> float:
    """Train ``run`` for one step and return ‖f − f*‖ / ‖f*‖ on ``inputs``.

    Args:
        run: At the step before; K-FAC with the settings of the module docstring for f = f*.
        inputs: ``[T, …]``, in the run's precision.
        solution: f*, ``[T, C]``; None takes :func:`kernel_solution`.
    """
    wanted = kernel_solution(run, inputs) if solution is None else solution
    run.advance()
    with torch.no_grad():
        return relative_distance(run.forward(inputs), wanted)


def relative_distance(value: Tensor, reference: Tensor) -> float:
    """Return ‖value − reference‖ / ‖reference‖."""
    return float((value - reference).norm() / reference.norm())
