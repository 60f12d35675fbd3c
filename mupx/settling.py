"""The first elementwise function of a process, called before several threads call one at once.

PyTorch leaves tanh, log, erf, sin and sqrt to MKL, which settles how to compute them on the first call. Where
several threads make that call at once, after a matrix product, now and then one of them returns its part in
low accuracy: with torch 2.13.0 and two threads in 15 of 100 processes half of the first tanh was off by up to
9·10⁻⁵, and only that one; the others likewise. That is enough to turn a label that is made so, and the last
bits of a run that is continued. Once one thread has called one of them all are exact.
"""

from __future__ import annotations

import torch


def settle() -> None:
    """Make that call in this thread alone; cheap, and without effect from the second time on."""
    torch.tanh(torch.zeros(16))
