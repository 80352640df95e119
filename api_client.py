"""Send a few multi-turn conversations to a running service and compare the labels with the expected ones."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domain.document_files import read_documents
from domain.text import one_line
from error_handler import ConfigurationError, ExitCode, RequestError
from logger import configure_logging
from service.client.client import (
    Pace,
    ServiceClient,
    ServiceTimeoutError,
    add_service_arguments,
    open_session,
    target_from,
    whole_number,
)
from service.client.protocol import ServiceTarget, request_for
from storage.contract import Document
from storage.extended_json import id_key, loads
from utils.process import exit_code_of
from utils.retry_utils import RetryPolicy

DATA = Path(__file__).parent / "data"
SAMPLES, EXPECTED = DATA / "sample_conversations.jsonl", DATA / "sample_expected.jsonl"
FIELDS = ("intent", "topic", "sentiment")
LEAST_TURNS = 3
MOST_SAMPLES = 100
AT_ONCE = 4
ATTEMPTS, FIRST_WAIT_S = 3, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (None: of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)

    def run() -> int:
        target = target_from(arguments)
        configure_logging("DEBUG" if arguments.verbose else "WARNING", secrets=target.headers.values())
        return asyncio.run(_run(target, arguments.count, arguments.timeout))

    return exit_code_of(
        run, "api_client.py", verbose=arguments.verbose, interrupted="Interrupted; no files were written."
    )


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api_client.py",
        description="Send sample multi-turn conversations to a running service and compare its labels with the expected ones.",
        epilog="Exit codes: 0 all answered (right or wrong), 1 some have no answer, 2 usage or key, "
        "3 the service is not reachable, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--count",
        type=whole_number(1, MOST_SAMPLES),
        default=8,
        metavar="N",
        help="number of conversations (%(default)s)",
    )
    add_service_arguments(parser)
    return parser


async def _run(target: ServiceTarget, count: int, timeout_s: float) -> int:
    documents = list(itertools.islice(choose_samples(), count))
    async with open_session(AT_ONCE) as session:
        pace = Pace(AT_ONCE, asyncio.Event())
        client = ServiceClient(target, session, pace, RetryPolicy(ATTEMPTS, FIRST_WAIT_S), timeout_s)
        outcomes = await asyncio.gather(*(_ask(client, document) for document in documents), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    expected = read_expected()
    rows = [
        (document, outcome, expected.get(id_key(document["_id"]), {}))
        for document, outcome in zip(documents, outcomes, strict=True)
        if not isinstance(outcome, BaseException)
    ]
    _print_table(rows)
    return ExitCode.DONE if all(isinstance(labels, dict) for _, labels, _ in rows) else ExitCode.INCOMPLETE


async def _ask(client: ServiceClient, document: Document) -> dict[str, Any] | str:
    """Return the labels of *document*, or the error message."""
    try:
        answer = await client.classify(request_for(document, 1))
    except (RequestError, ServiceTimeoutError) as exc:
        return str(exc)
    return dict(answer.body["classification"])


def choose_samples() -> Iterator[Document]:
    """Yield the multi-turn samples: one for each expected intent, then the others in file order."""
    expected, seen, later = read_expected(), set(), []
    for document in read_documents(SAMPLES):
        if len(document.get("tweets") or document.get("messages") or []) < LEAST_TURNS:
            continue
        intent = expected.get(id_key(document["_id"]), {}).get("intent")
        if intent is None or intent in seen:
            later.append(document)
            continue
        seen.add(intent)
        yield document
    yield from later


def read_expected() -> dict[bytes, dict[str, str]]:
    """Return the expected labels of the samples by ``extended_json.id_key``."""
    try:
        lines = EXPECTED.read_bytes().splitlines()
    except OSError as exc:
        raise ConfigurationError(f"Cannot read {EXPECTED} ({exc.strerror}); restore it from the repository.") from exc
    return {id_key(row["_id"]): row["expected"] for row in map(loads, lines)}


def _print_table(rows: Sequence[tuple[Document, dict[str, Any] | str, dict[str, str]]]) -> None:
    table = Table(title="Labels of the service; the expected label in brackets if it differs", title_justify="left")
    for heading in ("conversation", "turns", *FIELDS, "categorization"):
        table.add_column(heading, overflow="fold")
    right = dict.fromkeys(FIELDS, 0)
    for document, labels, expected in rows:
        turns = document.get("tweets") or document.get("messages") or []
        head = (str(document.get("conversation_number")), str(len(turns)))
        if isinstance(labels, str):
            table.add_row(*map(escape, head), "[red]none[/]", "", "", escape(labels))
            continue
        cells = []
        for name in FIELDS:
            is_right = labels[name] == expected.get(name)
            right[name] += is_right
            missed = "" if is_right or name not in expected else f" [yellow]({escape(expected[name])})[/]"
            cells.append(escape(labels[name]) + missed)
        table.add_row(*map(escape, head), *cells, escape(one_line(labels["categorization"], 90)))
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)
    answered = sum(isinstance(labels, dict) for _, labels, _ in rows)
    shares = ", ".join(f"{name} {count}" for name, count in right.items())
    console.print(f"{answered} of {len(rows)} answered; as expected: {shares}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
