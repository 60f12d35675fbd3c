"""``mupx verify``: does the transfer hold for this model, these data and this optimizer?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mupx import dotted
from mupx import recipe as recipes
from mupx.cli import _options as o
from mupx.cli._console import note, print_json, print_table, progress, say, warn
from mupx.config import Experiment
from mupx.errors import CheckFailedError, StorageError, UsageError
from mupx.locks import held
from mupx.sections import Range

if TYPE_CHECKING:
    from mupx.checks.result import Report, Sweep
    from mupx.checks.rows import Row

LINES = 20
OPEN = {-1: "≤", 0: "", 1: "≥"}  # where a line's minimum lies at or beyond that end
HOW = "How it is verified"
NOT_RUN_FLAGS = ("config", "widths", "seeds", "at", "quick", "slopes", "junit", "figures", "run_dir", "fresh")


def command(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG|RECIPE", help="TOML file; flags override it.", show_default=False),
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    optimizer: o.Optimizer = None,
    loss: o.Loss = None,
    damping_rule: o.DampingRule = None,
    refresh: o.Refresh = None,
    parametrization: o.Parametrization = None,
    width: Annotated[int | None, o.whole("--width", o.WHAT, "Base width: that of the proxy.")] = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    lr: Annotated[str | None, o.flag("--lr", panel=o.WHAT, help="Learning rate at the base width.")] = None,
    damping: Annotated[str | None, o.flag("--damping", panel=o.WHAT, help="Damping, likewise.")] = None,
    momentum: Annotated[str | None, o.flag("--momentum", panel=o.WHAT, help="Momentum.")] = None,
    weight_decay: Annotated[str | None, o.flag("--weight-decay", panel=o.WHAT, help="Weight decay.")] = None,
    quick: Annotated[
        bool, o.flag("--quick", panel=HOW, help="About a minute: 8× in width, 30 steps a run, no SP beside.")
    ] = False,
    widths: Annotated[
        str | None, o.flag("--widths", panel=HOW, help="Widths to compare, such as 64,128,256,512.")
    ] = None,
    seeds: Annotated[str | None, o.flag("--seeds", panel=HOW, help="Seeds; 0,1 when left out.")] = None,
    at: Annotated[
        str | None, o.flag("--at", panel=HOW, help="Steps at which movement is read; 1,10 when left out.")
    ] = None,
    slopes: Annotated[
        bool, o.flag("--slopes-only", panel=HOW, help="Coordinate and curvature check, no sweeps.")
    ] = False,
    junit: Annotated[Path | None, o.flag("--junit", panel=o.WHERE, help="Write JUnit XML.")] = None,
    figures: Annotated[
        Path | None, o.flag("--figures", panel=o.WHERE, help="Folder for figures, PNG and SVG.")
    ] = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    run_dir: o.RunDir = None,
    fresh: o.Fresh = False,
    allow_code: o.AllowCode = None,
    set_: o.Set = None,
    json: o.Json = False,
) -> None:
    """Measure whether learning rate and damping transfer over width; exit 6 if they do not.

    The same command continues a verification that was stopped.

    Example: mupx verify --optimizer kfac --width 64 --lr 0.04 --damping 0.004 --quick
    """
    flags = {name: value for name, value in context.params.items() if name not in NOT_RUN_FLAGS}
    experiment, provenance = _experiment(context, config, set_, flags)
    wanted = _whole_numbers("--widths", widths)
    chosen_seeds = _whole_numbers("--seeds", seeds, least=0)
    read_at = _whole_numbers("--at", at)
    folder = run_dir or Path("runs") / f"{experiment.run_name}-verify"

    from mupx import check_report
    from mupx.checks.runner import SEEDS, STEPS, verify
    from mupx.search.loop import set_aside

    if fresh:
        set_aside(folder)
    with held(folder, "verify"), progress("runs", LINES) as advance:
        report = verify(
            experiment,
            widths=wanted,
            seeds=chosen_seeds or SEEDS,
            steps=read_at or STEPS,
            quick=quick,
            sweeps=not slopes,
            run_dir=folder,
            provenance=provenance,
            progress=advance,
        )
    unwritten: StorageError | None = None
    files: list[Path] = []
    try:
        files = check_report.write(report, junit, figures)
    except StorageError as error:
        unwritten = error  # the verdict is printed all the same
    if json:
        print_json({**check_report.document(report), "run_dir": folder, "files": files})
    else:
        _print(report, files)
    if unwritten is not None:
        raise unwritten
    if report.verdict == "fail":
        raise CheckFailedError(f"the transfer does not hold: {report.causes[0] if report.causes else ''}")


def _experiment(
    context: typer.Context, path: Path | None, items: Sequence[str] | None, flags: dict[str, Any]
) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment at its base width, and the provenance of a recipe."""
    document = {} if path is None else dotted.read_toml(path)
    changes = {**dotted.environment_changes(), **dotted.assignments(items or ()), **o.flag_changes(flags)}
    if "parameters" in document and path is not None:
        recipe = recipes.read(path)
        experiment, provenance = recipe.experiment, dict(recipe.provenance)
        changed = experiment.updated(changes)
        overrides = dotted.differences(experiment.model_dump(mode="json"), changed.model_dump(mode="json"))
        told = [line for line in overrides if line.startswith(("train.", "data."))]
        provenance["overrides"] = [*provenance.get("overrides", ()), *told]
        o.require_allowed(context, changed, changes, flags["allow_code"])
        experiment = changed
    else:
        sources = o.sources(path, items, flags)
        experiment, provenance = o.fixed_experiment([*_centred(sources), *sources[1:]]), {}
    base = flags["width"] or experiment.scaling.base_width
    experiment = experiment.updated({"scaling.base_width": base, "scaling.width": base})
    return o.check_names(experiment), provenance


