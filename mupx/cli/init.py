"""``mupx init``: a configuration and a model file to begin with (no torch)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mupx.cli._console import note, print_json, say
from mupx.cli._options import WHERE, Json, flag
from mupx.errors import MismatchError, StorageError
from mupx.starter import CONFIG_FILE, MODEL, MODEL_FILE, config_text


def command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; made where it is missing.")
    ] = Path(),
    force: Annotated[
        bool,
        flag("--force", panel=WHERE, help="Move existing files aside, and say where to, instead of exit 4."),
    ] = False,
    json: Json = False,
) -> None:
    """Write a commented configuration and a model file that `mupx tune` runs as they are.

    Example: mupx init experiment
    """
    contents = {CONFIG_FILE: config_text(), MODEL_FILE: MODEL}
    # lexists: a link that leads nowhere is somebody's file too.
    existing = [directory / name for name in contents if os.path.lexists(directory / name)]
    if existing and not force:
        raise MismatchError(
            f"{existing[0]} exists and is left as it is; give another DIR, or --force to move it aside"
        )
    moved = {path: _move_aside(path) for path in existing}
    files = [_write_new(directory / name, text) for name, text in contents.items()]
    enter = [] if directory == Path() else [f"cd {shlex.quote(str(directory))}"]
    following = [*enter, f"mupx tune {CONFIG_FILE}"]
    for old, new in moved.items():
        note(f"moved {old} to {new}")
    if json:
        print_json(
            {"files": files, "moved": {str(old): new for old, new in moved.items()}, "next": following}
        )
        return
    for path in files:
        say(f"wrote  {path}")
    for line in following:
        say(f"next   {line}")


def _move_aside(path: Path) -> Path:
    """Rename a file to the first free ``<name>.old-N`` and return where it went."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    try:
        return path.rename(target)
    except OSError as error:
        raise StorageError(f"cannot move {path} to {target}: {error.strerror}") from None


def _write_new(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:  # x: never into a file that appeared meanwhile
            file.write(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another DIR") from None
    return path
