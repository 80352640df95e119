"""What SIGTERM and SIGINT do to a run."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from error_handler import ExitCode

logger = logging.getLogger(__name__)

HARD_STOP_S = 1.5  # a second signal ends the process within this time, whatever hangs


def end_soon() -> None:
    """End the process within HARD_STOP_S, whatever hangs."""
    killer = threading.Timer(HARD_STOP_S, os._exit, (ExitCode.INTERRUPTED,))
    killer.daemon = True
    killer.start()


@contextmanager
def stop_on_signals(stop: asyncio.Event, is_running: Callable[[], bool]) -> Iterator[None]:
    """While inside, the first signal sets *stop* and the second cancels the current task.

    The first cancels as well while *is_running* says that there is nothing to finish yet. What a
    cancelled task leaves behind is safe: the local files say what was in work. Restores the handlers.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def handle(name: str) -> None:
        first = not stop.is_set()
        stop.set()
        if first and is_running():
            logger.warning("%s: finishing the calls in flight; a second signal stops at once", name)
            return
        if not first:
            end_soon()
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
