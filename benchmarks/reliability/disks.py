"""A real file system that fills up at random moments: does the last good checkpoint always load?

    python benchmarks/reliability/disks.py            # 50 times, about five minutes on one core; needs root
    python benchmarks/reliability/disks.py --table    # from the committed results
    python benchmarks/reliability/disks.py --smoke    # four times

A tmpfs of 12 MiB is mounted (where that is not allowed the script says so and stops). ``mupx train``,
``tune`` and ``verify`` work on it in real processes while, after a time drawn uniformly from that of an
undisturbed run, this process writes a file until nothing more fits. The command must leave with exit code 7
and one sentence that names the disk, without a traceback, or finish; its newest checkpoint must load from the
full disk, and its study must open or say that the disk is full. Then the space is freed and the same command
must end like the undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import commands
from kills import RUN, Job, jobs
from sweeps import read_rows, set_threads, write_rows

RESULTS = Path(__file__).resolve().parents[1] / "results" / "reliability-disks.csv"
MIB = 12  # SQLite's log of a small study alone takes four


class NoMountError(Exception):
    """Mounting is not allowed here."""


@contextmanager
def mounted(mib: int = MIB) -> Iterator[Path]:
    """Mount a tmpfs and yield where it is."""
    place = Path(tempfile.mkdtemp(prefix="mupx-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "mupx-test", str(place)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        place.rmdir()
        raise NoMountError(f"mounting a tmpfs is not allowed here ({ended.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def fill(place: Path) -> None:
    """Take every byte that is left."""
    with suppress(OSError), open(place / "filler", "ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def filled(job: Job, draw: random.Random) -> dict[str, Any]:
    """Run a job undisturbed, and on a disk that fills up, and continue it when there is space again."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as streams, mounted() as place:
        whole = Path(first)
        job.prepare(whole)
        job.prepare(place)
        undisturbed = commands.run(list(job.arguments), whole)
        expected = job.outcome(whole, undisturbed)
        moment = draw.uniform(0, undisturbed.seconds)
        command = commands.Command(list(job.arguments), place, Path(streams))
        while command.alive() and time.perf_counter() - command.started < moment:
            time.sleep(0.002)
        deadline = time.perf_counter() + 30
        while command.alive() and time.perf_counter() < deadline:
            fill(place)  # also what a failed write has given back
            time.sleep(0.01)
        ended = command.wait()
        clear = "Traceback" not in ended.err and (
            ended.code == undisturbed.code or (ended.code == 7 and str(place) in _last_line(ended.err))
        )
        _readable_or_said(job, place, Path(streams))
        (place / "filler").unlink(missing_ok=True)
        job.sound(place, Path(streams))
        again = commands.run(list(job.arguments), place, Path(streams))
        same = again.code == undisturbed.code and job.outcome(place, again) == expected
        if not (clear and same):
            print(f"{job.verb} {job.what}: {ended} then {again}", file=sys.stderr)
        return {
            "verb": job.verb,
            "what": job.what,
            "moment_s": round(moment, 3),
            "undisturbed_s": round(undisturbed.seconds, 3),
            "exit": ended.code,
            "clear": clear,
            "message": _last_line(ended.err).replace(str(place), "DISK") if ended.code == 7 else "",
            "same": same,
        }


def _readable_or_said(job: Job, place: Path, streams: Path) -> None:
    """Read what there is from the full disk; SQLite may need room for that, and then the message says so."""
    if job.verb == "train":
        job.sound(place, streams)
    else:
        status = commands.run(["status", RUN], place, streams)
        unmade = status.code == 3  # it was full before the study was made
        assert status.code == 0 or unmade or (status.code == 7 and str(place) in status.err), status.err


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the README."""
    yield "| verb | disks filled | exit 7, naming the disk | finished first | continued to the same bits |"
    yield "| --- | --- | --- | --- | --- |"
    for verb in ("train", "tune", "verify"):
        own = [{key: str(value) for key, value in row.items()} for row in rows if row["verb"] == verb]
        clear = [row["exit"] for row in own if row["clear"] == "True"]
        same = sum(row["same"] == "True" for row in own)
        left = clear.count("7")
        yield f"| {verb} | {len(own)} | {left} | {len(clear) - left} | {same} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(read_rows(given.csv))))
        return
    print(set_threads(1))
    rows: list[dict[str, Any]] = [] if given.smoke else read_rows(given.csv)  # of a run that was interrupted
    begun = max((int(row["run"]) for row in rows), default=0)
    try:
        for run, job in islice(enumerate(jobs(), start=1), begun, 4 if given.smoke else given.times):
            rows.append({"run": run, **filled(job, random.Random(f"{given.seed} {run}"))})
            print(rows[-1], flush=True)
            if not given.smoke:
                write_rows(given.csv, rows)
    except NoMountError as error:
        print(f"nothing was measured: {error}")
        return
    print("\n".join(table(rows)))
    sys.exit(0 if all(str(row["same"]) == str(row["clear"]) == "True" for row in rows) else 1)


if __name__ == "__main__":
    main()
