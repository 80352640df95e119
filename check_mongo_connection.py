"""Check whether MongoDB is ready for a run, and show how to fix problems. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console

from commands.diagnosis.findings import Finding, exit_code, print_finding, print_totals
from commands.diagnosis.mongo import diagnose
from config import Settings, load_settings
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
        description="Check whether MongoDB is ready for a run, and show how to fix problems. Changes nothing.",
        epilog="Exit codes: 0 ready (perhaps with warnings), 2 usage or configuration, 3 at least one error.",
        allow_abbrev=False,
    )
    parser.add_argument("--mongodb-uri", help="MongoDB connection string (MONGODB_URI; mongodb://localhost:27017)")
    parser.add_argument("--db-name", help="database (MONGODB_DB; customer_support)")
    parser.add_argument(
        "--source-collection",
        "--queries-collection",
        help="collection of the conversations (MONGODB_SOURCE_COLLECTION; conversation_set)",
    )
    parser.add_argument(
        "--results-collection", help="collection of the results (MONGODB_RESULTS_COLLECTION; sentimental_analysis)"
    )
    parser.add_argument("--verbose", action="store_true", help="log at level DEBUG and print tracebacks")
    return parser


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
