"""Checks of the environment: variables that override a configuration, and the terminal's encoding."""

from __future__ import annotations

from mupx import config, dotted
from mupx.doctor.base import Finding, System, fail, ok, warn
from mupx.errors import MupxError
from mupx.study import redact

READ = ("MUPX_DATA_DIR",)  # read by mupx, but no key of the configuration
SHOWN = "ρ √ × – ·"  # what tables and formulas are written with


def check_variables(system: System) -> Finding:
    """List the MUPX_ variables, which win over every configuration file."""
    names = sorted(name for name in system.environment if name.startswith("MUPX_") and name not in READ)
    overriding = {name: system.environment[name] for name in names if "__" in name}
    try:
        config.parse(dotted.merge({}, dotted.environment_changes(overriding)))
    except MupxError as error:
        return fail(redact(str(error)), f"correct or unset it: {', '.join(overriding)}")
    unread = [name for name in names if name not in overriding]
    if unread:
        return warn(f"{', '.join(unread)} is not read by mupx", "write MUPX_SECTION__KEY, or unset it")
    if overriding:
        stated = ", ".join(f"{name}={redact(value)}" for name, value in overriding.items())
        return warn(f"these win over every configuration file: {stated}", "unset what you do not mean")
    return ok("no MUPX_ variable overrides the configuration")


def check_encoding(system: System) -> Finding:
    """Say whether the terminal can show what mupx prints."""
    encoding = system.encoding or "ascii"
    try:
        SHOWN.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return warn(f"stdout takes {encoding}, which has no Greek", "set PYTHONUTF8=1, or a UTF-8 locale")
    return ok(f"stdout takes {encoding}")
