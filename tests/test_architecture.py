"""Imports point down only, light levels stay light, and names stay unambiguous."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mupx"
# A module's level is that of its longest listed prefix; the package itself only resolves names lazily.
LEVELS = {
    "mupx.errors": 0,
    "mupx.registry": 0,
    "mupx.elsewhere": 0,
    "mupx.blame": 0,
    "mupx.usercode": 0,
    "mupx.scaling": 0,
    "mupx.blocks": 0,
    "mupx.files": 0,
    "mupx.dotted": 0,
    "mupx.memory": 0,
    "mupx.mounts": 0,
    "mupx.processes": 0,
    "mupx.locks": 0,
    "mupx.deadlines": 0,
    "mupx.schema": 0,
    "mupx.signals": 0,
    "mupx.refresh": 0,
    "mupx.settling": 2,
    "mupx.sections": 1,
    "mupx.config": 1,
    "mupx.layers": 1,
    "mupx.interop": 1,
    "mupx.groups": 1,
    "mupx.recipe": 1,
    "mupx.study": 1,
    "mupx.storage": 1,
    "mupx.journal": 1,
    "mupx.bulk": 1,
    "mupx.turns": 1,
    "mupx.leases": 1,
    "mupx.slurm": 1,
    "mupx.heads": 2,
    "mupx.roles": 2,
    "mupx.starter": 2,
    "mupx.linalg": 2,
    "mupx.padded": 2,
    "mupx.triangular": 2,
    "mupx.tiles": 2,
    "mupx.update_norm": 3,
    "mupx.gradients": 2,
    "mupx.lowrank": 2,
    "mupx.running_means": 3,
    "mupx.sketch": 2,
    "mupx.preconditioning": 3,
    "mupx.samples": 3,
    "mupx.pooling": 3,
    "mupx.losses": 2,
    "mupx.plain_loss": 2,
    "mupx.curvature": 3,
    "mupx.factor_sums": 3,
    "mupx.passes": 2,
    "mupx.left_out": 3,
    "mupx.layer_rows": 3,
    "mupx.autocorrelation": 2,
    "mupx.patch_moments": 3,
    "mupx.depth": 3,
    "mupx.advice": 1,
    "mupx.advice.measuring": 5,
    "mupx.advice.network": 5,
    "mupx.advice.costs": 3,
    "mupx.advice.refreshes": 1,
    "mupx.advice.estimates": 5,
    "mupx.advice.choosing": 5,
    "mupx.advice.result": 5,
    "mupx.advice.advising": 8,
    "mupx.evaluation": 3,
    "mupx.models": 3,
    "mupx.datasets": 3,
    "mupx.optim": 4,
    "mupx.parts": 5,
    "mupx.own_optimizer": 5,
    "mupx.quality": 5,
    "mupx.parametrization": 5,
    "mupx.run": 6,
    "mupx.training": 6,
    "mupx.checkpoint": 6,
    "mupx.run_folder": 6,
    "mupx.population": 6,
    "mupx.stackable": 6,
    "mupx.lockstep": 6,
    "mupx.stacked": 5,
    "mupx.distributed": 2,
    "mupx.parallel": 5,
    "mupx.shared_folder": 6,
    "mupx.sharded_checkpoint": 6,
    "mupx.search": 7,
    "mupx.checks": 7,
    "mupx.api": 8,
    "mupx.report": 8,
    "mupx.plots": 8,
    "mupx.tables": 8,
    "mupx.export": 8,
    "mupx.doctor": 8,
    "mupx.check_report": 8,
    "mupx.check_plots": 8,
    "mupx.cli": 9,
    "mupx.__main__": 10,
}
HEAVY = {"torch", "numpy", "pandas", "matplotlib", "optuna", "pyarrow"}
# Tables of strings: reading the names costs nothing, whatever the level.
TABLES = {"mupx.optim", "mupx.models", "mupx.datasets"}
# What optimizers derive from; an optimizer never imports another one.
BASES = {
    "mupx.optim",
    "mupx.optim.base",
    "mupx.optim.blockwise",
    "mupx.optim.by_rows",
    "mupx.optim.divided",
    "mupx.optim.captured",
    "mupx.optim.kronecker",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}


def level(module: str) -> int:
    known = [prefix for prefix in LEVELS if module == prefix or module.startswith(prefix + ".")]
    assert known, f"{module} has no level: add it to LEVELS"
    return LEVELS[max(known, key=len)]


def imports(source: str, at_start: bool = False) -> Iterator[str]:
    """Yield imported modules; with ``at_start`` only those that importing the module executes."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else str(node.module)
        skipped = (ast.FunctionDef, ast.AsyncFunctionDef) if at_start else ()
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (isinstance(node, skipped) or typing):
            pending.extend(ast.iter_child_nodes(node))


