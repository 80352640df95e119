"""Send a few multi-turn conversations to a running service and compare the labels with the expected ones."""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import argparse
import asyncio
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domain.conversation import stored_labels
from domain.text import one_line
from error_handler import ExitCode, RequestError
from help_desks.reader import SAMPLES, read_documents
from service.client.client import (
    Pace,
    ServiceClient,
    ServiceTimeoutError,
    add_service_arguments,
    open_session,
    run_client,
)
from service.client.protocol import ServiceTarget, request_for
from storage.extended_json import Document, id_key, loads
from utils.process import Parser, number_between
from utils.retry_utils import RetryPolicy

EXPECTED = SAMPLES.with_name("sample_expected.jsonl")
FIELDS = ("intent", "topic", "sentiment")  # of the expected labels
MIN_TURNS = 3
MAX_SAMPLES = 100
AT_ONCE = 4
ATTEMPTS, FIRST_WAIT_S = 3, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (None: of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)
    return run_client(
        "api_client.py",
        arguments,
        lambda target: _run(target, arguments.count, arguments.timeout),
        "Interrupted; no files were written.",
    )


def _create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="api_client.py",
        description="Send sample multi-turn conversations to a running service and compare its labels with the expected ones.",
        epilog="Exit codes: 0 all answered (right or wrong), 1 some have no answer, 2 usage or key, "
        "3 the service is not reachable, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--count",
        type=number_between(int, 1, MAX_SAMPLES),
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
        answers = await asyncio.gather(*(_ask(client, document) for document in documents))
    _print_table(documents, answers, read_expected())
    return ExitCode.INCOMPLETE if any(isinstance(answer, str) for answer in answers) else ExitCode.DONE


async def _ask(client: ServiceClient, document: Document) -> dict[str, Any] | str:
    """Return the labels of *document*, or the error message."""
    try:
        answer = await client.classify(request_for(document, 1))
    except (RequestError, ServiceTimeoutError) as exc:
        return str(exc)
    return dict(answer["classification"])


def choose_samples() -> Iterator[Document]:
    """Yield the multi-turn samples: one for each expected intent, then the others in file order."""
    expected, seen, later = read_expected(), set(), []
    for document in read_documents(SAMPLES):
        if len(document.get("tweets") or document.get("messages") or []) < MIN_TURNS:
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
    return {id_key(row["_id"]): row["expected"] for row in map(loads, EXPECTED.read_bytes().splitlines())}


def _print_table(
    documents: Sequence[Document], answers: Sequence[dict[str, Any] | str], expected: dict[bytes, dict[str, str]]
) -> None:
    table = Table(title="Labels of the service; the expected label in brackets if it differs", title_justify="left")
    answered = [labels for labels in answers if isinstance(labels, dict)]
    fields = list(dict.fromkeys(field for labels in answered for field in stored_labels(labels))) or [*FIELDS]
    for heading in ("conversation", "turns", *fields, "categorization"):
        table.add_column(heading, overflow="fold")
    right = {field: 0 for field in fields if field in FIELDS}
    for document, labels in zip(documents, answers, strict=True):
        wanted = expected.get(id_key(document["_id"]), {})
        turns = document.get("tweets") or document.get("messages") or []
        head = (str(document.get("conversation_number")), str(len(turns)))
        if isinstance(labels, str):
            table.add_row(*map(escape, head), "[red]none[/]", *[""] * (len(fields) - 1), escape(labels))
            continue
        cells = []
        for name in fields:
            given = ", ".join(stored_labels(labels).get(name, []))
            is_right = given == wanted.get(name)
            if name in right:
                right[name] += is_right
            missed = "" if is_right or name not in wanted else f" [yellow]({escape(wanted[name])})[/]"
            cells.append(escape(given) + missed)
        table.add_row(*map(escape, head), *cells, escape(one_line(labels.get("categorization", ""), 90)))
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)
    shares = ", ".join(f"{name} {count}" for name, count in right.items())
    console.print(f"{len(answered)} of {len(answers)} answered; as expected: {shares}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
