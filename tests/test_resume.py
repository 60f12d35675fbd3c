"""A run continued from any step is the undisturbed one, to the last bit, for every registered optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mupx import checkpoint, config, dotted, parts
from mupx.datasets.base import Dataset, Split
from mupx.optim import OPTIMIZERS
from mupx.run import Run

STEPS = 7  # two refreshes after the first
SETTING = {
    "scaling.base_width": 8,
    "scaling.width": 16,
    "train.batch_size": 16,
    "train.steps": STEPS,
    "train.schedule": "cosine",
    "train.warmup": 0.3,
    "train.threads": 1,
    "hyperparameters.lr": 0.01,
    "hyperparameters.damping": 0.1,
    "hyperparameters.momentum": 0.9,
    "hyperparameters.weight_decay": 0.01,
    "optimizer.refresh": 3,
    "optimizer.staleness": 1.0,
}
CASES: dict[str, dict[str, Any]] = {name: {"optimizer.name": name} for name in sorted(OPTIMIZERS)}
CASES |= {
    "kfac, sampled labels": {"optimizer.name": "kfac", "optimizer.fisher": "mc"},
    "kfac, low rank": {"optimizer.name": "kfac", "optimizer.solver": "low-rank"},
    "kfac, phases of refresh": {"optimizer.name": "kfac", "optimizer.refresh": "1:50%,4!"},
    "kfac, statistics between refreshes": {"optimizer.name": "kfac", "optimizer.statistics": 2},
    "kfac, clipped and accumulated": {
        "optimizer.name": "kfac",
        "train.grad_clip": 0.5,
        "train.accumulate": 2,
    },
    "shampoo, grafted": {"optimizer.name": "shampoo", "optimizer.graft": "rms"},
    "shampoo, low rank": {"optimizer.name": "shampoo", "optimizer.solver": "low-rank"},
    "soap, blocks": {"optimizer.name": "soap", "optimizer.blocks": 8},
    "convolutions with running statistics": {
        "optimizer.name": "kfac",
        "model.name": "resnet",
        "scaling.base_width": 4,
        "scaling.width": 4,
    },
}
LONG = {"convolutions with running statistics", "soap, blocks", "shampoo, low rank"}


@pytest.fixture(scope="module")
def images() -> Dataset:
    full = parts.load_data(config.Experiment())
    few = {
        name: Split(getattr(full, name).inputs[:40], getattr(full, name).targets[:40])
        for name in ("train", "validation", "test")
    }
    return replace(full, **few)


def made(case: str, data: Dataset) -> Run:
    experiment = config.parse(dotted.merge({}, {**SETTING, **CASES[case]}))
    return Run(experiment, data, parts.describe(experiment, data))


def differing(a: Run, b: Run) -> list[str]:
    """Return what differs between two runs: weights, buffers, state, losses, generators."""
    one, two = a.snapshot(), b.snapshot()
    assert one.tensors.keys() == two.tensors.keys()
    names = [name for name in one.tensors if not torch.equal(one.tensors[name], two.tensors[name])]
    return [*names, *([] if one.values == two.values else ["values"])]


def walked(run: Run, folder: Path) -> Iterator[int]:
    """Advance a run to its end and write a checkpoint before every step."""
    while run.step < STEPS:
        checkpoint.write(folder, run.snapshot(), keep=STEPS)
        yield run.step
        run.advance()


def continued(case: str, data: Dataset, path: Path) -> Run:
    run = made(case, data)
    torch.manual_seed(999)  # whatever happened in this process before must not matter
    run.restore(checkpoint.read(path))
    while run.step < STEPS:
        run.advance()
    return run


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in LONG else ()) for case in sorted(CASES)]
)
def test_from_any_step_a_run_ends_in_the_same_bits(case: str, images: Dataset, tmp_path: Path) -> None:
    whole = made(case, images)
    steps = list(walked(whole, tmp_path))
    assert steps == list(range(STEPS))
    for path in sorted(tmp_path.iterdir()):
        assert differing(whole, continued(case, images, path)) == [], path.name


@pytest.mark.parametrize(
    ("lost", "case"), [("rng/labels", "kfac, sampled labels"), ("optimizer", "soap"), ("model", "sgd")]
)
def test_a_checkpoint_without_one_of_its_parts_would_not_do(
    lost: str, case: str, images: Dataset, tmp_path: Path
) -> None:
    whole = made(case, images)
    list(walked(whole, tmp_path))
    saved = checkpoint.read(tmp_path / "step-000000004.safetensors")
    fresh = made(case, images).snapshot()
    forgotten = {name: tensor for name, tensor in fresh.tensors.items() if name.startswith(lost)}
    changed = {name: forgotten.get(name, tensor) for name, tensor in saved.tensors.items()}
    if lost == "optimizer":
        changed |= {n: torch.zeros_like(t) for n, t in saved.tensors.items() if n.startswith(lost)}
    checkpoint.write(tmp_path / "spoilt", replace(saved, tensors=changed))
    assert differing(whole, continued(case, images, tmp_path / "spoilt" / "step-000000004.safetensors"))
