"""Toy data, folders of the test's own, and a file server on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mupx.datasets import files

from .toys import FileServer, Toy


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Keep every look-up inside the test's folder, and downloads off any proxy."""
    folders = {"data": tmp_path / "data", "system": tmp_path / "system", "cache": tmp_path / "cache"}
    monkeypatch.setenv("MUPX_DATA_DIR", str(folders["data"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["cache"]))
    monkeypatch.setattr(files, "SYSTEM_FOLDER", folders["system"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return {**folders, "cache": folders["cache"] / "mupx"}


@pytest.fixture
def server() -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            state.requests.append(name)
            if name not in state.content:
                return self.send_error(404)
            data = state.content[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if name in state.broken else data)
            return None

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state = FileServer(f"http://127.0.0.1:{http.server_port}/", {})
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()
