"""The pure parts of the service: places, rates, kept answers, keys, deadlines, JSON, settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.service_settings import load_service_settings
from error_handler import ConfigurationError, RequestError
from network.addresses import is_loopback
from service import access as rate_limit
from service.access import CLASSIFY, KeyRing, RateLimiter, ServiceGate
from service.admission import MAX_RETRY_AFTER_S, AdmissionQueue, Deadlines, IdempotencyStore
from service.body_limits import check_json_object
from service.errors import KEY_REUSED, QUEUE_FULL, STOPPING, TOO_MANY, TOO_SLOW, UNAUTHENTICATED


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def hold(queue: AdmissionQueue, order: list[int], number: int, release: asyncio.Event) -> None:
    await queue.acquire()
    order.append(number)
    await release.wait()
    queue.release(1.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_are_granted_first_come_first_served() -> None:
    """One at a time, first come first served, the next one refused at once."""
    order: list[int] = []
    queue, release = AdmissionQueue(1, 2), asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, order, number, release)) for number in range(4)]
    await settle()
    assert (queue.running, queue.waiting, order) == (1, 2, [0])
    with pytest.raises(RequestError) as refused:
        await tasks[3]
    assert refused.value.kind is QUEUE_FULL
    assert 1 <= (refused.value.retry_after_s or 0) <= MAX_RETRY_AFTER_S
    release.set()
    await asyncio.gather(*tasks[:3])
    assert order == [0, 1, 2]
    assert (queue.running, queue.waiting) == (0, 0)


async def test_background_work_waits_for_requests_and_leaves_them_a_slot() -> None:
    """It has all slots but one, starts only if no request waits, and does not count as a request."""
    queue, release, started = AdmissionQueue(3, 2), asyncio.Event(), []

    async def work(number: int) -> None:
        await queue.acquire_in_background()
        started.append(number)
        await release.wait()
        queue.release_in_background()

    background = [asyncio.create_task(work(number)) for number in range(3)]
    await settle()
    assert (started, queue.running, queue.requests) == ([0, 1], 2, 0)
    order: list[int] = []
    answered = asyncio.Event()
    requests = [asyncio.create_task(hold(queue, order, number, answered)) for number in range(2)]
    await settle()
    assert (order, queue.waiting, queue.requests) == ([0], 1, 2)
    release.set()
    await asyncio.gather(*background[:2])
    await settle()
    assert (order, started) == ([0, 1], [0, 1])  # the waiting request goes first
    answered.set()
    await asyncio.gather(*requests, background[2])
    assert queue.running == 0


async def test_single_slot_is_lent_to_background_work_while_no_request_has_it() -> None:
    queue = AdmissionQueue(1, 1)
    await queue.acquire_in_background()
    waiting = asyncio.create_task(queue.acquire())
    await settle()
    assert (queue.running, queue.waiting) == (1, 1)
    queue.release_in_background()
    await waiting
    other = asyncio.create_task(queue.acquire_in_background())
    await settle()
    assert not other.done()
    queue.release(0.0)
    await other


async def test_patient_request_waits_while_the_queue_is_full() -> None:
    """It is a conversation of a batch, which was admitted as a whole."""
    queue = AdmissionQueue(1, 0)
    await queue.acquire()
    patient = asyncio.create_task(queue.acquire(patiently=True))
    await settle()
    with pytest.raises(RequestError):
        await queue.acquire()
    queue.release(0.0)
    await patient
    assert queue.running == 1


@pytest.mark.parametrize("seed", range(20))
async def test_slots_survive_random_cancellations(seed: int) -> None:
    """Random cancellations, also in the moment in which a place is handed over."""
    rng = random.Random(seed)
    queue, holders, most = AdmissionQueue(3, 50), 0, 0

    async def work() -> None:
        nonlocal holders, most
        await queue.acquire()
        holders += 1
        most = max(most, holders)
        try:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            holders -= 1
            queue.release(0.0)

    tasks = [asyncio.create_task(work()) for _ in range(40)]
    while not all(task.done() for task in tasks):
        rng.choice(tasks).cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most <= 3
    assert (queue.running, queue.waiting) == (0, 0)


def test_rate_limiter_allows_a_burst_and_then_a_steady_rate() -> None:
    """As many as a minute has at once, then one each time a token is there; the refused cost nothing."""
    clock = Clock()
    limiter = RateLimiter(6, clock)
    assert [limiter.take("a") for _ in range(6)] == [0.0] * 6
    assert limiter.take("a") == pytest.approx(10.0)
    assert limiter.take("b") == 0.0
    clock.now = 9.9
    assert limiter.take("a") == pytest.approx(0.1)
    clock.now = 10.0
    assert limiter.take("a") == 0.0
    clock.now = 10_000.0
    assert [limiter.take("a") > 0 for _ in range(7)] == [False] * 6 + [True]
    assert RateLimiter(0).take("a") == 0.0


def test_rate_limiter_remembers_a_bounded_number_of_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million addresses take no more memory than the table has; who was silent longest goes."""
    monkeypatch.setattr(rate_limit, "MAX_CALLERS", 2)
    limiter = RateLimiter(1, Clock())
    for caller in ("a", "b", "c"):
        assert limiter.take(caller) == 0.0
    assert limiter.take("c") > 0
    assert limiter.take("a") == 0.0


