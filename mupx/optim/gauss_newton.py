"""Gauss–Newton, one layer at a time or the whole network at once, solved through the batch's Gram matrix.

Update: u = (JᵀJ/M + ρ)⁻¹ g, where the rows of J are the gradients of v_knᵀ f_n for the outputs f_n of the
batch, weighted by the loss's curvature there: Σ_k v_kn v_knᵀ = H_n, the identity for the squared error
and diag(p) − p pᵀ for softmax cross-entropy (Schraudolph 2002; Martens 2014, arXiv:1412.1193). M is the
number of terms the loss is a mean over. No matrix of the size of the parameters is formed: with R rows
and one ridge ρ_l per tensor (Woodbury's identity; Ren & Goldfarb 2019, arXiv:1906.02353),

    c = (Σ_l K_l/ρ_l + M)⁻¹ Σ_l J_l g_l/ρ_l,   u_l = (g_l − J_lᵀ c)/ρ_l,   K_l = J_l J_lᵀ, [R, R].

``fisher`` says which rows: ``exact``, R = N·C, is Gauss–Newton; ``mc``, R = N, an unbiased estimate of it
by one sampled label; ``empirical``, R = N, takes the gradients of the batch's own labels.

**gauss-newton** sums over one l at a time: every tensor, weight or bias, is solved as if the others stood
still. A bias apart from its weight: in one block with it, it would vanish with width, as in K-FAC.

**gauss-newton-full** sums over all of them. Under μP the entries of K_l have order r_in/r_out: falling with
width at the input, level in the middle, growing at the read-out. With one ρ for all, as in textbooks, the
read-out's block is soon all that is left of the sum, and the layers below it take steps of order 1/width²
and 1/width; multipliers on a solution that has left them out would not make it theirs. It needs a
parametrization in which all blocks have one order: a = (−½, 0, ½), weights stored with the multipliers
r_out^½ at the input and r_in^-½ at the read-out. That is the same as ridges ρ_l = ρ·r_in/r_out for the
weights as they are, which is what the groups carry; at the base width the update is the textbook's.

Damping: ``trace``, ρ_l = ρ·tr(K_l)/M; ``absolute``, ρ_l = ρ. The curvature is that of the current batch, so
there is nothing to refresh and every step needs the capture. In float32 the update has a relative error of
about 1e-7·λmax/ρ: rounding of g outside the rows of J is divided by ρ like the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.factor_sums import FactorSums
from mupx.linalg import Scalar, damped_cholesky, largest_eigenvalue, over, trace
from mupx.losses import Loss
from mupx.optim.base import Groups, Scale, require_damping_rule, split_ridge
from mupx.optim.captured import Captured
from mupx.samples import SampleRows, combine, gram, project

BYTES = {torch.float32: 4, torch.float64: 8}


class Block(NamedTuple):
    """One tensor's part of the Jacobian; a bias is a weight with the input 1.

    Attributes:
        gradient: g, ``[..., d_out, d_in]``.
        h: ``[..., N, T, d_in]``.
        delta: ``[..., K, N, T, d_out]``.
        damping: ρ, broadcastable against ``[...]``.
    """

    gradient: Tensor
    h: Tensor
    delta: Tensor
    damping: Scalar


def solve(blocks: Sequence[Block], terms: Tensor | float, rule: str) -> tuple[list[Tensor], Tensor]:
    """Return u = (JᵀJ/M + D)⁻¹ g for the blocks together, D their ridges, and ok ``[...]``.

    Args:
        blocks: All with the same samples and directions.
        terms: M.
        rule: ``trace`` or ``absolute``.

    Returns:
        One update per block, zero where the block (or all of them: ok is False) is zero or not finite.
    """
    total, projected, gains = torch.zeros(()), torch.zeros(()), []
    for block in blocks:
        K = gram(block.h, block.delta)
        gain = _gain(K, terms, block.damping, rule)
        total = total.to(K) + K * gain[..., None, None]
        projected = projected.to(K) + project(block.h, block.delta, block.gradient) * gain[..., None]
        gains.append(gain)
    lower, ok = damped_cholesky(total, terms)
    c = torch.cholesky_solve(projected.to(lower.dtype).unsqueeze(-1), lower).squeeze(-1).to(total.dtype)
    updates = []
    for block, gain in zip(blocks, gains, strict=True):
        inside = combine(block.h, block.delta, c)
        update = (block.gradient - inside) * gain[..., None, None]
        updates.append(torch.where(ok[..., None, None], update, 0.0))
    return updates, ok


def _gain(K: Tensor, terms: Tensor | float, damping: Scalar, rule: str) -> Tensor:
    """Return 1/ρ_l, or 0 for a block that is zero: it takes no step."""
    size = trace(K)
    ridge = damping * size / terms if rule == "trace" else over(damping, size) + torch.zeros_like(size)
    return torch.where((size > 0) & (ridge > 0), 1 / ridge, 0.0)


class GaussNewton(Captured):
    """Layer-wise Gauss–Newton for Linear and ungrouped Conv2d layers; everything else goes to AdamW.

    The forward and backward pass of every step must run inside :meth:`curvature`, with
    :meth:`update_curvature` between them for the exact and the Monte-Carlo rows, as for K-FAC.

    Width rule (derived): lr × 1; ρ × r_in/r_out, the order of λmax(K); ``trace`` needs no multiplier. For
    a bias r_in = 1. Inside residual branches lr × 1/depth, ρ × 1/depth².

    Args:
        params: Parameters or groups; plain parameters are sorted into Gauss–Newton and fallback by layer.
        model: The module they belong to.
        lr: Learning rate.
        damping: ρ > 0.
        damping_rule: ``trace`` or ``absolute``.
        fisher: The rows: ``exact``, ``mc`` or ``empirical``.
        loss: ``cross_entropy``, ``squared_error`` or a :class:`mupx.losses.Loss`.
        max_rows: Refuse a system of more rows: its matrix has max_rows² entries, and solving with it
            takes max_rows³/3 multiplications.
        momentum: Heavy-ball momentum on the preconditioned update.
        fallback_lr: AdamW's learning rate for the rest.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
        generator: Source of the Monte-Carlo labels.
    """

    algorithm = "gauss-newton"
    whole: ClassVar[bool] = False  # one system for all tensors
    kept = (*Captured.kept, "damping_rule", "max_rows")

    def __init__(
        self,
        params: Groups,
        model: nn.Module,
        lr: Scalar = 0.1,
        *,
        damping: float = 0.01,
        damping_rule: str = "trace",
        fisher: str = "empirical",
        loss: str | Loss = "cross_entropy",
        max_rows: int = 4096,
        momentum: float = 0.0,
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
        generator: torch.Generator | None = None,
    ) -> None:
        self.damping_rule = require_damping_rule(self.algorithm, damping_rule)
        if max_rows < 1:
            raise UsageError(f"max_rows must be ≥ 1, got {max_rows}")
        self.max_rows = max_rows
        defaults = {
            "lr": lr,
            "damping_B": split_ridge(damping, 1.0)[1],
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(
            params,
            model,
            defaults,
            fisher=fisher,
            loss=loss,
            refresh=1,
            staleness=1.0,
            ema=0.0,
            generator=generator,
            fallback_lr=fallback_lr,
        )

    def _read_model(self) -> None:
        super()._read_model()
        self._blocks: dict[int, Block] = {}
        self._terms: Tensor | float = 1.0
        self._updates: dict[int, Tensor] = {}

    def _stale(self, state: Mapping[str, Any]) -> bool:
        return True  # the curvature is the current batch's

    def _collector(self, weight: Tensor, due: bool) -> FactorSums:
        return SampleRows(summed=False)

    def update_curvature(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Back-propagate the rows of J; call between forward and backward.

        Args:
            outputs: Model outputs ``[N, …, C]``, attached to the graph. With an output per position the
                exact rows are one per position and class.
            labels: Labels to use instead of sampling them (Monte-Carlo only).

        Raises:
            UsageError: The exact rows would be more than ``max_rows``.
        """
        if self._capture is None or self.fisher != "exact":
            super().update_curvature(outputs, labels)
            return
        self._require_few(outputs.numel(), len(outputs), outputs.dtype)
        self._capture.backpropagate(outputs, _apart(self.loss.exact_gradients(outputs)))

    def _require_few(self, rows: int, samples: int, dtype: torch.dtype) -> None:
        if rows > self.max_rows:
            fewer = f"set optimizer.fisher to mc ({samples} rows), " if rows > samples else ""
            size = rows**2 * BYTES.get(dtype, 4) / 2**30
            raise UsageError(
                f"{self.algorithm} would solve with {rows} rows, beyond max_rows = {self.max_rows}: "
                f"{fewer}lower train.batch_size, or raise max_rows (optimizer.args.max_rows), at {size:.1f} "
                "GiB per matrix"
            )

    def forget(self) -> None:
        """Drop what the passes captured."""
        super().forget()
        self._rows, self._blocks = {}, {}  # as large as the activations

    def before_step(self) -> None:
        """Solve for the updates of this step."""
        self._blocks = {}
        super().before_step()
        systems = [list(self._blocks)] if self.whole else [[key] for key in self._blocks]
        for system in systems if self._blocks else ():
            blocks = [self._blocks[key] for key in system]
            self._require_same(blocks)
            updates, ok = solve(blocks, self._terms, self.damping_rule)
            self._updates.update(zip(system, updates, strict=True))
            self._count(system, bool(ok))

    def refresh_layer(self, weight: Tensor, sums: FactorSums, groups: Mapping[int, dict[str, Any]]) -> None:
        """Set up the blocks of a layer's weight and bias."""
        if not isinstance(sums, SampleRows):
            sums = SampleRows()
        h, delta = sums.rows()
        self._require_few(delta.shape[0] * delta.shape[1], delta.shape[1], delta.dtype)
        self._terms = sums.output_count
        bias = self._layers[id(weight)].bias
        for parameter in (weight, bias):
            if parameter is None or parameter.grad is None or id(parameter) not in groups:
                continue
            group = groups[id(parameter)]
            if group["algorithm"] != self.algorithm:
                continue
            if not group["damping_B"] > 0:
                raise UsageError(f"damping of {self.algorithm} must be > 0, got {group['damping_B']}")
            inputs = h if parameter is weight else torch.ones_like(h[..., :1])
            matrix = self._gradient(parameter, group).reshape(delta.shape[-1], -1)
            self._blocks[id(parameter)] = Block(matrix, inputs, delta, group["damping_B"])

    def _require_same(self, blocks: Sequence[Block]) -> None:
        rows = {tuple(block.delta.shape[:2]) for block in blocks}
        if len(rows) > 1:
            raise UsageError(
                f"{self.algorithm} needs the samples on the first axis of every layer's input, but there are "
                f"{' and '.join(str(n) for n in sorted(count for _, count in rows))} of them; keep inputs as "
                "[samples, positions, features], or use gauss-newton, which takes each layer by itself"
            )

    def _count(self, system: Iterable[int], ok: bool) -> None:
        for weight in self._weights():
            if id(weight) in system:
                state = self.state[weight]
                zero = not bool(self._updates[id(weight)].any())
                state["skipped"] = state.get("skipped", 0) + int(not ok or zero)

    def precondition_weight(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the update that was solved for."""
        return self._updates.pop(id(weight))

    def precondition_bias(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the update that was solved for."""
        return self._updates.pop(id(self._layers[id(weight)].bias)).squeeze(-1)

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax and trace of JᵀJ/M of the last step's block with its ridge, as ``F``."""
        block = self._blocks.get(id(parameter))
        if block is None:
            return super().scales(parameter, group)
        K = gram(block.h, block.delta) / self._terms
        size, unit = largest_eigenvalue(K).item(), trace(K).item()
        ridge = float(block.damping) * (unit if self.damping_rule == "trace" else 1.0)
        return {"F": Scale(size, ridge, unit)}


class GaussNewtonFull(GaussNewton):
    """Gauss–Newton of the whole network: one Gram matrix, the sum over all layers, for small models.

    Width rule (derived): lr × 1; ρ × r_in/r_out *per tensor*, without which it is no μP update (see the
    module). Inside residual branches lr × 1 and ρ × 1/depth (``trace``: × depth): the sum over depth
    blocks of order 1/depth² is held at order one. Arguments as for :class:`GaussNewton`.
    """

    algorithm = "gauss-newton-full"
    whole = True

    def unit(self, parameter: Tensor) -> Tensor:
        """Return the first weight: one system, one owner."""
        first: Tensor = next(iter(self._layers.values())).weight
        return first


def _apart(directions: Tensor) -> Iterable[Tensor]:
    """Yield directions ``[K, N, …, C]`` one by one, and the positions of a sample each by itself."""
    for direction in directions:
        flat = direction.unsqueeze(1).flatten(1, -2)
        for position in range(flat.shape[1]):
            only = torch.zeros_like(flat)
            only[:, position] = flat[:, position]
            yield only.view_as(direction)