def violations(module: str, source: str) -> list[str]:
    own = level(module)
    found = []
    for target in imports(source):
        if not target.startswith("mupx.") or target == module:
            continue
        package = target.rpartition(".")[0]
        family = (
            module.startswith(package + ".") or module == package or package in (module.rpartition(".")[0],)
        )
        if level(target) > own and target not in TABLES:
            found.append(f"{module} (level {own}) imports {target} (level {level(target)}) upwards")
        if own == 4 and family and level(target) == 4 and target not in BASES:
            found.append(f"{module} imports its sibling {target}; siblings import only what they derive from")
        if level(target) == 9 and own < 9:
            found.append(f"{module} imports {target}: nobody imports the command line")
    return found


@pytest.mark.parametrize("module", sorted(set(FILES) - {"mupx"}))
def test_imports_point_down_only(module: str) -> None:
    assert violations(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mupx.scaling", "from mupx.config import Experiment"),
        ("mupx.linalg", "def f():\n    import mupx.optim.base"),
        ("mupx.optim.shampoo", "from mupx.optim.kfac import ridges"),
        ("mupx.training", "from mupx import cli"),
        ("mupx.layers", "from mupx import roles"),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert violations(module, source) != []


def heavy_at_start(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(source, at_start=True)} & HEAVY


LIGHT = [name for name in FILES if name != "mupx" and level(name) <= 1] + sorted(TABLES & set(FILES))


@pytest.mark.parametrize("module", ["mupx", *LIGHT])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert heavy_at_start(SOURCES[module]) == set()


def test_a_heavy_import_is_caught() -> None:
    assert heavy_at_start("import torch.nn as nn") == {"torch"}
    assert heavy_at_start("if True:\n    from numpy import array") == {"numpy"}
    assert heavy_at_start("def f():\n    import torch") == set()
    assert heavy_at_start("if TYPE_CHECKING:\n    import torch") == set()


def test_importing_the_light_modules_loads_nothing_heavy() -> None:
    names = ", ".join(["mupx", *LIGHT])
    code = f"import sys, {names}; print(sorted(set(sys.modules) & {HEAVY!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def shadowed(module: str, source: str, modules: set[str]) -> list[str]:
    """Public functions and classes called like a module of the same package or of mupx itself."""
    package = module if FILES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    siblings = {m.rpartition(".")[2] for m in modules if m.rpartition(".")[0] in (package, "mupx")}
    tops = (n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return [n.name for n in tops if not n.name.startswith("_") and n.name in siblings]


@pytest.mark.parametrize("module", sorted(n for n in FILES if not n.startswith("mupx.cli")))
def test_no_public_function_shares_a_modules_name(module: str) -> None:
    assert shadowed(module, SOURCES[module], set(FILES)) == []


def test_a_shared_name_is_caught() -> None:
    assert shadowed("mupx.layers", "def recipe(): ...", set(FILES)) == ["recipe"]
    assert shadowed("mupx.optim.base", "def kfac(): ...", set(FILES)) == ["kfac"]


def test_every_module_has_a_docstring() -> None:
    bare = [
        name
        for name, source in SOURCES.items()
        if source.strip() and not ast.get_docstring(ast.parse(source))
    ]
    assert bare == []


def knows_other_processes(source: str) -> bool:
    tree = ast.parse(source)
    attributes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "distributed")
    used = any(isinstance(n.value, ast.Name) and n.value.id == "torch" for n in attributes)
    return used or any(name.startswith("torch.distributed") for name in imports(source))


def test_one_package_alone_knows_torch_distributed() -> None:
    knowing = {name for name, source in SOURCES.items() if knows_other_processes(source)}
    assert {name for name in knowing if not name.startswith("mupx.distributed")} == set()
    assert knowing
    assert knows_other_processes("def f():\n    from torch.distributed.tensor import DTensor")
    assert knows_other_processes("ranks = torch.distributed.get_world_size()")
