"""Where a command ends: errors become one sentence on stderr and a documented exit code."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable

from error_handler import ExitCode, TriadError


def explain(program: str, sentence: str, *, verbose: bool) -> None:
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
        explain(program, str(exc), verbose=verbose)
        return exc.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError):
        explain(program, interrupted, verbose=verbose)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return ExitCode.DONE  # the reader of stdout has gone, as head does
