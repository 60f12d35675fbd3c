"""What the terminal sees: the result on stdout, progress and warnings on stderr.

``--json`` prints exactly one document. Bars are drawn only when stderr is a terminal, otherwise one
plain line per event; rich leaves colours out where stdout is no terminal or ``NO_COLOR`` is set.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mupx.schema import SCHEMA

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120  # columns where there is no terminal to ask
NONE = "–"
# Control characters but for tab and line end, and what turns the direction of writing.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
Advance = Callable[[int, int, str], None]  # (done, total, one line about it)


def out() -> Console:
    """Return the console of results."""
    from rich.console import Console

    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(file=sys.stdout, width=None if fixed else PIPE_WIDTH, highlight=False)


def plain(text: str) -> str:
    r"""Return a text without what steers a terminal: names may come from somebody else's file.

    >>> plain("tune\x1b[2J\nverify")
    'tune\\x1b[2J\nverify'
    """
    return STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Lossy:
    """A stream that loses what a full disk cannot take: a log is no reason to end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or do not."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do not."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str = "") -> None:
    """Print a line of the result; long lines are never broken, so they can be copied."""
    print(plain(text), file=sys.stdout)


def warn(text: str) -> None:
    """Print a warning."""
    print(plain(f"warning: {text}"), file=sys.stderr)


def note(text: str) -> None:
    """Print a remark that is no warning."""
    print(plain(f"note: {text}"), file=sys.stderr)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def relay_log() -> None:
    """Print what the library logs as remarks."""
    log = logging.getLogger("mupx")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(logging.WARNING))
        log.propagate = False


def print_json(document: Mapping[str, Any]) -> None:
    """Print one document ``{"schema": "mupx/1", …}``; a number that is not finite becomes null."""
    print(json_text(document), file=sys.stdout)


def json_text(document: Mapping[str, Any]) -> str:
    """Return what :func:`print_json` prints."""
    return json.dumps({"schema": SCHEMA, **finite(document)}, indent=2, ensure_ascii=False)


def finite(value: Any) -> Any:
    """Return a value with JSON's own types only and null in place of NaN and infinities.

    >>> finite({"loss": float("inf"), "shape": (64, 196)})
    {'loss': None, 'shape': [64, 196]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def number(value: float | None, digits: int = 3) -> str:
    """Write a number in few characters: a small one with an exponent, which is narrower than zeros.

    >>> number(0.0009765625), number(None), number(16.0)
    ('9.77e-4', '–', '16')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def parameters(values: Mapping[str, float], most: int | None = None) -> str:
    """Write hyperparameters, lr first; all of them, or ``most`` and how many are left.

    >>> parameters({"damping": 0.01, "lr": 0.1, "momentum": 0.9}, most=2)
    'lr=0.1  damping=0.01  +1'
    """
    names = sorted(values, key=lambda name: (name != "lr", name != "damping", name))
    rest = "" if most is None or len(names) <= most else f"  +{len(names) - most}"
    return "  ".join(f"{name}={values[name]:.4g}" for name in names[:most]) + rest


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, folded: int = 0
) -> None:
    """Print a table; the first ``left`` columns are text, the rest numbers.

    Where the terminal is too narrow, column ``folded`` takes several lines; nothing is cut off. An
    underscore in a column's name may become a line break: narrow columns keep to 80 characters.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows, heads = list(rows), [name.replace("_", "\n") if len(name) > 7 else name for name in columns]
    console = out()
    natural = sum(
        max(map(len, [*head.split("\n"), *cells])) for head, *cells in zip(heads, *rows, strict=True)
    )
    gap = 1 if natural + 2 * len(heads) - 2 <= console.width else 0  # one more than the divider's space
    table = Table(title=Text(plain(title)), title_justify="left", box=SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    table.padding = (0, gap, 0, 0)
    for index, head in enumerate(heads):
        table.add_column(
            Text(head),
            justify="left" if index < left else "right",
            overflow="fold",
            no_wrap=index != folded,
            vertical="bottom",
        )
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console.print(table)
    say()


@contextmanager
def progress(unit: str, lines: int | None = None) -> Iterator[Advance]:
    """Show how far something is: a bar on a terminal, else plain lines.

    Args:
        unit: What is counted, in the plural.
        lines: Without a terminal, about how many lines to print in all; None prints every event.
    """
    if sys.stderr.isatty():
        with _bar(unit) as advance:
            yield advance
    else:
        yield _lines(unit, lines)


@contextmanager
def _bar(unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        MofNCompleteColumn(),
        TextColumn(unit),
        BarColumn(bar_width=20),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=plain(text))

        yield advance


def _lines(unit: str, lines: int | None) -> Advance:
    last = 0

    def advance(done: int, total: int, text: str) -> None:
        nonlocal last
        part = done if lines is None else done * lines // max(total, 1)
        if lines is None or part > last:
            last = part
            print(plain(f"{done}/{total} {unit}  {text}"), file=sys.stderr, flush=True)

    return advance
