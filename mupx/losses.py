"""Losses that declare what they average over and the Fisher matrix they imply.

Outputs are ``[N, …, C]`` with the classes or regression targets last. A loss is a mean over
``normaliser(targets)`` terms; K-FAC needs that number to undo the mean, and the mask to leave ignored
terms out of the input covariance.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
VECTOR = 16  # classes below which the softmax of the CPU's kernels is faster across examples than along them


class Loss(Protocol):
    """A mean over terms, with the output-space Fisher of its likelihood."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar."""

    def mask(self, targets: Tensor) -> Tensor | None:
        """Return ``[N, …]`` with 1 for terms that count and 0 for ignored ones; None if all count."""

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """Return the number of terms the mean is taken over."""

    def sampled_gradients(
        self, outputs: Tensor, generator: torch.Generator | None, labels: Tensor | None = None
    ) -> Tensor:
        """Return ∂loss_n/∂f_n for targets drawn from the model, shape of ``outputs``."""

    def exact_gradients(self, outputs: Tensor) -> Tensor:
        """Return ``[K, *outputs.shape]`` whose outer products sum to the output-space Fisher."""


class CrossEntropy:
    """Softmax cross-entropy −log p_y, mean over targets that are not ``ignore_index`` (−100)."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean negative log-likelihood in nats."""
        logits, labels = outputs.flatten(0, -2), targets.flatten()
        if logits.shape[1] < VECTOR and logits.device.type == "cpu":
            logits, labels = logits.mT.unsqueeze(0), labels.unsqueeze(0)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)

    def mask(self, targets: Tensor) -> Tensor | None:
        """Return 1 where the target counts."""
        return targets.ne(IGNORED)

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """Return the number of targets that count."""
        return targets.ne(IGNORED).sum()

    def sampled_gradients(
        self, outputs: Tensor, generator: torch.Generator | None, labels: Tensor | None = None
    ) -> Tensor:
        """Return p − e_y with y drawn from p (or the given ``labels``)."""
        p = outputs.detach().softmax(-1)
        if labels is None:
            labels = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
        return p - F.one_hot(labels, p.shape[-1]).to(p.dtype)

    def exact_gradients(self, outputs: Tensor) -> Tensor:
        """Return √p_c (p − e_c) for every class c: Σ_c p_c (p − e_c)(p − e_c)ᵀ = diag(p) − p pᵀ."""
        p = outputs.detach().softmax(-1)
        steps = p.unsqueeze(-2) - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        return (steps * p.sqrt().unsqueeze(-1)).movedim(-2, 0)


class SquaredError:
    """½‖f − y‖², summed over outputs and averaged over samples: unit-variance Gaussian likelihood.

    Integer targets are read as class labels and turned into one-hot vectors.
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over samples of half the squared distance."""
        wanted = targets
        if not targets.is_floating_point():  # not F.one_hot, which looks at the labels: vmap cannot follow
            wanted = torch.zeros_like(outputs).scatter(-1, targets.unsqueeze(-1), 1.0)
        return 0.5 * (outputs - wanted.to(outputs.dtype)).square().sum() / self.normaliser(targets)

    def mask(self, targets: Tensor) -> Tensor | None:
        """Return None: every sample counts."""
        return None

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """Return the number of samples."""
        return targets.shape[0]

    def sampled_gradients(
        self, outputs: Tensor, generator: torch.Generator | None, labels: Tensor | None = None
    ) -> Tensor:
        """Return f − y with y drawn from N(f, I): standard normal noise."""
        return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)

    def exact_gradients(self, outputs: Tensor) -> Tensor:
        """Return the basis vectors e_c: their outer products sum to the identity."""
        basis = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return basis.view(-1, *[1] * (outputs.dim() - 1), outputs.shape[-1]).expand(-1, *outputs.shape)


LOSSES: dict[str, Loss] = {"cross_entropy": CrossEntropy(), "squared_error": SquaredError()}
