"""Versions of what mupx writes: which schema a document has, and how an older one is read (no torch).

Every file and study carries ``schema = "mupx/N"`` and the versions of the libraries that made it. A
document of an older schema is migrated, step by step, by ``MIGRATIONS``: that list is only ever appended
to, so whatever was written once can be read. A newer one is refused. One golden file of each schema is kept
in ``tests/golden/schemas``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from mupx.errors import MismatchError

Migration = Callable[[str, dict[str, Any]], dict[str, Any]]  # (kind, document) -> document

# Entry i turns schema i + 1 into schema i + 2, for every kind: "recipe", "checkpoint", "run", "study".
MIGRATIONS: tuple[Migration, ...] = ()
SCHEMA = f"mupx/{len(MIGRATIONS) + 1}"
PACKAGES = ("mupx", "torch", "optuna")


def migrated(kind: str, document: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return a document in today's schema.

    Args:
        kind: What it is: recipe, checkpoint, run or study.
        document: Has the key ``schema``.
        origin: Where it comes from, for the error.

    Raises:
        MismatchError: Its schema is newer than this mupx, or none of mupx's.
    """
    stated = document.get("schema")
    found = re.fullmatch(r"mupx/([1-9]\d{0,5})", stated) if isinstance(stated, str) else None
    if found is None:
        raise MismatchError(
            f"{origin} has schema {stated!r}, this mupx reads {SCHEMA!r}; "
            f"a file without a schema is no {kind}"
        )
    number = int(found[1])
    if number > len(MIGRATIONS) + 1:
        made = document.get("versions") or document.get("provenance") or {}
        by = made.get("mupx") if isinstance(made, Mapping) else None
        raise MismatchError(
            f"{origin} has schema {stated!r}{f', written by mupx {by}' if by else ''}; this mupx "
            f"({version('mupx')}) reads up to {SCHEMA!r}: install a newer mupx"
        )
    result = dict(document)
    for migration in MIGRATIONS[number - 1 :]:
        result = migration(kind, result)
    return {**result, "schema": SCHEMA}


def versions() -> dict[str, str]:
    """Return package → version of what decides how a document reads and what its numbers are."""
    return {package: version(package) for package in PACKAGES}


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
