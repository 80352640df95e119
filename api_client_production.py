"""Takes a large file of conversations through the REST service, and can be interrupted at any moment.

Answers are kept in a journal beside the output as they come, so the same command goes on where an
interrupted run ended, and asks for nothing twice. At the end all answers are in one JSON array.
"""

from __future__ import annotations

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
from domain.document_files import read_documents
from error_handler import ExitCode, RunInterruptedError, StateDirectoryError, TriadError
from logger import configure_logging
from service.client.arguments import add_service_arguments, target_from, whole_number
from service.client.client import Pace, ServiceClient, open_session
from service.client.documents import request_for
from service.client.journal import AnswerJournal
from service.client.protocol import ServiceTarget
from service.client.run import ClientRun, percentile
from storage.files import remove_file
from utils.process import exit_code_of, stop_on_signals
from utils.retry_utils import RetryPolicy
from worker.progress import ConsoleProgress

DATA = Path(__file__).parent / "data"
FIRST_WAIT_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (None: of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)

    def run() -> int:
        target = target_from(arguments)
        configure_logging("DEBUG" if arguments.verbose else "WARNING", secrets=target.headers.values())
        return asyncio.run(_run(arguments, target))

    return exit_code_of(
        run,
        "api_client_production.py",
        verbose=arguments.verbose,
        interrupted="Interrupted; the same command asks for the rest.",
    )


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api_client_production.py",
        description="Classify a file of conversations through the REST service. The same command resumes an interrupted run.",
        epilog="Exit codes: 0 done, 1 some conversations have no answer (the same command asks for those again), 2 usage, "
        "file or key, 3 the service is not reachable, 5 another run works on this file, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--file", type=Path, required=True, help="JSON, JSONL or CSV in any accepted shape")
    parser.add_argument(
        "--concurrency", type=whole_number(1, 1000), default=8, metavar="N", help="requests at once (%(default)s)"
    )
    parser.add_argument(
        "--retries",
        type=whole_number(0, 100),
        default=5,
        metavar="N",
        help="repetitions of a request that may help (%(default)s)",
    )
    parser.add_argument("--output-dir", type=Path, default=DATA, metavar="DIR", help="folder of the results (data/)")
    parser.add_argument(
        "--restart", action="store_true", help="discard the answers of an interrupted run and ask for all"
    )
    add_service_arguments(parser)
    return parser


async def _run(arguments: argparse.Namespace, target: ServiceTarget) -> int:
    console = Console(stderr=True, soft_wrap=True)
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StateDirectoryError(
            f"{arguments.output_dir} cannot be made ({exc.strerror}); name another --output-dir."
        ) from exc
    path = journal_path(arguments.output_dir, arguments.file)
    if arguments.restart:
        remove_file(path)
    stop = asyncio.Event()
    journal = AnswerJournal(path, target.url)
    finished = False
    try:
        run = ClientRun(partial(read_documents, arguments.file), request_for, journal, stop)
        with stop_on_signals(stop, lambda: bool(run.places)):
            run.plan()
            if run.stats.already_done:
                console.print(
                    f"{run.stats.already_done} answers are there from an interrupted run; asking for the rest."
                )
            failed = await _ask_and_write(arguments, target, run)
        finished = not failed
    except TriadError as exc:
        if len(journal):
            console.print(
                f"{len(journal)} answers are kept in {path}; the same command asks for the rest.", markup=False
            )
        elif isinstance(exc, RunInterruptedError):
            console.print("No answer had come; the same command starts again.")
        raise
    finally:
        journal.close(remove=finished or not len(journal))
    if failed:
        console.print("The same command asks again for the conversations without an answer, and for no others.")
    return ExitCode.INCOMPLETE if failed else ExitCode.DONE


async def _ask_and_write(arguments: argparse.Namespace, target: ServiceTarget, run: ClientRun) -> int:
    """Ask for what is missing, write the files, print the summary, and return how many have no answer."""
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
        sys.stdout.write(f"Without:  {failures}\n")
    return failed


def _summarize(run: ClientRun, client: ServiceClient) -> None:
    stats, console = run.stats, Console(soft_wrap=True)
    rate = stats.successful / run.duration_s if run.duration_s else 0.0
    console.print(
        f"{len(run.places)} conversations: {stats.successful} classified now, {stats.already_done} before, "
        f"{stats.failed} failed, {stats.skipped} skipped; {client.retries} repetitions"
    )
    for reason, count in sorted(stats.reasons.items(), key=lambda pair: -pair[1]):
        console.print(f"  {count} x {reason}")
    median, high = percentile(run.latencies_s, 0.5), percentile(run.latencies_s, 0.95)
    if median is not None and high is not None:
        console.print(
            f"{run.duration_s:.1f} s, {rate:.1f} answers/s; latency p50 {1000 * median:.0f} ms, p95 {1000 * high:.0f} ms"
        )
    print_labels(console, stats.labels)


def journal_path(folder: Path, file: Path) -> Path:
    """Return where the answers for *file* are kept meanwhile; the same for each run of it."""
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    return folder / f"classified_results_{file.stem[:60]}_{digest}.journal.jsonl"


if __name__ == "__main__":
    sys.exit(main())
