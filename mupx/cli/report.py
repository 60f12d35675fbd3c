"""``mupx report``: the trials of a search as a table and as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mupx.cli import _options as o
from mupx.cli._console import number, print_json, print_table, say
from mupx.cli._sources import experiment_of, open_source

SHOWN = 10


def command(
    source: Annotated[str, typer.Argument(metavar="RUN_DIR|STORAGE#STUDY", help="The search to report on.")],
    csv: Annotated[Path | None, o.flag("--csv", panel=o.WHERE, help="Write the trials as CSV.")] = None,
    parquet: Annotated[
        Path | None, o.flag("--parquet", panel=o.WHERE, help="Write the trials as Parquet.")
    ] = None,
    png: Annotated[
        Path | None, o.flag("--png", panel=o.WHERE, help="Folder for the lr × damping map and the curves.")
    ] = None,
    storage: o.Storage = None,
    json: o.Json = False,
) -> None:
    """Write a search's trials as a table and as figures.

    Example: mupx report runs/mlp-fashion-mnist-14-kfac-w64 --csv trials.csv --png figures
    """
    study, _ = open_source(source, storage)
    from mupx.tables import trials_table, write_table

    table = trials_table(study)
    written: list[Path] = []
    for path in (csv, parquet):
        if path is not None:
            write_table(table, path if path is csv else path.with_suffix(".parquet"))
            written.append(path)
    if png is not None:
        from mupx.report import write_figures

        written += write_figures(study, experiment_of(study), png)
    if json:
        rows: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]
        print_json({"study": study.study_name, "trials": rows, "files": written})
        return
    best = table.sort_values("value").head(SHOWN)
    heads = [name for name in best.columns if name not in ("state", "steps")]
    cells = [[_cell(row[name]) for name in heads] for _, row in best.iterrows()]
    print_table(f"{study.study_name}: the best {len(cells)} of {len(table)} trials", heads, cells)
    for path in written:
        say(f"wrote  {path}")


def _cell(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else str(value)
