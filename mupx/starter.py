"""What ``mupx init`` writes: a configuration that shows every key, and a model to begin with.

Sections, their descriptions, defaults and allowed values are read from :mod:`mupx.config`; only what a key
means in one sentence is said here. A key that is shown but not set starts with ``#``, without a space, and
stands at its default, or at an example where the default is to leave it out.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mupx.config import Experiment
from mupx.datasets import DATASETS
from mupx.models import MODELS
from mupx.optim import OPTIMIZERS
from mupx.scaling import PARAMETRIZATIONS, ROLES

CONFIG_FILE, MODEL_FILE = "mupx.toml", "model.py"
COLUMNS = 100
HEAD = f"""\
# Configuration of mupx; start with: mupx tune {CONFIG_FILE}
# A line such as #key = value shows a key at its default: remove the # to change it. Flags win over
# --set section.key=value, that over the environment (MUPX_SECTION__KEY), that over this file.
"""
# What the file sets; everything else is shown at its default.
CHOSEN: Mapping[str, Any] = {
    "model.name": f"{MODEL_FILE}:build",
    "data.name": f"{MODEL_FILE}:load",
    "optimizer.name": "kfac",
    "search.trials": 16,
    "scaling.base_width": 64,
}
# Shown for keys that have no default, or an empty one.
EXAMPLES: Mapping[str, Any] = {
    "model.args": {"depth": 4},
    "data.dir": "~/data",
    "data.args": {"size": 4096},
    "optimizer.rule": "adamw",
    "optimizer.args": {"nesterov": True},
    "optimizer.damping_rule": "trace",
    "optimizer.statistics": 1,
    "search.space": {"lr": {"low": 1e-3, "high": 1.0}, "momentum": {"low": 0.0, "high": 0.9, "log": False}},
    "search.storage": "postgresql://user@host/studies",
    "search.workers": 4,
    "train.steps": 200,
    "train.grad_clip": 1.0,
    "train.threads": 1,
    "train.checkpoint_every": 100,
    "train.eval_every": 50,
    "train.curvature_every": 50,
    "depth.blocks": "blocks.*",
    "depth.base": 2,
    "depth.depth": 8,
    "roles": {"head.weight": "output"},
}
CHOICES: Mapping[str, Any] = {
    "model.name": MODELS,
    "data.name": DATASETS,
    "optimizer.name": OPTIMIZERS,
    "scaling.parametrization": PARAMETRIZATIONS,
    "roles": ROLES,
}
MEANINGS: Mapping[str, str] = {
    "model.name": "The factory build(width, ...): your own, as file.py:function, or a built-in.",
    "model.args": "Further arguments of the factory.",
    "data.name": "Your own, as file.py:function, or a built-in data set.",
    "data.dir": "Folder that holds the data set's files.",
    "data.timeout": "Seconds that loading the data may take.",
    "data.args": "Further arguments of the loader.",
    "optimizer.rule": "Width rule of an optimizer of your own: one of mupx rules.",
    "optimizer.args": "Further arguments of the optimizer.",
    "optimizer.name": "The optimizer; its width rule: mupx rules NAME.",
    "optimizer.damping_rule": "What damping is relative to; the optimizer's own default when left out.",
    "optimizer.fisher": "Labels of K-FAC's curvature: the data's, drawn from the model, or all of them.",
    "optimizer.refresh": "Longest age of the curvature, in steps, or phases: 10:0.3%,100 is every 10 steps "
    "until 0.3 % of the training is done, then every 100.",
    "optimizer.staleness": "Longest age of the curvature as a fraction of the steps done; not with phases.",
    "optimizer.statistics": "Steps between new factors, where they are averaged more often than inverted.",
    "optimizer.ema": "Decay per step of the curvature's running average.",
    "optimizer.solver": "How curvature is kept and solved with; auto takes whatever costs less.",
    "optimizer.accumulate": "Shampoo: a running average of the statistics, or their sum.",
    "optimizer.blocks": "Shampoo, SOAP: longest edge of a block; 0 means one block per tensor.",
    "optimizer.graft": "Optimizer in whose size the update is made, and whose lr rule it then follows.",
    "optimizer.normalise": "spectral: updates divided by their largest singular value, with that lr rule.",
    "optimizer.betas": "AdamW's two decay rates, also where it stands in for another optimizer.",
    "optimizer.fallback_lr": "Learning rate of AdamW for tensors the optimizer cannot treat.",
    "optimizer.weight_decay_mode": "Decay apart from the lr, times the lr (adamw), or in the gradient (l2).",
    "optimizer.weight_decay_scaling": "Weight decay over width: constant, or times base width / width.",
    "hyperparameters.lr": "Learning rate at the base width. A value given here is fixed and not searched.",
    "hyperparameters.damping": "Damping at the base width.",
    "hyperparameters.damping_ratio": "Damping of the input side over that of the output side.",
    "hyperparameters.momentum": "Heavy-ball momentum.",
    "hyperparameters.weight_decay": "Weight decay; what it multiplies: optimizer.weight_decay_mode.",
    "hyperparameters.eps": "Added to the root of Adam's second moment, in the gradient's units.",
    "hyperparameters.lr_mult_input": "Factor on the lr of input weights, on top of the width rule.",
    "hyperparameters.lr_mult_hidden": "The same for hidden weights.",
    "hyperparameters.lr_mult_output": "The same for the read-out.",
    "hyperparameters.lr_mult_vector": "The same for biases and gains.",
    "hyperparameters.init_mult_input": "Factor on the initial std of input weights, likewise.",
    "hyperparameters.init_mult_hidden": "The same for hidden weights.",
    "hyperparameters.init_mult_output": "The same for the read-out.",
    "hyperparameters.output_scale": "Factor on the logits.",
    "search.space": "Ranges of any hyperparameters, log unless told otherwise; replaces the optimizer's own.",
    "search.trials": "Finished trials in all, over workers and restarts.",
    "search.sampler": "How trials are chosen; gp needs pip install 'mupx[gp]'.",
    "search.pruner": "Whether trials worse than the median are stopped early.",
    "search.storage": "URL of the study's storage; a SQLite file in the run folder when left out.",
    "search.seed": "Seed of the sampler.",
    "search.objective": "The loss that is searched on.",
    "search.confirm": "Best trials run again on fresh seeds, whose mean decides; 0: none.",
    "search.population": "Trials trained in lock-step, each to its own numbers; 1: one after the other.",
    "search.workers": "Processes that search on this machine; left out: one per GPU where there are several.",
    "search.grace": "Seconds without a sign of life after which another machine's trial is run again.",
    "search.patience": "Seconds for which a storage that does not answer is asked again.",
    "train.epochs": "Passes over the training data.",
    "train.steps": "Steps, instead of epochs.",
    "train.batch_size": "Examples per step; does not transfer, keep it equal.",
    "train.schedule": "Course of the learning rate.",
    "train.warmup": "Part of the steps in which the lr rises linearly.",
    "train.grad_clip": "Largest norm of the whole gradient; none when left out.",
    "train.accumulate": "Parts a batch is cut into, to save memory.",
    "train.amp": "Mixed precision.",
    "train.loss": "The loss, a mean over the batch.",
    "train.dtype": "Type of weights and activations.",
    "train.seed": "Seed of initial weights and data order.",
    "train.device": "auto takes CUDA, then MPS, then the CPU.",
    "train.threads": "CPU threads; torch decides when left out.",
    "train.checkpoint_every": "Steps between checkpoints; ten a run when left out.",
    "train.keep_latest": "Checkpoints kept, the newest; more are deleted.",
    "train.curvature_every": "Steps between measurements of the curvature's quality; none when left out.",
    "train.eval_every": "Steps between evaluations; only at the end when left out.",
    "scaling.parametrization": "The width rule.",
    "scaling.base_width": "Width of the proxy, at which everything is tuned.",
    "scaling.width": "Width of the model that is trained; the search uses the base width.",
    "depth.blocks": "Name pattern of the parameters inside residual branches.",
    "depth.base": "Depth of the proxy; the factory's own number of blocks when left out.",
    "depth.depth": "Depth of the model that is trained; the search uses the base depth.",
    "depth.argument": "The factory's argument that is the number of residual blocks.",
    "depth.branch_argument": "The factory's argument that multiplies every residual branch.",
    "roles": "Name pattern = role, for what the shapes cannot tell.",
}
MODEL = '''\
"""The model and the data of mupx.toml. Nothing here knows of mupx: replace both by your own."""

import math

import torch
from torch import nn


def build(width, *, input_shape, classes, depth=3):
    """Build the model; width is what grows from the proxy to the target."""
    layers = [nn.Flatten(), nn.Linear(math.prod(input_shape), width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def load():
    """Return split -> (inputs [N, ...], targets [N]); the search never reads the test split."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 4, generator=generator)
    splits = {}
    for name, size in (("train", 4096), ("validation", 1024), ("test", 1024)):
        inputs = torch.randn(size, 16, generator=generator)
        splits[name] = inputs, (inputs**2 @ teacher).argmax(1)
    return splits
