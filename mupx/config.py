"""The experiment a run is made of: strict, typed, the same nouns in files, flags and code.

Precedence: flags over ``--set a.b=c`` over ``MUPX_A__B`` over the file over the defaults. An unknown
key is an error that names the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from mupx.dotted import merge, read_toml
from mupx.errors import UsageError
from mupx.scaling import Power, ScalingRule
from mupx.sections import (
    DataConfig,
    Declaration,
    DepthConfig,
    Hyperparameters,
    ModelConfig,
    OptimizerConfig,
    Range,
    RoleEntry,
    ScalingConfig,
    SearchConfig,
    Section,
    TrainConfig,
    unknown_key,
)
from mupx.usercode import digest, is_reference, label, source_of

SOURCE = "source"
# What stands in for the fields' own defaults under an optimizer whose authors recommend something else; the
# same as in its constructor.
OWN_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "lion": {"optimizer": {"betas": (0.9, 0.99)}},
    "muon": {"hyperparameters": {"momentum": 0.95, "eps": 1e-7}},
    "psgd": {"hyperparameters": {"momentum": 0.9}},
    **{name: {"optimizer": {"betas": (0.95, 0.95)}} for name in ("soap", "soap-left", "soap-right")},
}


class Experiment(Section):
    """Everything a run depends on. Proxy and target differ only in width and depth."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    hyperparameters: Hyperparameters = Hyperparameters()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    depth: DepthConfig = DepthConfig()
    roles: dict[str, RoleEntry] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, document: Any) -> Any:
        """Fill in what the named optimizer starts from where the document does not say."""
        optimizer = document.get("optimizer") if isinstance(document, Mapping) else None
        name = optimizer.get("name") if isinstance(optimizer, Mapping) else None
        result = document
        for section, values in OWN_DEFAULTS.get(name if isinstance(name, str) else "", {}).items():
            given = result.get(section, {})
            if isinstance(given, Mapping):
                result = {**result, section: {**values, **given}}
        return result

    def updated(self, changes: Mapping[str, Any]) -> Experiment:
        """Return a copy with dotted keys replaced: ``{"scaling.width": 1024}``."""
        # Only what was said: the rest may have another default under another optimizer.
        return parse(merge(self.model_dump(exclude_unset=True), changes))

    @property
    def run_name(self) -> str:
        """The default name of a run folder."""
        parts = map(label, (self.model.name, self.data.name, self.optimizer.name))
        deep = f"-d{self.depth.depth}" if self.depth.ratio != 1.0 else ""
        return f"{'-'.join(parts)}-w{self.scaling.width}{deep}"

    @property
    def own_code(self) -> dict[str, str]:
        """Key → reference, of what is code of the user's own."""
        names = {
            "model.name": self.model.name,
            "data.name": self.data.name,
            "optimizer.name": self.optimizer.name,
            "train.loss": self.train.loss,
        }
        return {key: name for key, name in names.items() if is_reference(name)}

    def sources(self) -> dict[str, str]:
        """Return file or module → digest of the user's own code, which is imported for that."""
        return {source_of(name): digest(name, key) for key, name in self.own_code.items()}

    def fingerprint(self, *, search: bool) -> str:
        """Return a short hash of everything that decides the numbers of a run.

        Args:
            search: Hash what a study depends on (space, sampler, seed, but not the number of trials);
                otherwise what one training run depends on.
        """
        document = self.identity(search=search)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def identity(self, *, search: bool) -> dict[str, Any]:
        """Return the part of the experiment that :meth:`fingerprint` hashes, for a readable diff.

        Of code of the user's own its content is part, under ``source``.
        """
        document = self.model_dump(mode="json")
        for key in ("dir", "timeout"):
            document["data"].pop(key)
        for key in ("device", "threads", "checkpoint_every", "keep_latest"):
            document["train"].pop(key)
        for key in ("trials", "storage", "confirm", "population", "workers", "grace", "patience"):
            document["search"].pop(key)
        if not search:
            document.pop("search")
        for section, key in (("optimizer", "statistics"), ("train", "curvature_every")):  # came later, too
            if document[section][key] is None:
                document[section].pop(key)
        if self.optimizer.weight_decay_scaling == "constant":  # likewise without the key
            document["optimizer"].pop("weight_decay_scaling")
        if self.depth == DepthConfig():  # a run that leaves depth alone is the run it was without the section
            document.pop("depth")
        for key in ("graft", "normalise"):  # likewise
            if document["optimizer"][key] == "none":
                document["optimizer"].pop(key)
        if sources := self.sources():
            document[SOURCE] = sources
        return document


def parse(document: Mapping[str, Any]) -> Experiment:
    """Validate a nested dictionary.

    Raises:
        UsageError: One sentence per problem, with the key, the value given and the nearest known key.
    """
    try:
        return Experiment.model_validate(dict(document))
    except ValidationError as error:
        raise UsageError("; ".join(_explain(item) for item in error.errors())) from None


def load(path: Path) -> Experiment:
    """Read an experiment from a TOML file."""
    return parse(read_toml(path))


def declare(value: str | Mapping[str, Any] | Declaration, name: str) -> Declaration:
    """Return what ``[roles]`` says about ``name``: a role's name, a table, or a declaration as it is.

    Raises:
        UsageError: It is none of these.
    """
    if isinstance(value, Declaration):
        return value
    try:
        return Declaration.model_validate({"role": value} if isinstance(value, str) else value)
    except ValidationError as error:
        items = ({**item, "loc": ("roles", name, *item["loc"])} for item in error.errors())
        raise UsageError("; ".join(map(_explain, items))) from None


def parse_range(name: str, text: str) -> Range | float:
    """Read ``1e-3:1`` as a range and ``0.03`` as a fixed value.

    >>> parse_range("lr", "1e-3:1").high
    1.0
    """
    parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != 2:
        raise UsageError(
            f"{name} takes a value such as 0.03 or a range such as 1e-3:1 (low:high), got {text!r}"
        )
    try:
        return Range(low=numbers[0], high=numbers[1])
    except ValidationError as error:
        raise UsageError(f"{name}: {_reason(error.errors()[0])}") from None


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    if location[:2] == ["optimizer", "rule"]:
        del location[2:3]  # whether it is taken for a name or for a table
        if item["type"] == "unexpected_keyword_argument":
            known = fields(Power if "lr" in location or "eps" in location else ScalingRule)
            return unknown_key(location[-1], [f.name for f in known], ".".join(location[:-1]))
        if item["type"] == "missing":
            return f"{'.'.join(location)} is missing (a rule has at least name, update, lr, source, standing)"
    if item["type"] == "extra_forbidden":
        return unknown_key(
            location[-1], _known_keys(location[:-1]), ".".join(location[:-1]) or "the experiment"
        )
    given = item.get("input")
    shown = "" if isinstance(given, (dict, Section)) else f", got {given!r}"
    return f"{'.'.join(location) or 'experiment'}: {_reason(item)}{shown}"


def _reason(item: Any) -> str:
    return str(item["msg"]).removeprefix("Value error, ").replace("Input should", "should")


def _known_keys(location: list[str]) -> Iterable[str]:
    if location[:1] == ["roles"]:
        return Declaration.model_fields
    section: type[Section] = Experiment
    for name in location:
        annotation = section.model_fields[name].annotation if name in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return Range.model_fields
        section = annotation
    return section.model_fields
