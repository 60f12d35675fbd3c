"""SOAP: Adam in the eigenbasis of Shampoo's row and column second moments (arXiv:2409.11321).

For a matrix gradient G ``[d_out, d_in]``, with L and R the running averages of G Gᵀ and Gᵀ G and Q_L, Q_R
their eigenvectors: U = Q_L · Adam(Q_Lᵀ G Q_R) · Q_Rᵀ. In the order of the authors' implementation:

1. the first gradient only makes L, R and, by a full decomposition, the bases: the weights stay;
2. G is rotated into the bases made from earlier gradients, Adam's direction is rotated back, and done;
3. after the step L and R take G in; every ``refresh`` steps one power iteration and a QR decomposition
   follow their eigenvectors: columns ordered by estimated eigenvalue, Q ← qr(L Q). Adam's m is rotated
   from the old basis into the new one, the entries of v only follow the order of the columns.

Conventions: eps is added to √v before the bias correction, as the authors do; convolution weights are
flattened to ``[out, in·k·k]`` at every size (the authors rotate each axis, or merge axes while their
product is small, which would make narrow and wide layers run different algorithms); weight decay acts
before the step and in the first one too. Where L or R lacks rank (a batch smaller than the layer), the
basis of its null space is arbitrary and rounding decides it, in the published algorithm as here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mupx.blocks import BOTH, blocks_of
from mupx.errors import UsageError
from mupx.linalg import Scalar, eigh, gram, largest_eigenvalue, trace
from mupx.optim.base import DEFAULTS, Groups, Scale, finite_or, sort_groups
from mupx.optim.blockwise import Blockwise
from mupx.padded import qr
from mupx.refresh import Refresh, refresh_interval, require_refresh
from mupx.running_means import adam_direction, running
from mupx.tiles import in_parts


def rotate(matrix: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Return Q_Lᵀ M Q_R of ``[..., d_out, d_in]``; None leaves a side as it is."""
    matrix = matrix if Q_L is None else Q_L.mT @ matrix
    return matrix if Q_R is None else matrix @ Q_R


