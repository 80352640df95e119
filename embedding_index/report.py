"""Console output of ``cli.py index``: progress, outcome, prices, hits, and the question before costs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from database_docs.items import CONVERSATION_FACTS, Ended, Kind, State
from domain.prices import dollars
from domain.text import encodable, escaped
from embedding_index.embedding_run import RunCounts
from embedding_index.providers.contract import ModelIdentity
from embedding_index.search_entries import Hit
from embedding_index.vector_ledger import Totals
from error_handler import EmbeddingCostError
from storage.files import replace_file
from utils.process import is_confirmed

LINE_EVERY_S = 5.0
SHOWN_PROBLEMS = 10
PIPE_WIDTH = 120  # if the output is not a terminal
EXCERPT_CHARACTERS = 200

KINDS = {"database": (Kind.TABLE, Kind.RELATIONSHIP), "conversations": (Kind.CONVERSATION,)}


@dataclass(slots=True)
class Outcome:
    """The outcome of one run.

    *before* is ``get_processing_stats`` before the run. *results* has, for each kind, name -> whether it is indexed now;
    conversations are only counted, in *more*. *problems* are by item id. *error* is the reason of an early end, or None.
    """

    source: str
    before: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, bool]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    indexed: int = 0
    failed: int = 0
    removed: int = 0
    more: dict[str, int] = field(default_factory=dict)
    duration_s: float = 0.0
    is_interrupted: bool = False
    error: str | None = None

    def count(self, ended: Ended) -> None:
        """Count items whose indexing has ended."""
        problems = {item.id: problem for item, problem in ended if problem is not None}
        self.problems |= problems
        self.failed += len(problems)
        self.indexed += len(ended) - len(problems)

    def as_dict(
        self, identity: ModelIdentity, counts: RunCounts, spent: Totals, price: Callable[[int], float | None]
    ) -> dict[str, Any]:
        """Return it as plain values, with the *counts* of this run and what all runs have *spent*.

        *price* returns the US dollars of a number of tokens.
        """
        ended = self.indexed + self.failed
        return {
            "source": self.source,
            "provider": identity.provider,
            "model": identity.model,
            "dimensions": identity.dimensions,
            "stats": self.before,
            **self.results,
            "indexed": self.indexed,
            "failed": self.failed,
            "success_rate": self.indexed / ended if ended else None,
            "reused": counts.reused,
            "removed": self.removed,
            **self.more,
            "calls": counts.calls,
            "tokens": counts.tokens,
            "cost_usd": price(counts.tokens),
            "all_runs": {"calls": spent.calls, "tokens": spent.tokens, "cost_usd": price(spent.tokens)},
            "duration_s": round(self.duration_s, 3),
            "items_per_s": round(ended / self.duration_s, 1) if ended and self.duration_s else None,
            "interrupted": self.is_interrupted,
            "error": self.error,
            "problems": self.problems,
        }


class IndexProgress:
    """Progress on stderr: a bar on a terminal, else a line every LINE_EVERY_S seconds. Use as ``with``."""

    def __init__(self, what: str, outcome: Outcome, total: int | None = None) -> None:
        self._outcome = outcome
        console = Console(stderr=True, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar.add_task(what, total=total)
        (self._task,) = self._bar.tasks
        self._written_at, self._written = time.monotonic(), 0.0

    def __enter__(self) -> IndexProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._bar.disable and self._task.completed > self._written:
            self._write()

    def reached(self, number: int, of: int | None = None) -> None:
        """Show that *number* items have ended; *of* is the new total, None if it is the same."""
        self._bar.start()
        self._bar.update(self._task.id, completed=number, total=of)
        if self._bar.disable and time.monotonic() - self._written_at >= LINE_EVERY_S:
            self._write()

    def _write(self) -> None:
        task = self._task
        self._written_at, self._written = time.monotonic(), task.completed
        of = "" if task.total is None else f" of {task.total}"
        self._bar.console.print(Text(f"{task.description}: {task.completed}{of}, {self._outcome.failed} failed"))


def show_outcome(facts: dict[str, Any], *, as_json: bool, output: Path | None) -> None:
    """Print *facts*, which are ``Outcome.as_dict`` with ``states``, and write them to *output*."""
    if give_json(facts, as_json=as_json, output=output):
        return
    lines = [f"{facts['indexed']} indexed, {facts['failed']} failed, {facts['removed']} removed."]
    for name in ("read", "unclassified", "without_text", "changed"):
        if name in facts:
            lines.append(f"  {name.replace('_', ' ')}: {facts[name]}")
    if facts["success_rate"] is not None:
        lines.append(f"Success rate {facts['success_rate']:.1%}, {facts['items_per_s']} items/s.")
    lines.append(f"{_spent(facts)}; {facts['reused']} stored vectors reused ({facts['model']} of {facts['provider']}).")
    if facts["all_runs"]["tokens"] > facts["tokens"]:
        lines.append(f"Since the index was made: {_spent(facts['all_runs'])}.")
    problems = facts["problems"]
    lines += [escaped(f"  {name}: {problem}") for name, problem in list(problems.items())[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more: --json shows all")
    _print([*lines, *_elsewhere(facts)])


def _spent(facts: Mapping[str, Any]) -> str:
    return f"{facts['calls']} calls, {facts['tokens']:,} tokens, {in_dollars(facts['cost_usd'])}"


def _print(lines: Iterable[str]) -> None:
    console = Console(soft_wrap=True)
    for line in lines:
        console.print(Text(line))


def _elsewhere(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the command for the other source if its items are pending, for example after a rebuild."""
    for source, kinds in KINDS.items():
        left = sum(facts["states"][kind][State.PENDING] for kind in kinds)
        if left and source != facts["source"]:
            what = "tables and relationships are" if source == "database" else f"{source} are"
            yield f"{left} {what} not in the index, or with an older text: cli.py index --batch{_flag(source)} indexes them."


