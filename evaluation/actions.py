"""Carries out ``cli.py evaluate``, from its arguments to the report and the exit code."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from config import Settings, load_prompt_taxonomy
from domain.text import counted
from error_handler import ConfigurationError, ExitCode
from evaluation.comparison import Comparer
from evaluation.corrections import read_corrections
from evaluation.fresh_run import FreshRun, choose, evaluation_name, read_sources
from evaluation.gold import PAGE, Gold, match, merge, read_gold_file, require_labels
from evaluation.html_report import render_html
from evaluation.metrics import FieldFigures, field_figures
from evaluation.report import Report
from evaluation.shares import field_shares
from evaluation.sources import Collections, LabelSource, ReportFile, ResultsCollection, report_file
from evaluation.text_report import print_report
from evaluation.values import GoldEntry, Labelled, Problem, Row, Spelling
from mongo_client import DocumentStore
from storage import extended_json
from storage.extended_json import canonical, id_text
from storage.files import replace_file
from utils.retry_utils import RetryPolicy
from worker.progress import ConsoleProgress
from worker.subset import in_subset, require_query

LINE_EVERY_S = 5.0
COLLECTION, CORRECTIONS, CONTROL = "collection:", "corrections", "control"


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Evaluate as *arguments* say; print and write the report, and return the exit code.

    Only conversations whose source documents are in ``arguments.subset`` count.
    """
    store = DocumentStore(settings, subset=arguments.subset)
    try:
        await store.check()
        await require_query(store, store.states.subset, "--filter")
        report = await Evaluation(arguments, settings, store).report()
        report.problems.sort(key=lambda problem: (len(problem.place), problem.place))  # line 9 before line 10
    finally:
        await store.close()
    print_report(Console(emoji=False), report)
    if arguments.output:
        replace_file(arguments.output, extended_json.pretty(report.as_dict()).encode())
    if arguments.html:
        replace_file(arguments.html, render_html(report).encode())
    is_empty = not report.rows if report.comparison is None else not report.comparison.n
    if is_empty:
        sys.stderr.write(f"cli.py evaluate: {_why_empty(arguments, report)}\n")
    return ExitCode.INCOMPLETE if is_empty or report.failures else ExitCode.DONE


def _why_empty(arguments: argparse.Namespace, report: Report) -> str:
    if report.comparison is not None:
        what = "conversation with a gold label" if report.gold_source else "conversation"
        return f"No {what} is in both {report.comparison.a.source} and {report.comparison.b.source}."
    if not report.lines and arguments.gold in (CORRECTIONS, CONTROL):
        return f"There are no {report.gold_source}; make some with python cli.py review."
    return f"There is no result in {report.results} for {counted(report.lines, 'gold line')}; run python cli.py first, or add --run N."


