"""Import conversations into MongoDB: the shipped samples, or a file in any accepted shape.

The import is idempotent: documents with an existing ``_id`` are skipped, and a document without one gets an ``_id``
derived from its content. With ``--update``, stored conversations get the turns that they lack.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: modules in this folder must not hide packages of the same name
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import argparse
import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from aggregator import SENDER_FIELDS, TEXT_FIELDS, TIME_FIELDS, aggregate_conversation, document_entries
from commands.flags import command_settings, positive
from commands.import_flags import add_file_flags, export_of
from commands.import_update import DERIVED_ID, Growth, Pair, StoredConversations
from config import Settings
from domain.text import counted
from error_handler import (
    ConfigurationError,
    ExitCode,
    Reason,
    RunInterruptedError,
    SkippedDocumentError,
    StoreRejectedError,
    TriadError,
)
from help_desks.preview import preview_lines
from help_desks.reader import SAMPLES, Export, read_documents
from logger import configure_logging
from mongo_client import DocumentStore
from storage.extended_json import Document, bson_encode, dumps, id_text
from storage.mongo_errors import translated
from storage.selection import StateFields
from utils.process import Parser, exit_code_of, is_confirmed
from worker.left_out import NAMED_STATUSES, status_name

PAGE_SIZE = 500
MAX_BYTES = 16_777_216  # of a document in MongoDB
_SKIPPED = {
    Reason.SKIPPED_NO_TEXT: f"without a text, which a run skips; a text is expected in {', '.join(TEXT_FIELDS[:4])}",
    Reason.SKIPPED_NO_CUSTOMER: (
        f"without a turn of the customer, which a run skips; expected in {', '.join(SENDER_FIELDS[:4])}: customer, user, "
        "visitor, contact, lead, end-user or requester"
    ),
    Reason.UNREADABLE: "without their fields, as quarantine shows documents that are not valid BSON; a run skips them",
}
_UNORDERED = "with times that cannot be read, so the turns keep the listed order; ISO 8601 can always be read"
_OTHER_TEXT = "with the _id of a stored document that has another text; not imported"
_IN_WORK = "that a worker had in work: the worker may label the text that it has read, so run python cli.py --only changed afterwards"
_FOREIGN = "with new turns and a status of another program, which no run selects; with STATUS_FIELD, the product has a status of its own"
_MISSED = "that other programs changed at the same time, without all of their new turns; the same command adds them"
# Of a row: the same conversation in a later export has another status, but the same messages.
_ROW_FIELDS = frozenset({"metadata", "channel", "subject", "created_at"})
_STATUS_FIELDS = frozenset({"status", "status_reason", "last_processed_at", "processed", "processing_attempts"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the import in *argv* (None: of the process) and return its exit code."""
    parser = Parser(
        prog="mongodb_import.py",
        description="Import conversations into MongoDB: the shipped samples, or a file. Importing twice adds nothing.",
        epilog="Exit codes: 0 done, 2 usage, configuration or file, 3 MongoDB is not reachable, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--count", type=positive, metavar="N", help="import N samples, or the first N of --file (all)")
    parser.add_argument("--file", type=Path, help="CSV, TSV, JSON or JSONL, also as .gz, instead of the samples")
    add_file_flags(parser.add_argument_group("how --file is read (docs/import.md)"))
    parser.add_argument("--mongodb-uri", help="MongoDB address (MONGODB_URI; mongodb://localhost:27017)")
    parser.add_argument("--db-name", help="database (MONGODB_DB; customer_support)")
    parser.add_argument(
        "--source-collection",
        "--collection",
        "--queries-collection",
        help="collection to fill (MONGODB_SOURCE_COLLECTION; conversation_set)",
    )
    parser.add_argument(
        "--update", action="store_true", help="add the new turns of conversations that have grown since their import"
    )
    parser.add_argument(
        "--drop", action="store_true", help="delete the collection first; asks for confirmation unless --yes is given"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    parser.add_argument("--verbose", action="store_true", help="show log lines, and the traceback of an error")
    arguments = parser.parse_args(argv)

    def run() -> int:
        configure_logging("DEBUG" if arguments.verbose else "WARNING")
        return asyncio.run(_import(arguments, command_settings(arguments), Console(stderr=True)))

    interrupted = "Interrupted; the same command imports the rest."
    return exit_code_of(run, parser.prog, verbose=arguments.verbose, interrupted=interrupted)


async def _import(arguments: argparse.Namespace, settings: Settings, console: Console) -> int:
    if arguments.drop and not arguments.yes and not arguments.dry_run:
        if not sys.stdin.isatty():
            raise ConfigurationError("--drop deletes the collection; add --yes to confirm without a terminal.")
        question = f"Delete the collection {settings.source_collection} of the database {settings.db_name}?"
        if not await is_confirmed(question):
            raise RunInterruptedError("Nothing was deleted or imported.")
    notes, unselected, moved = _Notes(), Counter[str](), Counter[str]()
    states = StateFields(settings.status_field)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} documents"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Importing", total=None)
        export = export_of(
            arguments,
            lambda row: progress.update(task, description=f"Reading row {row:,}"),
            adds_status=states.is_default,  # else the field is another program's; a missing state counts as pending
        )
        documents = export.documents() if export else _samples(arguments.count, console)
        with_ids = _with_ids(documents, lambda: export is not None and export.has_rows)
        chosen = _judged(itertools.islice(_with_own_status(with_ids, states, moved), arguments.count), notes)
        pages = iter(lambda: list(itertools.islice(chosen, PAGE_SIZE)), [])
        first = next(pages, [])  # before the collection is dropped: the file may be invalid
        pages = _counting(itertools.chain([first], pages), states, unselected)

        def on_read(number: int) -> None:
            progress.update(task, completed=number, description="Reading" if arguments.dry_run else "Importing")

        if arguments.dry_run:
            read, new, growth = _counted(pages, arguments.file or SAMPLES, on_read), 0, Growth()
        else:
            read, new, growth = await _stored(arguments, settings, pages, on_read)
    if export:
        _print_mapping(export)
    if arguments.dry_run:
        print("Preview:" if first else "There is no conversation in the file.")
        print(*(line for document in first[:2] for line in preview_lines(document)), sep="\n")
    done = f"{_outcome(read, new, growth, arguments.update)}, in {settings.db_name}.{settings.source_collection}."
    print(f"Read {counted(read, 'document')}: {'nothing is written (--dry-run).' if arguments.dry_run else done}")
    for line in export.findings.note_lines() if export else ():
        console.print(f"{line}.", markup=False, highlight=False, soft_wrap=True)
    notes.show(console)
    _show_growth(console, growth)
    _show_statuses(console, unselected, moved)
    return ExitCode.DONE


