import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = {  # name: small arguments, and what its last lines must say
    "01_tune_and_transfer.py": (
        ["--base-width=8", "--width=16", "--trials=4", "--steps=15", "--threads=1"],
        r"regret of the transferred recipe: [0-9.-]+",
    ),
    "02_own_model.py": ([], r"step 19  loss [01]\.\d+"),
    "03_verify_a_model.py": (
        [],
        r"(?s)trace damping: pass.*pi damping: fail.*because input.weight: π",
    ),
    "04_own_optimizer.py": ([], r"(?s)mupx tune.*mupx train.*finished after 62 steps.*verdict  pass"),
    "05_hugging_face.py": (
        [],
        r"of the last 0\.[0-5]\d+\nK-FAC trains \d+ tensors, AdamW \d+\n",
    ),
    "06_lightning.py": ([], r"(?s)step  10  loss [01]\.\d+.*step  40  loss 0\.\d+"),
}
# Not among the development dependencies: CI runs these examples in an environment of their own.
NEEDS = {"05_hugging_face.py": ("transformers", "accelerate"), "06_lightning.py": ("lightning",)}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(name, tmp_path):
    arguments, expected = EXAMPLES[name]
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {' '.join(NEEDS[name])}")
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert re.search(expected, ended.stdout), ended.stdout
    assert list(tmp_path.iterdir()) == []
