"""Every crash that benchmarks/reliability/fuzz.py has found, and a small run of it."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mupx import config, dotted, report
from mupx.errors import MupxError, StorageError, UsageError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks" / "reliability")


@pytest.mark.parametrize(
    "lines",
    [
        b"[1]",
        b'{"loss": 1.0}',
        b'{"step": "1"}',
        b'{"step": 1, "loss": []}',
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
        b'{"step": 1, "loss": "\xf4"}',
        b'{"step": 1, "curvature": []}',
        b'{"step": 1, "curvature": {"a": 3}}',
        b'{"step": 1, "curvature": {"a": {"A": {"c": "x"}}}}',
        b'{"step": 1, "curvature": {"\\ud800": {"c": 1.0}}}',
        b"[" * 100_000,
    ],
)
def test_metrics_that_are_none_are_damage(tmp_path: Path, lines: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines + b'\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(StorageError, match="line 1 is damaged"):
        report.run_status(tmp_path)
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n' + lines)  # torn: the last line of a killed run
    assert report.run_status(tmp_path)["step"] == 2
    report.write_run(tmp_path, report.Outputs(csv=tmp_path / "t.csv", figures=tmp_path))


@pytest.mark.parametrize(
    "changes", [{"outcome": 3}, {"steps": "x"}, {"train_loss": "x"}, {"train_loss": 10**400}]
)
def test_a_result_that_is_none_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = {"outcome": "finished", "steps": 4, "train_loss": 2.0, "test": None}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert report.run_status(tmp_path)["state"] == "finished"
    (tmp_path / "result.json").write_text(json.dumps({**whole, **changes}))
    with pytest.raises(StorageError, match="damaged"):
        report.run_status(tmp_path)


@pytest.mark.parametrize("seed", [2**32, 10**30])
@pytest.mark.parametrize("section", ["train", "search"])
def test_a_seed_that_does_not_fit_into_torch_is_refused(section: str, seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        config.parse({section: {"seed": seed}})
    assert config.parse({section: {"seed": 2**32 - 1}})


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000])
def test_a_value_that_python_does_not_take_is_text(text: str) -> None:
    assert dotted.parse_value(text) == text


@pytest.mark.parametrize("verb", [["status"], ["report"], ["train"], ["transfer", "--width", "8"]])
def test_a_path_too_long_for_the_system_is_a_usage_error(run: Any, verb: list[str]) -> None:
    ended = run(verb[0], "a" * 5000, *verb[1:])
    assert ended.code in (2, 3), ended.err
    assert ended.message


def test_a_short_run_of_the_fuzzer_finds_nothing() -> None:
    sys.path.insert(0, BENCHMARKS)
    try:
        fuzz = import_module("fuzz")
    finally:
        sys.path.remove(BENCHMARKS)
    import signal
    import tempfile

    watch = fuzz.Watch(Path(tempfile.mkdtemp()))  # without its hook, which no process gets rid of
    former = signal.getsignal(signal.SIGALRM)
    for target in fuzz.targets():
        if target.name not in ("arguments", "checkpoint, continued"):
            fuzzer = fuzz.Fuzzer(target, watch, None)
            fuzz.by_mutation(fuzzer, 150, seed=3)
            assert (fuzzer.inputs, fuzzer.crashes, fuzzer.hangs) == (150, 0, 0), target.name
    signal.signal(signal.SIGALRM, former)
    watch.folder.rmdir()


def test_a_reader_that_crashes_would_be_counted() -> None:
    sys.path.insert(0, BENCHMARKS)
    try:
        fuzz = import_module("fuzz")
    finally:
        sys.path.remove(BENCHMARKS)
    import tempfile

    def feed(content: bytes, folder: Path) -> None:
        if len(content) > 3:
            raise MupxError("refused")
        if content:
            raise KeyError("step")

    watch = fuzz.Watch(Path(tempfile.mkdtemp()))
    fuzzer = fuzz.Fuzzer(fuzz.Target("toy", 1.0, [b"good"], feed), watch, None)
    for content in (b"", b"good", b"bad"):
        fuzzer(content)
    assert (fuzzer.inputs, fuzzer.crashes) == (3, 1)
    watch.hook("open", ("/etc/victim", "w", 0))
    assert watch.touched == []
    watch.active = True
    watch.hook("open", (str(watch.folder / "fine"), "w", 0))
    watch.hook("os.rename", (str(watch.folder / "fine"), "/etc/victim", -1, -1))
    assert watch.touched == ["os.rename /etc/victim"]
    watch.folder.rmdir()
