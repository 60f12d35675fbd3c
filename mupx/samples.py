"""Per-sample gradients of one layer as products of rows: second moments in a basis, never a list of them.

Layout: h ``[..., N, T, d_in]`` (T positions: patches of a convolution, tokens of a sequence, 1 for plain
Linear) and δ ``[..., K, N, T, d_out]`` (K back-propagated directions: one for the empirical and the
Monte-Carlo Fisher, the classes for the exact one). Sample n and direction k have the gradient

    G_kn = Σ_t δ_knt h_ntᵀ,  [d_out, d_in],

and a bias the same with h = 1. Positions add up inside a sample, as they do in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mupx.errors import UsageError
from mupx.factor_sums import FactorSums, nothing_captured

ENTRIES = 2**23  # numbers of per-sample gradients formed at once


@dataclass
class SampleRows(FactorSums):
    """The rows h and δ of every sample, kept apart; with ``summed`` the sums behind A and B besides."""

    at_once = None  # kept for the step, so all at once
    summed: bool = True
    h: list[Tensor] = field(default_factory=list)  # one per pass
    delta: list[list[Tensor]] = field(default_factory=list)  # per pass one per direction

    @property
    def keeps_rows(self) -> bool:
        """Every sample's."""
        return True

    def add_terms(self, terms: Tensor | float) -> None:
        """Count the terms of one more pass."""
        super().add_terms(terms)
        self.delta.append([])

    def add_inputs(self, rows: Tensor, mask: Tensor | None) -> None:
        """Keep h ``[N, T, d_in]`` of a pass.

        Raises:
            UsageError: The layer runs a second time in the same pass.
        """
        if len(self.h) == len(self.delta):
            raise UsageError(
                "a layer runs more than once in one forward pass, so a sample has several inputs there: "
                "per-sample gradients are not kept for such a layer; use kfac, which needs none"
            )
        if self.summed:
            super().add_inputs(rows, mask)
        self.h.append(rows)

    def add_outputs(self, rows: Tensor, scale: Tensor | float) -> None:
        """Keep δ = scale · rows, rows ``[N·T, d_out]``, of one more direction."""
        if self.summed:
            super().add_outputs(rows, scale)
        self.delta[-1].append((rows * scale).view(*self.h[-1].shape[:2], -1))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return h ``[N, T, d_in]`` and δ ``[K, N, T, d_out]`` of all passes together.

        Passes of fewer positions are filled up with zeros, which add nothing to a gradient.

        Raises:
            UsageError: The layer saw no forward or no backward pass.
        """
        if not self.h or not all(self.delta):
            raise nothing_captured()
        positions = max(h.shape[1] for h in self.h)
        h = [F.pad(h, (0, 0, 0, positions - h.shape[1])) for h in self.h]
        delta = [F.pad(d, (0, 0, 0, positions - d.shape[2])) for d in map(torch.stack, self.delta)]
        return torch.cat(h), torch.cat(delta, 1)


def squares(h: Tensor, delta: Tensor) -> Tensor:
    """Return Σ_kn G_kn², entry by entry, ``[..., d_out, d_in]``.

    With one position the square of a product is the product of squares; with several the gradients of
    some samples are formed at a time.

    Args:
        h: ``[..., N, T, d_in]``.
        delta: ``[..., K, N, T, d_out]``.
    """
    if h.shape[-2] == 1:
        signals = delta.squeeze(-2).square().sum(-3)
        return signals.mT @ h.squeeze(-2).square()
    size = max(1, ENTRIES // (delta.shape[-4] * delta.shape[-1] * h.shape[-1]))
    parts = zip(h.split(size, -3), delta.split(size, -3), strict=True)
    return torch.stack([sample_gradients(*part).square().sum((-4, -3)) for part in parts]).sum(0)


def sample_gradients(h: Tensor, delta: Tensor) -> Tensor:
    """Return G_kn ``[..., K, N, d_out, d_in]``."""
    return delta.mT @ h.unsqueeze(-4)


def bias_gradients(delta: Tensor) -> Tensor:
    """Return the gradients of a bias, Σ_t δ_knt, ``[..., K, N, d_out]``."""
    return delta.sum(-2)


def turned(moments: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the second moments in another basis of what has ``moments`` and no correlations in this one.

    Under G → Pᵀ G Q uncorrelated entries with second moments S get (P²)ᵀ S Q²; the sum stays.

    Args:
        moments: S, ``[..., d_out, d_in]``.
        left: P, orthogonal, ``[..., d_out, d_out]``.
        right: Q, orthogonal, ``[..., d_in, d_in]``.
    """
    return left.square().mT @ moments @ right.square()


def gram(h: Tensor, delta: Tensor) -> Tensor:
    """Return K = [⟨G_kn, G_k'n'⟩], ``[..., K·N, K·N]``, directions outermost.

    With one position it is the product of two small Gram matrices, entry by entry, (δ·δ')(h·h'); with
    several, the gradients of some output units are formed at a time.

    Args:
        h: ``[..., N, T, d_in]``.
        delta: ``[..., K, N, T, d_out]``.
    """
    directions, count = delta.shape[-4:-2]
    if h.shape[-2] == 1:
        rows, signals = h.squeeze(-2), delta.squeeze(-2).flatten(-3, -2)
        inputs = (rows @ rows.mT).repeat(*[1] * (rows.dim() - 2), directions, directions)
        return signals @ signals.mT * inputs
    size = max(1, ENTRIES // (directions * count * h.shape[-1]))
    total = torch.zeros((), dtype=h.dtype, device=h.device)
    for part in delta.split(size, -1):
        rows = sample_gradients(h, part).flatten(-2).flatten(-3, -2)
        total = total + rows @ rows.mT
    return total


def project(h: Tensor, delta: Tensor, matrix: Tensor) -> Tensor:
    """Return ⟨G_kn, V⟩ ``[..., K·N]`` for V ``[..., d_out, d_in]``, directions outermost."""
    image = h @ matrix.mT.unsqueeze(-3)
    return (delta * image.unsqueeze(-4)).sum((-2, -1)).flatten(-2)


def combine(h: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_kn c_kn G_kn, ``[..., d_out, d_in]``, for c ``[..., K·N]``, directions outermost."""
    c = weights.reshape(*weights.shape[:-1], *delta.shape[-4:-2])
    signals = (delta * c[..., None, None]).sum(-4)
    return signals.flatten(-3, -2).mT @ h.flatten(-3, -2)
