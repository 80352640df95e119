"""Errors of the driver become ours: what is worth repeating, what ends the run, and nothing of a secret in any."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from bson.errors import InvalidBSON, InvalidDocument
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import errors

from config import load_settings
from error_handler import (
    ConfigurationError,
    StoreForbiddenError,
    StoreRejectedError,
    StoreUnavailableError,
    StoreUnreadableError,
    TriadError,
)
from mongo_client import DocumentStore, call_repeatedly
from storage.mongo_connection import open_client
from storage.mongo_errors import FORBIDDEN_CODES, TRANSIENT_CODES, has_no_server, translated
from tests.embedding_index.stores import open_store
from utils.retry_utils import RetryPolicy

SECRET = "mongodb://user:hunter2@host"


def failure(code: int) -> errors.OperationFailure:
    return errors.OperationFailure(f"failed at {SECRET}", code)


def bulk(*codes: int, **details: Any) -> errors.BulkWriteError:
    write_errors = [{"index": n, "code": code, "errmsg": SECRET} for n, code in enumerate(codes)]
    return errors.BulkWriteError({"writeErrors": write_errors, "writeConcernErrors": [], **details})


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        pytest.param(errors.AutoReconnect(SECRET), StoreUnavailableError, id="connection-lost"),
        pytest.param(errors.ServerSelectionTimeoutError(SECRET), StoreUnavailableError, id="no-server"),
        pytest.param(errors.NetworkTimeout(SECRET), StoreUnavailableError, id="network-time-out"),
        pytest.param(errors.NotPrimaryError(SECRET), StoreUnavailableError, id="not-primary"),
        pytest.param(errors.WaitQueueTimeoutError(SECRET), StoreUnavailableError, id="pool-exhausted"),
        pytest.param(errors.ExecutionTimeout(SECRET, 50), StoreUnavailableError, id="operation-time-out"),
        pytest.param(errors.WTimeoutError(SECRET, 64), StoreUnavailableError, id="write-concern-time-out"),
        pytest.param(errors.WriteConcernError(SECRET, 91), StoreUnavailableError, id="write-concern-shutdown"),
        pytest.param(errors.CursorNotFound(SECRET, 43), StoreUnavailableError, id="cursor-lost"),
        pytest.param(errors.InvalidOperation(SECRET), StoreUnavailableError, id="closed-client"),
        pytest.param(failure(13), StoreForbiddenError, id="unauthorized"),
        pytest.param(failure(18), StoreForbiddenError, id="wrong-password"),
        pytest.param(failure(8000), StoreForbiddenError, id="atlas-password"),
        pytest.param(failure(112), StoreUnavailableError, id="write-conflict"),
        pytest.param(failure(11600), StoreUnavailableError, id="shutdown"),
        pytest.param(failure(10107), StoreUnavailableError, id="stepped-down"),
        pytest.param(failure(14031), StoreUnavailableError, id="disk-full"),
        pytest.param(failure(121), StoreRejectedError, id="validator"),
        pytest.param(failure(2), StoreRejectedError, id="bad-value"),
        pytest.param(errors.DocumentTooLarge(SECRET), StoreRejectedError, id="too-large"),
        pytest.param(InvalidDocument(SECRET), StoreRejectedError, id="invalid-document"),
        pytest.param(InvalidBSON(SECRET), StoreUnreadableError, id="invalid-bson"),
        pytest.param(OverflowError(SECRET), StoreRejectedError, id="number-too-large"),
        pytest.param(UnicodeEncodeError("utf-8", SECRET, 0, 1, "x"), StoreRejectedError, id="surrogate"),
        pytest.param(bulk(121), StoreRejectedError, id="bulk"),
        pytest.param(errors.ConfigurationError(SECRET), ConfigurationError, id="configuration"),
        pytest.param(errors.InvalidURI(SECRET), ConfigurationError, id="uri"),
        pytest.param(errors.InvalidName(SECRET), ConfigurationError, id="name"),
    ],
)
def test_translation(raised: Exception, expected: type[TriadError]) -> None:
    """One of ours, with the cause kept, and a sentence that says what was tried and quotes nobody."""
    with pytest.raises(TriadError) as caught, translated("read a page"):
        raise raised
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised
    assert "hunter2" not in str(caught.value)
    assert "read a page" in str(caught.value) or isinstance(raised, errors.BulkWriteError)


def test_the_codes_do_not_overlap() -> None:
    """A forbidden operation is never repeated."""
    assert not FORBIDDEN_CODES & TRANSIENT_CODES


def test_our_own_errors_and_bugs_pass() -> None:
    """Nothing is translated twice, nothing foreign is swallowed."""
    for raised in (StoreRejectedError("x"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(raised)) as caught, translated("x"):
            raise raised
        assert caught.value is raised


class Collection:
    """Answers writes with the errors it was given, in turn."""

    def __init__(self, *raised: Exception | None) -> None:
        self.raised = list(raised)
        self.calls = 0

    async def insert_many(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        problem = self.raised.pop(0) if self.raised else None
        if problem is not None:
            raise problem


@pytest.mark.parametrize(
    ("raised", "expected", "calls"),
    [
        pytest.param([errors.AutoReconnect("x"), None], None, 2, id="connection-lost"),
        pytest.param([bulk(11000), None], None, 1, id="stored-already"),
        pytest.param([bulk(11000, 91), None], None, 2, id="shutdown-in-the-middle"),
        pytest.param([bulk(writeConcernErrors=[{"code": 64}]), None], None, 2, id="not-durable-yet"),
        pytest.param([bulk(11000, 13)], StoreForbiddenError, 1, id="rights-lost"),
        pytest.param([errors.AutoReconnect("x")] * 3, StoreUnavailableError, 3, id="away"),
    ],
)
async def test_groups(
    mongodb_uri: str, db_name: str, raised: list[Exception | None], expected: type[TriadError] | None, calls: int
) -> None:
    """A group is written again where its fate is unknown; duplicates are done; a lost right ends the run."""
    async with open_store(mongodb_uri, db_name) as store:
        collection = Collection(*raised)
        store._results = collection
        if expected is None:
            assert await store.write_results([{"source_conversation_id": n} for n in (1, 2)]) == {}
        else:
            with pytest.raises(expected):
                await store.write_results([{"source_conversation_id": n} for n in (1, 2)])
        assert collection.calls == calls


async def test_unreachable_server_is_tried_as_often_as_set(caplog: pytest.LogCaptureFixture) -> None:
    """The error is one sentence without the address."""
    # Not a port that is closed: PyMongo's monitor, cancelled while it connects, would leave a socket open.
    uri = "mongodb://user:hunter2@%2Fno-such-folder%2Fmongod.sock/"
    async with open_store(uri, "x", mongodb_timeout_ms=100, mongodb_max_retries=2) as store:
        with pytest.raises(StoreUnavailableError, match="start it, or correct MONGODB_URI") as caught:
            await store.check()
    assert caplog.text.count("attempt 1 failed") == 1
    assert "attempt 2 failed" not in caplog.text
    assert "hunter2" not in str(caught.value)


async def test_search_for_a_server_ends_before_the_time_limit_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyMongo ignores serverSelectionTimeoutMS beside timeoutMS, so a wrong address would take a minute to be reported."""
    monkeypatch.setattr("mongo_client.CONNECT_S", 0.05)
    uri = "mongodb://user:hunter2@%2Fno-such-folder%2Fmongod.sock/"
    async with asyncio.timeout(10), open_store(uri, "x", mongodb_timeout_ms=60_000, mongodb_max_retries=1) as store:
        with pytest.raises(StoreUnavailableError):
            await store.check()


