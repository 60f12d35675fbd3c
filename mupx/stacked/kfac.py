"""K-FAC and FOOF of several models at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mupx.layer_rows import factorable_layers
from mupx.linalg import eigh
from mupx.lowrank import CHOLESKY, EIGH
from mupx.optim.base import Base, running_average
from mupx.optim.kronecker import Kronecker
from mupx.preconditioning import (
    Solver,
    build_solver,
    damped_side,
    precondition,
    precondition_bias,
    ridge_of,
    ridges,
    side_of,
    times,
)
from mupx.refresh import averaged_at, averages, needs_refresh, needs_statistics, refresh_interval
from mupx.stacked.base import Factors, Group, Rows, Stacked, pick


class StackedKFAC(Stacked):
    """K-FAC with the empirical Fisher."""

    shell: Kronecker

    def __init__(self, model: nn.Module, optimizers: Sequence[Base], values: dict[str, Tensor]) -> None:
        super().__init__(model, optimizers, values)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.weights: dict[str, str] = {}  # layer → its weight, and so on
        self.biases: dict[str, str] = {}
        self.layer_of: dict[str, str] = {}
        for layer, module in factorable_layers(model).items():
            weight, bias = names[id(module.weight)], names.get(id(module.bias), "")
            if self.groups[weight]["algorithm"] == self.shell.algorithm:
                self.weights[layer], self.biases[layer] = weight, bias
                self.layer_of |= dict.fromkeys((weight, bias), layer)
        self.averages: dict[str, dict[str, Tensor]] = {layer: {} for layer in self.weights}
        self.solvers: dict[str, Solver] = {}

    @property
    def captured(self) -> list[str]:
        """The layers it treats, where new factors are averaged in."""
        shell = self.shell
        due = needs_statistics(self.clock, shell.refresh, shell.staleness, shell.statistics)
        return list(self.weights) if due else []

    @property
    def by_rows(self) -> dict[str, str]:
        """The layers whose input side is kept in an eigenbasis: with H in it, so is the gradient."""
        return {
            layer: self.weights[layer]
            for layer, solver in self.solvers.items()
            if "inner_A" in solver and self.takes_rows(layer)
        }

    def takes_rows(self, layer: str) -> bool:
        """Whether rows can stand for the gradient of a layer: not where weight decay is a part of it."""
        group = self.groups[self.weights[layer]]
        adds = group["weight_decay_mode"] == "l2" and isinstance(group["weight_decay"], Tensor)
        return layer in self.rows_suffice and not adds

    def keep(self, members: Tensor) -> None:
        """Go on with some of the members only."""
        super().keep(members)
        for kept in (self.averages, self.solvers):
            for layer, entries in kept.items():
                kept[layer] = pick(entries, members)

    def refresh(self, factors: Factors) -> None:
        """Average new factors in and rebuild the solvers, each where its step has come."""
        shell, clock, step = self.shell, self.clock, self.clock["step"]
        if factors:
            seen, gap = averages(clock), step - averaged_at(clock)
            for layer, pair in factors.items():
                kept = self.averages[layer]
                for side in shell.sides:
                    kept[side] = running_average(kept.get(side), pair[side], shell.ema, seen, gap)
            clock |= {"averages": seen + 1, "averaged_at": step}
        if needs_refresh(clock, shell.refresh, shell.staleness):
            clock["refreshed_at"] = step
            self.solvers = {layer: self.solver(layer) for layer in self.weights}

    def solver(self, layer: str) -> Solver:
        """Return what preconditions one layer of all members until the next refresh."""
        group, bias = self.groups[self.weights[layer]], self.groups.get(self.biases[layer])
        A, B = self.averages[layer]["A"], self.averages[layer]["B"]
        ridge_A, ridge_B, rule = group["damping_A"], group["damping_B"], self.shell.damping_rule
        if rule == "exact":
            return build_solver(A, B, None, ridge_B, None if bias is None else bias["damping_B"], rule)[0]
        rho_A, rho_B = ridges(A, B, ridge_A, ridge_B, rule)
        return {**self.input_side(layer, A, rho_A), **damped_side("B", B, rho_B, solve=False)[0]}

    def input_side(self, layer: str, A: Tensor, rho: Tensor) -> Solver:
        """Return (A + ρ I)⁻¹ of all members, in the eigenbasis of a factor they share where that pays."""
        shell, (members, d_out) = self.shell, self.values[self.weights[layer]].shape[:2]
        interval = refresh_interval(self.clock["step"], shell.refresh, shell.staleness)
        products = 0 if self.takes_rows(layer) else interval
        if len(A) == members or not eigenbasis_pays(A.shape[-1], d_out, members, products):
            return damped_side("A", A.expand(members, -1, -1), rho, solve=False)[0]
        values, vectors, ok = eigh(A)
        return {"vectors_A": vectors, "inner_A": ok[:, None] / (values + rho[:, None])}

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the momentum of the preconditioned gradient."""
        layer = self.layer_of[name]
        if name == self.biases[layer]:
            update = self.precondition_bias(gradient, self.solvers[layer])
        else:
            update = self.precondition(gradient.flatten(2), self.solvers[layer]).view_as(gradient)
        return self.momentum(name, update, group)

    def direction_by_rows(self, name: str, gradient: Rows, group: Group) -> Tensor:
        """Return the momentum of the preconditioned gradient, in the eigenbasis without a product."""
        solver = self.solvers[self.layer_of[name]]
        if "inner_A" not in solver:  # no longer worth it
            update = self.precondition(gradient.product, solver)
        else:
            Q = solver["vectors_A"][0]
            G = gradient._replace(inputs=gradient.inputs @ Q).product
            update = self.output_side(G, solver).mul_(solver["inner_A"][:, None]) @ Q.mT
        return self.momentum(name, update.view_as(self.values[name]), group)

    def precondition(self, gradient: Tensor, solver: Solver) -> Tensor:
        """Return (B + ρ_B)⁻¹ G (A + ρ_A)⁻¹, or the exactly damped G."""
        if "inner" in solver:
            return precondition(gradient, solver)
        return times_input_side(self.output_side(gradient, solver), solver)

    def output_side(self, gradient: Tensor, solver: Solver) -> Tensor:
        """Return (B + ρ_B)⁻¹ G."""
        return side_of(solver, "B") @ gradient

    def precondition_bias(self, gradient: Tensor, solver: Solver) -> Tensor:
        """Return (B + ρ_B)⁻¹ g."""
        return precondition_bias(gradient, solver)