def _counted(pages: Iterable[list[Document]], path: Path, on_read: Callable[[int], None]) -> int:
    """Read every page and store nothing; return the number of documents."""
    read = 0
    for page in pages:
        for number, document in enumerate(page, read + 1):
            try:
                is_storable = len(bson_encode(document)) <= MAX_BYTES
            except ValueError:
                is_storable = False
            if not is_storable:
                raise _not_storable(path, number)
        read += len(page)
        on_read(read)
    return read


def _outcome(read: int, new: int, growth: Growth, updates: bool) -> str:
    grown = growth.grown
    if updates:
        turns = counted(growth.turns, "turn")
        return f"{new} new, {grown} grown ({turns} added), {read - new - grown} unchanged"
    have = "has" if grown == 1 else "have"
    more = f", of which {grown} {have} grown (--update adds {counted(growth.turns, 'new turn')})" if grown else ""
    return f"{new} new, {read - new} already there{more}"


def _show_growth(console: Console, growth: Growth) -> None:
    lines = {
        _OTHER_TEXT: growth.others,
        _IN_WORK: growth.in_work,
        _FOREIGN: growth.foreign,
        _MISSED: growth.missed,
    }
    for what, count in lines.items():
        first = f" (first: document {growth.first_other})" if what == _OTHER_TEXT else ""
        if count:
            text = f"{counted(count, 'document')} {what}{first}."
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_mapping(export: Export) -> None:
    findings = export.findings
    if findings.layout:
        named = "a table" if findings.layout == "table" else findings.layout
        print(f"{counted(findings.rows, 'record')}, read as {named}:", *findings.table_lines(), sep="\n")


def _show_statuses(console: Console, unselected: Counter[str], moved: Counter[str]) -> None:
    def names(counts: Counter[str]) -> str:
        return ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(NAMED_STATUSES))

    if moved:
        number = counted(moved.total(), "document had", "documents had")
        text = f"{number} a status of another program: {names(moved)}. It is kept in metadata.status, and a run selects them."
        console.print(text, markup=False, soft_wrap=True)
    if unselected:
        number = counted(unselected.total(), "document has", "documents have")
        text = f"{number} a status that a run does not select: {names(unselected)}."
        console.print(f"{text} Set it to pending, or remove it, to classify them.", markup=False, soft_wrap=True)


async def _stored(
    arguments: argparse.Namespace,
    settings: Settings,
    pages: Iterable[list[Document]],
    on_read: Callable[[int], None],
) -> tuple[int, int, Growth]:
    """Store every page, in an emptied collection with ``--drop``; return how many documents were read, were new, had grown."""
    store = DocumentStore(settings)
    try:
        await store.check()
        if arguments.drop:
            with translated("drop the collection"):
                await store.database.drop_collection(settings.source_collection)
        stored = StoredConversations(store, settings, updates=arguments.update)
        read, new = await _insert(store, stored, pages, arguments.file or SAMPLES, on_read)
        return read, new, stored.growth
    finally:
        await store.close()


def _with_own_status(documents: Iterable[Document], states: StateFields, moved: Counter[str]) -> Iterator[Document]:
    """Yield *documents*; a status of another program moves to metadata, where it hides no document from a run."""
    for document in documents:
        if states.state_of(document) == "foreign":
            moved[status_name(document[states.status])] += 1
            status = document.pop(states.status)
            metadata = document.get("metadata")
            kept = metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata}
            document["metadata"] = {**kept, "document_status" if "status" in kept else "status": status}
            if "tweets" in document or "messages" in document:
                document[states.status] = "pending"
        yield document


