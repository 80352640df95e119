"""``cli.py export``: write results, with corrections applied, as CSV, XLSX, Parquet or JSON Lines. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import SecretStr

from commands.evaluate import EMBEDDED_DATABASE
from commands.flags import Command, positive
from commands.subset_flags import add_filter_flag, filter_of, require_span, time_flag
from config import Settings, load_taxonomy
from domain.text import counted
from error_handler import ConfigurationError, ExitCode
from exporting.columns import ORIGINAL, Table
from exporting.filters import Filter, end_of, label_filter, start_of
from exporting.formats import FORMATS, STREAMED, Format, TableFile, open_table, require_package
from exporting.results import ResultReader
from mongo_client import DocumentStore
from storage.files import SPACE, explained, replacement, require_replaceable
from utils.process import number_between, stop_on_signals, tell_line
from worker.subset import require_query

STDOUT = "-"
LINE_EVERY_S = 5.0
NAMED_PATHS = 5

share = number_between(float, 0, 1)


def _field_and_label(text: str) -> tuple[str, str]:
    name, separator, label = text.partition("=")
    if not separator or not name or not label.strip():
        raise argparse.ArgumentTypeError("must be FIELD=LABEL, for example intent=Complaint")
    return name, label


def _add_flags(parser: argparse.ArgumentParser) -> None:
    file = parser.add_argument_group("file")
    file.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, or - for stdout with csv and jsonl"
    )
    file.add_argument("--format", choices=FORMATS, help="format of the file (by default, what its name ends with)")
    file.add_argument("--text", action="store_true", help="add the transcripts; the file then holds customer text")
    file.add_argument("--embedded", action="store_true", help="use the embedded MongoDB, with the results of make run")
    which = parser.add_argument_group("results")
    which.add_argument(
        "--label",
        type=_field_and_label,
        action="append",
        default=[],
        metavar="FIELD=LABEL",
        help="only results with this label, corrections applied; repeatable: one of the labels of each field given",
    )
    which.add_argument(
        "--since",
        type=time_flag(start_of),
        metavar="TIME",
        help="only conversations whose last message is at TIME or later",
    )
    which.add_argument(
        "--until", type=time_flag(end_of), metavar="TIME", help="only those before TIME; a date includes the whole day"
    )
    add_filter_flag(which)
    # Not the name of a setting: it is the model of results, not of a server.
    which.add_argument("--model", dest="model_used", metavar="NAME", help="only results of this model")
    which.add_argument(
        "--confidence-below", type=share, metavar="P", help="only results whose lowest confidence is below P, 0 to 1"
    )
    which.add_argument(
        "--confidence-above", type=share, metavar="P", help="only results whose lowest confidence is P or more"
    )
    which.add_argument("--limit", type=positive, metavar="N", help="write at most N results")


def _format_of(arguments: argparse.Namespace) -> Format:
    """Return the format of the file; raise ConfigurationError if it is unknown, or cannot be written."""
    suffix = Path(arguments.output).suffix.lower().removeprefix(".")
    form: Format | None = arguments.format or next((each for each in FORMATS if each == suffix), None)
    if form is None:
        raise ConfigurationError(
            f"--output {arguments.output} does not end in a format: add --format csv, for example."
        )
    if arguments.output == STDOUT and form not in STREAMED:
        raise ConfigurationError(f"--format {form} cannot go to stdout: name a file with --output.")
    require_package(form)
    if arguments.output != STDOUT:
        require_replaceable(Path(arguments.output), "--output")
    return form


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    require_span(arguments)
    form = _format_of(arguments)
    taxonomy = load_taxonomy(settings.taxonomy_file)
    condition = Filter(
        label_filter(arguments.label, taxonomy),
        arguments.since,
        arguments.until,
        arguments.model_used,
        arguments.confidence_below,
        arguments.confidence_above,
    )
    with ExitStack() as stack:
        if arguments.embedded:
            from embedded.replica_set import ReplicaSetMongod  # noqa: PLC0415 - only for --embedded

            mongod = await asyncio.to_thread(stack.enter_context, ReplicaSetMongod(EMBEDDED_DATABASE))
            settings = settings.model_copy(update={"mongodb_uri": SecretStr(mongod.uri)})
        store = DocumentStore(settings, subset=filter_of(arguments))
        try:
            await store.check()
            await require_query(store, store.states.subset, "--filter")
            reader = ResultReader(store, settings, condition, taxonomy.field_names)
            export = Export(reader, Table(taxonomy, with_text=arguments.text), await store.count_results())
            if arguments.text:
                tell_line("export: with --text the file holds customer text; store it as you store the conversations.")
            target = replacement(Path(arguments.output)) if arguments.output != STDOUT else _stdout()
            # SIGTERM would otherwise leave the unfinished file behind.
            with stop_on_signals(asyncio.Event(), lambda: False), target as file:
                await export.write(form, file, arguments.limit, with_text=arguments.text)
        finally:
            await store.close()
    if not export.is_complete:
        tell_line("export: the reader of stdout ended before the last result.")
        return ExitCode.INCOMPLETE
    export.tell("stdout" if arguments.output == STDOUT else arguments.output, settings)
    return ExitCode.DONE if export.written else ExitCode.INCOMPLETE


@contextmanager
def _stdout() -> Iterator[BinaryIO]:
    """Yield stdout for bytes: its text stream would escape what the locale cannot show. Ends early if nobody reads it."""
    sys.stdout.flush()
    with (
        explained("stdout cannot be written", SPACE),
        suppress(BrokenPipeError),
        open(sys.stdout.fileno(), "wb", closefd=False) as file,
    ):
        yield file


class Export:
    """One export: rows of *table* from what *reader* reads; *about* results are in the collection."""

    def __init__(self, reader: ResultReader, table: Table, about: int) -> None:
        self._reader, self._table, self._about = reader, table, about
        self._sources: Counter[str] = Counter()
        self._notes: list[str] = []
        self.written = self._originals = self._without_text = 0
        self.is_complete = False

    async def write(self, form: Format, file: BinaryIO, limit: int | None, *, with_text: bool) -> None:
        """Write at most *limit* rows (None: all) into *file*, with progress on stderr."""
        target = open_table(form, file, self._table.columns)
        try:
            await self._write_rows(target, limit, with_text=with_text)
            target.finish()
            file.flush()
        finally:
            target.close()
        self.is_complete = True
        self._note_losses(target)

    async def _write_rows(self, target: TableFile, limit: int | None, *, with_text: bool) -> None:
        shown_s = time.monotonic()
        async for page in self._reader.pages(with_text=with_text):
            entries = page if limit is None else page[: limit - self.written]
            target.write([self._table.row(entry) for entry in entries])
            self.written += len(entries)
            self._sources.update(entry.labels.label_source for entry in entries)
            self._originals += sum(ORIGINAL in entry.result for entry in entries)
            self._without_text += sum(entry.transcript is None for entry in entries) if with_text else 0
            if self.written == limit:
                return
            if time.monotonic() - shown_s >= LINE_EVERY_S:
                shown_s = time.monotonic()
                looked_at = max(self._reader.looked_at, self.written)
                tell_line(f"export: {self.written:,} written, {looked_at:,} of about {self._about:,} results read")

    def _note_losses(self, target: TableFile) -> None:
        for name, what in (
            ("cut", "cut to 32,767 characters, the limit of a cell of XLSX"),
            ("replaced", "with characters that XLSX cannot hold; each became U+FFFD"),
        ):
            if count := getattr(target, name, 0):
                self._notes.append(f"{counted(count, 'text')} {what}. The other formats keep them.")

    def tell(self, place: str, settings: Settings) -> None:
        """Print on stderr what was written, and what was not."""
        sources = ", ".join(f"{count:,} {name}" for name, count in self._sources.most_common())
        tell_line(f"export: {counted(self.written, 'result')} written to {place}{f' ({sources})' if sources else ''}.")
        if not self.written:
            results = f"{settings.db_name}.{settings.results_collection}"
            tell_line(
                f"export: no result matches the filters in {results}."
                if self._about
                else f"export: {results} has no results."
            )
        for note in (*self._notes, *self._left_out(settings)):
            tell_line(f"export: {note}")

    def _left_out(self, settings: Settings) -> list[str]:
        notes = []
        if other := self._table.other.most_common():
            names = ", ".join(f"{path} ({count:,})" for path, count in other[:NAMED_PATHS])
            more = f" and {len(other) - NAMED_PATHS} more" if len(other) > NAMED_PATHS else ""
            notes.append(f"fields without a column are in other_fields: {names}{more}.")
        if self._reader.outside:
            notes.append(
                f"{counted(self._reader.outside, 'result')} left out by --filter: the conversation is not found by it, or no "
                f"longer in {settings.source_collection}."
            )
        if self._originals:
            notes.append(
                f"{counted(self._originals, 'result')} with original_conversation: it is not exported; "
                "--text adds transcripts."
            )
        if self._without_text:
            notes.append(
                f"{counted(self._without_text, 'result')} without a transcript: no text, or no longer in "
                f"{settings.source_collection}."
            )
        return notes


COMMAND = Command("export", "Write results as CSV, XLSX, Parquet or JSON Lines; see docs/export.md.", _add_flags, _run)
