"""What SIGTERM and SIGINT do to a run."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from error_handler import ExitCode, TriadError

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


def print_error(program: str, sentence: str, *, verbose: bool) -> None:
    """Write *sentence* to stderr; *verbose* adds the traceback of the error in work."""
    sys.stderr.write(f"{program}: {sentence}\n")
    if verbose:
        traceback.print_exc()


def exit_code_of(run: Callable[[], int], program: str, *, verbose: bool, interrupted: str = "Interrupted.") -> int:
    """Return the exit code of *run*, or that of the error of ours it raised.

    *interrupted* is the sentence for Ctrl-C: whether something is left to do. Other errors pass.
    """
    try:
        return run()
    except TriadError as exc:
        print_error(program, str(exc), verbose=verbose)
        return exc.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print_error(program, interrupted, verbose=verbose)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return ExitCode.DONE  # the reader of stdout has gone, as head does
