"""The summary of a run for people: counts, shares of labels as bars, example rows, next steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

from config import Settings
from domain.conversation import stored_labels
from domain.text import counted, one_line
from storage.extended_json import id_text
from utils.process import tell_line
from worker.left_out import LeftOut, is_fruitless
from worker.quarantine import failed_places

BAR_WIDTH = 28


def print_run(console: Console, stats: dict[str, Any], settings: Settings) -> None:
    """Print the counts of one run, the reasons of failed, skipped and unselected documents, and the state of the queues."""
    if not stats["documents_processed"] and not stats["already_done"] and not stats["leased_elsewhere"]:
        left = stats.get("not_selected")
        queued = stats["in_retry_queue"] + stats["in_quarantine"]
        if left is not None and (hint := LeftOut(**left).hint_if_none(settings, queued)):
            console.print(f"[bold]Nothing to do.[/] {escape(hint)}")
            return
        console.print(
            "[bold red]No document could be selected:[/] there are documents, and none is pending or has a result here."
            if is_fruitless(stats)
            else "[bold]Nothing to do[/]: no documents are pending. Documents with results are skipped; --only stale "
            "replaces results of another model, prompt or taxonomy, --reprocess all results, and --retry-failed retries "
            "failed documents."
        )
        _print_left_out(console, stats, settings)
        _print_queues(console, stats)
        return
    console.print(
        f"[bold]{counted(stats['documents_processed'], 'document')}[/] processed in run {stats['job_id']}: "
        f"[green]{stats['successful']} classified[/], [red]{stats['failed']} failed[/], {stats['skipped']} skipped"
    )
    _print_details(console, stats, settings)
    _print_review(console, stats)
    for reason, count in sorted(stats["reasons"].items(), key=lambda pair: -pair[1]):
        console.print(f"  {count} x {reason}")
    if is_fruitless(stats):
        console.print(
            "[bold red]All documents were skipped for their shape[/]: nothing was classified. data/README.md lists the "
            "accepted shapes and senders; python cli.py doctor counts the shapes."
        )
    _print_left_out(console, stats, settings)
    _print_queues(console, stats)


def _print_details(console: Console, stats: dict[str, Any], settings: Settings) -> None:
    """Print where results came from, and what delayed the run."""
    if stats["copied"]:
        console.print(f"{stats['copied']} reused the result of an identical conversation (--no-dedupe disables this)")
    if taken := stats.get("by_student"):
        asked = stats["successful"] - stats["copied"] - taken
        console.print(
            f"The student labelled {taken}, and the model was asked about {asked} ({taken / (taken + asked):.0%} of the calls saved)"
        )
    if urgent := stats.get("urgent"):
        console.print(f"{counted(urgent, 'urgent document')} went first (docs/order.md)")
    if stats["already_done"]:
        console.print(f"{stats['already_done']} already had a result (--reprocess replaces results)")
    if stats["leased_elsewhere"]:
        leased = counted(stats["leased_elsewhere"], "document is", "documents are")
        console.print(f"{leased} leased by another worker (leases expire after {settings.lease_s:g} s)")
    if stats.get("held_back_s"):
        console.print(
            f"Held back for {stats['held_back_s']:.0f} s while the service had requests (SERVICE_LEASE=false disables this)"
        )
    for state in stats.get("servers", ()):
        console.print(server_line(state))


def server_line(state: Mapping[str, Any]) -> str:
    """Return what one of several model servers did, and its state."""
    mean = "" if state["seconds"] is None else f", {state['seconds']:.2f} s each"
    problem = "" if state["state"] == "ready" else f", {state['state'].replace('_', ' ')}: {state['problem']}"
    return f"{state['server']}: {counted(state['answered'], 'conversation')}{mean}{problem}"


def _print_left_out(console: Console, stats: dict[str, Any], settings: Settings) -> None:
    """Print what the run did not select; stats of a run that did not count them have none."""
    left = stats.get("not_selected")
    for sentence, remedy in LeftOut(**left).problems(settings.results_collection) if left else ():
        console.print(f"[yellow]{escape(sentence)}[/] {escape(remedy)}")


def _print_queues(console: Console, stats: dict[str, Any]) -> None:
    if not stats["in_retry_queue"] and not stats["in_quarantine"]:
        return
    console.print(
        f"Retry queue: {stats['in_retry_queue']} (retried by the next run). Quarantine: {stats['in_quarantine']}"
        + (" (--retry-failed retries them)" if stats["in_quarantine"] else "")
    )
    if stats["in_quarantine"]:
        console.print("python cli.py quarantine list lists them with reasons")


def _print_review(console: Console, stats: dict[str, Any]) -> None:
    """Print how many results a person should review, if REVIEW_BELOW is set."""
    limit, stored, judged = stats.get("review_below"), stats["successful"], stats.get("with_confidence", 0)
    if limit is None or not stored:
        return
    if not judged:
        console.print(
            "[yellow]No result is marked for review[/]: the model server returned no log probabilities, so there is no "
            "confidence to compare (docs/local-inference.md)"
        )
        return
    needing = counted(stats["needs_review"], "result needs", "results need")
    console.print(f"[yellow]{needing} review[/]: the confidence of a label is below {limit:g}")
    if judged < stored:
        without = counted(stored - judged, "result has", "results have")
        console.print(f"{without} no confidence and no review mark: the server returned no log probabilities")


def tell_failed(directory: Path) -> None:
    """Print where the documents are that failed before a run ended with an error, which is printed last."""
    if places := failed_places(directory):
        tell_line(places)


def print_labels(console: Console, counts: dict[str, dict[str, int]]) -> None:
    """Print the share of each label as a bar, the most frequent first. *counts*: field -> label -> documents."""
    for field, labels in counts.items():
        if not labels:
            continue
        total = sum(labels.values())
        width, digits = max(map(cell_len, labels)), len(str(max(labels.values())))
        bars = {label: "█" * max(1, round(count / total * BAR_WIDTH)) for label, count in labels.items()}
        longest = max(map(len, bars.values()))
        # Not a table of rich, which takes a twentieth of the start of a run.
        lines = [f"[bold]{field.capitalize().replace('_', ' ')}[/]"]
        for label, count in sorted(labels.items(), key=lambda pair: -pair[1]):
            bar = f"[cyan]{bars[label]}[/]{' ' * (longest - len(bars[label]))}"
            name = escape(label + " " * (width - cell_len(label)))
            lines.append(f" {name}  {bar}  {count:<{digits}}  {count / total:.0%}")
        console.print("\n".join(lines), highlight=False, emoji=False)


def print_examples(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Print one row for each of *results*."""
    from rich.table import Table  # noqa: PLC0415 - only for --embedded

    table = Table(title="Examples", title_justify="left", title_style="bold", box=None)
    fields = list(dict.fromkeys(field for result in results for field in stored_labels(result["classification"])))
    has_sentence = any("categorization" in result["classification"] for result in results)
    for heading in ("conversation", *fields, *(["categorization"] if has_sentence else [])):
        table.add_column(heading, overflow="fold")
    for result in results:
        labels = stored_labels(result["classification"])
        name = result.get("conversation_number") or id_text(result["source_conversation_id"])
        row = [one_line(name, 40), *(", ".join(labels.get(field, [])) for field in fields)]
        if has_sentence:
            row.append(one_line(result["classification"].get("categorization", ""), 70))
        table.add_row(*(escape(text) for text in row))  # rich would read "[/b]" as markup
    console.print(table)


def print_next_steps(console: Console, settings: Settings) -> None:
    """Print where the results of an embedded run are, and how to use your own data and model."""
    console.print(
        f"\n[bold]Results[/]: collection {settings.results_collection} in database {settings.db_name} "
        "of the embedded MongoDB (data/embedded/).\n"
        "[bold]Next[/]\n"
        "  your conversations  .venv/bin/python -m utils.mongodb_import --file FILE --mongodb-uri mongodb://HOST:27017\n"
        "  your model          ollama pull llama3.2\n"
        "  your run            .venv/bin/python cli.py --mongodb-uri mongodb://HOST:27017 --model llama3.2\n"
        "  everything else     docs/operations.md"
    )
