"""Nested tables and their dotted keys: read from a file or a command line, changed, compared.

``{"train": {"epochs": 2}}`` has the dotted key ``train.epochs``. What the keys mean is :mod:`mupx.config`'s.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from mupx.errors import MismatchError, NotFoundError, UsageError
from mupx.files import MOST_TEXT, read_bounded

DEEP = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')\s*+\.\s*+){100}""")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file into a dictionary.

    Raises:
        NotFoundError: There is no such file, or it cannot be read.
        UsageError: It is not TOML; the message has line and column.
    """
    try:
        text = read_bounded(path, MOST_TEXT, waiting=True).decode()
        if DEEP.search(text):  # the parser's time grows as the square of a key's parts
            raise ValueError("a key in it has a hundred parts")
        return tomllib.loads(text)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def merge(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of ``document`` with dotted keys replaced; intermediate tables are made."""
    result = deepcopy(dict(document))
    for dotted, value in changes.items():
        *parents, leaf = dotted.split(".")
        table = result
        for name in parents:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(f"{dotted}: {name!r} is a value, not a table")
        table[leaf] = value
    return result


def environment_changes(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return dotted keys from variables such as ``MUPX_TRAIN__SEED=3`` (two underscores for a dot)."""
    prefix = "MUPX_"
    names = [n for n in environment if n.startswith(prefix) and "__" in n]
    return {n.removeprefix(prefix).lower().replace("__", "."): parse_value(environment[n]) for n in names}


def assignments(items: Iterable[str]) -> dict[str, Any]:
    """Parse ``a.b=value`` items from the command line.

    >>> assignments(["train.epochs=2", "data.name=mnist"])
    {'train.epochs': 2, 'data.name': 'mnist'}
    """
    changes = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise UsageError(f"--set takes key=value, got {item!r}; example: --set train.epochs=2")
        changes[key] = parse_value(value)
    return changes


def parse_value(text: str) -> Any:
    """Read one TOML value; anything that is not TOML is a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # ValueError also for whole numbers of thousands of digits
        return text


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ, as ``key: old → new``."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} → {b!r}")
    return lines


def refuse_difference(what: str, old: Mapping[str, Any], new: Mapping[str, Any], advice: str) -> None:
    """Raise a MismatchError with the differing keys unless the two documents agree."""
    lines = differences(old, new)
    if lines:
        raise MismatchError(f"{what} was made with another configuration ({'; '.join(lines)}); {advice}")
