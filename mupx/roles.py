"""Read each parameter's role, fan-in and fan-out from the model itself.

The factory is built at the base width and at twice the base width. A dimension that differs grows with
width; the layer type says which axes are fan-in. Role is a property of the architecture, whatever the
target: *input* (only fan-out grows), *hidden* (both grow, or a finite fan-out that is not the read-out),
*output* (the last module with growing fan-in and fixed fan-out in a traced forward pass), *vector*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mupx.errors import MismatchError, UsageError
from mupx.layers import Parameter, Shape, require_growth
from mupx.scaling import Role

Factory = Callable[[int], nn.Module]
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BARE = ("matrix", "vector")  # parameters no known layer owns
BUILD_SEED = 0


@dataclass(frozen=True)
class Layout:
    """What owns a tensor and which of its axes are fan-in and fan-out."""

    kind: str
    in_axes: Shape
    out_axes: Shape


def describe(
    build: Factory,
    base_width: int,
    *,
    overrides: Mapping[str, Role] | None = None,
    example: Tensor | None = None,
) -> tuple[Parameter, ...]:
    """Describe every parameter of ``build(width)`` at the base width and at twice that.

    Args:
        build: Factory of the model, ``build(width)``.
        base_width: The width at which multipliers are 1.
        overrides: Name pattern (``*`` and ``?``) → role, for what the shapes cannot tell.
        example: A batch of inputs; with it the read-out is the last one in a traced forward pass,
            without it the last one in order of registration.

    Raises:
        MismatchError: Nothing grows with width, or a parameter's role cannot be told.
        UsageError: An override matches no parameter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BUILD_SEED)
        base = build(base_width)
        doubled = _shapes(build, 2 * base_width)
        order = _call_order(base, example)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    if shapes.keys() != doubled.keys():
        different = sorted(shapes.keys() ^ doubled.keys())
        raise MismatchError(
            f"width changes which parameters exist ({', '.join(different[:3])}); "
            "the factory must build the same layers at every width"
        )
    _refuse_tied(base)
    chosen = _overridden(shapes, overrides or {})
    layouts = {name: _layout(owner, leaf) for name, owner, leaf in _owned(base)}
    layouts |= {
        name: _bare_layout(layouts[name], role, _growing(shapes[name], doubled[name]), len(shapes[name]))
        for name, role in chosen.items()
        if layouts[name].kind in BARE
    }
    inferred = {name: layout for name, layout in layouts.items() if name not in chosen}
    roles = _roles(shapes, doubled, inferred, order) | chosen
    parameters = tuple(
        Parameter(
            name=name,
            kind=layouts[name].kind,
            role=roles[name],
            shape=shapes[name],
            doubled=doubled[name],
            in_axes=layouts[name].in_axes,
            out_axes=layouts[name].out_axes,
            std=initial_std(base, name),
        )
        for name in shapes
    )
    require_growth(parameters, base_width)
    return parameters


def initial_std(model: nn.Module, name: str) -> float:
    """Return the std of a parameter's initial law.

    For torch's defaults — U(−1/√fan_in, 1/√fan_in), that is 1/√(3 fan_in), of Linear and convolutions,
    N(0, 1) of embeddings — the law's; otherwise it is measured on the tensor; 0 for constants.
    """
    tensor = model.get_parameter(name).detach()
    default = _default_law(model.get_submodule(name.rpartition(".")[0]))
    if _constant(tensor, drawn=default is not None):
        return 0.0
    measured = float(tensor.double().square().mean().sqrt())
    if default is None:
        return measured
    law, bound, spread = default
    close = abs(measured / law - 1) < 5 * math.sqrt(spread / tensor.numel())
    return law if close and float(tensor.abs().max()) <= bound * (1 + 1e-6) else measured


def _default_law(owner: nn.Module) -> tuple[float, float, float] | None:
    """Return (std, bound, n × relative variance of the root mean square of n entries) of torch's default."""
    if isinstance(owner, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        # torch computes fan-in from axis 1 for every layer type, transposed convolutions included.
        bound = 1 / math.sqrt(owner.weight[0].numel())
        return bound / math.sqrt(3), bound, 0.2
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return 1.0, math.inf, 0.5
    return None


def _constant(tensor: Tensor, drawn: bool) -> bool:
    if tensor.numel() == 1 and drawn:
        # The bias of one output looks constant but is drawn all the same.
        return float(tensor) in (0.0, 1.0)
    return tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all())


