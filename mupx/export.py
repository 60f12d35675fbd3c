"""A recipe for other trainers: a Python file that needs only torch, or a JSON document.

The Python file holds the recipe's table by parameter name and three functions: ``param_groups(model)``,
``make_optimizer(model)`` and, for those who want it, ``rescale_init(model)``. SGD and AdamW become
torch's own optimizers, with weight decay converted to torch's conventions; the other optimizers are
mupx's, so there the groups are made for them and ``make_optimizer`` imports mupx.

Names in a recipe are the user's strings. In code they appear as ``repr`` only, in comments with
everything that is not printable escaped, and never in the first two lines, where Python looks for
an encoding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import mupx
from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.layers import Layer
from mupx.optim import OPTIMIZERS
from mupx.recipe import Recipe
from mupx.scaling import find_parametrization
from mupx.usercode import is_reference

VALUES = ("init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay")
# torch multiplies a decoupled weight decay by the lr; mupx's `independent` one does not depend on it.
DECOUPLED = {"independent": 'row["weight_decay"] / row["lr"]', "adamw": 'row["weight_decay"]'}
COUPLED = {"l2": 'row["weight_decay"]'}
INSIDE = "; do forward and backward pass inside `with optimizer.curvature(targets):`"
SCHEDULED = "    from mupx.refresh import parse_refresh\n"
SCALE = "\nOUTPUT_SCALE = {!r}  # tuned with the logits times this: multiply yours by it too\n"
BRANCHES = "\nBRANCH_SCALE = {!r}  # depth {} from {}: multiply your residual branches by this too\n"
DECAY_HOOK = '''

@torch.no_grad()
def decay(optimizer, *_):
    """Do what torch.optim.SGD lacks, decoupled weight decay: W <- (1 - decay * lr) W before each step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.mul_(1 - group["decay"] * group["lr"])
'''

TOP = Template("""\
# Parameter groups from a mupx recipe; names and shapes are those of one model at one width.
# Written by `mupx export`. This file needs only torch$needs.
#
# Model: $model at width $width; tuned at width $base_width.
# Base values: $values.
# Provenance: $origin.
# Rule: $rule.
# Does not transfer, keep as tuned: $kept.
#
#     model = ...                        # yours, at width $width
#     rescale_init(model)                # optional: once, on weights as your code has drawn them
#     optimizer = make_optimizer($takes)
#
# A scheduler must scale the lr of all groups by one factor: LambdaLR does, OneCycleLR(max_lr=x) does not.
$scale
import math

import torch
from torch import nn

# Absolute values per tensor; r_in and r_out are fan-in and fan-out relative to the base width.
TABLE = {
$table
}
$base
def plain(name):
    \"\"\"Return a parameter's name without what DataParallel and torch.compile put before it.\"\"\"
    while name not in TABLE and name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def tensors(model):
    \"\"\"Return name -> tensor, and refuse a model that is not the table's.\"\"\"
    found = {plain(name): parameter for name, parameter in model.named_parameters()}
    for name in [*TABLE, *found]:
        wanted = TABLE[name]["shape"] if name in TABLE else None
        shape = tuple(found[name].shape) if name in found else None
        if shape != wanted:
            raise ValueError(f"{name}: shape {shape} in the model, {wanted} in the table")
    return {name: found[name] for name in TABLE}

""")
RESCALE = Template('''

@torch.no_grad()
def rescale_init(model):
    """Scale freshly drawn tensors so that their std is the table's; constants stay. Not for trained ones."""
    tensors(model)
    for full, parameter in model.named_parameters():
        own, wanted = $own, TABLE[plain(full)]["init_std"]
        if own and wanted:
            parameter.mul_(wanted / own)
''')
OWN_STD = '''

def own_std(model, name, tensor):
    """Return the std a tensor was drawn with: that of torch's default law where it fits, else measured."""
    first = tensor.flatten()[:1]
    if (tensor == first).all() and (tensor.numel() != 1 or first.item() in (0.0, 1.0)):
        return 0.0
    measured = tensor.double().square().mean().sqrt().item()
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
        bound = 1 / math.sqrt(owner.weight[0].numel())
        law, spread = bound / math.sqrt(3), 0.2
    elif isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        law, bound, spread = 1.0, math.inf, 0.5
    else:
        return measured
    fits = abs(measured / law - 1) < 5 * math.sqrt(spread / tensor.numel())
    return law if fits and tensor.abs().max().item() <= bound * (1 + 1e-6) else measured