def _flag(source: str) -> str:
    return "" if source == "database" else f" --source {source}"


def give_json(value: object, *, as_json: bool, output: Path | None) -> bool:
    """Write *value* to *output* and, with *as_json*, print it; return whether it was printed."""
    if output is None and not as_json:
        return False
    text = encodable(json.dumps(value, indent=2, ensure_ascii=False))
    if output is not None:
        replace_file(output, text.encode())
    if as_json:
        sys.stdout.write(text + "\n")
    return as_json


def show_estimate(stats: dict[str, Any], tokens: int, model: str, source: str) -> None:
    """Print an estimate."""
    shown = {name: in_dollars(value) if name.endswith("cost") else value for name, value in stats.items()}
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in shown.items()]
    _print([*lines, f"About {tokens:,} tokens for {model}; prices from {source}. Nothing was sent."])


def show_hits(hits: Sequence[Hit], source: str, *, as_json: bool, output: Path | None) -> None:
    """Print *hits* of *source*, the best first, and write them to *output*."""
    rows = [
        {"kind": hit.kind, "name": hit.name, "similarity": round(hit.similarity, 4), **hit.metadata, "text": hit.text}
        for hit in hits
    ]
    if give_json(rows, as_json=as_json, output=output):
        return
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    if not hits:
        _print([f"Nothing is indexed yet: run cli.py index --batch{_flag(source)} first."])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("like", justify="right", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("name", overflow="fold", max_width=console.width * 2 // 5)
    table.add_column("about", overflow="fold")
    for hit in hits:
        table.add_row(f"{hit.similarity:.2f}", hit.kind.value, Text(escaped(hit.name)), Text(escaped(_about(hit))))
    console.print(table)


def _about(hit: Hit) -> str:
    if hit.kind is Kind.CONVERSATION:
        labels = {name: value for name, value in hit.metadata.items() if name not in CONVERSATION_FACTS}
        texts = (", ".join(value) if isinstance(value, list) else str(value) for value in labels.values() if value)
        return ", ".join(texts)
    # The first line repeats the name.
    text = " ".join((hit.text or "").partition("\n")[2].split())
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 3] + "..."


def in_dollars(usd: float | None) -> str:
    """Return *usd* as text for people."""
    if usd is None:
        return "price unknown"
    return f"{dollars(usd)} US dollars" if usd else "free"


async def require_affordable(limit_usd: float | None, usd: float | None, price: str) -> None:
    """Ask on the terminal if *usd* (None: unknown) is over the limit. *price* is *usd* as text.

    Raises:
        EmbeddingCostError: The answer is not yes, or there is no terminal.
    """
    if limit_usd is None or (usd is not None and usd <= limit_usd):
        return
    question = f"This costs {price}, more than --max-cost {limit_usd:g} allows. Continue?"
    if sys.stdin.isatty() and sys.stderr.isatty() and await is_confirmed(question):
        return
    raise EmbeddingCostError(f"Nothing was sent: {price}; raise --max-cost, or give --yes to spend it.")
