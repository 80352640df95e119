"""Console output of ``cli.py index``: progress, outcome, prices, hits, and the confirmation of costs."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from database_docs.items import Ended, Kind, State
from domain.text import encodable, escaped
from embedding_index.search_entries import Hit
from error_handler import EmbeddingCostError
from storage.files import replace_file

LINE_EVERY_S = 5.0
SHOWN_PROBLEMS = 10
PIPE_WIDTH = 120  # if the output is not a terminal
EXCERPT_CHARACTERS = 200

KINDS = {"database": (Kind.TABLE, Kind.RELATIONSHIP), "conversations": (Kind.CONVERSATION,)}


@dataclass(frozen=True, slots=True)
class Spent:
    """Calls that were answered, the tokens billed for them, and their price in US dollars (None: not known)."""

    calls: int
    tokens: int
    cost_usd: float | None


@dataclass(slots=True)
class Outcome:
    """The outcome of one run. Tokens are as billed, 0 if the provider does not report them.

    *results* holds, for each kind, name -> whether it is indexed now, as BatchIndexingManager returns it; conversations
    are too many to be named and only counted. *before* is ``get_processing_stats`` before the run, *all_runs* what all
    runs paid for this model, *states* the number of items by kind and state. *error* is why the run ended early, or None.
    """

    source: str
    provider: str
    model: str
    dimensions: int | None
    before: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, bool]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    indexed: int = 0
    failed: int = 0
    reused: int = 0
    removed: int = 0
    calls: int = 0
    tokens: int = 0
    cost_usd: float | None = 0.0
    all_runs: Spent = field(default_factory=lambda: Spent(0, 0, 0.0))
    duration_s: float = 0.0
    is_interrupted: bool = False
    more: dict[str, int] = field(default_factory=dict)
    states: Mapping[Kind, Mapping[State, int]] = field(default_factory=dict)
    error: str | None = None

    def count(self, ended: Ended) -> int:
        """Count items whose indexing has ended; return how many of them failed."""
        problems = {item.id: problem for item, problem in ended if problem is not None}
        self.problems |= problems
        self.failed += len(problems)
        self.indexed += len(ended) - len(problems)
        return len(problems)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        ended = self.indexed + self.failed
        return {
            "source": self.source,
            "provider": self.provider,
            "model": self.model,
            "dimensions": self.dimensions,
            "stats": self.before,
            **self.results,
            "indexed": self.indexed,
            "failed": self.failed,
            "success_rate": self.indexed / ended if ended else None,
            "reused": self.reused,
            "removed": self.removed,
            **self.more,
            "calls": self.calls,
            "tokens": self.tokens,
            "cost_usd": self.cost_usd,
            "all_runs": asdict(self.all_runs),
            "duration_s": round(self.duration_s, 3),
            "items_per_s": round(ended / self.duration_s, 1) if ended and self.duration_s else None,
            "states": self.states,
            "interrupted": self.is_interrupted,
            "error": self.error,
            "problems": self.problems,
        }


class IndexProgress:
    """Progress on stderr: a bar on a terminal, else a line every LINE_EVERY_S seconds. Use as ``with``."""

    def __init__(self, what: str, total: int | None = None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._what, self._total = what, total
        self._ended = self._failed = 0
        self._written_at = time.monotonic()
        self._written = -1
        self._bar: Progress | None = None

    def __enter__(self) -> IndexProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._ended > max(self._written, 0):
            self._write()

    def failed(self, number: int) -> None:
        """Count items that failed; ``reached`` counts them as well."""
        self._failed += number

    def reached(self, number: int, of: int | None = None) -> None:
        """Show that *number* items have ended; *of* is the new total, None if it is the same."""
        self._ended, self._total = number, self._total if of is None else of
        if self._bar is None and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=number, total=self._total)
        elif time.monotonic() - self._written_at >= LINE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written_at, self._written = time.monotonic(), self._ended
        of = "" if self._total is None else f" of {self._total}"
        self._console.print(Text(f"{self._what}: {self._ended}{of}, {self._failed} failed"))


def show_outcome(outcome: Outcome, *, as_json: bool, output: Path | None) -> None:
    """Print *outcome*, and write it to *output*."""
    facts = outcome.as_dict()
    if give_json(facts, as_json=as_json, output=output):
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{outcome.indexed} indexed, {outcome.failed} failed, {outcome.removed} removed.", markup=False)
    for name, count in outcome.more.items():
        console.print(f"  {name.replace('_', ' ')}: {count}", markup=False)
    if facts["success_rate"] is not None:
        console.print(f"Success rate {facts['success_rate']:.1%}, {facts['items_per_s']} items/s.", markup=False)
    console.print(
        f"{outcome.calls} calls, {outcome.tokens:,} tokens, {in_dollars(outcome.cost_usd)}; "
        f"{outcome.reused} vectors were there already ({outcome.model} of {outcome.provider}).",
        markup=False,
    )
    spent = outcome.all_runs
    if spent.tokens > outcome.tokens:
        console.print(
            f"Since the index was made: {spent.calls} calls, {spent.tokens:,} tokens, {in_dollars(spent.cost_usd)}.",
            markup=False,
        )
    for name, problem in list(outcome.problems.items())[:SHOWN_PROBLEMS]:
        console.print(Text(escaped(f"  {name}: {problem}")))
    if len(outcome.problems) > SHOWN_PROBLEMS:
        console.print(f"  ... and {len(outcome.problems) - SHOWN_PROBLEMS} more: --json shows all", markup=False)
    for sentence in _elsewhere(outcome):
        console.print(sentence, markup=False)


def _elsewhere(outcome: Outcome) -> Iterator[str]:
    """Yield what to do for the other source, whose items may have left the index in a rebuild."""
    for source, kinds in KINDS.items():
        left = sum(outcome.states.get(kind, {}).get(State.PENDING, 0) for kind in kinds)
        if left and source != outcome.source:
            flag = "" if source == "database" else f" --source {source}"
            what = "tables and relationships are" if source == "database" else f"{source} are"
            yield f"{left} {what} not in the index, or with an older text: cli.py index --batch{flag} indexes them."


def say(sentence: str) -> None:
    """Print *sentence* to stderr; stdout has the outcome only."""
    sys.stderr.write(f"{sentence}\n")


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
    """Print what indexing sends and costs."""
    console = Console(soft_wrap=True, highlight=False)
    for name, value in stats.items():
        shown = in_dollars(value) if name.endswith("cost") else value
        console.print(f"{name.replace('_', ' ')}: {shown}", markup=False)
    console.print(f"About {tokens:,} tokens for {model}; prices from {source}. Nothing was sent.", markup=False)


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
        flag = "" if source == "database" else f" --source {source}"
        console.print(
            f"Nothing is indexed yet that could be found: run cli.py index --batch{flag} first.", markup=False
        )
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
        labels = (str(hit.metadata.get(name) or "") for name in ("intent", "topic", "sentiment", "categorization"))
        return ", ".join(label for label in labels if label)
    # The first line repeats the name.
    text = " ".join((hit.text or "").partition("\n")[2].split())
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 3] + "..."


def in_dollars(usd: float | None) -> str:
    """Return *usd* as text for people."""
    if usd is None:
        return "price unknown"
    return "free" if not usd else f"{usd:.6f} US dollars" if usd < 0.01 else f"{usd:.2f} US dollars"


@dataclass(frozen=True, slots=True)
class Spending:
    """The limit on the cost of a run. *max_usd* None: no limit. *is_agreed*: no confirmation is needed."""

    max_usd: float | None
    is_agreed: bool

    @property
    def has_limit(self) -> bool:
        """True if the price must be known before anything is sent."""
        return self.max_usd is not None and not self.is_agreed


async def require_affordable(spending: Spending, usd: float | None, price: str) -> None:
    """Return if *usd* (None: not known) may be spent; if it is over the limit, ask on the terminal.

    *price* is the same for people.

    Raises:
        EmbeddingCostError: It may not be spent, or there is no terminal to ask on.
    """
    if not spending.has_limit or (usd is not None and spending.max_usd is not None and usd <= spending.max_usd):
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        sys.stderr.write(f"This costs {price}, more than --max-cost {spending.max_usd:g} allows. Go on? [y/N] ")
        sys.stderr.flush()
        if (await _line()).strip().lower() in ("y", "yes"):
            return
    raise EmbeddingCostError(f"Nothing was sent: {price}; raise --max-cost, or give --yes to spend it.")


async def _line() -> str:
    """Return a line from the terminal. The event loop waits for it, so that Ctrl-C ends the wait."""
    loop, is_there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), is_there.set)
    try:
        await is_there.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return sys.stdin.readline()
