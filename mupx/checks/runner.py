"""What ``mupx verify`` does: lint, coordinate check, sweeps over widths, late check, one verdict.

Every run is a cell of the :class:`~mupx.checks.store.Store`, so an interrupted verification continues
where it stopped. A width that does not fit into memory is left out and noted; what was measured counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mupx import parts, training
from mupx.checks import coordinate, late, transfer, verdict
from mupx.checks.causes import damped_share
from mupx.checks.coordinate import Readings
from mupx.checks.lint import ENOUGH, Finding, examine, flattened, under_damping
from mupx.checks.result import Report, Sweep
from mupx.checks.rows import Evidence
from mupx.checks.session import Progress, Session, SweepPoint, TooWideError
from mupx.checks.transfer import Line, at
from mupx.config import Experiment
from mupx.datasets.base import Dataset
from mupx.errors import NoResultError, UsageError, out_of_memory
from mupx.layers import derive
from mupx.parametrization import resolved
from mupx.run import Run, total_steps

FULL, QUICK = (1, 2, 4, 8, 16), (1, 2, 4, 8)  # default widths in base widths
STEPS = (1, 10)
SEEDS = (0, 1)
LEARNED = 0.01  # of the untrained loss: what gains no more has learned nothing
REACH = 4  # half-octave steps to either side of a line: ±2 octaves
QUICK_STEPS = 30
LEAST_SWEPT = 3
SHRINKING = 0.1  # exponent of an own contribution from which low damping is worth a word


def verify(
    experiment: Experiment,
    *,
    data: Dataset | None = None,
    widths: Sequence[int] | None = None,
    seeds: Sequence[int] = SEEDS,
    steps: Sequence[int] = STEPS,
    quick: bool = False,
    sweeps: bool = True,
    beside_sp: bool | None = None,
    run_dir: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure whether an experiment's hyperparameters transfer over width, and say so.

    Args:
        experiment: Model, data, optimizer and base values; ``scaling.width`` is ignored.
        data: The loaded data set, or what stands for it.
        widths: Widths to measure, two or more; by default 1 to 16 base widths (8 when quick).
        seeds: Seeds of init and data order; one seed gives no honest regret.
        steps: Steps after which the coordinate check reads.
        quick: Smaller widths, 30 steps per run, telescoped lines, nothing beside.
        sweeps: Whether to sweep lr and damping at all.
        beside_sp: Whether to sweep standard parametrization too; by default unless quick.
        run_dir: Folder that keeps every measurement, so that the same call continues.
        provenance: Of the recipe, for the lint.
        progress: ``(done, total so far, text)``.

    Raises:
        UsageError: Fewer than two widths or no seed.
        MismatchError: A width gives no whole shapes, or the folder belongs to another experiment.
        NoResultError: Nothing could be measured at two widths.
    """
    experiment = resolved(experiment)
    widths = _widths(experiment, widths, quick)
    if not seeds or not steps or min(steps) < 1:
        raise UsageError("verify needs at least one seed and one step ≥ 1 at which to read")
    if experiment.train.threads is not None:
        torch.set_num_threads(experiment.train.threads)
    loaded = parts.load_data(experiment) if data is None else data
    parameters = parts.describe(experiment, loaded)
    for width in widths:
        derive(parameters, experiment.updated({"scaling.width": width}))
    session = Session(experiment, loaded, parameters, list(widths), list(seeds), run_dir, progress)
    report = Report(experiment, session.widths, list(seeds), storage=session.store.storage)
    report.findings += examine(
        experiment, parameters, loaded.classes, widths[-1], len(loaded.train), provenance
    )
    # The second smallest width already has other multipliers than 1, and fits where the largest may not.
    report.findings += flattened(session.run(experiment.scaling.parametrization, widths[1], seeds[0]))
    if any(finding.level == "error" for finding in report.findings):
        session.store.finish(report.verdict, report.causes)
        return report  # every run would stop at the first step
    sp = not quick if beside_sp is None else beside_sp
    session.total = len(seeds) * _expected(experiment, widths, quick, sweeps, sp)
    _coordinate(session, report, sorted(set(steps)))
    if sweeps and len(session.widths) >= LEAST_SWEPT:
        _sweeps(session, report, quick, sp)
        _late(session, report, quick)
    elif sweeps:
        session.notes.append(f"the transfer check needs {LEAST_SWEPT} widths; only slopes were measured")
    report.notes += session.notes
    session.store.finish(report.verdict, report.causes)
    return report


def _widths(experiment: Experiment, widths: Sequence[int] | None, quick: bool) -> list[int]:
    base = experiment.scaling.base_width
    chosen = sorted(set(widths or [base * factor for factor in (QUICK if quick else FULL)]))
    if len(chosen) < 2:
        raise UsageError(
            f"verify compares widths and got one ({chosen[0]}); give at least two, three for the transfer "
            f"check, such as --widths {base},{2 * base},{4 * base}"
        )
    if chosen[0] < 1:
        raise UsageError(f"a width must be a whole number of at least 1, got {chosen[0]}")
    return chosen


