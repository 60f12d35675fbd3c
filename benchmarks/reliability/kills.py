"""Kill -9 at random moments: is anything lost, does every run end in the same bits?

    python benchmarks/reliability/kills.py            # 200 kills, about ten minutes on one core
    python benchmarks/reliability/kills.py --table    # from the committed results
    python benchmarks/reliability/kills.py --smoke    # a dozen kills

Real processes (see commands.py) of ``mupx train`` (every registered optimizer in turn), ``tune`` and
``verify`` are killed by signal 9 after a time drawn uniformly from that of an undisturbed run, and started
again with the same command until they finish. After every kill the newest checkpoint must load. In the end
must be equal to those of the undisturbed run: of ``train`` the bytes of the last checkpoint (weights,
optimizer state, generators, losses), of ``metrics.jsonl``, and the result but for its seconds; of ``tune``
every finished trial in order (values, losses, reports); of ``verify`` the whole JSON report.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import commands
from sweeps import read_rows, set_threads, write_rows

from mupx import checkpoint
from mupx.optim import OPTIMIZERS
from mupx.study import STUDY_FILE, file_url, finished, open_study

RESULTS = Path(__file__).resolve().parents[1] / "results" / "reliability-kills.csv"
RUN = "run"
BASE = ["--model", "mlp", "--base-width", "8", "--width", "16", "--lr", "0.005"]
SHORT = ["train.steps=40", "train.threads=1", "train.checkpoint_every=3", "train.eval_every=7"]
SHORT += ["hyperparameters.momentum=0.9", "optimizer.refresh=4"]
MOST_RESTARTS = 60


@dataclass(frozen=True)
class Job:
    """A command that can be continued, and what of its run folder must come out the same."""

    verb: str
    what: str
    arguments: tuple[str, ...]
    prepare: Callable[[Path], None]
    outcome: Callable[[Path, commands.Ended], Any]
    sound: Callable[[Path, Path], None]


def train(optimizer: str) -> Job:
    """Train at twice the base width."""

    def recipe(folder: Path) -> None:
        more = [word for item in SHORT for word in ("--set", item)]
        damped = (
            ["--damping", "0.1"]
            if optimizer.startswith(("kfac", "foof", "ekfac", "gauss", "shampoo"))
            else []
        )
        made = ["transfer", "--optimizer", optimizer, *BASE, *damped, *more, "-o", "wide.toml"]
        ended = commands.run(made, folder)
        assert ended.code == 0, ended.err

    return Job("train", optimizer, ("train", "wide.toml", "--run-dir", RUN), recipe, _trained, _loads)


def tune(optimizer: str, seed: int) -> Job:
    """Search, with a model-based sampler and a pruner at work."""
    arguments = ("tune", "--optimizer", optimizer, "--width", "8", "--steps", "12", "--threads", "1")
    arguments += ("--trials", "14", "--seed", str(seed), "--run-dir", RUN, "--set", "search.patience=5")
    return Job("tune", f"{optimizer}, seed {seed}", arguments, _nothing, _searched, _opens)


def verify(optimizer: str) -> Job:
    """Check slopes over three widths."""
    arguments = ("verify", "--data", "synthetic", "--optimizer", optimizer, "--lr", "0.02", "--width", "16")
    arguments += ("--widths", "16,32,64", "--at", "1,40", "--slopes-only", "--threads", "1", "--json")
    return Job("verify", optimizer, (*arguments, "--run-dir", RUN), _nothing, _verified, _opens)


def jobs() -> Iterator[Job]:
    """Yield jobs without end, the verbs in turn."""
    optimizers, number = sorted(OPTIMIZERS), 0
    while True:
        yield train(optimizers[number % len(optimizers)])
        yield train(optimizers[(number + len(optimizers) // 2) % len(optimizers)])
        yield tune(("sgd", "kfac", "adamw")[number % 3], number)
        yield verify(("sgd", "kfac", "shampoo")[number % 3])
        number += 1


def _nothing(folder: Path) -> None:
    pass


def _loads(folder: Path, streams: Path) -> None:
    checkpoint.latest(folder / RUN / "checkpoints")


def _opens(folder: Path, streams: Path) -> None:
    if (folder / RUN / "study.json").exists() or (folder / RUN / "verify.db").exists():
        status = commands.run(["status", RUN], folder, streams)
        assert status.code in (0, 3), status.err  # 3: killed before the study was made


def _trained(folder: Path, ended: commands.Ended) -> Any:
    result = json.loads((folder / RUN / "result.json").read_text())
    result.pop("seconds")
    last = max((folder / RUN / "checkpoints").glob("*.safetensors"))
    return last.name, last.read_bytes(), (folder / RUN / "metrics.jsonl").read_bytes(), result


def _searched(folder: Path, ended: commands.Ended) -> Any:
    url = file_url(folder / RUN / STUDY_FILE)
    study = open_study(url, RUN, create=False, identity=None)
    return [
        (
            t.state.name,
            t.params,
            t.value,
            t.intermediate_values,
            t.user_attrs["outcome"],
            t.user_attrs.get("train_loss"),
        )
        for t in finished(study)
    ]


def _verified(folder: Path, ended: commands.Ended) -> Any:
    return {key: value for key, value in json.loads(ended.out).items() if key not in ("storage", "files")}


def killed(job: Job, draw: random.Random, most: int) -> list[dict[str, Any]]:
    """Run a job undisturbed, then killed again and again, and return a row per kill."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole, folder = Path(first), Path(second)
        job.prepare(whole)
        job.prepare(folder)
        undisturbed = commands.run(list(job.arguments), whole)
        expected, codes = job.outcome(whole, undisturbed), {0, 5, 6}  # 5 and 6 are results, too
        assert undisturbed.code in codes, undisturbed.err
        rows: list[dict[str, Any]] = []
        for _ in range(MOST_RESTARTS):
            command = commands.Command(list(job.arguments), folder)
            if len(rows) == most:
                ended = command.wait()
            else:
                moment = draw.uniform(0, undisturbed.seconds)
                ended = command.after(moment)
            if ended.code in codes:
                break
            assert ended.code == -9, (job.arguments, ended.code, ended.err)
            job.sound(folder, folder)
            rows.append(
                {"verb": job.verb, "what": job.what, "kill": len(rows) + 1, "moment_s": round(moment, 3)}
            )
        same = ended.code == undisturbed.code and job.outcome(folder, ended) == expected
        left = [path.name for path in folder.rglob(".*.tmp")]
        if not same or left:
            kept = shutil.copytree(folder, tempfile.mkdtemp() + "/killed")
            print(f"DIFFERENT: {job.verb} {job.what}: {kept}, left over: {left}", file=sys.stderr)
        return [{**row, "undisturbed_s": round(undisturbed.seconds, 3), "same": same} for row in rows]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the README."""
    yield "| verb | kills | runs | ended in the same bits |"
    yield "| --- | --- | --- | --- |"
    for verb in ("train", "tune", "verify"):
        own = [row for row in rows if row["verb"] == verb]
        runs = sum(str(row["kill"]) == "1" for row in own)
        same = sum(str(row["kill"]) == "1" and str(row["same"]) == "True" for row in own)
        yield f"| {verb} | {len(own)} | {runs} | {same} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--most", type=int, default=8, help="kills of one run")
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
    for run, job in islice(enumerate(jobs(), start=1), begun, None):
        found = killed(job, random.Random(f"{given.seed} {run}"), given.most)
        rows += [{"run": run, **row} for row in found]
        print(f"{len(rows)} kills: {job.verb} {job.what}", flush=True)
        if not given.smoke and rows:
            write_rows(given.csv, rows)
        if len(rows) >= (12 if given.smoke else given.kills):
            break
    print("\n".join(table(rows)))
    sys.exit(0 if all(str(row["same"]) == "True" for row in rows) else 1)


if __name__ == "__main__":
    main()
