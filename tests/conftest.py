"""One thread and one seed for every test: results must not depend on the machine or on the order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("mupx", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mupx")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