def _coordinate(session: Session, report: Report, steps: Sequence[int]) -> None:
    own = session.experiment.scaling.parametrization
    readings: dict[tuple[int, int], Readings] = {}
    tables = {}
    for width in list(session.widths):
        for seed in session.seeds:
            cell = {"kind": "coordinate", "width": width, "seed": seed, "steps": list(steps)}

            def make(width: int = width, seed: int = seed) -> Any:
                return coordinate.read(session.run(own, width, seed), steps).as_dict()

            try:
                reading = session.measure(cell, make, f"coordinate check, width {width}, seed {seed}")
            except TooWideError:
                session.drop(width)
                break
            readings[width, seed] = Readings.from_dict(reading)
        if width not in session.widths:
            break
        tables[width] = derive(session.parameters, session.config(own, width, session.seeds[0]))
    readings = {key: reading for key, reading in readings.items() if key[0] in session.widths}
    _judge_coordinates(session, report, Evidence(session.experiment, tables, readings))


def _judge_coordinates(session: Session, report: Report, evidence: Evidence) -> None:
    broken = {key: r.broke_at for key, r in evidence.readings.items() if r.broke_at is not None}
    for (width, seed), step in list(broken.items())[:1]:
        report.failures.append(
            f"the run at width {width}, seed {seed} is not finite after step {step} "
            f"({len(broken)} of {len(evidence.readings)} runs break): lower hyperparameters.lr or raise "
            "hyperparameters.damping"
        )
    silent = sorted({name for reading in evidence.readings.values() for name in reading.silent})
    if silent:
        report.failures.append(
            f"{', '.join(silent)} never ran in the forward pass: remove what is not used from the model, "
            "or verify with data that reaches it"
        )
    if len({width for (width, _), reading in evidence.readings.items() if reading.moved}) < 2:
        reason = "; ".join([*report.failures, *session.notes]) or "too few widths"
        raise NoResultError(f"nothing could be measured at two widths: {reason}")
    report.rows = verdict.judge(evidence)
    _measure_damping(report, evidence)
    for name in filter(evidence.grows, verdict.too_narrow(report.rows)):
        report.findings.append(
            Finding(
                "proxy-too-narrow",
                "warning",
                f"{name}: its order holds among larger widths but not between the two smallest; the proxy "
                f"at width {evidence.widths[0]} is not yet in the regime the rule describes, use a wider one",
            )
        )


def _measure_damping(report: Report, evidence: Evidence) -> None:
    """Report under-damping where an update shrinks and its measured damping is low."""
    if any(finding.code == "under-damped" for finding in report.findings):
        return
    shrinking = {row.name for row in report.rows if row.quantity == "own" and row.off < -SHRINKING}
    shares = {name: damped_share(name, evidence) for name in sorted(shrinking)}
    low = {name: share for name, share in shares.items() if share is not None and share < ENOUGH}
    if low:
        batch = evidence.experiment.train.batch_size
        report.findings.append(under_damping(list(low), min(low.values()), batch))


def _axes(experiment: Experiment) -> list[str]:
    return ["log2_lr", *(["log2_damping"] if experiment.optimizer.scaling_rule.damping else [])]


