"""Hostile bytes into every reader: no traceback, no hang, no file touched outside of the run folder.

    python benchmarks/reliability/fuzz.py                      # 100,000 inputs, about ten minutes on one core
    python benchmarks/reliability/fuzz.py --table              # from the committed results
    python benchmarks/reliability/fuzz.py --smoke              # 600 inputs
    python benchmarks/reliability/fuzz.py --engines atheris    # coverage-guided; `pip install atheris` first

Targets: a configuration, a recipe, a checkpoint (its bytes, its header, a run that continues from it), idx,
CIFAR and text files, metrics and result of a run, arguments of the command line. Engines: ``mutation`` spoils
valid examples (bytes, lines, numbers, JSON and TOML values), seeded; ``hypothesis`` builds documents;
``atheris`` is coverage-guided and is left out, with a word, where it is not installed.

A crash is any exception but mupx's own (and exit code 1 of the command line), a hang takes longer than
``SLOW`` seconds, a touch is a file opened for writing, renamed or removed outside of the target's folder.
Every crash found has become a test in tests/hostile/test_found.py.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweeps import read_rows, set_threads, write_rows

from mupx import checkpoint, config, parts, recipe, report, sections
from mupx.cli import app
from mupx.datasets.cifar import Source, parse_batch, read_archive
from mupx.datasets.files import read_unpacked, unpack
from mupx.datasets.idx import parse_idx
from mupx.errors import MupxError
from mupx.run import Run
from mupx.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "schemas"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "reliability-fuzz.csv"
SLOW = 10.0  # seconds
ENGINES = ("mutation", "hypothesis", "atheris")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CIFAR = Source("toy", "toy.tar.gz", "0" * 32, "inner", {"one.bin": 2, "test.bin": 1}, (10,))


class HangError(BaseException):
    """A target took too long."""


@dataclass
class Watch:
    """What a target did that it must not."""

    folder: Path
    touched: list[str] = field(default_factory=list)
    active: bool = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See every file that Python opens for writing, renames, makes or removes."""
        if not self.active:
            return
        if event == "open":
            path, mode, flags = (*arguments, None, None)[:3]
            writing = bool(flags & WRITING) if isinstance(flags, int) else "w" in str(mode)
            paths = [path] if writing else []
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = list(arguments[:2])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            paths = list(arguments[:1])
        elif event in ("os.system", "subprocess.Popen", "socket.connect"):
            self.touched.append(event)
            return
        else:
            return
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and not self._allowed(os.fsdecode(path)):
                self.touched.append(f"{event} {os.fsdecode(path)}")

    def _allowed(self, path: str) -> bool:
        full = os.path.abspath(path)
        caches = "__pycache__" in full or "torchinductor" in full  # Python's own and torch's, of an import
        return caches or full.startswith((str(self.folder), "/dev/null"))


class Target:
    """A reader of hostile bytes.

    Args:
        name: What is read.
        share: Its part of all inputs.
        examples: Valid inputs, which engines spoil.
        feed: Reads one input from a folder of its own.
    """

    def __init__(
        self, name: str, share: float, examples: list[bytes], feed: Callable[[bytes, Path], Any]
    ) -> None:
        self.name, self.share, self.examples, self.feed = name, share, examples, feed