async def test_a_client_that_was_handed_in_stays_open(mongodb_uri: str, db_name: str) -> None:
    """Whoever opened it closes it; one's own is closed."""
    client = AsyncIOMotorClient(mongodb_uri)
    settings = load_settings(None, mongodb_uri=mongodb_uri, db_name=db_name, mongodb_backoff_s=0)
    store = DocumentStore(settings, client=client)
    await store.close()
    assert await client.admin.command("ping") == {"ok": 1.0}
    client.close()
    own = DocumentStore(settings)
    await own.check()
    await own.close()
    with pytest.raises(StoreUnavailableError):
        await own.check()


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://",
        "mongodb://host:port",
        "mongodb://user:hunt%er2@host",
        "mongodb://user:hunter2@host/?tls=perhaps",
        "mongodb://user:hunter2@host/?tsl=true",
        "mongodb://user:hunter2@host/?authMechanism=MAGIC",
    ],
)
async def test_an_address_that_is_none(uri: str) -> None:
    """The setting is named and the address is not shown; an option with a typo is not left out in silence."""
    with pytest.raises(ConfigurationError, match="MONGODB_URI") as caught:
        open_client(load_settings(None, mongodb_uri=uri))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        pytest.param("mongodb://u:p@hunter2/w@127.0.0.1:27017", "percent-encode", id="B7-slash"),
        pytest.param(
            "mongodb://127.0.0.1/?useUnifiedTopology=true", "option useUnifiedTopology.*; remove it", id="B7-node"
        ),
        pytest.param("mongodb://127.0.0.1/?ssl_cert_reqs=CERT_NONE", "tlsAllowInvalidCertificates=true", id="B7-old"),
        pytest.param("mongodb://user:hunter2@x@host", "percent-encode", id="at"),
        pytest.param("mongodb://user:hunter2?x@host:27017", "percent-encode", id="question-mark"),
        pytest.param("mongodb://user:hunter2%zz@host", "percent-encode", id="percent"),
        pytest.param("mongodb://user:hunter2:x@host", "percent-encode", id="colon"),
        pytest.param("mongodb://host?poolSize=5", "write maxPoolSize instead", id="node-pool"),
        pytest.param("mongodb://host/?tsl=true", "tsl.*spelling", id="misspelt"),
        pytest.param("mongodb://host/?tls=perhaps", "wrong value for tls", id="value"),
        pytest.param("mongodb://host/?tlsCAFile=/hunter2", "tlsCAFile", id="missing-file"),
        pytest.param("mongodb+srv://host:27017/", "remove the port", id="srv-port"),
        pytest.param("mongodb://user:<password>@host/", "placeholder", id="placeholder"),
    ],
)
async def test_unusable_address_is_explained_in_one_sentence(uri: str, words: str) -> None:
    """It says what to change, and shows nothing that may be a password."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        open_client(load_settings(None, mongodb_uri=uri))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["mongodb://host/?appName=a@b", "mongodb://u:p@host/db?appName=a@b", "mongodb://h?appName=a@b"]
)
async def test_at_sign_in_an_option_is_no_password(uri: str) -> None:
    client = open_client(load_settings(None, mongodb_uri=uri))
    assert client.options.pool_options.appname is not None
    await client.close()


@pytest.mark.parametrize(
    ("text", "words", "no_server"),
    [
        ("h:1: [Errno 111] Connection refused", "nothing listens", True),
        ("h:1: [Errno 111] Connect call failed ('h', 1)", "nothing listens", True),
        ("Message length (1347703880) is larger than server max", "not MongoDB", False),
        ("h:1: [Errno -2] Name or service not known", "DNS", True),
        ("SSL handshake failed: h:1: [SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", "tlsCAFile", False),
        ("SSL handshake failed: h:1: [SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired", "expired", False),
        ("h:1: [SSL: CERTIFICATE_VERIFY_FAILED] Hostname mismatch, certificate is not valid", "host name", False),
        ("SSL handshake failed: h:1: [SSL: WRONG_VERSION_NUMBER] wrong version number", "remove tls=true", False),
        ("h:1: connection closed", "add tls=true", False),
        ("No primary available for writes", "no primary", False),
        ("replica set named 'a' but this node belongs to a set named 'b'", "another name", False),
        ("h:1: timed out", "check that it runs", False),
    ],
)
def test_failed_connection_has_a_sentence_of_its_kind(text: str, words: str, no_server: bool) -> None:
    """TLS, DNS and replica sets are not a server that has to be started."""
    with pytest.raises(StoreUnavailableError, match=words) as caught, translated("connect"):
        raise errors.ServerSelectionTimeoutError(text)
    assert "h:1" not in str(caught.value)
    assert has_no_server(caught.value.__cause__) is no_server


@pytest.mark.parametrize(
    ("code", "text", "expected", "words"),
    [
        pytest.param(301, "x", ConfigurationError, "add retryWrites=false to MONGODB_URI", id="B15"),
        pytest.param(20, "does not support retryable writes", ConfigurationError, "retryWrites=false", id="driver"),
        pytest.param(20, "illegal operation", StoreRejectedError, "code 20", id="other-illegal-operation"),
        pytest.param(166, "x", ConfigurationError, "view.*MONGODB_SOURCE_COLLECTION", id="view"),
        pytest.param(40485, "x", ConfigurationError, "--time-zone and REPORT_TIME_ZONE", id="time-zone"),
        pytest.param(13, "not authorized on db", StoreForbiddenError, "docs/operations.md", id="right"),
        pytest.param(13, "command find requires authentication", StoreForbiddenError, "user:password@", id="no-user"),
        pytest.param(18, "Authentication failed.", StoreForbiddenError, "authSource", id="password"),
    ],
)
def test_refused_operation_has_a_sentence_of_its_kind(
    code: int, text: str, expected: type[TriadError], words: str
) -> None:
    with pytest.raises(expected, match=words), translated("claim documents"):
        raise errors.OperationFailure(text, code)


async def in_context(call: Callable[[], Awaitable[None]]) -> None:
    with translated("beat"):
        await call()


async def repeatedly(call: Callable[[], Awaitable[None]]) -> None:
    await call_repeatedly("beat", call, RetryPolicy(3, 0.0))


@pytest.mark.parametrize("way", [in_context, repeatedly])
@pytest.mark.parametrize("problem", [None, errors.NetworkTimeout("late")], ids=["success", "failure"])
async def test_swallowed_cancellation_is_raised_again(
    problem: Exception | None, way: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
) -> None:
    """A loop that catches StoreError, such as that of a heartbeat, would go on for ever after the end of its run."""
    is_waiting = asyncio.Event()
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        assert calls == 1, "repeated after a cancellation"
        try:
            is_waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:  # as asyncio.wait_for of Python 3.11 in PyMongo
            if problem is not None:
                raise problem from None

    task = asyncio.ensure_future(way(call))
    await is_waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
