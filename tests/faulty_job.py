"""A job that is killed (SIGKILL) at a named point, in a process of its own: `run_killed`.

A point is ``MODULE.CLASS.METHOD:before`` or ``:after``, with ``[STATE]`` for a step of the ledger, such as
``ledger.Ledger.advance[created]:before``; the N-th time (from 1) that it is reached ends the process.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from typing import Any

from tests.openai_job import Place

_POINT = re.compile(r"(?P<module>\w+)\.(?P<owner>\w+)\.(?P<method>\w+)(\[(?P<state>\w+)\])?:(?P<when>before|after)")


def arm(point: str, nth: int) -> None:
    """Let this process die at *point*."""
    found = _POINT.fullmatch(point)
    assert found is not None, point
    owner = getattr(importlib.import_module(f"openai_batch.{found['module']}"), found["owner"])
    method: Callable[..., Any] = getattr(owner, found["method"])
    hits = [0]

    def reached(when: str, arguments: tuple[Any, ...]) -> None:
        if when != found["when"] or (found["state"] is not None and found["state"] not in map(str, arguments)):
            return
        hits[0] += 1
        if hits[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def asynchronous(*arguments: Any, **named: Any) -> Any:
            reached("before", arguments)
            outcome = await method(*arguments, **named)
            reached("after", arguments)
            return outcome

        setattr(owner, found["method"], asynchronous)
        return

    @functools.wraps(method)
    def synchronous(*arguments: Any, **named: Any) -> Any:
        reached("before", arguments)
        outcome = method(*arguments, **named)
        reached("after", arguments)
        return outcome

    setattr(owner, found["method"], synchronous)


def _run(place: Place, point: str, nth: int) -> None:
    arm(point, nth)
    place.processor().process_pending_documents()


def run_killed(place: Place, point: str, nth: int) -> int:
    """Run the job of *place* until it is killed at *point*; return its exit code, negative for a signal.

    It is forked from a server that has the packages loaded already: they take longer to load than a job takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faulty_job", "openai_batch.processor"])
    process = context.Process(target=_run, args=(place, point, nth))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the job neither died nor ended: {point}")
    assert process.exitcode is not None
    return process.exitcode