def rotate_back(matrix: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """Return Q_L M Q_Rᵀ, the inverse of :func:`rotate`."""
    matrix = matrix if Q_L is None else Q_L @ matrix
    return matrix if Q_R is None else matrix @ Q_R.mT


def eigenbasis(factor: Tensor) -> Tensor:
    """Return the eigenvectors of ``[..., d, d]`` as columns, the largest eigenvalue first."""
    return eigh(factor)[1].mT.flip(-2).mT


def followed(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return (basis, order) after one power iteration: qr(M Q) with columns by estimated eigenvalue.

    Bases are column-major, as LAPACK returns them: all that is done to single columns is quicker so.

    Args:
        factor: M, symmetric, ``[..., d, d]``.
        basis: Q, an orthogonal approximation of its eigenvectors, ``[..., d, d]``.

    Returns:
        The new basis, and the old column ``[..., d]`` in each place of it.
    """
    columns = basis.mT.contiguous()
    image = columns @ factor
    order = torch.linalg.vecdot(columns, image).argsort(dim=-1, descending=True)
    return qr(ordered(image, order, -2).mT), order


def ordered(matrix: Tensor, order: Tensor, axis: int) -> Tensor:
    """Return the rows or columns of ``[..., m, n]`` in the order ``[..., m or n]``; axis −2 or −1."""
    if order.dim() == 1:
        return matrix.index_select(axis, order)
    along = order.unsqueeze(-1 if axis == -2 else -2)
    return matrix.gather(axis, along.expand(matrix.shape))


class SOAP(Blockwise):
    """Adam in Shampoo's eigenbasis.

    Width rule (arXiv:2512.05620, 2603.00541): lr × (r_out/r_in)^½ · n_blocks^-½, eps × its counterpart
    (r_in/r_out)^½ · n_blocks^-½.

    Args:
        params: Parameters or groups; tensors with fewer than two axes go to Adam, which leaves out the
            first gradient as well: with ``fallback_lr`` equal to ``lr`` the step is the authors'.
        lr: Learning rate.
        betas: Adam's decay rates, in the eigenbasis and for the fallback.
        eps: Added to √v, in the units of the gradient.
        ema: Decay per step of the running averages L and R (the authors' ``shampoo_beta``).
        refresh: Interval between updates of the eigenbases, in steps, or a function step -> interval (of
            phases: :func:`mupx.refresh.parse_refresh`).
        blocks: Longest block edge (see :mod:`mupx.blocks`); 0 means one block.
        max_precond_dim: Longest side that is rotated; 0 means any. A side that grows with width must not
            cross it: cut it into blocks instead.
        momentum: Heavy-ball momentum on the update, beside Adam's own mean.
        graft: Whose update's norm this one takes: ``none``, ``sgd``, ``adam`` or ``rms``; before momentum
            (see :mod:`mupx.update_norm`).
        normalise: ``spectral`` divides the update by its largest singular value; or ``none``.
        fallback_lr: Adam's learning rate for biases and gains.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
    """

    algorithm = "soap"
    of_blocks = ("L", "R", "Q_L", "Q_R")
    kept = ("ema", "refresh", "blocks", "max_precond_dim")

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        ema: float = 0.95,
        refresh: Refresh = 10,
        blocks: int = 0,
        max_precond_dim: int = 10_000,
        momentum: float = 0.0,
        graft: str = "none",
        normalise: str = "none",
        fallback_lr: Scalar = 1e-3,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        require_refresh(refresh, 1.0, ema)
        if blocks < 0 or max_precond_dim < 0:
            raise UsageError(
                f"blocks and max_precond_dim must be ≥ 0 (0: no limit), got {blocks=}, {max_precond_dim=}"
            )
        self.ema, self.refresh = ema, refresh
        self.blocks, self.max_precond_dim = blocks, max_precond_dim
        defaults = {
            **DEFAULTS,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "graft": graft,
            "normalise": normalise,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(sort_groups(params, fallback_lr, lambda p: p.dim() >= 2), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; a growing side that is too long to be rotated is refused.

        Raises:
            UsageError: A hyperparameter is out of range, or the rule would not be that of the proxy.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["algorithm"] == self.algorithm:
            for parameter in group["params"]:
                self._refuse_too_long(parameter, group)

    def _refuse_too_long(self, parameter: Tensor, group: dict[str, Any]) -> None:
        # Of a hidden tensor both sides grow, where their ratios say so, and of a read-out the input side.
        # An input tensor has one side that grows, the first of a Linear and the last of an Embedding.
        grows = {
            "L": group.get("role") == "hidden" and group.get("r_out", 1) != 1,
            "R": group.get("role") in ("hidden", "output") and group.get("r_in", 1) != 1,
        }
        rows, columns = next(blocks_of(parameter.shape, self.blocks, self.sides))
        for side, part in (("L", rows), ("R", columns)):
            length = part.stop - part.start
            if side in self.sides and grows[side] and 0 < self.max_precond_dim < length:
                raise UsageError(
                    f"{group.get('name', 'a parameter')}: a side of {length} is longer than max_precond_dim "
                    f"= {self.max_precond_dim} and grew with width: the proxy rotates what this model "
                    "would not; raise max_precond_dim (0: no limit), or set blocks, from the base width on"
                )

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Adam's direction in the eigenbasis, rotated back; zero at the first gradient."""
        state, matrix = self.state[parameter], gradient.flatten(1)
        first = "step" not in state
        state["step"] = 0 if first else state["step"] + 1
        if first:
            self._observe(state, matrix, first=True)
            return torch.zeros_like(gradient)
        mean = state.pop("mean", None)  # there where the last step made the bases anew
        if mean is not None:
            state["exp_avg"] = self._blockwise(rotate, state, mean)
        update = adam_direction(
            self._blockwise(rotate, state, matrix),
            running(state, "exp_avg", matrix),
            running(state, "exp_avg_sq", matrix),
            state["step"],
            group["betas"],
            _uncorrected_eps(group, state["step"]),
        )
        update = self._blockwise(rotate_back, state, update)
        due = self._due(state)
        if due:
            # m waits for its new bases in those of the weights: where every step makes them anew it never
            # has to be rotated back.
            own = state.pop("exp_avg")
            state["mean"] = (
                self._blockwise(rotate_back, state, own)
                if mean is None
                else mean.lerp_(matrix, 1 - group["betas"][0])
            )
            state["refreshed_at"] = state["step"]
        self._observe(state, matrix, due=due)
        return self.momentum(parameter, update.view_as(gradient), group)

    def adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Adam's direction for what is no matrix, from the second gradient on, like the rest."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            return torch.zeros_like(gradient)
        return super().adam(parameter, gradient, {**group, "eps": _uncorrected_eps(group, state["step"] + 1)})

    def _blockwise(self, turn: Callable[..., Tensor], state: dict[str, Any], matrix: Tensor) -> Tensor:
        result = torch.empty_like(matrix)
        for index, tile in enumerate(self.tiles(matrix)):
            bases = (state.get(f"Q_{side}{index}") for side in "LR")
            tile.paste(turn(tile.cut(matrix), *bases), result)
        return result

    def _observe(
        self, state: dict[str, Any], matrix: Tensor, *, first: bool = False, due: bool = False
    ) -> None:
        """Take a gradient into L and R, and make the first bases or let them follow."""
        for index, tile in enumerate(self.tiles(matrix)):
            blocks = tile.cut(matrix)
            for side, oriented in (("L", blocks), ("R", blocks.mT)):
                if side not in self.sides or 0 < self.max_precond_dim < oriented.shape[-2]:
                    continue
                name = f"{side}{index}"
                factor = state[name] = _averaged(state.get(name), gram(oriented.mT), self.ema)
                if not (first or due):
                    continue
                turned = [
                    (eigenbasis(factor[part]),) if first else followed(factor[part], state[f"Q_{name}"][part])
                    for part in in_parts(factor)
                ]
                state[f"Q_{name}"], *order = (
                    each[0] if len(each) == 1 else torch.cat(each) for each in zip(*turned, strict=True)
                )
                if due:
                    square = tile.cut(state["exp_avg_sq"])
                    tile.paste(ordered(square, order[0], -2 if side == "L" else -1), state["exp_avg_sq"])

    def _due(self, state: dict[str, Any]) -> bool:
        # A number is the authors' interval, from the first step on: no age rule shortens it.
        step, interval = state["step"], self.refresh
        interval = interval if isinstance(interval, int) else refresh_interval(step, interval, 1.0)
        return bool(step - state.get("refreshed_at", 0) >= interval)

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax and trace of L and R, the largest over blocks, and as ``w`` √v̂ against eps.

        In the eigenbasis few entries hold the whole gradient, so it is the largest entry of √v̂ that counts,
        in root mean square over blocks. With one side rotated the symbol is ``wL`` or ``wR``.
        """
        state = self.state.get(parameter, {})
        if group["algorithm"] != self.algorithm or "exp_avg_sq" not in state:
            return {} if state.get("step") == 0 else super().scales(parameter, group)
        result = {}
        for side in self.sides:
            factors = [value for key, value in state.items() if key[0] == side and key[1:].isdigit()]
            if factors:
                sizes, traces = (
                    max(f(factor).max().item() for factor in factors) for f in (largest_eigenvalue, trace)
                )
                result[side] = Scale(sizes, None, traces)
        squares = state["exp_avg_sq"]
        largest = [tile.cut(squares).amax((-2, -1)).flatten() for tile in self.tiles(squares)]
        square = torch.cat(largest).mean().item() / (1 - group["betas"][1] ** state["step"])
        result["w" if self.sides == BOTH else f"w{self.sides}"] = Scale(
            math.sqrt(square), float(group["eps"])
        )
        return result


class LeftSOAP(SOAP):
    """SOAP with the output side alone rotated; lr × r_out^½ · r_in^-1 · n_blocks^-½.

    Parameters are taken to have that side first. An embedding has it second: give it a group with
    ``"algorithm": "adamw"``, as :func:`mupx.param_groups` does.
    """

    algorithm = "soap-left"
    sides = "L"


class RightSOAP(SOAP):
    """SOAP with the input side alone rotated, the second of a parameter; lr × r_in^-½ · n_blocks^-½.

    As for :class:`LeftSOAP`, an embedding is to go to AdamW.
    """

    algorithm = "soap-right"
    sides = "R"


def _uncorrected_eps(group: dict[str, Any], step: int) -> Scalar:
    """Return the eps that, added after the bias correction of √v, is the group's added before it."""
    eps: Scalar = group["eps"]
    return eps / math.sqrt(1 - group["betas"][1] ** step)


def _averaged(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    old = torch.zeros_like(new) if old is None else old
    average = finite_or(torch.lerp(old, new, 1 - decay), old)
    return old if average is None else average
