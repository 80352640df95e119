"""The embedded mongod, a real one but for the tests about a mongod that cannot run."""

from __future__ import annotations

import os
import platform
import random
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pymongo
import pytest
from pymongo.database import Database

from embedded import mongod as embedded_mongod
from embedded import replica_set
from embedded.mongod import PORTS, EmbeddedMongod, find_mongod
from embedded.replica_set import ReplicaSetMongod
from error_handler import ConfigurationError

ROOT = Path(__file__).parents[2]
LOADER_ERROR = "mongod: error while loading shared libraries: {}: cannot open shared object file: No such file"

# One line as mongod 6.0.5 wrote it on a full disk, shortened.
DISK_FULL = (
    '{"s":"E",  "c":"WT",  "id":22435,   "ctx":"initandlisten","msg":"WiredTiger error message","attr":{"error":28,'
    '"message":{"msg":"handle-write: pwrite: failed to write 4096 bytes at offset 0",'
    '"error_str":"No space left on device","error_code":28}}}'
)


def client_of(mongod: EmbeddedMongod) -> pymongo.MongoClient[dict[str, object]]:
    return pymongo.MongoClient(mongod.uri, serverSelectionTimeoutMS=10_000)


def count(mongod: EmbeddedMongod) -> int:
    with client_of(mongod) as client:
        return client.shop.orders.count_documents({})


def insert(mongod: EmbeddedMongod) -> None:
    with client_of(mongod) as client:
        orders = client.shop.get_collection("orders", write_concern=pymongo.WriteConcern(w="majority", j=True))
        orders.insert_one({"text": "where is my order"})


def folder_of(database: Database[dict[str, Any]]) -> Path:
    """Return the folder of the server that has *database*."""
    return Path(database.client.admin.command("getCmdLineOpts")["parsed"]["storage"]["dbPath"])


def await_end(pid: int) -> None:
    """Return when the process has ended; fail after a minute."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], 60)[0], f"process {pid} is still there"
    finally:
        os.close(handle)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.thorough
def test_standalone_takes_writes_on_loopback_only(tmp_path: Path) -> None:
    data_dir = tmp_path / "deep" / "data of mine"
    with EmbeddedMongod(data_dir) as mongod:
        insert(mongod)
        assert count(mongod) == 1
        assert mongod.port in PORTS
        process = psutil.Process(mongod.pid)
        listening = [c.laddr for c in process.net_connections("all") if c.status == psutil.CONN_LISTEN]
        assert listening == [("127.0.0.1", mongod.port)]
        assert not [c for c in process.net_connections("unix") if c.laddr]
        assert os.getsid(process.pid) == process.pid, "Ctrl-C in the terminal would reach it"
    assert mongod.pid is None
    assert not process.is_running()
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((data_dir / "mongod.log").stat().st_mode) == 0o600


@pytest.mark.thorough  # of the replica set that other tests use; the standalone server has separate tests
def test_replica_set_keeps_its_data_over_restart_crash_and_another_port(tmp_path: Path) -> None:
    with ReplicaSetMongod(tmp_path / "data") as mongod:
        insert(mongod)
        port = mongod.port
        mongod.stop()
        mongod.start()
        assert mongod.port == port
        assert count(mongod) == 1
        insert(mongod)
        mongod.kill()
        assert mongod.pid is None
        mongod.start()
        assert mongod.port == port
        insert(mongod)
        mongod.kill()
    with ReplicaSetMongod(tmp_path / "data") as moved:
        assert moved.port != port
        assert count(moved) == 3
        insert(moved)


def test_replica_set_whose_server_dies_at_the_start_is_an_error_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the driver would end the run without a word on what to do."""
    monkeypatch.setattr(replica_set, "START_TIMEOUT_S", 0.2)
    monkeypatch.setattr(EmbeddedMongod, "start", lambda mongod: None)  # ends before it is asked
    mongod = ReplicaSetMongod(tmp_path / "data")
    mongod.port = 1
    with pytest.raises(ConfigurationError, match=r"took no writes .*ServerSelectionTimeoutError.*mongod\.log"):
        mongod.start()


@pytest.mark.thorough
def test_folder_of_another_replica_set_is_refused(tmp_path: Path) -> None:
    """No server stays behind, and the message says what to do."""
    with EmbeddedMongod(tmp_path, extra_arguments=("--replSet", "other")) as other:
        members = [{"_id": 0, "host": f"127.0.0.1:{other.port}"}]
        with pymongo.MongoClient[dict[str, object]](other.uri, directConnection=True) as client:
            client.admin.command("replSetInitiate", {"_id": "other", "members": members})
    server = ReplicaSetMongod(tmp_path)
    with pytest.raises(ConfigurationError, match="move the folder away"):
        server.start()
    assert server.pid is None


@pytest.mark.thorough
def test_data_of_a_killed_standalone_server_becomes_a_replica_set(tmp_path: Path) -> None:
    """Earlier versions ran the embedded MongoDB as a standalone server."""
    with EmbeddedMongod(tmp_path / "data") as earlier:
        insert(earlier)
        earlier.kill()
    with ReplicaSetMongod(tmp_path / "data") as mongod:
        assert count(mongod) == 1
        insert(mongod)
        mongod.kill()
    with ReplicaSetMongod(tmp_path / "data") as again:
        assert count(again) == 2


@pytest.mark.thorough
def test_ends_with_its_parent_and_the_folder_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from embedded.mongod import EmbeddedMongod\n"
        "mongod = EmbeddedMongod(Path(sys.argv[1])); mongod.start()\n"
        "print(mongod.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert psutil.Process(pid).name() == "mongod"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        with EmbeddedMongod(tmp_path):  # without waiting for the first one
            await_end(pid)