def _shapes(build: Factory, width: int) -> dict[str, Shape]:
    try:
        with torch.device("meta"):
            model = build(width)
    except (RuntimeError, NotImplementedError):
        # Some constructors read values (.item()); build those for real.
        model = build(width)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _owned(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    result = []
    for name, _ in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        result.append((name, model.get_submodule(path), leaf))
    return result


def _growing(base: Shape, doubled: Shape) -> set[int]:
    return {i for i, (a, b) in enumerate(zip(base, doubled, strict=True)) if a != b}


def _bare_layout(layout: Layout, role: Role, growing: set[int], axes: int) -> Layout:
    """Tell fan-in from fan-out of a bare parameter by the role the user gave it."""
    fixed = tuple(sorted({*range(axes)} - growing))
    grown = tuple(sorted(growing))
    if role == "vector":
        return Layout(layout.kind, (), grown)
    if role == "input":
        return Layout(layout.kind, fixed, grown)
    if role == "output":
        return Layout(layout.kind, grown, fixed)
    return Layout(layout.kind, tuple(range(1, axes)), (0,))


def _layout(owner: nn.Module, leaf: str) -> Layout:
    tensor: Tensor = getattr(owner, leaf)
    kernel = tuple(range(2, tensor.dim()))
    if isinstance(owner, nn.Linear):
        return _weight_or_bias("linear", leaf, Layout("linear", (1,), (0,)))
    if isinstance(owner, CONVOLUTIONS):
        plain = isinstance(owner, nn.Conv2d) and owner.groups == 1 and owner.padding_mode == "zeros"
        kind = "conv2d" if plain else "conv"
        return _weight_or_bias(kind, leaf, Layout(kind, (1, *kernel), (0,)))
    if isinstance(owner, TRANSPOSED):
        return _weight_or_bias("conv", leaf, Layout("conv", (0, *kernel), (1,)))
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Layout("embedding", (0,), (1,))
    if isinstance(owner, NORMS):
        return Layout("norm", (), (tensor.dim() - 1,))
    if tensor.dim() == 2:
        return Layout("matrix", (1,), (0,))
    return Layout("vector", (), (tensor.dim() - 1,) if tensor.dim() else ())


def _weight_or_bias(kind: str, leaf: str, weight: Layout) -> Layout:
    return Layout(f"{kind}.bias", (), (0,)) if leaf == "bias" else weight


def _call_order(model: nn.Module, example: Tensor | None) -> list[str]:
    """Return module names in order of their (last) call, or of registration without an example."""
    names = {module: name for name, module in model.named_modules()}
    if example is None:
        return list(names.values())
    calls: list[str] = []
    handles = [m.register_forward_hook(lambda m, *_: calls.append(names[m])) for m in names]
    try:
        with torch.no_grad():
            floating = example.is_floating_point()
            model(example.to(next(model.parameters()).dtype) if floating else example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _roles(
    shapes: Mapping[str, Shape], doubled: Mapping[str, Shape], layouts: Mapping[str, Layout], order: list[str]
) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    readouts: list[str] = []
    for name, layout in layouts.items():
        grows = _growing(shapes[name], doubled[name])
        grows_in, grows_out = bool(grows & {*layout.in_axes}), bool(grows & {*layout.out_axes})
        if grows - {*layout.in_axes, *layout.out_axes}:
            raise _unknown_role(name, shapes[name], "an axis that is neither fan-in nor fan-out grows")
        if not layout.in_axes:
            roles[name] = "vector"
        elif layout.kind == "matrix" and grows:
            raise _unknown_role(name, shapes[name], "a bare parameter does not say which axis is fan-in")
        else:
            roles[name] = "hidden" if grows_in else "input"
            if grows_in and not grows_out:
                readouts.append(name)
    if readouts:
        position = {module: i for i, module in enumerate(order)}
        roles[max(readouts, key=lambda n: position.get(n.rpartition(".")[0], -1))] = "output"
    return roles


def _overridden(shapes: Mapping[str, Shape], overrides: Mapping[str, Role]) -> dict[str, Role]:
    result: dict[str, Role] = {}
    for pattern, role in overrides.items():
        matched = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"[roles] pattern {pattern!r} matches no parameter (parameters: {', '.join(shapes)})"
            )
        result |= dict.fromkeys(matched, role)
    return result


def _refuse_tied(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            raise MismatchError(
                f"{name} shares its tensor with {first}: one tensor, two roles, and the head would need "
                "a 1/r_in multiplier; untie them, or build the model with separate tensors"
            )


def _unknown_role(name: str, shape: Shape, reason: str) -> MismatchError:
    return MismatchError(
        f"cannot tell the role of {name} {list(shape)}: {reason}; "
        f'add a line to the config: [roles] "{name}" = "input" | "hidden" | "output" | "vector"'
    )