def _swept(widths: Sequence[int], quick: bool) -> list[int]:
    return [widths[0], widths[len(widths) // 2], widths[-1]] if quick else list(widths)


def _expected(experiment: Experiment, widths: Sequence[int], quick: bool, sweeps: bool, sp: bool) -> int:
    """Return how many runs per seed a verification takes if no line has to grow."""
    if not sweeps or len(widths) < LEAST_SWEPT:
        return len(widths)
    swept, axes = _swept(widths, quick), len(_axes(experiment))
    points = 0
    for width in swept:
        reach = transfer.telescoped(REACH, math.log2(width / swept[0]), axes) if quick else REACH
        # The lines cross in one point, and at base width SP is the same run.
        points += (2 * reach * axes + 1) * (2 if sp and width != experiment.scaling.base_width else 1)
    return len(widths) + points


def _sweeps(session: Session, report: Report, quick: bool, beside_sp: bool) -> None:
    own = session.experiment.scaling.parametrization
    parametrizations = [own, *(["sp"] if beside_sp and own != "sp" else [])]
    widths = session.widths
    swept, axes = _swept(widths, quick), _axes(session.experiment)
    for parametrization in parametrizations:
        for axis in axes:
            sweep = _sweep(session, parametrization, axis, swept, quick, len(axes))
            if sweep is not None:
                report.sweeps.append(sweep)
                if parametrization == own:  # at the base width SP has the same line
                    session.notes += _idle(session, sweep, quick)
    _wider(session, report, swept, quick)


def _idle(session: Session, sweep: Sweep, quick: bool) -> list[str]:
    """Return a sentence where the base width learns nothing anywhere on its line, which is then noise."""
    line = sweep.lines[0]
    place = _place(session, sweep.parametrization, line.width)
    untrained = float(_loss(session, place, quick)["untrained"])
    if sweep.gains[line.width] > LEARNED * untrained:
        return []
    values = f"{sweep.axis} 2^{line.values[0]:.1f} to 2^{line.values[-1]:.1f}"
    where = f" at lr 2^{place.log2_lr:.1f}" if sweep.axis != "lr" else ""
    return [
        f"width {line.width} learned nothing over {values}{where}: its loss stayed within {LEARNED:.0%} of "
        f"the untrained one, {untrained:.4g}, so that line is noise; verify with an lr at which the model "
        "learns, or with more steps"
    ]


def _place(session: Session, parametrization: str, width: int) -> SweepPoint:
    """Return the run of the base values at a width."""
    hyper, scaling = session.experiment.hyperparameters, session.experiment.scaling
    # At base width every parametrization is the same run, bit for bit: it is trained once.
    name = parametrization if width != scaling.base_width else scaling.parametrization
    return SweepPoint(name, width, math.log2(hyper.lr), math.log2(hyper.damping), session.seeds[0])


def _base_run(session: Session, width: int, seed: int) -> SweepPoint:
    """Return the run of the base values under the rules that are verified."""
    own = session.experiment.scaling.parametrization
    return at(_place(session, own, width), "seed", seed)


def _sweep(
    session: Session, parametrization: str, axis: str, widths: Sequence[int], quick: bool, axes: int
) -> Sweep | None:
    def loss(point: SweepPoint) -> float:
        return float(_loss(session, point, quick)["train_loss"])

    lines: list[Line] = []
    for width in [width for width in widths if width in session.widths]:
        reach = transfer.telescoped(REACH, math.log2(width / widths[0]), axes) if quick else REACH
        centre = _place(session, parametrization, width)
        centre = at(centre, axis, lines[0].lowest()) if lines else centre
        try:
            untrained = float(_loss(session, centre, quick)["untrained"])
            points = transfer.sweep(loss, centre, axis, session.seeds, reach, untrained)
        except TooWideError:
            session.drop(width)
            break
        lines.append(transfer.measured(loss, points, axis, session.seeds))
    if len(lines) < 2:
        return None
    regrets = {line.width: transfer.regret(lines[0], line) for line in lines}
    gains = {line.width: _gain(session, parametrization, line, axis, quick) for line in lines}
    name, moved = axis.removeprefix("log2_"), transfer.drift(lines)
    fast = transfer.speed(lines)
    return Sweep(parametrization, name, tuple(lines), moved, regrets, gains, fast, coarse=quick)


def _gain(session: Session, parametrization: str, line: Line, axis: str, quick: bool) -> float:
    """Return the untrained loss minus the best loss of a line."""
    point = at(_place(session, parametrization, line.width), axis, line.lowest())
    return max(float(_loss(session, point, quick)["untrained"]) - min(line.mean()), 0.0)


def _loss(session: Session, point: SweepPoint, quick: bool) -> Any:
    config = session.config(
        point.parametrization,
        point.width,
        point.seed,
        hyperparameters__lr=2.0**point.log2_lr,
        hyperparameters__damping=2.0**point.log2_damping,
    )
    steps = _steps(session, quick)
    config = config.updated({"train.steps": steps})
    based = point == _base_run(session, point.width, point.seed)

    def make() -> Any:
        run = Run(config, session.brief, session.parameters)
        last = late.LastUpdate(run, session.parameters) if based else None
        result = training.carry_out(run, progress=last)
        reading = {
            "outcome": result.outcome,
            "train_loss": result.train_loss,
            "untrained": result.untrained["train"],
        }
        return reading if last is None else {**reading, "late": _last_update(last)}

    cell = {"kind": "run", **asdict(point), "steps": steps, **({"late": True} if based else {})}
    damped = "log2_damping" in _axes(session.experiment)
    damping = f", damping 2^{point.log2_damping:.1f}" if damped else ""
    text = f"{point.parametrization} width {point.width}: lr 2^{point.log2_lr:.1f}{damping}"
    return session.measure(cell, make, f"{text}, seed {point.seed}")


def _wider(session: Session, report: Report, widths: Sequence[int], quick: bool) -> None:
    for width in widths:
        if width in session.widths:
            points = [_base_run(session, width, seed) for seed in session.seeds]
            report.wider[width] = [float(_loss(session, point, quick)["train_loss"]) for point in points]


def _last_update(last: late.LastUpdate) -> dict[str, late.Reading] | None:
    """Return what is read; None where a product with it does not fit into memory, though the run did."""
    try:
        return last.reading()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None


def _late(session: Session, report: Report, quick: bool) -> None:
    """Judge the last update of the runs with the base values, which the sweeps have trained."""
    readings: dict[tuple[int, int], dict[str, late.Reading]] = {}
    for width in report.wider:
        for seed in session.seeds:
            reading = _loss(session, _base_run(session, width, seed), quick)["late"]
            if reading is None:
                session.notes.append(f"the late check does not fit into memory at width {width}")
                break
            readings[width, seed] = {name: late.Reading(*found) for name, found in reading.items()}
    report.late = verdict.judge_late(readings, derive(session.parameters, session.experiment))


def _steps(session: Session, quick: bool) -> int:
    """Return the number of steps of a run in the sweeps."""
    steps = total_steps(session.experiment, len(session.data.train))
    return min(steps, QUICK_STEPS) if quick else steps
