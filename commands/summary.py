"""What a person reads after a run: counts, shares of labels as bars, example rows, what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from config import Settings
from domain.text import one_line
from storage.extended_json import id_text

BAR_WIDTH = 28
FIELDS = ("intent", "topic", "sentiment")

LabelCounts = dict[str, dict[str, int]]  # intent, topic, sentiment -> label -> documents


def print_run(console: Console, stats: dict[str, Any]) -> None:
    """Print the counts of one run, and why documents failed or were skipped."""
    if not stats["documents_processed"] and not stats["already_done"] and not stats["leased_elsewhere"]:
        console.print(
            "[bold]Nothing to do[/]: no document is pending. What has a result is not asked again; --reprocess replaces "
            "results, --retry-failed takes up failed documents."
        )
        _print_queues(console, stats)
        return
    console.print(
        f"[bold]{stats['documents_processed']} documents[/] processed in run {stats['job_id']}: "
        f"[green]{stats['successful']} classified[/], [red]{stats['failed']} failed[/], {stats['skipped']} skipped"
    )
    if stats["copied"]:
        console.print(f"{stats['copied']} of them have the answer of an identical conversation (--no-dedupe asks each)")
    if stats["already_done"]:
        console.print(
            f"{stats['already_done']} had a result already and were not asked again (--reprocess replaces results)"
        )
    if stats["leased_elsewhere"]:
        console.print(f"{stats['leased_elsewhere']} are in the hands of another worker")
    _print_review(console, stats)
    for reason, count in sorted(stats["reasons"].items(), key=lambda pair: -pair[1]):
        console.print(f"  {count} x {reason}")
    _print_queues(console, stats)


def _print_queues(console: Console, stats: dict[str, Any]) -> None:
    if stats["in_retry_queue"] or stats["in_quarantine"]:
        console.print(
            f"{stats['in_retry_queue']} documents wait in the retry queue and {stats['in_quarantine']} are in quarantine; "
            "the next run takes up the former, --retry-failed both (docs/operations.md)"
        )
    if stats["in_quarantine"]:
        console.print("python cli.py quarantine list says which and why")


def _print_review(console: Console, stats: dict[str, Any]) -> None:
    """Print how many results a person should look at, where it was asked for."""
    limit, stored, judged = stats.get("review_below"), stats["successful"], stats.get("with_confidence", 0)
    if limit is None or not stored:
        return
    if not judged:
        console.print(
            "[yellow]No result is marked for review[/]: the model server gave no log probabilities, so no confidence is "
            "known (docs/local-inference.md)"
        )
        return
    console.print(f"[yellow]{stats['needs_review']} need review[/]: a label with a confidence below {limit:g}")
    if judged < stored:
        console.print(f"{stored - judged} results have no confidence and are not marked: the server gave none for them")


def print_labels(console: Console, counts: LabelCounts) -> None:
    """Print the share of each label as a bar, the most frequent first."""
    for field in FIELDS:
        labels = counts.get(field)
        if not labels:
            continue
        total = sum(labels.values())
        table = Table(title=field.capitalize(), box=None, show_header=False, title_justify="left", title_style="bold")
        for label, count in sorted(labels.items(), key=lambda pair: -pair[1]):
            share = count / total
            bar = "█" * max(1, round(share * BAR_WIDTH))
            table.add_row(escape(label), f"[cyan]{bar}[/]", f"{count}", f"{share:.0%}")
        console.print(table)


def print_examples(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Print one row for each of *results*."""
    table = Table(title="Examples", title_justify="left", title_style="bold", box=None)
    for heading in ("conversation", *FIELDS, "categorization"):
        table.add_column(heading, overflow="fold")
    for result in results:
        labels = result["classification"]
        name = result.get("conversation_number") or id_text(result["source_conversation_id"])
        row = (one_line(name, 40), *(labels[field] for field in FIELDS), one_line(labels["categorization"], 70))
        table.add_row(*(escape(text) for text in row))  # a text such as "[/b]" would be read as markup
    console.print(table)


def print_next_steps(console: Console, settings: Settings) -> None:
    """Print where the results of an embedded run are and how to go on with one's own data and model."""
    console.print(
        f"\n[bold]Where the results are[/]: collection {settings.results_collection} in database {settings.db_name} "
        "of the embedded MongoDB (data/embedded/).\n"
        "[bold]Next[/]\n"
        "  your conversations  .venv/bin/python -m utils.mongodb_import --file FILE --mongodb-uri mongodb://HOST:27017\n"
        "  your model          ollama pull llama3.2\n"
        "  your run            .venv/bin/python cli.py --mongodb-uri mongodb://HOST:27017 --model llama3.2\n"
        "  everything else     docs/operations.md"
    )
