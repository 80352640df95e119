"""Check whether MongoDB is ready for a run, and show how to fix problems. Changes nothing."""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import asyncio
import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console

from commands.diagnosis.findings import Finding, exit_code, print_finding, print_totals
from commands.diagnosis.mongo import diagnose
from commands.flags import add_database_flags, command_settings
from config import Settings
from logger import configure_logging
from utils.process import Parser, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the diagnosis with the flags in *argv* (None: of the process) and return its exit code."""
    parser = Parser(
        prog="check_mongo_connection.py",
        description="Check whether MongoDB is ready for a run, and show how to fix problems. Changes nothing.",
        epilog="Exit codes: 0 ready (perhaps with warnings), 2 usage or configuration, 3 at least one error.",
        allow_abbrev=False,
    )
    add_database_flags(parser)
    parser.add_argument("--verbose", action="store_true", help="log at level DEBUG and print tracebacks")
    arguments = parser.parse_args(argv)

    def run() -> int:
        settings = command_settings(arguments)
        configure_logging("DEBUG" if arguments.verbose else "ERROR")
        return asyncio.run(_report(settings.model_copy(update={"mongodb_max_retries": 1})))

    return exit_code_of(run, parser.prog, verbose=arguments.verbose)


async def _report(settings: Settings) -> int:
    console = Console()
    found: list[Finding] = []
    async with contextlib.aclosing(diagnose(settings)) as findings:
        async for finding in findings:
            print_finding(console, finding)
            found.append(finding)
    print_totals(console, found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