def targets() -> list[Target]:
    """Return all targets."""
    recipe_text = (GOLDEN / "recipe-1.toml").read_bytes()
    saved = (GOLDEN / "run-1" / "checkpoints" / "step-000000003.safetensors").read_bytes()
    idx = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 3, 3) + bytes(18)
    batch = bytes(2 * CIFAR.record)
    text = b"the quick brown fox\njumps over the lazy dog\n" * 3
    lines = (GOLDEN / "run-1" / "metrics.jsonl").read_bytes()
    result = json.dumps(
        {"outcome": "finished", "steps": 4, "train_loss": 2.1, "validation": {"loss": 2.0, "accuracy": 0.1}}
        | {"test": None, "untrained": {"train": 2.3}, "seconds": 0.1, "skipped_steps": 0, "repairs": {}}
    ).encode()
    flags = [
        b"rules\0kfac\0--width-mult\x0016",
        b"transfer\0recipe.toml\0--width\x008\0--json",
        b"status\0run",
    ]
    flags += [
        b"report\0run\0--csv\0t.csv",
        b"export\0recipe.toml\0--format\0json",
        b"train\0recipe.toml\0--seed\0x",
    ]
    flags += [
        b"tune\0--lr\x001:0.1\0--set\0a.b=c",
        b"verify\0recipe.toml\0--widths\x001,x",
        b"init\0new\0--json",
    ]
    return [
        Target("config", 0.22, [_starter(), recipe_text], _config),
        Target("recipe", 0.14, [recipe_text], _recipe),
        Target("checkpoint", 0.2, [saved], _checkpoint),
        Target("checkpoint, continued", 0.02, [saved], _continued),
        Target("idx", 0.14, [idx, gzip.compress(idx)], _idx),
        Target("cifar", 0.08, [batch, _archive(batch)], _cifar),
        Target("text", 0.08, [text, gzip.compress(text)], _text),
        Target("metrics and result", 0.08, [lines, result], _folder),
        Target("arguments", 0.04, flags, _arguments),
    ]


def _starter() -> bytes:
    document = config.Experiment().model_dump(mode="json", exclude_none=True)
    import tomli_w

    return tomli_w.dumps(document).encode()


def _archive(batch: bytes) -> bytes:
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, records in CIFAR.files.items():
            member = tarfile.TarInfo(f"inner/{name}")
            member.size = records * CIFAR.record
            archive.addfile(member, io.BytesIO(batch[: member.size]))
    return stream.getvalue()


def _config(content: bytes, folder: Path) -> None:
    (folder / "c.toml").write_bytes(content)
    experiment = config.load(folder / "c.toml")
    experiment.run_name.encode()
    experiment.model_dump(mode="json")


def _recipe(content: bytes, folder: Path) -> None:
    (folder / "r.toml").write_bytes(content)
    found = recipe.read(folder / "r.toml")
    found.transfer(2 * found.experiment.scaling.width).to_dict()


def _checkpoint(content: bytes, folder: Path) -> None:
    (folder / "step-000000001.safetensors").write_bytes(content)
    checkpoint.latest(folder)


_RUNS: list[tuple[Any, Any, Any]] = []


def _continued(content: bytes, folder: Path) -> None:
    """Continue a run from a checkpoint whose checksum fits: whoever made it knows how to compute one."""
    if not _RUNS:
        tuned = recipe.read(GOLDEN / "recipe-1.toml")
        data = parts.load_data(tuned.experiment)
        _RUNS.append((tuned, data, Run(tuned.experiment, data, tuned.parameters)))
    tuned, data, run = _RUNS[0]
    (folder / "step-000000001.safetensors").write_bytes(content)
    saved = None
    with suppress(MupxError):
        saved = checkpoint.read(folder / "step-000000001.safetensors")
    if saved is None:
        draw = random.Random(content)
        saved = checkpoint.read(GOLDEN / "run-1" / "checkpoints" / "step-000000003.safetensors")
        values = spoil_json(json.dumps(saved.values).encode(), draw)
        with suppress(ValueError, RecursionError):
            saved = checkpoint.Checkpoint(saved.step, saved.tensors, json.loads(values))
        for name in draw.sample(sorted(saved.tensors), draw.randrange(2)):
            saved.tensors.pop(name)
    if not isinstance(saved.values, dict):
        return
    checkpoint.write(folder / "run" / "checkpoints", saved)
    RunFolder(folder / "run", tuned.experiment, data.checksum, True).restore(run)


def _idx(content: bytes, folder: Path) -> None:
    path = folder / "x"
    parse_idx(unpack(path, content, 34) if content[:2] == b"\x1f\x8b" else content, path)


def _cifar(content: bytes, folder: Path) -> None:
    if content[:2] == b"\x1f\x8b":
        for path, batch in read_archive(CIFAR, content, folder / "x.tar.gz"):
            parse_batch(CIFAR, batch, path)
    else:
        parse_batch(CIFAR, content, folder / "x")


def _text(content: bytes, folder: Path) -> None:
    path = folder / ("x.gz" if content[:2] == b"\x1f\x8b" else "x.xz" if content[:2] == b"\xfd7" else "x")
    path.write_bytes(content)
    read_unpacked(path, 1 << 20)


