"""A read-only table from names to objects that are imported only when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from mupx.errors import UsageError, unknown_name
from mupx.usercode import HOW


class Registry(Mapping[str, str]):
    """Map a name to a ``"module:attribute"`` string and import it on request.

    The table is a plain literal written next to the package it describes: no decorators, no
    scanning, no import side effects, so listing the names never imports torch.

    Args:
        kind: What an entry is, for error messages ("optimizer", "model", …).
        table: Name → ``"module:attribute"``.
        more: Names that installed packages add, for error messages; looked up when one is needed.

    >>> Registry("number", {"pi": "math:pi"}).load("pi")
    3.141592653589793
    """

    def __init__(
        self, kind: str, table: Mapping[str, str], more: Callable[[], Iterable[str]] = tuple
    ) -> None:
        self.kind = kind
        self._table = dict(table)
        self._more = more

    def __getitem__(self, name: str) -> str:
        try:
            return self._table[name]
        except KeyError:
            raise self.unknown(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def unknown(self, name: str) -> UsageError:
        """Return the error for a name that is not in the table, with the nearest one that is."""
        return unknown_name(self.kind, name, {*self._table, *self._more()}, hint=HOW)

    def load(self, name: str) -> Any:
        """Import and return the object behind ``name``.

        Raises:
            UsageError: The name is not in the table; the message lists the known ones.
        """
        module, _, attribute = self[name].partition(":")
        return getattr(import_module(module), attribute)