class _Notes:
    """Counts documents by what the user should know about them, and remembers the first one of each kind."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, int]] = {}  # what -> count, number of the first document

    def add(self, what: str, number: int) -> None:
        count, first = self._found.get(what, (0, number))
        self._found[what] = count + 1, min(first, number)

    def show(self, console: Console) -> None:
        for what, (count, first) in self._found.items():
            text = f"{counted(count, 'document')} {what} (first: document {first})."
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _judged(documents: Iterable[Document], notes: _Notes) -> Iterator[Document]:
    """Yield *documents*; note those that a run will skip or cannot put in order."""
    for number, document in enumerate(documents, 1):
        try:
            conversation = aggregate_conversation(document)
        except SkippedDocumentError as exc:
            notes.add(_SKIPPED[exc.reason], number)
        else:
            entries = () if conversation.is_ordered else document_entries(document, conversation.shape)
            if any(entry.get(name) for entry in entries if isinstance(entry, dict) for name in TIME_FIELDS):
                notes.add(_UNORDERED, number)
        yield document


def _counting(
    pages: Iterable[list[Document]], states: StateFields, unselected: Counter[str]
) -> Iterator[list[Document]]:
    """Yield *pages*; count in *unselected*, by status, the documents that a run does not select."""
    for page in pages:
        for document in page:
            state = states.state_of(document)
            if state not in ("pending", "processing"):
                unselected[status_name(document[states.status]) if state == "foreign" else state] += 1
        yield page


async def _insert(
    store: DocumentStore,
    stored: StoredConversations,
    pages: Iterable[list[Document]],
    path: Path,
    on_read: Callable[[int], None],
) -> tuple[int, int]:
    """Store every page; return how many documents were read and how many were new."""
    read = new = 0
    try:
        for page in pages:
            to_insert, pairs = await stored.split(list(enumerate(page, read + 1)))
            added = await _insert_page(store, to_insert, path)
            if added < len(to_insert):
                pairs += [Pair(number, document, document["_id"]) for number, document in to_insert]
            await stored.take(pairs)
            new += added
            read += len(page)
            on_read(read)
    except TriadError:
        imported = counted(read, "document was", "documents were")
        sys.stderr.write(f"{imported} imported before the error; the same command imports the rest.\n")
        raise
    return read, new


async def _insert_page(store: DocumentStore, page: list[tuple[int, Document]], path: Path) -> int:
    """Store *page*, documents with their numbers; return how many were new."""
    if not page:
        return 0
    try:
        return await store.insert_documents([document for _, document in page])
    except StoreRejectedError:
        # One invalid document fails the whole page; inserted alone, it can be named.
        for number, document in page:
            try:
                await store.insert_documents([document])
            except StoreRejectedError as exc:
                raise _not_storable(path, number) from exc
        raise


def _not_storable(path: Path, number: int) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: document {number} cannot be stored in MongoDB (too large, or an unsupported value); correct or remove it."
    )


def _samples(count: int | None, console: Console) -> Iterator[Document]:
    """Yield the shipped samples, repeated as often as *count* needs."""
    shipped = list(read_documents(SAMPLES))
    repeats = max(0, (count or 0) - len(shipped))
    if repeats:
        console.print(
            f"{len(shipped)} samples are shipped: {repeats} of the {count} documents repeat them under new ids and numbers."
        )
    yield from shipped
    for number in itertools.count(2) if repeats else ():
        for document in shipped:
            repeat = document | {"_id": f"{id_text(document['_id'])}-{number}"}
            if "conversation_number" in document:
                repeat["conversation_number"] = f"{document['conversation_number']}-{number}"
            yield repeat


def _with_ids(documents: Iterable[Document], has_rows: Callable[[], bool]) -> Iterator[Document]:
    """Yield *documents*; one without ``_id`` gets an ``_id`` derived from its content.

    Of a conversation made of rows, number and messages count, so that a later export with another status adds nothing.
    Documents without a conversation_number may repeat: each repetition gets its own ``_id``.
    """
    seen: Counter[str] = Counter()
    for number, document in enumerate(documents, 1):
        if "_id" in document:
            yield document
            continue
        try:
            ignored = _STATUS_FIELDS | (_ROW_FIELDS if has_rows() and "messages" in document else frozenset())
            content = dumps({name: value for name, value in document.items() if name not in ignored})
        except ValueError as exc:
            raise ConfigurationError(
                f"Document {number} contains a value that MongoDB cannot store; correct or remove it."
            ) from exc
        document_id = f"{DERIVED_ID}{hashlib.sha256(content).hexdigest()[:32]}"
        if document.get("conversation_number") is None:
            seen[document_id] += 1
            if seen[document_id] > 1:
                document_id += f"-{seen[document_id]}"
        yield {"_id": document_id, **document}


if __name__ == "__main__":
    sys.exit(main())