'''


@dataclass(frozen=True)
class Form:
    """How the groups of one optimizer are written.

    Attributes:
        group: Source of the dictionary's entries after ``params``, one string each.
        functions: Source of the functions behind ``param_groups``: ``make_optimizer`` and its helpers.
        params: Source of a group's ``params``.
        needs: What the file needs besides torch, in words.
        named: Whether the table names each tensor's algorithm and role.
        scheduled: Whether ``make_optimizer`` must know the number of steps.
    """

    group: Sequence[str]
    functions: str
    params: str = "[parameter]"
    needs: str = ""
    named: bool = False
    scheduled: bool = False


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as a document for trainers that are not Python.

    ``layers`` has the rows of ``mupx transfer --json``: absolute values, null where one does not apply.
    The other keys say how they are meant: the optimizer's structure, momentum, the weight-decay convention.
    """
    document = recipe.experiment.model_dump(mode="json")
    for private in ("search", "roles"):
        del document[private]
    rows = [layer.as_dict() for layer in recipe.layers]
    return {"version": mupx.__version__, **document, "provenance": dict(recipe.provenance), "layers": rows}


def to_torch(recipe: Recipe) -> str:
    """Return the recipe as the source of a Python file that needs only torch."""
    experiment, layers = recipe.experiment, recipe.layers
    form = FORMS.get(experiment.optimizer.name, _mupx)(experiment, layers)
    at_base = all(layer.r_in == layer.r_out == layer.depth == 1 for layer in layers)
    top = TOP.substitute(
        _comments(recipe),
        needs=form.needs,
        takes="model, steps" if form.scheduled else "model",
        table="\n".join(_row(layer, form.named) for layer in layers),
        base=_base_std(layers) if at_base else "\n",
    )
    # At the base width the law is known from the base model, whose draw need not be measured again.
    own = "BASE_STD[plain(full)]" if at_base else "own_std(model, full, parameter)"
    rescale = ("" if at_base else OWN_STD) + RESCALE.substitute(own=own)
    return top + _param_groups(form) + form.functions + rescale


FORMATS: Mapping[str, Callable[[Recipe], str | dict[str, Any]]] = {"torch": to_torch, "json": to_json}


def _sgd(experiment: Experiment, layers: Sequence[Layer]) -> Form:
    mode, momentum = experiment.optimizer.weight_decay_mode, experiment.hyperparameters.momentum
    hooked = mode in DECOUPLED and any(layer.weight_decay for layer in layers)
    decay = [*_why(mode), f'"decay": {DECOUPLED[mode]}'] if hooked else []
    coupled = [f'"weight_decay": {COUPLED[mode]}'] if mode in COUPLED else []
    hook = ["optimizer.register_step_pre_hook(decay)"] if hooked else []
    return Form(
        group=['"lr": row["lr"]', f'"momentum": {momentum!r}', *coupled, *decay],
        functions=(DECAY_HOOK if hooked else "") + _make("torch.optim.SGD(param_groups(model))", *hook),
    )


def _adamw(experiment: Experiment, layers: Sequence[Layer]) -> Form:
    mode = experiment.optimizer.weight_decay_mode
    kind, decay = ("Adam", COUPLED[mode]) if mode in COUPLED else ("AdamW", DECOUPLED[mode])
    betas = f'"betas": {tuple(experiment.optimizer.betas)!r}'
    return Form(
        group=['"lr": row["lr"]', betas, '"eps": row["eps"]', *_why(mode), f'"weight_decay": {decay}'],
        functions=_make(f"torch.optim.{kind}(param_groups(model))"),
    )


def _why(mode: str) -> list[str]:
    return [
        "# Multiplied by the lr in each step: this way the decay depends on the schedule, not on the lr."
    ][: mode == "independent"]


def _mupx(experiment: Experiment, layers: Sequence[Layer]) -> Form:
    from mupx.parametrization import STRUCTURE

    name, chosen = experiment.optimizer.name, experiment.optimizer
    if is_reference(name):
        raise UsageError(
            f"format torch writes mupx's and torch's optimizers, and {name} is your own; "
            "use --format json, or Recipe.apply(model) for its groups"
        )
    module, _, attribute = OPTIMIZERS[name].partition(":")
    offered: dict[str, Any] = {
        **chosen.args,
        "damping_rule": chosen.damping_rule or chosen.scaling_rule.default_damping,
        "loss": experiment.train.loss,
        **{key: getattr(chosen, key) for key in STRUCTURE},
    }
    accepted = inspect.signature(OPTIMIZERS.load(name)).parameters
    model = ["model=model"] if "model" in accepted else []
    phases = isinstance(chosen.refresh, str) and "refresh" in accepted
    written = {key: repr(value) for key, value in offered.items() if key in accepted}
    if phases:  # they are fractions of a training whose length is known only there
        written["refresh"] = f"parse_refresh({chosen.refresh!r}).over(steps, epoch)"
    stated = [f"{key}={value}" for key, value in written.items()]
    call = f"{attribute}({', '.join(['param_groups(model)', *model, *stated])})"
    return Form(
        params="[(name, parameter)]",
        group=[
            '''"name": f"{name} ({row['role']}, r_in {row['r_in']:g}, r_out {row['r_out']:g})"''',
            '"table_lr": row["lr"]',
            '**{key: value for key, value in row.items() if key not in ("shape", "init_std")}',
            f'"betas": {tuple(chosen.betas)!r}',
            f'"momentum": {experiment.hyperparameters.momentum!r}',
            f'"weight_decay_mode": {chosen.weight_decay_mode!r}',
        ],
        functions=_make(
            call,
            before=f"from {module} import {attribute}\n{SCHEDULED if phases else ''}\n    ",
            about=INSIDE,
            more=", steps, epoch=None" if phases else "",
        ),
        needs=f", but make_optimizer, which imports {attribute} from mupx; for\n"
        f"# another {name} take the values of TABLE",
        named=True,
        scheduled=phases,
    )


# torch's own optimizers; whatever is not here is mupx's.
FORMS: Mapping[str, Callable[[Experiment, Sequence[Layer]], Form]] = {"sgd": _sgd, "adamw": _adamw}


def _make(call: str, *after: str, before: str = "", about: str = "", more: str = "") -> str:
    lines = "".join(f"    {line}\n" for line in after)
    return (
        f'\n\ndef make_optimizer(model{more}):\n    """Return the optimizer on these groups{about}."""\n'
        f"    {before}optimizer = {call}\n{lines}    return optimizer\n"
    )


def _param_groups(form: Form) -> str:
    entries = "".join(
        f"            {entry}{'' if entry.startswith('#') else ','}\n"
        for entry in (f'"params": {form.params}', *form.group)
    )
    return (
        '\ndef param_groups(model):\n    """Return one parameter group per tensor, in table order."""\n'
        f"    return [\n        {{\n{entries}        }}\n"
        "        for (name, parameter), row in zip(tensors(model).items(), TABLE.values())\n    ]\n"
    )


def _row(layer: Layer, named: bool) -> str:
    values = {key: value for key in VALUES if (value := getattr(layer, key)) is not None}
    about = {"algorithm": layer.optimizer, "role": layer.role, "r_in": layer.r_in, "r_out": layer.r_out}
    about["reference_shape"] = tuple(layer.reference_shape)
    row = {"shape": tuple(layer.shape), **(about if named else {}), **values}
    note = "" if named else f"  # {layer.role}, r_in {layer.r_in:g}, r_out {layer.r_out:g}"
    return f"    {layer.name!r}: {row!r},{note}"


def _base_std(layers: Sequence[Layer]) -> str:
    rows = "".join(f"    {layer.name!r}: {layer.base_std!r},\n" for layer in layers)
    return f"BASE_STD = {{\n{rows}}}\n\n\n"


def _comments(recipe: Recipe) -> dict[str, str]:
    experiment = recipe.experiment
    rule, scaling, train = experiment.optimizer.scaling_rule, experiment.scaling, experiment.train
    law = find_parametrization(scaling.parametrization)
    damping = f", {experiment.optimizer.damping_rule or rule.default_damping} damping" if rule.damping else ""
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    hyper = experiment.hyperparameters
    values = {"lr": hyper.lr, **({"damping": hyper.damping} if rule.damping else {})}
    values |= hyper.model_dump(exclude_defaults=True)
    deep = experiment.depth
    branches = (
        BRANCHES.format(1 / deep.ratio, deep.depth, deep.base) if deep.ratio != 1 and law.forward else ""
    )
    origin = "; ".join(f"{key}: {value}" for key, value in recipe.provenance.items())
    return {
        "model": printable(experiment.model.name),
        "width": str(scaling.width),
        "base_width": str(scaling.base_width),
        "values": ", ".join(f"{key} {value!r}" for key, value in values.items()),
        "origin": printable(origin) or "not recorded",
        "rule": f"{rule.name}, {rule.update}{damping}; {law.name}; {rule.source}. "
        f"Formulas: `mupx rules {rule.name}`",
        "kept": printable(
            f"batch size {train.batch_size}, {length}, {train.schedule} schedule, data {experiment.data.name}"
        ),
        "scale": (SCALE.format(hyper.output_scale) if hyper.output_scale != 1 else "") + branches,
    }


def printable(text: str) -> str:
    r"""Return a text that fits in one comment: what is not printable is escaped.

    >>> printable("a\nimport os")
    'a\\nimport os'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