def _centred(sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the file's document with each searched range replaced by its centre."""
    file = dotted.merge(sources[0], {})
    space = file.get("search", {}).pop("space", {}) if isinstance(file.get("search"), dict) else {}
    for name, given in space.items():
        centre = Range.model_validate(given).centre
        if name not in file.get("hyperparameters", {}):
            note(f"{name} is a range: its centre {centre:.4g} is verified; a fixed value sets another")
            file = dotted.merge(file, {f"hyperparameters.{name}": centre})
    return [file]


def _whole_numbers(option: str, text: str | None, least: int = 1) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UsageError(
            f"{option} takes whole numbers of at least {least}, separated by commas, such as 64,128,256; "
            f"got {text!r}"
        )
    return numbers


def _print(report: Report, files: Sequence[Path]) -> None:
    experiment = report.experiment
    damping = f" ({experiment.optimizer.damping_rule})" if experiment.optimizer.damping_rule else ""
    what = f"{experiment.model.name} on {experiment.data.name} with {experiment.optimizer.name}{damping}"
    span = f"{report.widths[0]} … {report.widths[-1]}"
    title = f"{what}, {experiment.scaling.parametrization}: exponents over widths {span}"
    _print_slopes(title, report.rows)
    if report.sweeps:
        _print_sweeps(report.sweeps)
        losses = "  ".join(f"{w}: {sum(v) / len(v):.4f}" for w, v in report.wider.items())
        say(f"loss at the base values by width  {losses}")
    if report.late:
        off = max(report.late, key=lambda row: abs(row.off) if row.quantity == "norm" else 0.0)
        say(f"last update, RMS operator norm    width^{off.slope:+.2f} at most, at {off.name}")
    for finding in report.findings:
        warn(f"{finding.code}: {finding.text}")
    for text in report.notes:
        note(text)
    say(f"verdict  {report.verdict}")
    for cause in report.causes:
        say(f"  {cause}")
    for path in files:
        say(f"wrote  {path}")


def _print_slopes(title: str, rows: Sequence[Row]) -> None:
    """One line per tensor: Δh of its layer, its own contribution, and its worst ridge or curvature row."""
    from mupx.checks.result import worse

    steps = sorted({row.step for row in rows if row.quantity == "own"})
    heads = ("tensor", "role", "", "init", *(f"Δh t={t}" for t in steps), *(f"own t={t}" for t in steps))
    table = []
    for name in dict.fromkeys(row.name for row in rows if row.quantity == "own"):
        mine = [row for row in rows if row.name == name]
        module = [row for row in rows if row.name == name.rpartition(".")[0] and row.quantity == "Δh"]
        cells = [_exponent(mine, "init", 0)]
        cells += [_exponent(module, "Δh", step) for step in steps]
        cells += [_exponent(mine, "own", step) for step in steps]
        cells += [_worst(mine, "ridge"), _worst(mine, "size")]
        table.append([name, mine[0].role, worse(row.status for row in mine), *cells])
    print_table(title, (*heads, "ρ/λ", "λ"), table, left=3)


def _exponent(rows: Sequence[Row], quantity: str, step: int) -> str:
    found = [row for row in rows if row.quantity == quantity and row.step == step]
    return "–" if not found else f"{found[0].slope:+.2f}{'!' if found[0].status == 'fail' else ''}"


def _worst(rows: Sequence[Row], quantity: str) -> str:
    """Write the row of a kind that is farthest from its order, as its distance from it."""
    found = [row for row in rows if row.quantity == quantity]
    if not found:
        return "–"
    row = max(found, key=lambda row: abs(row.off))
    return f"{row.off:+.2f}{'!' if row.status == 'fail' else ''}"


def _print_sweeps(sweeps: Sequence[Sweep]) -> None:
    table = []
    for sweep in sweeps:
        widest = sweep.lines[-1].width
        regrets = sweep.regrets[widest]
        best = " ".join(f"{OPEN[line.beyond]}{line.best().value:+.1f}" for line in sweep.lines)
        drift = f"{sweep.drift.value:+.2f} ({sweep.drift.low:+.2f} … {sweep.drift.high:+.2f})"
        speed = sweep.speed
        fast = "–" if speed is None else f"{'yes' if speed.pays else 'no'}"
        table.append(
            [
                sweep.axis,
                sweep.parametrization,
                sweep.status,
                best,
                drift,
                f"{sum(regrets) / len(regrets):+.4f}",
                fast,
            ]
        )
    heads = ("tuned", "param.", "", "best log2 by width", "octaves per doubling", "regret", "pays")
    print_table("transfer of the base-width choice, by training loss", heads, table, left=3, folded=3)
