"""One retry policy for the synchronous and the asynchronous wrapper and for MongoDB."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

# Not where something is retry_async for the first time: without a free file descriptor it could not be loaded there.
import tenacity

from error_handler import ErrorClass, TriadError

CAP_S = 60.0
JITTER = 0.5  # +-50 %

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how slowly one operation is retry_async.

    ``wait(n) = min(CAP_S, first_wait_s * 2 ** (n - 1)) * U(0.5, 1.5)`` seconds after failed attempt
    *n* (from 1). *attempts* counts the first one.
    """

    attempts: int
    first_wait_s: float

    def wait_s(self, attempt: int) -> float:
        """Return the seconds to wait after failed *attempt* (from 1), jitter included, at most CAP_S."""
        planned = min(CAP_S, self.first_wait_s * 2.0 ** (attempt - 1))
        return min(CAP_S, planned * random.uniform(1 - JITTER, 1 + JITTER))


def is_worth_repeating(exc: BaseException) -> bool:
    """Whether another attempt can help: a transient or resource error of ours, and nothing else."""
    return isinstance(exc, TriadError) and exc.error_class is not ErrorClass.PERMANENT


def tenacity_options(policy: RetryPolicy, what: str, on_retry: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return the arguments of both ``tenacity.Retrying`` and ``tenacity.AsyncRetrying``.

    The last error is let through. *what* names the operation in the log; *on_retry* is called
    before each repetition.
    """

    def before_sleep(state: tenacity.RetryCallState) -> None:
        exc = state.outcome.exception() if state.outcome else None
        wait_s = state.next_action.sleep if state.next_action else 0.0
        logger.warning("%s: attempt %d failed (%s), next in %.1f s", what, state.attempt_number, exc, wait_s)
        if on_retry is not None:
            on_retry()

    return {
        "retry": tenacity.retry_if_exception(is_worth_repeating),
        "stop": tenacity.stop_after_attempt(policy.attempts),
        "wait": lambda state: policy.wait_s(state.attempt_number),
        "before_sleep": before_sleep,
        "reraise": True,
    }


async def retry_async(
    operation: Callable[[], Awaitable[T]], policy: RetryPolicy, what: str, on_retry: Callable[[], None] | None = None
) -> T:
    """Return what *operation* returns, retry_async as *policy* says; the last error is let through.

    The first attempt goes without tenacity, whose bookkeeping costs as much CPU as a whole insert;
    nearly all calls need no second one.
    """
    first_error: list[TriadError] = []
    try:
        return await operation()
    except TriadError as exc:
        first_error.append(exc)
    async for trial in tenacity.AsyncRetrying(**tenacity_options(policy, what, on_retry)):
        with trial:
            if first_error:  # counts as attempt 1
                raise first_error.pop()
            return await operation()
    raise AssertionError("tenacity returns or raises")
