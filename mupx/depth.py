"""Transfer over depth: how the deeper model is built, and which of its parameters lie inside branches.

With L = depth / base depth, residual branches are multiplied by 1/L, so that L times as many of them move
the residual stream as far as before; lr, damping and eps of the parameters inside follow the powers of L in
:mod:`mupx.scaling`. Outside the branches, and at the base depth, every multiplier is 1. A model without
residual branches has no such limit: its depth does not transfer, and is refused.

*Source*: the exponents are scaling.py's; for Adam they are those of N. Dey et al., "Don't be lazy:
CompleteP enables compute-efficient deep transformers", arXiv:2505.01618.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from mupx.config import Experiment
from mupx.errors import MismatchError, UsageError
from mupx.layers import Parameter
from mupx.roles import Factory, describe
from mupx.scaling import find_parametrization
from mupx.sections import DepthConfig

INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a name that counts blocks
SAME = ("kind", "role", "shape", "doubled", "in_axes", "out_axes", "growing_head")
NAME_IT = '[depth] argument = "…"'


@dataclass(frozen=True)
class Source:
    """What builds the model.

    Attributes:
        takes: The factory's parameters.
        args: The arguments it is given at the base depth.
        what: The factory in words.
    """

    takes: Mapping[str, inspect.Parameter]
    args: Mapping[str, Any]
    what: str = "the model factory"

    def value(self, argument: str, consequence: str) -> Any:
        """Return an argument's value at the base depth; None where it is not given and has no default.

        Raises:
            MismatchError: The factory takes no such argument.
        """
        anything = any(p.kind is p.VAR_KEYWORD for p in self.takes.values())
        if argument not in self.takes and not anything:
            raise MismatchError(
                f"{self.what} takes no argument {argument!r}, {consequence} (it takes: "
                f"{', '.join(self.takes)})"
            )
        default = self.takes[argument].default if argument in self.takes else inspect.Parameter.empty
        return self.args.get(argument, None if default is inspect.Parameter.empty else default)


def completed(section: DepthConfig, source: Source) -> DepthConfig:
    """Return the section with its base: what is stated, or the factory's own number of blocks.

    Raises:
        MismatchError: The factory takes no such argument, or it is no number of blocks.
        UsageError: The base is stated twice, or neither stated nor a default.
    """
    argument = section.argument
    own = source.value(
        argument, f"so its depth cannot be changed; name the one that is the number of blocks: {NAME_IT}"
    )
    if section.base is not None:
        if argument in source.args and section.base != own:
            raise UsageError(
                f"depth.base is {section.base}, but model.args.{argument} is {own}: both are the depth the "
                "values were tuned at; leave one out"
            )
        return section
    if own is None:
        raise UsageError(
            f"{source.what} has no default for {argument}, so the depth the values were tuned at is not "
            "known; give depth.base"
        )
    if isinstance(own, bool) or not isinstance(own, int) or own < 1:
        raise MismatchError(
            f"{argument} of {source.what} is {own!r}, which is no number of blocks; name the argument "
            f"that is: {NAME_IT}"
        )
    return section.model_copy(update={"base": own})


def depth_arguments(experiment: Experiment, source: Source) -> dict[str, Any]:
    """Return the arguments that build a model of the experiment's depth; none where it has no ``[depth]``.

    Under standard parametrization nothing is multiplied, branches included.

    Raises:
        MismatchError: The factory takes no number of blocks, or no multiplier of its branches.
        UsageError: The base depth is not known.
    """
    if experiment.depth.depth is None and experiment.depth.base is None:
        return {}
    section = completed(experiment.depth, source)
    found = {section.argument: section.depth or section.base}
    if section.ratio == 1.0 or not find_parametrization(experiment.scaling.parametrization).forward:
        return found
    own = source.value(
        section.branch_argument,
        "so its residual branches cannot be multiplied by base depth / depth; let it multiply them by one, "
        '1 by default, and name it: [depth] branch_argument = "…"',
    )
    if isinstance(own, bool) or not isinstance(own, (int, float)):
        raise MismatchError(
            f"{section.branch_argument} of {source.what} is {own!r} at the base depth, but must be a number"
        )
    return {**found, section.branch_argument: own / section.ratio}


def describe_at_depth(
    build_at: Callable[[Experiment], Factory], experiment: Experiment, source: Source, example: Tensor | None
) -> tuple[Parameter, ...]:
    """Describe every parameter at the experiment's depth, with the init law of the base depth.

    Args:
        build_at: Experiment → the factory of its depth.
        experiment: Widths, roles and depth.
        source: What builds the model.
        example: A batch of inputs, as for :func:`mupx.roles.describe`.

    Raises:
        MismatchError: A role cannot be told, or the model does not transfer over depth.
    """
    width = experiment.scaling.base_width

    def read(changes: Mapping[str, Any]) -> tuple[Parameter, ...]:
        build = build_at(experiment.updated(changes))
        return describe(build, width, overrides=experiment.roles, example=example)

    if experiment.depth.depth is None:
        return read({})
    # That there are no residual branches is a better reason than an argument that the factory lacks.
    adjustable = experiment.depth.argument in source.takes
    base_depth = completed(experiment.depth, source).base if adjustable else None
    shallow = {"depth.base": base_depth, "depth.depth": None}
    blocks = _branch_pattern(experiment.depth, build_at(experiment.updated(shallow)), width, source.what)
    section = completed(experiment.depth, source)
    return deepened(read({"depth.depth": None}), read({}), section, blocks)


def _branch_pattern(section: DepthConfig, build: Factory, width: int, what: str) -> str:
    """Return the name pattern of the parameters inside residual branches: stated, or the model's own."""
    if section.blocks is not None:
        return section.blocks
    with torch.random.fork_rng(devices=[]):
        declared = getattr(build(width), "residual_blocks", None)
    if not isinstance(declared, str):
        raise MismatchError(
            f"{what} declares no residual branches, and without them depth does not transfer: only a sum of "
            "branches that are multiplied by base depth / depth has a limit in depth. If it has them, say "
            'where: [depth] blocks = "blocks.*", or an attribute residual_blocks of the model'
        )
    return declared


