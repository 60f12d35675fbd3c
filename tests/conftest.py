"""One thread and one seed for every test: results must not depend on the machine or on the order."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("mupx", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mupx")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
