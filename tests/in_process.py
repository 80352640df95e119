"""``cli.main`` in the process of the tests: with an environment, a folder and streams of its own."""

from __future__ import annotations

import gc
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import cli


def run_cli(argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str, str]:
    """Return the exit code of ``cli.py *argv*``, and what it wrote to stdout and stderr; neither is a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with _as_before(), chdir(folder), redirect_stdout(out), redirect_stderr(err):
        os.environ.clear()
        os.environ.update(environment)
        try:
            code = cli.main(argv)
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
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = handlers
        root.setLevel(level)
        gc.set_threshold(*thresholds)
        os.environ.clear()
        os.environ.update(environment)
