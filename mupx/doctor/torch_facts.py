"""What torch says about itself, asked in a process of its own: a broken one takes only that down."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping

from mupx.doctor.base import Facts

SECONDS = 120
PROBE = """
import json, torch
gpus, problem = [], None
try:
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
except Exception as error:
    problem = " ".join(str(error).split())
print("\\n" + json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "devices": gpus,
    "problem": problem,
    "mps_built": torch.backends.mps.is_built(), "mps": torch.backends.mps.is_available(),
    "threads": torch.get_num_threads(), "mkl": torch.backends.mkl.is_available(),
    "lapack": torch._C.has_lapack, "config": torch.__config__.show(),
}))
"""


def ask_torch(environment: Mapping[str, str], probe: str = PROBE, seconds: float = SECONDS) -> Facts:
    """Import torch in a new Python and return what it says, or ``{"error": why it could not}``.

    Args:
        environment: Its environment variables.
        probe: Its program, whose last line is a JSON document.
        seconds: How long it may take.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-c", probe],
            capture_output=True,
            env=dict(environment),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {seconds:g} s"}
    except OSError as error:
        return {"error": f"Python cannot be started: {error}"}
    said = ended.stderr.decode(errors="replace").strip().splitlines()
    if ended.returncode < 0:
        return {"error": f"Python was ended by {signal.Signals(-ended.returncode).name}"}
    if ended.returncode > 0:
        return {"error": said[-1] if said else f"exit status {ended.returncode}"}
    facts: Facts = json.loads(ended.stdout.decode(errors="replace").splitlines()[-1])
    return facts
