"""The retry policy of model calls and MongoDB calls, carried out by tenacity."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity  # not imported at the first retry: that import fails if no file descriptor is free

from error_handler import ErrorClass, TriadError

CAP_S = 60.0
JITTER = 0.5  # +-50 %

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The number of attempts of an operation, including the first, and the waits between them.

    After failed attempt *n* (from 1) the wait is ``min(CAP_S, first_wait_s * 2 ** (n - 1)) * U(0.5, 1.5)`` seconds.
    """

    attempts: int
    first_wait_s: float

    def wait_s(self, attempt: int) -> float:
        """Return the seconds to wait after failed *attempt* (from 1), with jitter, at most CAP_S."""
        planned = min(CAP_S, self.first_wait_s * 2.0 ** (attempt - 1))
        return min(CAP_S, planned * random.uniform(1 - JITTER, 1 + JITTER))


def is_worth_repeating(exc: BaseException) -> bool:
    """Return whether another attempt can help: only after a transient or resource error of ours."""
    return isinstance(exc, TriadError) and exc.error_class is not ErrorClass.PERMANENT


def tenacity_options(policy: RetryPolicy, what: str) -> dict[str, Any]:
    """Return the arguments of ``tenacity.Retrying`` and ``tenacity.AsyncRetrying``. The last error is raised unchanged.

    *what* names the operation in the log.
    """

    def before_sleep(state: tenacity.RetryCallState) -> None:
        exc = state.outcome.exception() if state.outcome else None
        logger.warning(
            "%s: attempt %d failed (%s), next in %.1f s", what, state.attempt_number, exc, state.upcoming_sleep
        )

    return {
        "retry": tenacity.retry_if_exception(is_worth_repeating),
        "stop": tenacity.stop_after_attempt(policy.attempts),
        "wait": lambda state: policy.wait_s(state.attempt_number),
        "before_sleep": before_sleep,
        "reraise": True,
    }


async def retry_async(operation: Callable[[], Awaitable[T]], policy: RetryPolicy, what: str) -> T:
    """Return the result of *operation*, repeated as *policy* says; the last error is raised unchanged.

    The first attempt, which nearly always succeeds, runs without tenacity: its bookkeeping takes 35 µs, 7 % of the
    processor time of a document. Its error is then the first attempt that tenacity sees.
    """
    try:
        return await operation()
    except TriadError as exc:
        earlier = [exc]

    async def attempt() -> T:
        if earlier:
            raise earlier.pop()
        return await operation()

    return await tenacity.AsyncRetrying(**tenacity_options(policy, what))(attempt)
