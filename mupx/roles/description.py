"""Read each parameter's role, fan-in and fan-out from the model itself.

The factory is built at the base width and at twice the base width. A dimension that differs grows with
width; the layer type says which axes are fan-in. Role is a property of the architecture, whatever the
target: *input* (only fan-out grows), *hidden* (both grow, or a finite fan-out that is not the read-out),
*output* (growing fan-in and fixed fan-out, the last such used in a traced forward pass), *vector*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from mupx.errors import MismatchError, UsageError
from mupx.layers import Parameter, require_growth
from mupx.roles.axes import NORMS, Layout, factorable, growing_axes, layout_of
from mupx.roles.building import Factory, Pair, build_pair
from mupx.roles.declarations import apply_axes, bare_layout, declared, undeclared
from mupx.roles.initial import initial_std
from mupx.roles.sharing import Shared, functional_head, shared_layout, shared_names, tied_module
from mupx.roles.tracing import Trace, trace_forward
from mupx.scaling import FACTORED, Role
from mupx.sections import Declaration

QUERY_NORM = re.compile(r"(^|_)(q|qk|query)_?(norm|ln)|(norm|ln)_?(q|qk|query)($|_)")


def describe(
    build: Factory,
    base_width: int,
    *,
    overrides: Mapping[str, Any] | None = None,
    example: Tensor | None = None,
) -> tuple[Parameter, ...]:
    """Describe every parameter of ``build(width)`` at the base width and at twice that.

    Args:
        build: Factory of the model, ``build(width)``.
        base_width: The width at which multipliers are 1.
        overrides: Name pattern (``*`` and ``?``) → role or :class:`~mupx.sections.Declaration`, for what
            shapes cannot tell.
        example: A batch of inputs; with it the read-out is the last one used in a traced forward pass,
            without it the last one in order of registration.

    Raises:
        MismatchError: Nothing grows with width, or a parameter's role cannot be told.
        UsageError: The factory or the model fails, or an override matches no parameter or cannot hold.
    """
    pair = build_pair(build, base_width)
    shared = shared_names(pair.base)
    said = declared(shared, overrides or {})
    trace = None if example is None else trace_forward(pair.base, example)
    reader = _Reader(pair, shared, said, trace)
    parameters = reader.parameters()
    require_growth(parameters, base_width)
    return parameters


class _Reader:
    """One reading of a model: layouts first, then roles, which need all of them."""

    def __init__(
        self, pair: Pair, shared: Shared, said: Mapping[str, Declaration], trace: Trace | None
    ) -> None:
        self.pair, self.shared, self.said, self.trace = pair, shared, said, trace
        self.shapes = {name: tuple(p.shape) for name, p in pair.base.named_parameters()}
        self.doubled = {name: tuple(p.shape) for name, p in pair.doubled.named_parameters()}
        self.tied = {name: self._tied_head(name) for name in self.shapes}

    def parameters(self) -> tuple[Parameter, ...]:
        layouts = self._with_biases_of_their_weights({name: self._layout(name) for name in self.shapes})
        readouts = [n for n, layout in layouts.items() if self._is_readout(n, layout)]
        output = self._last(readouts)
        return tuple(self._parameter(name, layouts[name], output) for name in self.shapes)

    def _parameter(self, name: str, layout: Layout, output: str) -> Parameter:
        role, why = self._role(name, layout, output)
        return Parameter(
            name=name,
            kind=layout.kind,
            role=role,
            shape=self.shapes[name],
            doubled=self.doubled[name],
            in_axes=layout.in_axes,
            out_axes=layout.out_axes,
            std=0.0 if name in self.pair.fixed else initial_std(self.pair.base, name),
            owner=type(_owner(self.pair.base, name)).__name__,
            why=why,
            growing_head=self._growing_head(name, layout),
            tied_head=self.tied[name],
        )

    def _grows(self, name: str) -> set[int]:
        return growing_axes(self.shapes[name], self.doubled[name])

    def _layout(self, name: str) -> Layout:
        said, grows, shape = self.said.get(name), self._grows(name), self.shapes[name]
        if self.tied[name]:
            return Layout("embedding", (0,), (1,))
        spelt = {alias: self._own_layout(alias, name) for alias in self.shared[name]}
        layout = spelt[name] if said and said.role else shared_layout(name, spelt)
        if said is not None and said.fan_in is not None and said.fan_out is not None:
            layout = apply_axes(name, shape, layout, said.fan_in, said.fan_out)
        elif said is not None and said.role and layout.unknown:
            layout = bare_layout(name, shape, layout, cast(Role, said.role), grows)
        if grows and layout.unknown:
            raise undeclared(name, shape, layout)
        if said and said.role == "vector" and layout.kind in FACTORED:
            layout = replace(layout, kind="vector")
        if not (said and said.role) and grows - {*layout.in_axes, *layout.out_axes}:
            raise undeclared(name, shape, Layout("", unknown=_NEITHER))
        return layout

    def _own_layout(self, alias: str, name: str) -> Layout:
        path, _, leaf = alias.rpartition(".")
        owner = self.pair.base.get_submodule(path)
        factored = factorable(owner) and (self.trace is None or path in self.trace.called)
        factored = factored and len(self.shared[name]) == 1  # one owner, one pair of factors
        return layout_of(owner, leaf, self.pair.doubled.get_submodule(path), factored)

    def _with_biases_of_their_weights(self, layouts: dict[str, Layout]) -> dict[str, Layout]:
        """Return the layouts; a bias whose weight K-FAC does not train has no solver there either."""
        result = dict(layouts)
        for name, layout in layouts.items():
            weight = name.removesuffix("bias") + "weight"
            if layout.kind in FACTORED and name.endswith("bias"):
                trained = weight in layouts and self.pair.base.get_parameter(weight).requires_grad
                if not trained or layouts[weight].kind not in FACTORED:
                    result[name] = replace(layout, kind="vector")
        return result

    def _tied_head(self, name: str) -> str:
        said = self.said.get(name)
        functional = functional_head(self.pair.base, name, self.trace)
        if said is not None and said.role == "tied":
            return tied_module(self.pair.base, self.shared[name])
        if functional and not (said and said.role) and self._grows(name):
            raise MismatchError(
                f"{name} is looked up as an embedding and is also the matrix of a head, which needs its "
                f"logits times 1/r_in. Give the head a module, an nn.Linear that shares {name}, and "
                'declare it: [roles] "<head>.weight" = "tied"; or multiply the logits by base width / width '
                f'in the model and add [roles] "{name}" = "input"'
            )
        return ""

    def _is_readout(self, name: str, layout: Layout) -> bool:
        if layout.inner or (name in self.said and self.said[name].role):
            return False
        grows = self._grows(name)
        return bool(grows & {*layout.in_axes}) and not grows & {*layout.out_axes}

    def _last(self, readouts: list[str]) -> str:
        """Return the read-out among the candidates; none where the user has named one or tied the head."""
        if not readouts or any(s.role == "output" for s in self.said.values()) or any(self.tied.values()):
            return ""
        if self.trace is None:
            return readouts[-1]
        uses = self.trace.last_use
        return max(readouts, key=lambda n: (uses.get(n, -1), readouts.index(n)))

    def _role(self, name: str, layout: Layout, output: str) -> tuple[Role, str]:
        said = self.said.get(name)
        if self.tied[name]:
            return "input", f"tied to {self.tied[name]} in [roles]: an input, the head's logits times 1/r_in"
        if said is not None and said.role is not None:
            return cast(Role, said.role), "declared in [roles]"
        if not layout.in_axes:
            return "vector", "it has no fan-in"
        grows = self._grows(name)
        if not grows & {*layout.in_axes}:
            return "input", "only fan-out grows" if grows else "nothing grows"
        if grows & {*layout.out_axes}:
            return "hidden", "fan-in and fan-out grow"
        order = "order of registration" if self.trace is None else "the traced forward pass"
        if name == output:
            return "output", f"fan-in grows, fan-out is fixed, and it is the last such in {order}"
        last = f"the last such in {order} is {output}" if output else "the read-out is another"
        last = "it feeds the recurrence" if layout.inner else last
        return "hidden", f"fan-in grows, fan-out is fixed, but {last}: hidden with r_out = 1"

    def _growing_head(self, name: str, layout: Layout) -> bool:
        said = self.said.get(name)
        if said is None or not said.growing_head:
            return layout.growing_head
        if not self._grows(name) & {*layout.out_axes}:
            raise UsageError(f"[roles] says growing_head of {name}, but its fan-out does not grow with width")
        norm = _query_norm(self.pair.base, name)
        if norm:
            raise MismatchError(
                f"[roles] says growing_head of {name}, but {norm} normalises the queries: no scale of the "
                "projection reaches the logits; divide them by d_head in the model, or keep the head size "
                "fixed and grow the number of heads"
            )
        return True


_NEITHER = "an axis that is neither fan-in nor fan-out grows"


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _query_norm(model: nn.Module, name: str) -> str:
    """Return the name of a normalisation of the queries beside the projection that owns ``name``."""
    parent = name.rpartition(".")[0].rpartition(".")[0]
    for child, module in model.get_submodule(parent).named_children():
        known = isinstance(module, NORMS) or "norm" in type(module).__name__.lower()
        if known and QUERY_NORM.search(child.lower()):
            return f"{parent}.{child}" if parent else child
    return ""
