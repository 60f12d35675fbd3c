"""``mupx export``: a recipe in the form another trainer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mupx import recipe as recipes
from mupx.cli import _options as o
from mupx.cli._console import json_text, print_json, say
from mupx.errors import UsageError, unknown_name
from mupx.export import FORMATS
from mupx.files import write_atomically

HOW = "How it is written"


def command(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Written by `mupx tune` or `mupx transfer`.")
    ],
    format: Annotated[
        str, o.flag("--format", panel=HOW, help=f"One of: {o.known(FORMATS)}; torch when left out.")
    ] = "torch",
    output: Annotated[
        Path | None, o.flag("--output", "-o", panel=HOW, help="File to write; printed when left out.")
    ] = None,
    json: Annotated[
        bool, o.flag("--json", panel=HOW, help="Print one JSON document that holds format, file and content.")
    ] = False,
) -> None:
    """Write a recipe as a Python file that needs only torch, or as JSON.

    Example: mupx export wide.toml --format torch -o groups.py
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if output is not None and output.exists() and recipe.exists() and output.samefile(recipe):
        raise UsageError(f"-o {output} is the recipe itself; give another name")
    content = FORMATS[format](recipes.read(recipe))
    text = content if isinstance(content, str) else json_text(content) + "\n"
    if output is not None:
        # What is not printable has been escaped, but a name may hold a lone surrogate.
        write_atomically(output, text.encode("utf-8", "backslashreplace"))
    if json:
        print_json({"format": format, "file": output, "content": content})
    elif output is None:
        say(text.removesuffix("\n"))
    else:
        say(f"wrote  {output}")