'''


def config_text() -> str:
    """Return the configuration file's text: every section and key of :class:`mupx.config.Experiment`."""
    parts = [HEAD]
    for name, field in Experiment.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            about = _comment(inspect.cleandoc(section.__doc__ or "").replace("``", "`"))
            keys = [line for key, inner in section.model_fields.items() for line in _key(name, key, inner)]
            parts.append("\n".join([*about, f"[{name}]", *keys]) + "\n")
        else:
            lines = [f"#{line}" for line in _assignments("", EXAMPLES.get(name, {}))]
            parts.append("\n".join([*_comment(_about(name, field)), f"[{name}]", *lines]) + "\n")
    return "\n".join(parts)


def _key(section: str, key: str, field: FieldInfo) -> Iterator[str]:
    dotted = f"{section}.{key}"
    yield from _comment(_about(dotted, field))
    if dotted in CHOSEN:
        yield from _assignments(key, CHOSEN[dotted])
        return
    default = field.get_default(call_default_factory=True)
    value = EXAMPLES.get(dotted) if default in (None, {}) else default
    if value is None:  # a new key, of which no example has been given yet
        yield f"# {key}"
    else:
        yield from (f"#{line}" for line in _assignments(key, value))


def _about(dotted: str, field: FieldInfo) -> str:
    """Say what a key means, what it may be, and where the line below is an example."""
    literal = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    choices = ", ".join(CHOICES.get(dotted, literal))
    default = field.get_default(call_default_factory=True)
    stated = f" Default: {default}." if dotted in CHOSEN and CHOSEN[dotted] != default else ""
    example = " Unset by default, for example:" if default in (None, {}) else ""
    return MEANINGS.get(dotted, "") + (f" One of: {choices}." if choices else "") + stated + example


def _assignments(key: str, value: Any) -> list[str]:
    """Write ``key = value``; a table becomes one line per entry, so that lines can be added."""
    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return [prefix + line for name, item in value.items() for line in _entry(name, item)]
    return _entry(key, value)


def _entry(key: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        inner = ", ".join(line for name, item in value.items() for line in _entry(name, item))
        return [f"{key} = {{ {inner} }}"]
    text = tomli_w.dumps({key: list(value) if isinstance(value, tuple) else value})
    return [" ".join(text.split()).replace("[ ", "[").replace(", ]", "]")]


def _comment(text: str) -> list[str]:
    return [
        f"# {line}".rstrip()
        for paragraph in text.strip().split("\n\n")
        for line in textwrap.wrap(" ".join(paragraph.split()), COLUMNS - 2, break_on_hyphens=False)
    ]