def deepened(
    base: Sequence[Parameter], target: Sequence[Parameter], section: DepthConfig, blocks: str
) -> tuple[Parameter, ...]:
    """Return the parameters of the deeper model, with the base's init law and their depth ratio.

    Of n blocks at the base and m at the target, block j has the law of block ⌊j·n/m⌋: blocks that differ
    along the depth keep their relative position.

    Args:
        base: Parameters at the base depth.
        target: Parameters at the target depth.
        section: ``[depth]`` with its base.
        blocks: Name pattern of the parameters inside residual branches.

    Raises:
        MismatchError: The pattern matches nothing; or what it matches does not grow as the depth, or what
            it does not match grows; or deeper blocks are of another kind.
    """
    (inside, outside), (deep, rest) = _split(base, blocks), _split(target, blocks)
    if not inside:
        raise MismatchError(
            f"[depth] blocks = {blocks!r} matches no parameter ({', '.join(p.name for p in base)})"
        )
    _require_proportion(len(inside), len(deep), section, blocks)
    if len(outside) != len(rest):
        differing = sorted({p.name for p in outside} ^ {p.name for p in rest})
        raise MismatchError(
            f"depth changes what is outside the residual branches ({', '.join(differing[:3])}); "
            f"[depth] blocks = {blocks!r} must match all that is repeated, and only that"
        )
    std = _laws(inside, deep) | _laws(outside, rest)
    ratios = dict.fromkeys((p.name for p in deep), section.ratio)
    return tuple(replace(p, std=std[p.name], depth=ratios.get(p.name, 1.0)) for p in target)


def _split(parameters: Iterable[Parameter], blocks: str) -> tuple[list[Parameter], list[Parameter]]:
    inside: list[Parameter] = []
    outside: list[Parameter] = []
    for parameter in parameters:
        (inside if fnmatchcase(parameter.name, blocks) else outside).append(parameter)
    return inside, outside


def _require_proportion(base: int, target: int, section: DepthConfig, blocks: str) -> None:
    change = f"{section.argument} = {section.depth} instead of {section.base}"
    if target == base and section.ratio != 1.0:
        raise MismatchError(
            f"{change} leaves as many parameters inside residual branches ({blocks!r}) as there were, "
            f"{base}: it is not the number of blocks; name the argument that is: {NAME_IT}"
        )
    if target * (section.base or 1) != base * (section.depth or 1):
        raise MismatchError(
            f"{change} makes {base} parameters inside residual branches {target}, {target / base:g} and not "
            f"{section.ratio:g} times as many: the argument does not count equal blocks, so L cannot be told "
            f"from it; give the factory one that does and name it: {NAME_IT}"
        )


def _laws(base: Sequence[Parameter], target: Sequence[Parameter]) -> dict[str, float]:
    """Return name at the target → init std of the parameter that has its place at the base."""
    old, new = _families(base), _families(target)
    laws = {}
    for family, members in new.items():
        known = old.get(family, [])
        for j, parameter in enumerate(members):
            twin = known[j * len(known) // len(members)] if known else None
            if twin is None or any(getattr(twin, key) != getattr(parameter, key) for key in SAME):
                raise MismatchError(
                    f"depth makes {parameter.name} {list(parameter.shape)}, {parameter.role}, which no block "
                    "at the base depth has: depth may repeat blocks, not change what they are"
                )
            laws[parameter.name] = twin.std
    return laws


def _families(parameters: Iterable[Parameter]) -> dict[str, list[Parameter]]:
    families: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        families.setdefault(INDEX.sub("#", parameter.name), []).append(parameter)
    return families
