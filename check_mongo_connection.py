"""Says in plain words whether MongoDB is ready for a run, and what to do where it is not. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console

from commands.diagnosis.findings import print_finding
from commands.diagnosis.mongo import diagnose
from config import Settings, load_settings
from error_handler import ExitCode
from logger import configure_logging
from utils.process import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the diagnosis with the flags in *argv* (None: of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)

    def run() -> int:
        settings = load_settings(
            mongodb_uri=arguments.mongodb_uri,
            db_name=arguments.db_name,
            source_collection=arguments.source_collection,
            results_collection=arguments.results_collection,
            mongodb_max_retries=1,
        )
        configure_logging("DEBUG" if arguments.verbose else "ERROR")
        return asyncio.run(_report(settings))

    return exit_code_of(run, "check_mongo_connection.py", verbose=arguments.verbose)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_mongo_connection.py",
        description="Say whether MongoDB is ready for a run, and what to do where it is not. Changes nothing.",
        epilog="Exit codes: 0 ready (warnings included), 2 usage or configuration, 3 an error was found.",
        allow_abbrev=False,
    )
    parser.add_argument("--mongodb-uri", help="where MongoDB is (MONGODB_URI; mongodb://localhost:27017)")
    parser.add_argument("--db-name", help="database (MONGODB_DB; customer_support)")
    parser.add_argument(
        "--source-collection",
        "--queries-collection",
        help="conversations (MONGODB_SOURCE_COLLECTION; conversation_set)",
    )
    parser.add_argument("--results-collection", help="results (MONGODB_RESULTS_COLLECTION; sentimental_analysis)")
    parser.add_argument("--verbose", action="store_true", help="log lines, and a traceback with an error")
    return parser


async def _report(settings: Settings) -> int:
    console = Console()
    errors = warnings = 0
    async with contextlib.aclosing(diagnose(settings)) as findings:
        async for finding in findings:
            print_finding(console, finding)
            errors += finding.level == "error"
            warnings += finding.level == "warning"
    console.print(f"Errors: {errors}, warnings: {warnings}.", highlight=False)
    return ExitCode.UNREACHABLE if errors else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