class StackedFOOF(StackedKFAC):
    """FOOF: the input side alone."""

    def solver(self, layer: str) -> Solver:
        """Return (A + ρ_A)⁻¹."""
        A, damping = self.averages[layer]["A"], self.groups[self.weights[layer]]["damping_A"]
        return self.input_side(layer, A, ridge_of(A, damping, self.shell.damping_rule))

    def output_side(self, gradient: Tensor, solver: Solver) -> Tensor:
        """Return G."""
        return gradient

    def precondition_bias(self, gradient: Tensor, solver: Solver) -> Tensor:
        """Return g."""
        return gradient


def times_input_side(matrix: Tensor, solver: Solver) -> Tensor:
    """Return X (A + ρ_A)⁻¹ for ``[P, d_out, d_in]``."""
    if "inner_A" not in solver:
        return times(matrix, side_of(solver, "A"))
    Q = solver["vectors_A"][0]
    return (matrix @ Q).mul_(solver["inner_A"][:, None]) @ Q.mT


def eigenbasis_pays(d: int, d_out: int, members: int, products: int) -> bool:
    """Whether one decomposition of a factor that all members share is cheaper than an inverse for each.

    All A + ρ I have the eigenvectors of A, so one decomposition serves every ridge; but a gradient that is
    not made in that basis is multiplied by it twice, where it would be multiplied by an inverse once.

    Args:
        d: Units on the side of the factor.
        d_out: Units on the other side.
        members: Number of ridges.
        products: Products more until the next refresh, of a gradient with the eigenvectors.
    """
    return EIGH * d**3 + 2 * d**2 * d_out * members * products < members * CHOLESKY * d**3
