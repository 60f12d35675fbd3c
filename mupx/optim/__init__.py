"""The optimizers: one line each, imported when used; each has a scaling rule of the same name."""

from __future__ import annotations

from typing import Any

from mupx.elsewhere import installed
from mupx.registry import Registry

OPTIMIZERS = Registry(
    "optimizer",
    {
        "sgd": "mupx.optim.sgd:SGD",
        "adamw": "mupx.optim.adam:AdamW",
        "lion": "mupx.optim.lion:Lion",
        "adam-atan2": "mupx.optim.adam_atan2:AdamAtan2",
        "muon": "mupx.optim.muon:Muon",
        "psgd": "mupx.optim.psgd:PSGD",
        "kfac": "mupx.optim.kfac:KFAC",
        "foof": "mupx.optim.foof:FOOF",
        "ekfac": "mupx.optim.ekfac:EKFAC",
        "gauss-newton": "mupx.optim.gauss_newton:GaussNewton",
        "gauss-newton-full": "mupx.optim.gauss_newton:GaussNewtonFull",
        "shampoo": "mupx.optim.shampoo:Shampoo",
        "shampoo-half": "mupx.optim.shampoo:HalfShampoo",
        "shampoo-left": "mupx.optim.shampoo:LeftShampoo",
        "shampoo-right": "mupx.optim.shampoo:RightShampoo",
        "soap": "mupx.optim.soap:SOAP",
        "soap-left": "mupx.optim.soap:LeftSOAP",
        "soap-right": "mupx.optim.soap:RightSOAP",
    },
    more=installed,
)


def __getattr__(name: str) -> Any:
    for key, target in OPTIMIZERS.items():
        if target.endswith(f":{name}"):
            return OPTIMIZERS.load(key)
    raise AttributeError(f"module 'mupx.optim' has no attribute {name!r}")