async def test_kept_answers_are_bounded_in_number_and_age() -> None:
    """The oldest goes first; an old one is asked for again."""
    clock, asked = Clock(), 0
    store = IdempotencyStore[int](retention_s=10, max_keys=3, clock=clock)

    async def ask() -> int:
        nonlocal asked
        asked += 1
        return asked

    for number in range(5):
        await store.answer(("a", str(number)), b"f", ask)
    assert len(store) == 3
    assert await store.answer(("a", "4"), b"f", ask) == (5, True)
    assert await store.answer(("a", "0"), b"f", ask) == (6, False)
    with pytest.raises(RequestError) as refused:
        await store.answer(("a", "4"), b"other", ask)
    assert refused.value.kind is KEY_REUSED
    clock.now = 11
    assert await store.answer(("a", "4"), b"other", ask) == (7, False)
    assert len(store) == 1


async def test_task_for_a_key_is_cancelled_with_its_last_waiter() -> None:
    """One who leaves does not take the answer from the others; nobody left ends it, and the key is free."""
    store, started, ended = IdempotencyStore[int](10, 10), asyncio.Event(), asyncio.Event()

    async def ask() -> int:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 1

    first, second = (asyncio.create_task(store.answer(("a", "1"), b"f", ask)) for _ in range(2))
    await started.wait()
    first.cancel()
    await settle()
    assert not ended.is_set()
    second.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await second
    assert ended.is_set()
    assert len(store) == 0


async def test_failure_reaches_all_waiters_and_is_forgotten() -> None:
    """And is forgotten."""
    store = IdempotencyStore[int](10, 10)

    async def fail() -> int:
        await asyncio.sleep(0)
        raise RequestError(TOO_SLOW)

    waiting = [asyncio.create_task(store.answer(("a", "1"), b"f", fail)) for _ in range(3)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [RequestError] * 3
    assert len(store) == 0


async def test_deadlines_distinguish_late_from_stopped_requests() -> None:
    """The kind tells which of the two it was; later ones end with the grace period as well."""
    deadlines, loop = Deadlines(), asyncio.get_running_loop()

    async def wait(until: float) -> str:
        try:
            await deadlines.until(until, asyncio.Event().wait())
        except RequestError as problem:
            return problem.kind.name
        return "done"

    assert await wait(loop.time()) == TOO_SLOW.name
    running = asyncio.create_task(wait(loop.time() + 60))
    await settle()
    deadlines.stop(0.01)
    assert await running == STOPPING.name
    assert await wait(loop.time() + 60) == STOPPING.name


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), NESTED))
def test_strict_json_accepts_plain_objects(value: dict[str, object]) -> None:
    """Both with escapes and without."""
    for ascii_only in (True, False):
        check_json_object(json.dumps(value, ensure_ascii=ascii_only).encode())


@given(st.binary() | st.text(alphabet='{}[]",:\\u0d8 \n1eE+-.NaInfity').map(str.encode))
def test_strict_json_accepts_only_what_the_parser_reads_as_an_object(body: bytes) -> None:
    """And nothing else."""
    with contextlib.suppress(RequestError):
        check_json_object(body)
        assert isinstance(json.loads(body), dict)


@given(st.text(alphabet=string.printable))
def test_only_the_complete_key_is_valid(presented: str) -> None:
    """Names of keys open nothing."""
    key = "0123456789abcdef"
    ring = KeyRing([("helpdesk", key)])
    expected = "helpdesk" if presented == key else None
    assert ring.caller({b"x-api-key": presented.encode()}) == expected


def test_wrong_keys_are_limited_per_address() -> None:
    """The valid key, a request without a key, and other addresses are not affected."""
    key = "0123456789abcdef"
    gate = ServiceGate(load_service_settings(None, keys=f"helpdesk:{key}"))

    def refusal(headers: dict[bytes, bytes], address: str = "192.0.2.1") -> object:
        with pytest.raises(RequestError) as refused:
            gate.admit(CLASSIFY, headers, (address, 50_000))
        return refused.value.kind

    guesses = [refusal({b"x-api-key": b"guess-%d" % number}) for number in range(120)]
    assert guesses[:60] == [UNAUTHENTICATED] * 60
    assert guesses[-1] is TOO_MANY
    assert refusal({}) is UNAUTHENTICATED
    assert refusal({b"x-api-key": b"guess"}, "192.0.2.2") is UNAUTHENTICATED
    assert gate.admit(CLASSIFY, {b"x-api-key": key.encode()}, ("192.0.2.1", 50_000)) == "helpdesk"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        (None, False),
        ("10.0.0.1", False),
        ("192.0.2.1", False),
        ("no such host", False),
    ],
)
def test_is_loopback_recognises_local_addresses(host: str | None, expected: bool) -> None:
    """Everything that cannot be found out counts as outside."""
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": "name"},
        {"keys": "name:short"},
        {"keys": "na me:0123456789abcdef"},
        {"keys": "a:0123456789abcdef,b:0123456789abcdef"},
        {"keys": "a:0123456789abcdef,"},
        {"keys": "a:0123456789 abcdef"},
        {"max_concurrent": 0},
        {"expose_docs": "maybe"},
        {"port": 70_000},
    ],
    ids=str,
)
def test_invalid_settings_are_named_without_their_value(wrong: dict[str, object]) -> None:
    """The message may end in a log."""
    with pytest.raises(ConfigurationError) as refused:
        load_service_settings(None, **wrong)
    assert "API_" in str(refused.value)
    assert "0123456789" not in str(refused.value)
