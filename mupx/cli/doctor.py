"""``mupx doctor``: does this machine have what mupx needs?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from mupx.cli._console import print_json, say
from mupx.cli._options import WHERE, Json, flag
from mupx.doctor import examine, this_system
from mupx.errors import CheckFailedError


def command(
    run_dir: Annotated[
        Path, flag("--run-dir", panel=WHERE, help="Folder that runs are kept in; runs when left out.")
    ] = Path("runs"),
    json: Json = False,
) -> None:
    """Check Python, torch, threads, disk and settings, and say what to change; exit 6 if a check fails.

    Example: mupx doctor --run-dir runs
    """
    checks = []
    for name, finding in examine(this_system(run_dir)):
        entry = {"name": name, **{key: _shown(value) for key, value in asdict(finding).items()}}
        checks.append(entry)
        if not json:
            say(f"{entry['status']:<5} {name:<13} {entry['found']}")
            if entry["advice"]:
                say(f"{'':<19} {entry['advice']}")
            sys.stdout.flush()  # importing torch may take seconds, or for ever
    if json:
        print_json({"checks": checks})
    failed = [str(entry["name"]) for entry in checks if entry["status"] == "fail"]
    if failed:
        raise CheckFailedError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _shown(text: str) -> str:
    """Escape what stdout cannot show: the verb that reports a bad encoding must survive it."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)
