"""Programs in the process of the tests: with an environment, a folder and streams of their own."""

from __future__ import annotations

import gc
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import cli

Main = Callable[[Sequence[str]], int]


def run_script(
    main: Main, script: Path, argv: Sequence[str | Path], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run *main*, the function of *script*, as ``subprocess.run`` runs the script."""
    arguments = [str(argument) for argument in argv]
    with mock.patch.object(sys, "argv", [str(script), *arguments]):
        return subprocess.CompletedProcess(arguments, *run_main(main, arguments, environment, folder))


def run_cli(argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str, str]:
    """Return the exit code of ``cli.py *argv*``, and what it wrote to stdout and stderr; neither is a terminal."""
    return run_main(cli.main, argv, environment, folder)


def run_main(main: Main, argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str, str]:
    """Return the exit code of *main*, and what it wrote to stdout and stderr; neither is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with _as_before(), chdir(folder), redirect_stdout(out), redirect_stderr(err):
        os.environ.clear()
        os.environ.update(environment)
        try:
            code = main(argv)
        except SystemExit as exc:  # argparse ends with it
            code = int(exc.code or 0)
    return code, out.getvalue(), err.getvalue()


@contextmanager
def _as_before() -> Iterator[None]:
    """Restore what an entry point may set for its whole process."""
    environment, thresholds = dict(os.environ), gc.get_threshold()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    with warnings.catch_warnings():
        # A driver that is closed while it connects leaves its socket to the garbage collector.
        warnings.filterwarnings("ignore", "unclosed (<socket|transport)", ResourceWarning)
        try:
            yield
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers = handlers
            root.setLevel(level)
            gc.set_threshold(*thresholds)
            gc.collect()  # here, not in the next test
            gc.freeze()  # or the next run looks through all that was imported, which takes 100 ms
            os.environ.clear()
            os.environ.update(environment)
