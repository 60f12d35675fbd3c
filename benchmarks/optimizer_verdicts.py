"""Does every optimizer beside the basic four pass the coordinate check on an MLP, a GPT and a CNN?

    python benchmarks/optimizer_verdicts.py             # measure what is missing, then print the table
    python benchmarks/optimizer_verdicts.py --table     # print the committed results
    python benchmarks/optimizer_verdicts.py --smoke     # two optimizers on a narrow MLP, no CSV

The check of `zoo_verdicts.py`, with its data: after 1 and 10 steps of fresh batches of 32, seeds 0 and 1, one
thread; 8× in width on the MLP, 4× on GPT and Myrtle-5. One lr and damping per optimizer, untuned. The size of
the GPT's read-out, of either kind of update, flattens slowly: what `WIDER` names is measured from 128 on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sweeps import read_rows, set_threads, write_rows
from zoo_verdicts import measure

RESULTS = Path(__file__).parent / "results" / "optimizer-verdicts.csv"
WIDTHS = {"mlp": (64, 128, 256, 512), "gpt": (64, 128, 256), "myrtle5": (32, 64, 128)}
WIDER = {("gpt", name): (128, 256, 512) for name in ("ekfac", "gauss-newton", "gauss-newton-full")}
# Row → optimizer, its base values, its structural choices.
ROWS: dict[str, tuple[str, dict[str, float], dict[str, object]]] = {
    "lion": ("lion", {"lr": 5e-4}, {}),
    "adam-atan2": ("adam-atan2", {"lr": 2e-3}, {}),
    "muon": ("muon", {"lr": 0.02}, {}),
    "psgd": ("psgd", {"lr": 0.02}, {}),
    "foof": ("foof", {"lr": 0.02, "damping": 0.05}, {}),
    "ekfac": ("ekfac", {"lr": 0.02, "damping": 0.05}, {}),
    "gauss-newton": ("gauss-newton", {"lr": 0.02, "damping": 0.05}, {}),
    "gauss-newton-full": ("gauss-newton-full", {"lr": 0.02, "damping": 0.05}, {}),
    "shampoo-half": ("shampoo-half", {"lr": 0.001, "damping": 0.01}, {}),
    "shampoo-left": ("shampoo-left", {"lr": 0.02, "damping": 0.01}, {}),
    "shampoo-right": ("shampoo-right", {"lr": 0.02, "damping": 0.01}, {}),
    "adamw#shampoo": ("shampoo", {"lr": 2e-3, "damping": 0.01}, {"graft": "adam"}),
    "adamw#kfac": ("kfac", {"lr": 2e-3, "damping": 0.05}, {"graft": "adam"}),
    "spectral#shampoo": ("shampoo", {"lr": 0.02, "damping": 0.01}, {"normalise": "spectral"}),
    "soap": ("soap", {"lr": 2e-3}, {}),
    "soap, blocks 32": ("soap", {"lr": 2e-3}, {"blocks": 32}),
    "soap-left, blocks 32": ("soap-left", {"lr": 2e-3}, {"blocks": 32}),
    "soap-right, blocks 32": ("soap-right", {"lr": 2e-3}, {"blocks": 32}),
}


def show(rows: list[dict[str, object]]) -> str:
    found = {(row["optimizer"], row["family"]): _cell(row) for row in rows}
    heads = [f"{family}, {widths[0]} … {widths[-1]}" for family, widths in WIDTHS.items()]
    lines = ["| optimizer | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    names = [name for name in ROWS if any(row["optimizer"] == name for row in rows)]
    cells = {name: [found.get((name, family), "–") for family in WIDTHS] for name in names}
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return "\n".join(lines)


def _cell(row: dict[str, object]) -> str:
    usual = WIDTHS[str(row["family"])]
    elsewhere = "" if row["widths"] == f"{usual[0]} … {usual[-1]}" else f" at {row['widths']}"
    return f"{row['verdict']}{elsewhere} ({row['worst']})"


def row_of(name: str, family: str, widths: tuple[int, ...] | None = None) -> dict[str, object]:
    optimizer, values, structure = ROWS[name]
    widths = widths or WIDER.get((family, name), WIDTHS[family])
    row = measure(family, optimizer, widths, values, structure)
    return {**row, "optimizer": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--optimizers", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        print(set_threads(1))
        print(show([row_of(name, "mlp", (16, 32)) for name in ("muon", "foof")]))
        return
    rows = read_rows(RESULTS)
    if not arguments.table:
        print(set_threads(1))
        done = {(row["optimizer"], row["family"]) for row in rows}
        for family in arguments.families:
            for name in arguments.optimizers:
                if (name, family) in done:
                    continue
                rows.append(row_of(name, family))
                print(rows[-1], flush=True)
                write_rows(RESULTS, rows)
    print(show(rows))


if __name__ == "__main__":
    main()