def _folder(content: bytes, folder: Path) -> None:
    for name in ("metrics.jsonl", "result.json"):
        (folder / name).write_bytes(content)
        with suppress(MupxError):
            report.run_status(folder)
        with suppress(MupxError):
            report.write_run(folder, report.Outputs(csv=folder / "t.csv"))
        (folder / name).unlink()
        (folder / "t.csv").unlink(missing_ok=True)


def _arguments(content: bytes, folder: Path) -> None:
    words = [word.decode("utf-8", "replace") for word in content.split(b"\0")]
    if words[0] in ("tune", "verify", "train", "advise"):  # whatever is left of the words, little is done
        words += ["--steps", "1", "--trials", "1", "--width", "2"] if words[0] == "tune" else []
        words += ["--data", "nowhere"] if words[0] in ("verify", "advise") else []
    shutil.copy(GOLDEN / "recipe-1.toml", folder / "recipe.toml")
    former, out = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(out):
            code = app(words, standalone_mode=False, prog_name="mupx")
    finally:
        os.chdir(former)
    if code == 1 or "Traceback" in out.getvalue():
        raise AssertionError(f"{words}: {out.getvalue()}")


def mutations(target: Target, seed: int) -> Iterator[bytes]:
    """Yield spoilt examples without end."""
    draw = random.Random(f"{seed} {target.name}")
    while True:
        content = draw.choice(target.examples)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            content = draw.choice(SPOILING)(content, draw)
        yield content


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, drop, repeat or insert bytes."""
    at, kind = draw.randrange(len(content) + 1), draw.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes(draw.choices(range(256), k=draw.choice((1, 2, 8)))) + content[at:]
    end = min(len(content), at + draw.choice((1, 1, 4, 30, 300)))
    if kind == 2:
        return content[:at] + content[end:]
    if kind == 3:
        return content[:end] + content[at:]
    return content[:at] + bytes(byte ^ (1 << draw.randrange(8)) for byte in content[at:end]) + content[end:]


VALUES = [
    "0",
    "-1",
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "1e-400",
    "9" * 30,
    "9" * 5000,
    "true",
    "null",
    '""',
    "[]",
    "{}",
]
VALUES += [
    '"../../x"',
    '"a:b"',
    '"x.py:y"',
    '"\\u0000"',
    '"\\ud800"',
    "[" * 200 + "]" * 200,
    '"' + "a" * 3000 + '"',
    "0.5",
]
VALUES += [
    "2**9",
    "1979-05-27T07:32:00Z",
    "'''",
    '"mupx/2"',
    '"mupx/1"',
    "4294967296",
    "[1,2,3]",
    '{"a":1}',
    "{a=1}",
    "-0",
]


def spoil_value(content: bytes, draw: random.Random) -> bytes:
    """Put another value behind a ``=`` or a ``:``, or in the place of a word of the command line."""
    text = content.decode("latin-1")
    for mark in draw.sample(["=", ":", "\0", ","], 4):
        places = [i for i, c in enumerate(text) if c == mark]
        if places:
            at = draw.choice(places) + 1
            end = min((text.find(c, at) for c in "\n\0,}" if text.find(c, at) >= 0), default=len(text))
            return (text[:at] + draw.choice(VALUES) + text[end:]).encode("latin-1", "replace")
    return content


def spoil_lines(content: bytes, draw: random.Random) -> bytes:
    """Drop, repeat or exchange lines."""
    lines = content.split(b"\n")
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    if draw.random() < 0.3:
        del lines[a]
    elif draw.random() < 0.5:
        lines.insert(b, lines[a])
    else:
        lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def spoil_json(content: bytes, draw: random.Random) -> bytes:
    """Exchange a value somewhere in a JSON document, in the header of a checkpoint if it is one."""
    start, end = content.find(b"{"), content.rfind(b"}") + 1
    try:
        document = json.loads(content[start:end])
    except (ValueError, RecursionError):
        return spoil_value(content, draw)
    _exchange(document, draw)
    text = json.dumps(document).encode()
    if start == 8 and content[:8] != b"\0" * 8:  # safetensors: the length of the header comes first
        return struct.pack("<Q", len(text)) + text + content[end:]
    return content[:start] + text + content[end:]


def _exchange(node: Any, draw: random.Random) -> None:
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        if not isinstance(node[key], (dict, list)) or draw.random() < 0.3:
            if draw.random() < 0.2:
                del node[key]
                return
            if isinstance(node[key], str) and node[key][:1] == "{" and draw.random() < 0.8:
                node[key] = spoil_json(node[key].encode(), draw).decode("utf-8", "replace")
                return
            node[key] = draw.choice(
                [None, -1, 0, 2**70, 1e308, "", "x", [], {}, [[]], True, "../x", {"tensor": "x"}]
            )
            return
        node = node[key]


SPOILING = (spoil_bytes, spoil_bytes, spoil_value, spoil_value, spoil_lines, spoil_json)


class Fuzzer:
    """Feeds a target and counts what it does."""

    def __init__(self, target: Target, watch: Watch, keep: Path | None) -> None:
        self.target, self.watch, self.keep = target, watch, keep
        self.inputs = self.crashes = self.hangs = self.touches = 0
        self.slowest = 0.0
        for (
            example
        ) in target.examples:  # what is imported and cached for the first one is not the input's doing
            self._read(example)

    def __call__(self, content: bytes) -> None:
        """Feed one input."""
        self.inputs += 1
        started = time.perf_counter()
        self.watch.touched.clear()
        self.watch.active = True
        try:
            signal.setitimer(signal.ITIMER_REAL, SLOW)
            self._read(content)
        except HangError:
            self.watch.active = False
            self.hangs += 1
            self._keep(content, "hang")
        except BaseException:
            self.watch.active = False
            self.crashes += 1
            self._keep(content, "crash", traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watch.active = False
        self.slowest = max(self.slowest, time.perf_counter() - started)
        if self.watch.touched:
            self.touches += 1
            self._keep(content, "touch", "\n".join(self.watch.touched))

    def _read(self, content: bytes) -> None:
        try:
            with suppress(MupxError):
                self.target.feed(content, self.watch.folder)
        finally:
            self.watch.active = False
            for entry in self.watch.folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _keep(self, content: bytes, kind: str, why: str = "") -> None:
        print(f"{kind} in {self.target.name}: {why}", file=sys.stderr)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{kind}-{self.target.name.replace(', ', '-')}-{self.inputs}").write_bytes(content)

    def row(self, engine: str) -> dict[str, Any]:
        """Return the counts."""
        counts = {
            "inputs": self.inputs,
            "crashes": self.crashes,
            "hangs": self.hangs,
            "touches": self.touches,
        }
        return {"engine": engine, "target": self.target.name, **counts, "slowest_s": round(self.slowest, 3)}


def by_mutation(fuzzer: Fuzzer, count: int, seed: int) -> None:
    """Feed spoilt examples."""
    for _, content in zip(range(count), mutations(fuzzer.target, seed), strict=False):
        fuzzer(content)


def by_hypothesis(fuzzer: Fuzzer, count: int, seed: int) -> None:
    """Feed documents that hypothesis builds."""
    import hypothesis
    from hypothesis import strategies as st

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    names = st.sampled_from(
        [*config.Experiment.model_fields, *sections.TrainConfig.model_fields, "schema", "name", "step"]
    )
    tree = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=8), inner, max_size=5)
        ),
        max_leaves=12,
    )
    documents = st.dictionaries(names, tree, max_size=6)
    content = st.one_of(
        documents.map(lambda d: json.dumps(d).encode()),
        documents.map(_toml),
        st.binary(max_size=400),
        st.lists(st.text(max_size=12), max_size=6).map(
            lambda words: "\0".join(words).encode("utf-8", "replace")
        ),
        documents.map(lambda d: _tensors(json.dumps(d))),
    )
    settings = hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hypothesis.seed(seed)(settings(hypothesis.given(content)(lambda given: fuzzer(given))))()


def _toml(document: dict[str, Any]) -> bytes:
    import tomli_w

    try:
        return tomli_w.dumps(_without_none(document)).encode("utf-8", "replace")
    except (TypeError, ValueError):
        return repr(document).encode("utf-8", "replace")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value if v is not None] if isinstance(value, list) else value


def _tensors(text: str) -> bytes:
    from safetensors.torch import save

    return save({}, metadata={"mupx": text})


def by_atheris(name: str, count: int, seed: int) -> dict[str, Any] | None:
    """Run atheris on one target in a process of its own (it never returns) and read its counts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--atheris-target",
            name,
            "--inputs",
            str(count),
            "--seed",
            str(seed),
        ]
        command += ["--csv", f"{folder}/row.csv"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = read_rows(Path(folder) / "row.csv")
        if not rows:
            print(f"atheris, {name}: {ended.stderr[-2000:]}", file=sys.stderr)
        return rows[0] if rows else None


def atheris_child(target: Target, fuzzer: Fuzzer, count: int, seed: int, csv: Path) -> NoReturn:
    """Let atheris choose the inputs; counts are written as it goes."""
    import atheris

    def feed(content: bytes) -> None:
        fuzzer(content)
        if fuzzer.inputs % 200 == 0 or fuzzer.inputs >= count - 2:
            write_rows(csv, [fuzzer.row("atheris")])

    with tempfile.TemporaryDirectory() as corpus:
        for i, example in enumerate(target.examples):
            (Path(corpus) / str(i)).write_bytes(example)
        for module in (config, sections, recipe, checkpoint, report):
            for name, member in vars(module).items():
                if (
                    callable(member)
                    and getattr(member, "__module__", "").startswith("mupx")
                    and hasattr(member, "__code__")
                ):
                    setattr(module, name, atheris.instrument_func(member))
        atheris.Setup(
            [sys.argv[0], f"-runs={count}", f"-seed={seed + 1}", "-max_len=20000", "-timeout=60", corpus],
            feed,
        )
        atheris.Fuzz()
    raise AssertionError("unreachable: atheris ends the process")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the README."""
    yield "| target | inputs | crashes | hangs | files touched outside | slowest, s |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        sums = [sum(int(row[key]) for row in own) for key in ("inputs", "crashes", "hangs", "touches")]
        yield f"| {name} | {' | '.join(map(str, sums))} | {max(float(row['slowest_s']) for row in own):.2f} |"
    sums = [sum(int(row[key]) for row in rows) for key in ("inputs", "crashes", "hangs", "touches")]
    yield f"| all | {' | '.join(map(str, sums))} | {max(float(row['slowest_s']) for row in rows):.2f} |"


def watched() -> Watch:
    """Return a watch over a new folder; what takes too long is interrupted."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise HangError

    signal.signal(signal.SIGALRM, late)
    watch = Watch(Path(tempfile.mkdtemp(prefix="mupx-fuzz-")))
    sys.addaudithook(watch.hook)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--only", nargs="+", help="targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="folder for inputs that broke something")
    parser.add_argument("--atheris-target", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(read_rows(given.csv))))
        return
    warnings.simplefilter("ignore")
    everything = {target.name: target for target in targets()}
    watch = watched()
    if given.atheris_target:
        target = everything[given.atheris_target]
        atheris_child(target, Fuzzer(target, watch, given.keep), given.inputs, given.seed, given.csv)
    print(set_threads(1))
    rows: list[dict[str, Any]] = []
    inputs = 600 if given.smoke else given.inputs
    engines = list(given.engines)
    if "atheris" in engines:
        try:
            import atheris  # noqa: F401
        except ImportError:
            print("atheris is not installed: its part is left out and done by mutation")
            engines.remove("atheris")
    for name in given.only or everything:
        for engine in engines:
            parts_of = {"mutation": 0.8, "hypothesis": 0.1, "atheris": 0.1}
            weight = parts_of[engine] / sum(parts_of[e] for e in engines)
            count = max(3, round(inputs * everything[name].share * weight))
            if engine == "atheris":
                row = by_atheris(name, count, given.seed)
            else:
                fuzzer = Fuzzer(everything[name], watch, given.keep)
                (by_mutation if engine == "mutation" else by_hypothesis)(fuzzer, count, given.seed)
                row = fuzzer.row(engine)
            if row is not None:
                rows.append(row)
                print(row, flush=True)
            if not given.smoke:
                write_rows(given.csv, rows)
    shutil.rmtree(watch.folder)
    print("\n".join(table(rows)))
    sys.exit(any(int(row[key]) for row in rows for key in ("crashes", "hangs", "touches")))


if __name__ == "__main__":
    main()
