"""Hand-written loops: accumulation, mixed precision, clipping, freezing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from tests.optim.training import batches, train
from tests.survival import SENSITIVE, parametrized

CURVED = ("kfac", "foof", "shampoo")


@pytest.fixture(params=sorted(OPTIMIZERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Only K-FAC's δ carries the scale of the loss: for the others there is nothing to forget.
STABLE = sorted(set(OPTIMIZERS) - SENSITIVE)
TOLD = [*((name, True) for name in STABLE), ("kfac", False)]


@pytest.mark.parametrize(("name", "told"), TOLD)
def test_accumulation_is_the_whole_batch_where_the_scale_is_told(name: str, told: bool) -> None:
    results = []
    for parts in (1, 4):
        model, optimizer = parametrized(name)
        model.double()
        for x, y in batches(4, torch.double):
            optimizer.zero_grad()
            for x_k, y_k in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with optimizer.curvature(y_k, loss_scale=1 / parts if told else 1.0):
                    (F.cross_entropy(model(x_k), y_k) / parts).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, rtol=1e-9, atol=1e-12) == told


@pytest.mark.parametrize(("name", "told"), TOLD)
def test_a_grad_scaler_with_bf16_autocast_is_training_without_one(name: str, told: bool) -> None:
    models = []
    for enabled in (False, True):
        model, optimizer = parametrized(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        for x, y in batches(5):
            optimizer.zero_grad()
            with optimizer.curvature(y, loss_scale=scaler.get_scale() if told else 1.0):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*models, rtol=1e-4, atol=1e-6) == told


@pytest.mark.parametrize("solver", ["dense", "low-rank"])
@pytest.mark.parametrize("name", CURVED)
def test_a_batch_that_a_grad_scaler_skips_leaves_nothing_behind(name: str, solver: str) -> None:
    data = batches(5)
    models = []
    for overflowing in (False, True):
        model, optimizer = parametrized(name, solver=solver)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        for step, (x, y) in enumerate(data[:1] * overflowing + data):
            optimizer.zero_grad()
            with optimizer.curvature(y, loss_scale=scaler.get_scale()):
                loss = F.cross_entropy(model(x), y) * (1e38 if overflowing and step == 0 else 1.0)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (2.0**7 if overflowing else 2.0**8)
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # A power of two in the scale is exact, so what remains would show.
    torch.testing.assert_close(*models, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", ["dense", "low-rank"])
def test_clipping_scales_the_step_and_not_the_curvature(solver: str) -> None:
    x, y = batches(1)[0]
    updates: list[Tensor] = []
    for clipped in (False, True):
        model, optimizer = parametrized("kfac", solver=solver)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        with optimizer.curvature(y):
            F.cross_entropy(model(x), y).backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), norm / 4)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
        updates.append(before - torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(updates[1], updates[0] / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("solver", ["dense", "low-rank"])
def test_layers_frozen_and_thawed_in_mid_training_stand_still_and_then_move(name: str, solver: str) -> None:
    model, optimizer = parametrized(name, **({"solver": solver} if name in CURVED else {}))
    data = batches(9)

    def moved(part: list[Any]) -> list[bool]:
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, part)
        return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]

    assert all(moved(data[:3]))
    model[2].requires_grad_(False)
    assert moved(data[3:6]) == [True, True, False, False, True, True]
    model[2].requires_grad_(True)
    assert all(moved(data[6:]))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_bias_without_its_frozen_weight_is_refused_where_it_uses_its_factor(name: str) -> None:
    model, optimizer = parametrized(name)
    train(model, optimizer, batches(2))
    model[2].weight.requires_grad_(False)
    bias = model[2].bias.detach().clone()
    if getattr(optimizer, "bias_needs_weight", False):
        with pytest.raises(UsageError, match=r"2\.bias trains but 2\.weight does not.*freeze both"):
            train(model, optimizer, batches(1))
        model[2].bias.requires_grad_(False)
        train(model, optimizer, batches(2))
        assert torch.equal(model[2].bias, bias)
    else:
        train(model, optimizer, batches(1))
        assert not torch.equal(model[2].bias, bias)


@pytest.mark.parametrize("name", STABLE)
def test_the_loop_in_the_readme_trains_on_the_whole_batch(name: str) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```python\n(for step in range\(steps\):.*?)```", readme, re.S)
    data, results = batches(4), []
    for k in (1, 4):
        model, optimizer = parametrized(name)
        names: dict[str, Any] = {
            "torch": torch,
            "steps": len(data),
            "k": k,
            "micro_batches": lambda step, k=k: zip(*(part.chunk(k) for part in data[step]), strict=True),
            "model": model,
            "optimizer": optimizer,
            "loss": F.cross_entropy,
            "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**8),
            "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2),
        }
        exec(written.replace("cuda", "cpu").replace("float16", "bfloat16"), names)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0.02, atol=5e-3)  # bf16