@pytest.mark.thorough
def test_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    mongod = EmbeddedMongod(tmp_path)
    thread = threading.Thread(target=mongod.start)
    thread.start()
    thread.join()
    try:
        insert(mongod)
        assert count(mongod) == 1
    finally:
        mongod.stop()


def test_folder_of_a_running_server_is_refused(
    mongod: EmbeddedMongod, database: Database[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_mongod, "HOLDER_TIMEOUT_S", 0.0)
    with pytest.raises(ConfigurationError, match=rf"in use by another mongod \(process {mongod.pid}\)"):
        EmbeddedMongod(folder_of(database)).start()
    database.orders.insert_one({"text": "where is my order"})


@pytest.mark.thorough
def test_start_waits_for_a_server_that_is_ending(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with EmbeddedMongod(data_dir) as first:
        insert(first)
        binary = script(  # the first server dies after it made the second one fail
            tmp_path / "mongod",
            f'[ -e "$0.ran" ] && exec "{find_mongod()}" "$@"\n'
            f'touch "$0.ran"; "{find_mongod()}" "$@"; code=$?; kill -9 {first.pid}; exit $code',
        )
        with EmbeddedMongod(data_dir, binary=binary) as second:
            assert count(second) == 1


@pytest.mark.thorough
def test_port_lost_between_choice_and_start_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        first, choose = iter([other.getsockname()[1]]), random.choice
        monkeypatch.setattr(random, "choice", lambda ports: next(first, None) or choose(ports))
        with EmbeddedMongod(tmp_path) as mongod:
            assert count(mongod) == 0


@pytest.mark.thorough
def test_given_port_in_use_is_refused_even_if_mongodb_answers_there(tmp_path: Path) -> None:
    with (
        EmbeddedMongod(tmp_path / "a") as first,
        pytest.raises(ConfigurationError, match=f"Port {first.port} is in use"),
    ):
        EmbeddedMongod(tmp_path / "b", port=first.port).start()


def test_log_never_quotes_a_slow_command(database: Database[dict[str, Any]]) -> None:
    database.orders.insert_one({"n": 1})
    slow = {"$where": "sleep(300) || true", "text": {"$ne": "my card number"}}
    assert len(list(database.orders.find(slow))) == 1
    assert "my card number" not in (folder_of(database) / "mongod.log").read_text()


@pytest.mark.thorough
def test_large_log_is_rotated(tmp_path: Path) -> None:
    log = tmp_path / "mongod.log"
    log.write_text("x" * (embedded_mongod.LOG_LIMIT_BYTES + 1))
    with EmbeddedMongod(tmp_path):
        assert log.stat().st_size < embedded_mongod.LOG_LIMIT_BYTES
    assert (tmp_path / "mongod.log.1").stat().st_size > embedded_mongod.LOG_LIMIT_BYTES


@pytest.mark.thorough
def test_missing_libcurl_comes_from_the_wheel(tmp_path: Path) -> None:
    binary = script(
        tmp_path / "mongod",
        f'[ -e "$LD_LIBRARY_PATH/libcurl.so.4" ] && exec "{find_mongod()}" "$@"\n'
        f"echo '{LOADER_ERROR.format('libcurl.so.4')}' >&2; exit 127",
    )
    with EmbeddedMongod(tmp_path / "data", binary=binary) as mongod:
        insert(mongod)
        loaded = {m.path for m in psutil.Process(mongod.pid).memory_maps() if ".so" in m.path}
    assert any("pycurl.libs/libcurl-" in path for path in loaded)
    assert len([path for path in loaded if "libcrypto" in path]) == 1, "two OpenSSLs in one process"
    assert len([path for path in loaded if "libssl" in path]) == 1


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libcurl.so.4", "libcurl4"),
        ("liblzma.so.5", "liblzma5"),
        ("libssl.so.3", "libssl3"),
        ("libcrypto.so.3", "libssl3"),
    ],
)
def test_missing_library_is_named_with_its_package(tmp_path: Path, library: str, package: str) -> None:
    binary = script(tmp_path / "mongod", f"echo '{LOADER_ERROR.format(library)}' >&2; exit 127")
    with pytest.raises(ConfigurationError, match=rf"{library}: apt-get install {package}, then"):
        EmbeddedMongod(tmp_path / "data", binary=binary).start()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"echo '{DISK_FULL}'; exit 14", "disk of .* is full. Free some space"),
        ('echo "mongod: libc.so.6: version \\`GLIBC_2.34\' not found" >&2; exit 1', "needs GLIBC_2.34"),
        ('echo \'{"msg":"Shutting down","attr":{"exitCode":62}}\'; exit 62', "written by another version"),
        ("kill -ILL $$", "processor with AVX"),
        ("echo 'Error parsing command line: frob'; exit 2", "ended with code 2 .*see its log .*mongod.log: .*frob"),
    ],
)
def test_end_while_starting_is_explained(tmp_path: Path, command: str, message: str) -> None:
    mongod = EmbeddedMongod(tmp_path / "data", binary=script(tmp_path / "mongod", command))
    with pytest.raises(ConfigurationError, match=message):
        mongod.start()
    assert mongod.pid is None


def test_server_that_never_listens_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_mongod, "START_TIMEOUT_S", 0.2)
    mongod = EmbeddedMongod(tmp_path / "data", binary=script(tmp_path / "mongod", "exec tail -f /dev/null"))
    with pytest.raises(ConfigurationError, match="not ready after"):
        mongod.start()
    assert mongod.pid is None


def test_unusable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="Cannot use the folder"):
        EmbeddedMongod(tmp_path / "file").start()


def test_other_platforms_take_mongod_from_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="No mongod found"):
        find_mongod()
    binary = script(tmp_path / "mongod", "exit 0")
    assert find_mongod() == binary