class Evaluation:
    """One evaluation of the collections of *store*."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings, store: DocumentStore) -> None:
        self._arguments, self._settings, self._store = arguments, settings, store
        self._taxonomy = load_prompt_taxonomy(settings)
        self._fields = self._taxonomy.field_names
        self._spelling = Spelling(self._taxonomy)
        policy = RetryPolicy(settings.mongodb_max_retries, settings.mongodb_backoff_s)
        self._collections = Collections(store, policy)
        self._outside: set[bytes] = set()  # the keys of conversations outside the subset
        for name, _ in arguments.fail_under:
            if name not in self._fields:
                raise ConfigurationError(f"--fail-under {name}: the fields are {', '.join(self._fields)}.")

    async def report(self) -> Report:
        """Return the report that the arguments ask for."""
        gold = await self._gold() if self._arguments.gold else Gold("")
        report = await (self._compared(gold) if self._arguments.compare else self._judged(gold))
        if self._outside:
            left = counted(len(self._outside), "conversation is", "conversations are")
            note = f"{left} outside --filter, --since and --until."
            report.gold_note = f"{report.gold_note} {note}".strip()
        return report

    async def _judged(self, gold: Gold) -> Report:
        entries, name = gold.entries, self._settings.results_collection
        if self._arguments.run:
            name = self._arguments.run_into or evaluation_name(name)
            entries = await self._classified(gold, name)
        source = ResultsCollection(self._collections, name, self._fields)
        report = self._new_report(f"{self._settings.db_name}.{name}", gold)
        report.rows = await self._rows(entries, source, report)
        figures = (field_figures(field, report.rows, self._taxonomy.names(field)) for field in self._fields)
        report.fields = [each for each in figures if each.n]
        report.failures = self._failures(report.fields)
        if self._arguments.shares:
            for name in [each.field for each in report.fields]:
                counts = await source.counts(name)
                report.shares.append(field_shares(name, report.rows, counts, self._taxonomy.names(name)))
        return report

    @staticmethod
    def _new_report(results: str, gold: Gold) -> Report:
        return Report(results, gold.source, gold.note, len(gold.entries), gold.problems)

    async def _gold(self) -> Gold:
        given = self._arguments.gold
        if given in (CORRECTIONS, CONTROL):
            results, is_control = self._settings.results_collection, given == CONTROL
            return await read_corrections(self._collections, results, self._spelling, is_control=is_control)
        if not given.startswith(COLLECTION):
            return read_gold_file(Path(given), self._spelling)
        name = given.removeprefix(COLLECTION)
        gold = Gold(f"collection {name}")
        async for page in self._collections.pages(name, ()):
            for document in page:
                has_own_id = "source_conversation_id" not in document
                gold.add(f"document {id_text(document['_id'])}", document, self._spelling, has_own_id=has_own_id)
        require_labels(gold, self._spelling)
        return gold

    async def _rows(self, entries: list[GoldEntry], source: LabelSource, report: Report) -> list[Row]:
        """Return the conversations of *entries* with their labels; add to the problems of *report* what has none."""
        pairs, unmatched = await match(entries, source.find)
        if unmatched:
            places = {problem.place for problem in unmatched if problem.kind == "unknown"}
            found, _ = await match([entry for entry in entries if entry.place in places], self._find_source)
            known = {entry.place for entry, _ in found}
            unmatched = [
                Problem("no_result", one.place, one.detail) if one.place in known else one for one in unmatched
            ]
        pairs, examples = self._without_examples(pairs)
        inside = await self._inside([found for _, found in pairs])
        rows, problems = merge([pair for pair in pairs if pair[1].key in inside])
        report.problems += [*unmatched, *examples, *problems]
        return rows

    def _without_examples(
        self, pairs: Sequence[tuple[GoldEntry, Labelled]]
    ) -> tuple[list[tuple[GoldEntry, Labelled]], list[Problem]]:
        """Return *pairs* without the conversations that the prompt has as examples, and these as problems."""
        kept, shown = [], []
        for entry, one in pairs:
            if self._taxonomy.is_example(canonical(one.document_id), one.input_sha256):
                shown.append(Problem("example", entry.place))
            else:
                kept.append((entry, one))
        return kept, shown

    async def _inside(self, conversations: list[Labelled]) -> set[bytes]:
        """Return the keys of those *conversations* that are in the subset; without one, of all."""
        keys = {one.key: one.document_id for one in conversations}
        if not self._store.states.subset:
            return set(keys)
        inside: set[bytes] = set()
        ids = list(keys.values())
        for start in range(0, len(ids), PAGE):
            inside |= await in_subset(self._store, ids[start : start + PAGE])
        self._outside |= keys.keys() - inside
        return inside

    async def _find_source(self, ids: list[object], numbers: list[str]) -> list[Labelled]:
        return await self._collections.conversations(self._settings.source_collection, ids, numbers)

    async def _classified(self, gold: Gold, name: str) -> list[GoldEntry]:
        """Classify N conversations of *gold* into the collection *name*; return the entries of those that succeeded."""
        pairs, problems = await match(gold.entries, self._find_source)
        pairs, examples = self._without_examples(pairs)
        gold.problems += [*problems, *examples]
        inside = await self._inside([found for _, found in pairs])
        pairs = [pair for pair in pairs if pair[1].key in inside]
        chosen = choose(pairs, self._arguments.run)
        documents = await read_sources(self._collections, self._settings, chosen)
        fresh = FreshRun(self._settings, self._store, name, ConsoleProgress(sys.stderr))
        failed = await fresh.execute(documents) if documents else []
        gold.problems += failed
        kept = {one.key for one in chosen} - fresh.failed
        return [
            GoldEntry(entry.place, (found.document_id,), None, entry.labels)
            for entry, found in pairs
            if found.key in kept
        ]

    def _failures(self, fields: list[FieldFigures]) -> list[str]:
        by_name = {figures.field: figures for figures in fields}
        failures = []
        for name, least in self._arguments.fail_under:
            accuracy = by_name[name].accuracy.value if name in by_name else None
            if accuracy is None:
                failures.append(f"There is no accuracy of {name}: no conversation has a gold label and a result.")
            elif accuracy < least:
                failures.append(f"The accuracy of {name} is {accuracy:.3f}, below {least:g} (--fail-under).")
        return failures

    async def _compared(self, gold: Gold) -> Report:
        a, b = [await self._source(name) for name in self._arguments.compare]
        report = self._new_report(f"{a.name} and {b.name}", gold)
        comparer = Comparer(a, b, self._fields)
        if self._arguments.gold:
            rows = await self._rows(gold.entries, a, report)
            for start in range(0, len(rows), PAGE):
                await comparer.add(rows[start : start + PAGE])
        else:
            own_gold = a.gold if isinstance(a, ReportFile) else {}
            report.gold_source, report.lines = (a.name, len(own_gold)) if own_gold else ("", 0)
            done, shown_s = 0, time.monotonic()
            async for page in a.pages():
                inside = await self._inside(page)
                await comparer.add([Row(own_gold.get(one.key, {}), one) for one in page if one.key in inside])
                done += len(page)
                if time.monotonic() - shown_s >= LINE_EVERY_S:
                    shown_s = time.monotonic()
                    sys.stderr.write(f"evaluate: {counted(done, 'conversation')} of {a.name} compared\n")
        report.comparison = comparer.comparison()
        return report

    async def _source(self, name: str) -> LabelSource:
        if (report := report_file(name, self._fields)) is not None:
            return report
        if not await self._collections.find(name, {}, ("_id",), limit=1):
            raise ConfigurationError(f"--compare {name}: there is no such file, and no collection with results.")
        return ResultsCollection(self._collections, name, self._fields)
