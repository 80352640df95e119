"""A job in a separate process that is killed (SIGKILL) at a named point: `run_killed`.

A point is ``MODULE.CLASS.METHOD:before`` or ``:after``, with ``[STATE]`` for a step of the ledger, such as
``ledger.Ledger.advance[created]:before``; the process is killed when the point is reached for the N-th time (from 1).
"""

from __future__ import annotations

import base64
import functools
import importlib
import inspect
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forked_process import run_forked
from tests.openai_batch.openai_job import Place

_POINT = re.compile(r"(?P<module>[\w.]+)\.(?P<owner>\w+)\.(?P<method>\w+)(\[(?P<state>\w+)\])?:(?P<when>before|after)")


def arm(point: str, nth: int, package: str = "openai_batch") -> None:
    """Kill this process at *point* of *package*."""
    found = _POINT.fullmatch(point)
    assert found is not None, point
    owner = getattr(importlib.import_module(f"{package}.{found['module']}"), found["owner"])
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


def run_killed(place: Place, point: str, nth: int) -> int:
    """Run the job of *place* until it is killed at *point*; return its exit code, negative for a signal."""
    plan = base64.b64encode(pickle.dumps((place, point, nth))).decode()
    root = Path(__file__).parents[2]
    done = run_forked([__file__, plan], os.environ | {"PYTHONPATH": str(root)}, root)
    print(done.stdout, done.stderr)
    return done.returncode


if __name__ == "__main__":
    _place, _point, _nth = pickle.loads(base64.b64decode(sys.argv[1]))
    arm(_point, _nth)
    _place.processor().process_pending_documents()
