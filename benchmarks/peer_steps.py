"""One training step of every optimizer that `peers.py` compares, ours and other packages'.

An entry takes a model and the refresh interval and returns ``step(x, y)``: forward and backward pass,
update, everything. Peers are imported when they are asked for; what is not installed is left out with
one line (`peers-requirements.txt` names the packages).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx.optim.base import Base
from mupx.optim.kfac import KFAC
from mupx.optim.muon import Muon
from mupx.optim.psgd import PSGD
from mupx.optim.sgd import SGD
from mupx.optim.shampoo import Shampoo
from mupx.optim.soap import SOAP

Step = Callable[[Tensor, Tensor], Any]
LR, DAMPING, EMA = 1e-6, 0.01, 0.95  # so small a lr that nothing diverges


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return the plain step of an optimizer that looks at gradients alone."""

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    return step


def with_curvature(model: nn.Module, optimizer: Base) -> Step:
    """Return our step: the passes inside ``curvature``."""

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with optimizer.curvature(y, gradients=False):
            loss_of(model(x), y).backward()
        optimizer.step()

    return step


def ours(make: Callable[[nn.Module, int], Base]) -> Callable[[nn.Module, int], Step]:
    return lambda model, refresh: with_curvature(model, make(model, refresh))


def asdl(model: nn.Module, refresh: int, *, lr: float = LR, damping: float = DAMPING) -> Step:
    """ASDL's K-FAC; its NVTX ranges, which a CPU build of torch refuses, are stubbed."""
    torch.cuda.nvtx.range = _no_range
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    config = PreconditioningConfig(
        data_size=1,
        damping=damping,
        ema_decay=1 - EMA,
        preconditioner_upd_interval=refresh,
        curvature_upd_interval=refresh,
    )
    maker, optimizer = KfacGradientMaker(model, config), torch.optim.SGD(model.parameters(), lr)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, outputs, y)  # it asks for a `reduction`
        maker.forward_and_backward()
        optimizer.step()

    return step


@contextmanager
def _no_range(name: str) -> Any:
    yield


def kfac_pytorch(model: nn.Module, refresh: int) -> Step:
    """kfac-pytorch's K-FAC by inverses."""
    from kfac.preconditioner import KFACPreconditioner

    optimizer = torch.optim.SGD(model.parameters(), LR)
    preconditioner = KFACPreconditioner(
        model,
        factor_update_steps=refresh,
        inv_update_steps=refresh,
        compute_method="inverse",
        compute_eigenvalue_outer_product=False,
        damping=DAMPING,
        factor_decay=EMA,
        lr=LR,
    )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    return step


def curvlinops(model: nn.Module, refresh: int) -> Step:
    """curvlinops' inverse of the batch's K-FAC, applied to the gradient; it has no running average."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, LR)
    inverse: Any = None
    count = 0

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal inverse, count
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if count % refresh == 0:
            curvature = KFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                parameters,
                [(x, y)],
                fisher_type="empirical",
                check_deterministic=False,
            )
            inverse = KFACInverseLinearOperator(curvature, damping=DAMPING)
        for parameter, update in zip(parameters, inverse @ [p.grad for p in parameters], strict=True):
            parameter.grad = update.detach()
        count += 1
        optimizer.step()

    return step


def pytorch_optimizer(name: str, interval: str, **more: Any) -> Callable[[nn.Module, int], Step]:
    def make(model: nn.Module, refresh: int) -> Step:
        import pytorch_optimizer as package

        kind = getattr(package, name)
        return with_closure(model, kind(model.parameters(), lr=LR, **{interval: refresh}, **more))

    return make


def heavyball(name: str, **more: Any) -> Callable[[nn.Module, int], Step]:
    def make(model: nn.Module, refresh: int) -> Step:
        import heavyball as package

        package.utils.compile_mode = None  # eager, as all the others
        kind = getattr(package, name)
        interval = {"precondition_frequency": refresh} if name == "SOAP" else {}
        return with_closure(model, kind(model.parameters(), lr=LR, **interval, **more))

    return make


def torch_muon(model: nn.Module, refresh: int) -> Step:
    """torch.optim.Muon for the hidden matrices, AdamW for the rest, as its documentation says."""
    hidden, rest = hidden_matrices(model)
    muon, adamw = torch.optim.Muon(hidden, LR), torch.optim.AdamW(rest, LR)

    def step(x: Tensor, y: Tensor) -> None:
        muon.zero_grad()
        adamw.zero_grad()
        loss_of(model(x), y).backward()
        muon.step()
        adamw.step()

    return step


def our_muon(model: nn.Module, refresh: int) -> Step:
    """The same matrices and the same rest."""
    hidden, rest = hidden_matrices(model)
    groups = [{"params": hidden, "algorithm": "muon"}, {"params": rest, "algorithm": "adamw"}]
    return with_curvature(model, Muon(groups, LR))


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return weights but for the first and the last, and everything else."""
    weights = [p for p in model.parameters() if p.dim() >= 2][1:-1]
    return weights, [p for p in model.parameters() if not any(p is w for w in weights)]


def _kfac(model: nn.Module, refresh: int, **more: Any) -> KFAC:
    return KFAC(model.parameters(), model, LR, damping=DAMPING, refresh=refresh, staleness=1.0, **more)


FAMILIES: dict[str, dict[str, Callable[[nn.Module, int], Step]]] = {
    "sgd": {"sgd": ours(lambda m, r: SGD(m.parameters(), LR))},
    "kfac": {
        "mupx": ours(_kfac),
        "mupx, batch only": ours(lambda m, r: _kfac(m, r, ema=0.0)),
        "ASDL": asdl,
        "kfac-pytorch": kfac_pytorch,
        "curvlinops": curvlinops,
    },
    "shampoo": {
        "mupx": ours(
            lambda m, r: Shampoo(m.parameters(), LR, refresh=r, staleness=1.0, model=m, damping=DAMPING)
        ),
        "pytorch_optimizer": pytorch_optimizer(
            "ScalableShampoo",
            "preconditioning_compute_steps",
            start_preconditioning_step=1,
        ),
    },
    "soap": {
        "mupx": ours(lambda m, r: SOAP(m.parameters(), LR, refresh=r)),
        "pytorch_optimizer": pytorch_optimizer("SOAP", "precondition_frequency"),
        "heavyball": heavyball("SOAP"),
    },
    "psgd": {"mupx": ours(lambda m, r: PSGD(m.parameters(), LR)), "heavyball": heavyball("PSGDKron")},
    "muon": {"mupx": our_muon, "torch": torch_muon},
}


def versions() -> str:
    """Return the versions of the packages compared."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {sys.version.split()[0]}"]
    for package in (
        "torch",
        "asdfghjkl",
        "kfac-pytorch",
        "curvlinops-for-pytorch",
        "pytorch_optimizer",
        "heavyball",
    ):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
