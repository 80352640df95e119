"""Classify a large file of conversations through the REST service; an interrupted run can be resumed.

A journal beside the output keeps each answer, so the same command resumes and requests no answer twice. At the end one
JSON array holds all answers.
"""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import argparse
import asyncio
import hashlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from commands.summary import print_labels
from domain.text import counted
from error_handler import ExitCode, RunInterruptedError, StateDirectoryError, TriadError
from help_desks.reader import read_documents
from service.client.client import Pace, ServiceClient, add_service_arguments, open_session, run_client
from service.client.protocol import ServiceTarget
from service.client.run import AnswerJournal, ClientRun, percentile
from utils.process import Parser, number_between, stop_on_signals
from utils.retry_utils import RetryPolicy
from worker.progress import ConsoleProgress

DATA = Path(__file__).parent / "data"
FIRST_WAIT_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (None: of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)
    return run_client(
        "api_client_production.py",
        arguments,
        lambda target: _run(arguments, target),
        "Interrupted; run the same command again to resume.",
    )


def _create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="api_client_production.py",
        description="Classify a file of conversations through the REST service. The same command resumes an interrupted run.",
        epilog="Exit codes: 0 done, 1 some conversations have no answer (the same command retries them), 2 usage, "
        "file or key, 3 the service is not reachable, 5 another run is using this file, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--file", type=Path, required=True, help="JSON, JSONL or CSV file in any accepted shape")
    parser.add_argument(
        "--concurrency",
        type=number_between(int, 1, 1000),
        default=8,
        metavar="N",
        help="concurrent requests (%(default)s)",
    )
    parser.add_argument(
        "--retries", type=number_between(int, 0, 100), default=5, metavar="N", help="retries per request (%(default)s)"
    )
    parser.add_argument("--output-dir", type=Path, default=DATA, metavar="DIR", help="directory of the results (data/)")
    parser.add_argument(
        "--restart", action="store_true", help="discard the answers of an interrupted run and start again"
    )
    add_service_arguments(parser)
    return parser


async def _run(arguments: argparse.Namespace, target: ServiceTarget) -> int:
    console = Console(stderr=True, soft_wrap=True)
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StateDirectoryError(
            f"Cannot create {arguments.output_dir} ({exc.strerror}); choose another --output-dir."
        ) from exc
    path = journal_path(arguments.output_dir, arguments.file)
    stop = asyncio.Event()
    journal = AnswerJournal(path, target.url, restart=arguments.restart)
    finished = False
    try:
        run = ClientRun(partial(read_documents, arguments.file), journal, stop)
        with stop_on_signals(stop, lambda: bool(run.entries)):
            run.plan()
            if run.stats.already_done:
                console.print(f"Resuming: {counted(run.stats.already_done, 'answer')} kept from an interrupted run.")
            failed = await _ask_and_write(arguments, target, run)
        finished = not failed
    except TriadError as exc:
        if len(journal):
            kept = counted(len(journal), "answer is", "answers are")
            console.print(f"{kept} kept in {path}; run the same command again to resume.", markup=False)
        elif isinstance(exc, RunInterruptedError):
            console.print("No answers were received; run the same command again to start over.")
        raise
    finally:
        journal.close(remove=finished or not len(journal))
    if failed:
        console.print("Run the same command again to retry only the conversations without an answer.")
    return ExitCode.INCOMPLETE if failed else ExitCode.DONE


async def _ask_and_write(arguments: argparse.Namespace, target: ServiceTarget, run: ClientRun) -> int:
    """Request the missing answers, write the files, print the summary, and return the number of failures."""
    async with open_session(arguments.concurrency) as session:
        pace = Pace(arguments.concurrency, run.stop)
        policy = RetryPolicy(arguments.retries + 1, FIRST_WAIT_S)
        client = ServiceClient(target, session, pace, policy, arguments.timeout)
        try:
            await run.ask_all(client, arguments.concurrency, ConsoleProgress(sys.stderr))
        finally:
            _summarize(run, client)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    results = arguments.output_dir / f"classified_results_{stamp}.json"
    failures = arguments.output_dir / f"classified_results_{stamp}.failures.json"
    failed = run.write(results, failures)
    sys.stdout.write(f"Results:  {results}\n")
    if failures.exists():
        sys.stdout.write(f"Failures: {failures}\n")
    return failed


def _summarize(run: ClientRun, client: ServiceClient) -> None:
    stats, console = run.stats, Console(soft_wrap=True)
    rate = stats.successful / run.duration_s if run.duration_s else 0.0
    console.print(
        f"{counted(len(run.entries), 'conversation')}: {stats.successful} classified now, {stats.already_done} before, "
        f"{stats.failed} failed, {stats.skipped} skipped; {counted(client.retries, 'retry', 'retries')}"
    )
    for reason, count in sorted(stats.reasons.items(), key=lambda pair: -pair[1]):
        console.print(f"  {count} x {reason}")
    if client.latencies_s:
        median, high = (1000 * percentile(client.latencies_s, share) for share in (0.5, 0.95))
        console.print(f"{run.duration_s:.1f} s, {rate:.1f} answers/s; latency p50 {median:.0f} ms, p95 {high:.0f} ms")
    print_labels(console, stats.labels)


def journal_path(folder: Path, file: Path) -> Path:
    """Return the path of the journal for *file*, the same for every run of it."""
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    return folder / f"classified_results_{file.stem[:60]}_{digest}.journal.jsonl"


if __name__ == "__main__":
    sys.exit(main())
