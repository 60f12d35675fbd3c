import signal
import threading
import time

import pytest

from mupx import config, parts
from mupx.deadlines import deadline
from mupx.errors import StorageError

HANGING = """
import time

def load():
    while True:
        try:
            time.sleep(60)
        except Exception:
            {swallowing}
"""


@pytest.mark.parametrize("swallowing", ["raise", "pass"])
def test_a_loader_that_hangs_is_one_clear_error(tmp_path, monkeypatch, swallowing):
    monkeypatch.chdir(tmp_path)
    source = HANGING.format(swallowing="raise")
    if swallowing == "pass":  # once: a loader that swallows everything for good ends no process either
        source = source.replace(
            "            raise", "            load.tries -= 1\n            if not load.tries: raise"
        )
        source += "\nload.tries = 2\n"
    (tmp_path / "own.py").write_text(source)
    experiment = config.parse({"data": {"name": "own.py:load", "timeout": 0.1}})
    started = time.perf_counter()
    with pytest.raises(StorageError, match=r"data own.py:load were not there after 0.1 s: .* data.timeout"):
        parts.load_data(experiment)
    assert time.perf_counter() - started < 5


def test_the_timer_is_gone_with_the_block():
    former = signal.getsignal(signal.SIGALRM)
    with deadline(0.05, "late"):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is former


def test_in_another_thread_there_is_no_limit():
    ended = []

    def work():
        with deadline(0.01, "late"):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_the_limit_decides_no_number():
    assert config.Experiment().identity(search=False) == config.parse({"data": {"timeout": 5.0}}).identity(
        search=False
    )
