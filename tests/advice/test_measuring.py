"""One real measurement, as small as it can be, and the cache around it."""

import json
import logging

import pytest
import torch

from mupx.advice import measuring
from mupx.advice.rates import TABLES, gemm
from mupx.errors import UsageError

CPU = torch.device("cpu")
TINY = {"gemm": (8, 64), "conv": (2,), "decomposition": (8, 16), "stream": (4096, 65536)}
really_measure = measuring.measure  # the fixture puts another in its place


def kept(tmp_path):
    return list((tmp_path / "cache" / "mupx" / "rates").glob("*.json"))


def test_a_real_measurement_gives_a_positive_rate_for_everything():
    state = torch.get_rng_state()
    rates = really_measure(CPU, torch.float64, TINY, seconds=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert rates.about["dtype"] == "float64"
    assert 0 < rates.call < 1e-2
    for name in TABLES:
        assert all(rate > 0 for rate in getattr(rates, name).rates), name
    # Faster than an interpreter, slower than any processor there is.
    assert 1e6 < 2 * 512**3 / rates.seconds([gemm(512, 512, 512)]) < 1e15


def test_a_larger_product_takes_longer(tmp_path):
    rates = really_measure(CPU, torch.float32, TINY, seconds=1e-3)
    assert rates.seconds([gemm(512, 512, 512)]) > 3 * rates.seconds([gemm(128, 128, 128)])


def test_what_was_measured_is_read_back_and_measured_again_only_when_asked(tmp_path, monkeypatch):
    first = measuring.rates_of(CPU, torch.float32)
    assert len(kept(tmp_path)) == 1
    monkeypatch.setattr(measuring, "measure", None)  # calling it would fail
    assert measuring.rates_of(CPU, torch.float32) == first
    called = []
    monkeypatch.setattr(measuring, "measure", lambda *given: called.append(given) or first)
    assert measuring.rates_of(CPU, torch.float32, again=True) == first
    assert called == [(CPU, torch.float32)]


def test_precision_threads_and_version_have_files_of_their_own(tmp_path, monkeypatch):
    measuring.rates_of(CPU, torch.float32)
    measuring.rates_of(CPU, torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    measuring.rates_of(CPU, torch.float32)
    monkeypatch.setattr(torch, "__version__", "99")
    measuring.rates_of(CPU, torch.float32)
    assert len(kept(tmp_path)) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"gemm": 3}', "\udcff"])
def test_a_damaged_file_is_measured_again_and_replaced(tmp_path, content, caplog, monkeypatch):
    logging.getLogger("mupx").propagate = True
    whole = measuring.rates_of(CPU, torch.float32)
    (path,) = kept(tmp_path)
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert measuring.rates_of(CPU, torch.float32) == whole
    assert "measured again" in caplog.text
    assert json.loads(path.read_text())["call"] == whole.call


def test_a_device_that_lacks_an_operation_is_an_error_that_says_so(monkeypatch):
    def fail(device, dtype):
        raise NotImplementedError("eigh is not implemented for 'MPS'\nsee elsewhere")

    monkeypatch.setattr(measuring, "measure", fail)
    with pytest.raises(UsageError, match="eigh is not implemented for 'MPS'"):
        measuring.rates_of(CPU, torch.float32)


def test_a_cache_that_cannot_be_written_costs_no_advice(tmp_path, monkeypatch, caplog):
    logging.getLogger("mupx").propagate = True
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measuring.rates_of(CPU, torch.float32).call > 0
    assert "not kept" in caplog.text
