"""Checks of the folders mupx writes to: space, kind of file system, SQLite, clock."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import mupx
from mupx.doctor.base import GIB, MIB, Finding, System, fail, ok, size, text, warn
from mupx.mounts import NETWORK, existing, file_system, writable

NO_SPACE, LITTLE_SPACE = 100 * MIB, 2 * GIB
OLDEST_SQLITE = (3, 8, 3)  # WAL is older; SQLAlchemy, below Optuna, needs common table expressions
SKEW = 5.0  # seconds between this machine's clock and that of the file system
CLOCK = "dates of runs and trials, and their rate, will be wrong: set the clock (NTP)"


def check_space(system: System) -> Finding:
    """Say how much disk is left for runs and for data sets."""
    places = [system.run_dir, *([system.cache] if system.cache else [])]
    free = {place: shutil.disk_usage(existing(place)).free for place in places}
    found = ", ".join(f"{size(count)} free for {place}" for place, count in free.items())
    advice = "free space, or choose another --run-dir (runs) or XDG_CACHE_HOME (data sets)"
    if min(free.values()) < NO_SPACE:
        return fail(found, advice)
    return warn(found, advice) if min(free.values()) < LITTLE_SPACE else ok(found)


def check_file_system(system: System) -> Finding:
    """Say whether the run folder lies on another machine, where SQLite must not."""
    folder = existing(system.run_dir)
    kind = file_system(folder, text(system.proc / "self" / "mountinfo"))
    if kind is None:
        return ok(f"{folder}: kind of file system not known on this system")
    if kind not in NETWORK:
        return ok(f"{folder} is on {kind}, local")
    found = f"{folder} is on {kind}, a network file system: SQLite's locks and WAL do not hold there"
    stated = system.environment.get("MUPX_SEARCH__STORAGE", "sqlite")
    if not stated.startswith("sqlite"):
        return warn(found, "fine for a study in the database of MUPX_SEARCH__STORAGE; its runs may be slow")
    return fail(
        found,
        f"choose a --run-dir on a local disk, or keep the study in a journal (--storage journal://{folder}/"
        "study.log) or in PostgreSQL (--storage postgresql://user@host/studies)",
    )


def check_sqlite(system: System) -> Finding:
    """Write a study-like file in WAL mode where runs go, and read it through a second connection."""
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        return fail(
            f"SQLite {version}", f"use a Python with SQLite {'.'.join(map(str, OLDEST_SQLITE))} or newer"
        )
    folder = existing(system.run_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".mupx-doctor-", dir=folder) as place:
            mode, rows = _try_wal(Path(place) / "trial.db")
    except (OSError, sqlite3.Error) as error:
        return fail(
            f"SQLite {version} cannot write in {folder}: {error}",
            "choose a --run-dir that is yours and on a local disk, or a --storage on a server",
        )
    if mode != "wal" or rows != 1:
        return fail(
            f"SQLite {version} in {folder} gives journal mode {mode}, {rows} of 1 rows read back",
            "choose a --run-dir on a local disk, or a --storage on a server",
        )
    return ok(f"SQLite {version}, WAL works in {folder}")


def check_clock(system: System) -> Finding:
    """Compare the clock with mupx's own files and with a file written now."""
    now, installed = system.now(), Path(mupx.__file__).stat().st_mtime
    if now < installed - 86400:
        return fail("the clock stands before the day mupx was installed", CLOCK)
    folder = existing(system.run_dir)
    try:
        with tempfile.NamedTemporaryFile(prefix=".mupx-doctor-", dir=folder) as file:
            skew = os.fstat(file.fileno()).st_mtime - now
    except OSError:
        return ok("plausible")  # that the folder cannot be written is said by another check
    if abs(skew) > SKEW:
        return warn(f"files written in {folder} now are dated {skew:+.0f} s from now", CLOCK)
    return ok(f"plausible, and that of {folder} agrees")


def check_cache(system: System) -> Finding:
    """Say whether data sets can be kept, and whether MUPX_DATA_DIR exists."""
    stated = system.environment.get("MUPX_DATA_DIR")
    if stated and not Path(stated).is_dir():
        return warn(f"MUPX_DATA_DIR {stated} is no folder", "correct or unset MUPX_DATA_DIR")
    if system.cache is None or not writable(system.cache):
        return warn(
            f"{system.cache or 'a cache folder'} cannot be written, so data sets cannot be kept",
            "set XDG_CACHE_HOME to a folder of your own, or give --data-dir",
        )
    return ok(str(system.cache))


def _try_wal(path: Path) -> tuple[str, int]:
    with closing(sqlite3.connect(path, timeout=5)) as writer:
        mode = str(writer.execute("PRAGMA journal_mode=WAL").fetchone()[0])
        writer.execute("CREATE TABLE trials (number INTEGER)")
        writer.execute("INSERT INTO trials VALUES (0)")
        writer.commit()
        with closing(sqlite3.connect(path, timeout=5)) as reader:
            return mode, int(reader.execute("SELECT count(*) FROM trials").fetchone()[0])
