"""A real PostgreSQL server from Debian's packages, as a child process that ends with this one."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
import pytest

SUPERUSER = "owner"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
# PostgreSQL refuses to run as root, so root starts it as this one.
UNPRIVILEGED = "nobody"


def find_binaries() -> Path:
    """Return the folder of the newest server; the test is skipped, with the reason, where there is none."""
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if not folders:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql: on Debian and Ubuntu, apt-get install postgresql")
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv, which starts the PostgreSQL server: it is in the package util-linux")
    return max(folders, key=lambda folder: float(folder.parent.name))


@dataclass(frozen=True, slots=True)
class Postgres:
    """The address of the server. Everyone on loopback needs the password."""

    port: int
    password: str

    def uri(self, database: str = "postgres", *, user: str = SUPERUSER, password: str | None = None) -> str:
        """Return the address of *database* as a user would write it."""
        return f"postgresql://{user}:{quote(password or self.password)}@127.0.0.1:{self.port}/{quote(database)}"

    def run(self, *statements: str, database: str = "postgres") -> None:
        """Execute *statements*, each in a separate transaction."""
        with psycopg.connect(self.uri(database), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())


class PostgresServer:
    """One server in a temporary folder, which is removed when it stops; use in ``with``."""

    def __init__(self) -> None:
        self._binaries = find_binaries()
        # Not in pytest's folder: the server's user may not enter that.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.postgres = self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self, *arguments: str) -> list[str]:
        # SIGINT is PostgreSQL's fast shutdown: a killed test run leaves no server and no shared memory.
        launcher = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() == 0:
            launcher += ["--reuid", UNPRIVILEGED, "--regid", "nogroup", "--clear-groups"]
        return [*launcher, str(self._binaries / arguments[0]), *arguments[1:]]

    def _environment(self) -> Mapping[str, str]:
        return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": str(self._folder)}

    def _start(self) -> Postgres:
        password = secrets.token_urlsafe(12)
        secret = self._folder / "password"
        secret.write_text(password)
        if os.geteuid() == 0:
            shutil.chown(self._folder, UNPRIVILEGED)
            shutil.chown(secret, UNPRIVILEGED)
        data = self._folder / "data"
        arguments = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        made = subprocess.run(
            self._command("initdb", f"-D{data}", f"-U{SUPERUSER}", f"--pwfile={secret}", *arguments),
            env=self._environment(),
            cwd=self._folder,
            capture_output=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr.decode()
        for _ in range(5):
            port = _free_port()
            if self._serve(data, port):
                return Postgres(port, password)
        raise AssertionError((self._folder / "log").read_text())

    def _serve(self, data: Path, port: int) -> bool:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_locks_per_transaction": 1024,  # for the database of 2,000 tables
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", f"-D{data}", *settings),
                env=self._environment(),
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        ready = [str(self._binaries / "pg_isready"), "-q", "-h127.0.0.1", f"-p{port}", "-t1"]
        for _ in range(int(START_TIMEOUT_S * 20)):
            if subprocess.run(ready, check=False).returncode == 0:
                return self._process.poll() is None
            try:
                self._process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            return False
        return False

    def stop(self) -> None:
        """End the server and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(STOP_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
