"""One retry policy for both wrappers and MongoDB: which errors, how often, how long between."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from error_handler import (
    ConfigurationError,
    DirectoryLockedError,
    LLMBusyError,
    LLMConnectionError,
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    LLMReplyError,
    LLMTimeoutError,
    LLMUnavailableError,
    Reason,
    StateDirectoryError,
    StoreForbiddenError,
    StoreRejectedError,
    StoreUnavailableError,
    TriadError,
)
from utils.retry_utils import CAP_S, RetryPolicy, is_worth_repeating, retry_async, tenacity_options

AT_ONCE = RetryPolicy(3, 0.0)


class Flaky:
    """Fails with *errors* in turn, then returns "done"."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def run(operation: Flaky, policy: RetryPolicy = AT_ONCE, **options: Any) -> str:
    return tenacity.Retrying(**tenacity_options(policy, "test", **options))(operation)


@pytest.mark.parametrize(
    ("first_wait_s", "planned"), [(2.0, [2, 4, 8, 16, 32, 60, 60]), (1.0, [1, 2, 4, 8, 16, 32, 60])]
)
def test_waits_double_up_to_the_cap(first_wait_s: float, planned: list[float]) -> None:
    """With a jitter of +-50 % around the plan: both halves of it are used, and nothing outside."""
    policy = RetryPolicy(10, first_wait_s)
    for attempt, wait_s in enumerate(planned, 1):
        waits = [policy.wait_s(attempt) for _ in range(500)]
        assert wait_s * 0.5 <= min(waits) < wait_s * 0.75
        assert wait_s * (1.25 if wait_s < CAP_S / 1.5 else 0.9) < max(waits) <= min(CAP_S, wait_s * 1.5)


@given(st.integers(1, 10), st.floats(0, 60))
def test_no_wait_is_negative_or_longer_than_the_cap(attempt: int, first_wait_s: float) -> None:
    """For every value that settings allow."""
    assert 0 <= RetryPolicy(10, first_wait_s).wait_s(attempt) <= CAP_S


def test_the_waits_are_those_of_the_policy() -> None:
    """Attempts count from 1 in the policy and in the loop."""
    waited: list[float] = []
    retrying = tenacity.Retrying(**tenacity_options(RetryPolicy(4, 2.0), "test"), sleep=waited.append)
    with pytest.raises(LLMBusyError):
        retrying(Flaky(*[LLMBusyError("busy")] * 4))
    assert len(waited) == 3
    for wait_s, planned in zip(waited, [2, 4, 8], strict=True):
        assert planned * 0.5 <= wait_s <= planned * 1.5


@pytest.mark.parametrize(
    ("error", "is_repeated"),
    [
        (LLMUnavailableError("x"), True),
        (LLMConnectionError("x"), True),
        (LLMBusyError("x"), True),
        (LLMTimeoutError("x"), True),
        (StoreUnavailableError("x"), True),
        (StateDirectoryError("x"), True),
        (LLMReplyError("x", Reason.EMPTY), False),
        (LLMContextError("x"), False),
        (LLMModelError("x"), False),
        (LLMOutageError("x"), False),
        (StoreRejectedError("x"), False),
        (StoreForbiddenError("x"), False),
        (ConfigurationError("x"), False),
        (DirectoryLockedError("x"), False),
        (TriadError("x"), False),
        (ValueError("x"), False),
        (ConnectionError("x"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_which_errors_are_repeated(error: BaseException, is_repeated: bool) -> None:
    """Transient and resource errors of ours; a foreign error is a bug, and repeating bugs hides them."""
    assert is_worth_repeating(error) is is_repeated
    operation = Flaky(error)
    if is_repeated:
        assert run(operation) == "done"
    else:
        with pytest.raises(type(error)):
            run(operation)
    assert operation.calls == (2 if is_repeated else 1)


def test_the_last_error_is_let_through() -> None:
    """As it was raised, not wrapped."""
    last = LLMTimeoutError("third")
    operation = Flaky(LLMBusyError("first"), LLMConnectionError("second"), last)
    with pytest.raises(LLMTimeoutError) as caught:
        run(operation)
    assert caught.value is last
    assert operation.calls == 3


def test_a_permanent_error_ends_a_series_of_transient_ones() -> None:
    """At once."""
    operation = Flaky(LLMBusyError("first"), LLMModelError("gone"))
    with pytest.raises(LLMModelError):
        run(operation)
    assert operation.calls == 2


def test_one_attempt_means_no_repetition() -> None:
    """*attempts* counts the first one."""
    operation = Flaky(LLMBusyError("busy"))
    with pytest.raises(LLMBusyError):
        run(operation, RetryPolicy(1, 0.0))
    assert operation.calls == 1


def test_repetitions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each says what failed and why."""
    with caplog.at_level(logging.WARNING):
        run(Flaky(LLMBusyError("no slot"), LLMBusyError("no slot")))
    assert [record.getMessage() for record in caplog.records] == [
        "test: attempt 1 failed (no slot), next in 0.0 s",
        "test: attempt 2 failed (no slot), next in 0.0 s",
    ]


async def test_the_same_options_serve_the_asynchronous_driver() -> None:
    """One policy, two drivers."""
    operation = Flaky(LLMBusyError("busy"))
    async for trial in tenacity.AsyncRetrying(**tenacity_options(AT_ONCE, "test")):
        with trial:
            assert operation() == "done"
    assert operation.calls == 2


@pytest.mark.parametrize(
    ("errors", "attempts", "calls"),
    [
        ([], 3, 1),
        ([LLMBusyError("first"), LLMBusyError("second")], 3, 3),
        ([LLMBusyError("first"), LLMBusyError("second")], 2, 2),
        ([LLMBusyError("first")], 1, 1),
        ([LLMModelError("gone")], 3, 1),
        ([LLMBusyError("first"), LLMModelError("gone")], 3, 2),
    ],
)
async def test_first_attempt_outside_tenacity_counts(
    errors: list[LLMError], attempts: int, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The attempts, the log and the error that is raised are those of the policy."""
    operation = Flaky(*errors)

    async def asynchronous() -> str:
        return operation()

    if calls > len(errors):
        assert await retry_async(asynchronous, RetryPolicy(attempts, 0.0), "test") == "done"
    else:
        with pytest.raises(type(errors[calls - 1])) as caught:
            await retry_async(asynchronous, RetryPolicy(attempts, 0.0), "test")
        assert caught.value is errors[calls - 1]
    assert operation.calls == calls
    logged = [record.getMessage() for record in caplog.records]
    assert [line.split(" failed")[0] for line in logged] == [f"test: attempt {number}" for number in range(1, calls)]
