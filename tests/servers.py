"""A PostgreSQL server of a test's own: on loopback, with a password, in a folder that goes with it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

USER, PASSWORD = "ann", "s3cr3t-hunter2"
SEARCHED = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt/postgresql")


def binaries() -> Path | None:
    """Return the folder of the newest installed server's programs."""
    found = [path.parent for place in SEARCHED for path in Path(place).glob("**/bin/initdb")]
    on_path = shutil.which("initdb")
    found += [Path(on_path).parent] if on_path else []
    return max(found, key=lambda path: (len(str(path)), str(path)), default=None)


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def missing() -> str | None:
    """Return why no server can be started here, or None."""
    if binaries() is None:
        return "needs a PostgreSQL server (apt install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "needs psycopg (pip install mupx[postgres])"
    if os.getuid() == 0 and not (_account() and shutil.which("setpriv")):
        return "PostgreSQL refuses to run as root, and there is no user postgres to run it as"
    return None


# The value of a parameter that stands for a server, with its marks.
POSTGRES = pytest.param(
    "postgresql",
    marks=[pytest.mark.postgres, pytest.mark.skipif(missing() is not None, reason=str(missing()))],
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A running server; ``url`` has its password."""

    def __init__(self) -> None:
        self.port, self.folder = free_port(), Path(tempfile.mkdtemp(prefix="mupx-postgres-", dir="/tmp"))
        self.url = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        secret = self.folder / "secret"
        secret.write_text(PASSWORD)
        account = _account()
        if os.getuid() == 0 and account is not None:
            for path in (self.folder, secret):
                os.chown(path, account.pw_uid, account.pw_gid)
        options = ["-D", str(self.folder / "data"), "-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}"]
        self._run("initdb", *options, "--no-sync", "-E", "UTF8", "--locale=C")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start, or start again, and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "max_connections": 60,
        }
        flags = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        log = open(self.folder / "log", "ab")  # noqa: SIM115
        with log:
            self._server = subprocess.Popen(
                [*self._as_user(), str(self._program("postgres")), "-D", str(self.folder / "data"), *flags],
                stdout=log,
                stderr=log,
                cwd="/",
            )
        deadline = time.monotonic() + 30
        while self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), check=False) != 0:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop at once; connections are closed."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(30)
            self._server = None

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        command = [*self._as_user(), str(self._program(program)), *arguments]
        return subprocess.run(command, check=check, capture_output=True, cwd="/").returncode

    def _program(self, name: str) -> Path:
        folder = binaries()
        assert folder is not None
        return folder / name

    def _as_user(self) -> list[str]:
        account = _account()
        if os.getuid() != 0 or account is None:
            return []
        return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
