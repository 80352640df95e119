"""The actions of ``cli.py openai-batch``: the steps of a document job, together or one by one, and their output."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from config import Settings
from domain.prices import batch_prices, dollars, price_source
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, JobCostError, JobProcessingError, RunInterruptedError
from openai_batch.documents import reasons
from openai_batch.job_config import AppConfig, Document
from openai_batch.job_context import JobResult, Times
from openai_batch.job_run import JobRun
from openai_batch.job_store import Handling, JobStore
from openai_batch.ledger import ENDED, NOT_SENT, ItemState, Ledger, Shard
from openai_batch.planning import estimated_tokens, reply_limit, request_line
from openai_batch.processor import DocumentBatchProcessor
from openai_batch.schema_file import load_schema_file
from storage.extended_json import id_text
from utils.process import stop_on_signals

STEP_PATIENCE_S = 60.0  # how long a single step waits for OpenAI; ``run`` waits OUTAGE_LIMIT_S
SHOWN_BATCHES = 50
TABLE_WIDTH = 120
LINE_EVERY_S = 5.0
EXAMPLES, PROBLEMS = 3, 10  # shown documents of a preview: requests, and reasons for refusals
REASONING_TOKENS = 2000  # less is often used up before the answer begins
SHOWN_SUBJECTS = 8  # on a terminal, the last changed ones

Row = tuple[Shard, dict[ItemState, int]]


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run one action; see ``Command``."""
    for name in ("limit", "dry_run", "max_cost"):
        value = getattr(arguments, name)
        if arguments.action not in ("run", "submit") and value is not None and value is not False:
            raise ConfigurationError(f"--{name.replace('_', '-')} applies to run and submit only.")
    processor = _processor(arguments, settings)
    if arguments.action == "status":
        _report(arguments, processor)
        return ExitCode.DONE
    stop, connected = asyncio.Event(), asyncio.Event()
    with stop_on_signals(stop, connected.is_set), JobProgress() as progress:
        if arguments.dry_run:
            made = await _dry_run(arguments, processor, progress)
        else:
            async with processor.opened(stop, progress) as job:
                connected.set()  # until MongoDB answers, nothing must be finished after a signal
                await _do(arguments, job)
                result = job.context.result
    if arguments.dry_run:
        return _report_preview(arguments, made, processor)
    _report(arguments, processor, result)
    if stop.is_set():
        raise RunInterruptedError("Stopped. The batches continue at OpenAI; run the same command again to resume.")
    return ExitCode.INCOMPLETE if result.failed else ExitCode.DONE


def _processor(arguments: argparse.Namespace, settings: Settings) -> DocumentBatchProcessor:
    is_run = arguments.action == "run"
    patience_s = settings.outage_limit_s if is_run else min(settings.outage_limit_s, STEP_PATIENCE_S)
    given: dict[str, Any] = {name: True for name in ("allow_external", "mask_pii") if getattr(arguments, name)}
    return DocumentBatchProcessor(
        settings=settings,
        schema_file=load_schema_file(arguments.schema),
        state_dir=arguments.state_dir,
        times=Times(poll_s=arguments.poll_interval or 0.0, unreachable_limit_s=patience_s),
        **given,
    )


async def _do(arguments: argparse.Namespace, job: JobRun) -> None:
    if arguments.action == "poll":
        await job.poll()
    elif arguments.action == "cancel":
        await job.cancel()
    else:
        limit = await _affordable(arguments, job)
        await (job.run(limit) if arguments.action == "run" else job.submit(limit))


async def _affordable(arguments: argparse.Namespace, job: JobRun) -> int | None:
    """Return how many documents may be sent; raise JobCostError if they may cost more than ``--max-cost``.

    Documents that arrive later or become pending again were not in the sum, so they wait for another start.
    """
    limit: int | None = arguments.limit
    if arguments.max_cost is None:
        return limit
    context, unsent = job.context, job.context.ledger.shards(NOT_SENT)
    made = await preview(context.config, context.store, context.on_progress, limit, _waiting(unsent, context.folder))
    require_affordable(made, arguments.max_cost)
    return made.documents


async def _dry_run(arguments: argparse.Namespace, processor: DocumentBatchProcessor, progress: JobProgress) -> Preview:
    unsent = [shard for shard, _ in _rows(processor) if shard.state in NOT_SENT]
    async with processor.reading() as store:
        return await preview(
            processor.config, store, progress, arguments.limit, _waiting(unsent, processor.ledger_path.parent)
        )


def _waiting(unsent: Sequence[Shard], folder: Path) -> list[tuple[Shard, int | None]]:
    """Return each of the *unsent* shards with the answer tokens that its requests allow."""
    return [(shard, reply_limit(folder / shard.file_name)) for shard in unsent]


def _report_preview(arguments: argparse.Namespace, made: Preview, processor: DocumentBatchProcessor) -> int:
    if arguments.json:
        sys.stdout.write(json.dumps(made.as_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        _print_preview(made, processor)
    if arguments.max_cost is not None:
        require_affordable(made, arguments.max_cost)
    return ExitCode.DONE


def _print_preview(made: Preview, processor: DocumentBatchProcessor) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for example in made.examples:
        console.print(f"Request for document {example['document']}:", style="bold")
        console.print(json.dumps(example["body"], indent=2, ensure_ascii=False))
    config = processor.config
    price = "price unknown"
    if made.usd is not None:
        rate = "half the usual price, OpenAI's discount for batches" if made.is_assumed else "the batch rate"
        price = f"at most {dollars(made.usd)} US dollars at {rate}"
    console.print(
        f"{counted(made.documents + made.waiting, 'document')}, {made.bytes:,} bytes, about {made.prompt_tokens:,} prompt "
        f"tokens and at most {made.most_reply_tokens:,} answer tokens with {' and '.join(made.usage) or config.openai.model}: {price}."
    )
    if reasons(config.openai.model) and config.openai.max_tokens < REASONING_TOKENS:
        console.print(
            f"{config.openai.model} reasons before it answers, and {config.openai.max_tokens} tokens must hold both: set "
            f"OPENAI_MAX_TOKENS to {REASONING_TOKENS} or more, or answers are cut off."
        )
    if made.waiting:
        console.print(f"{made.waiting} of them are in files of an earlier start that are not sent yet.")
    for name, problem in made.problems.items():
        console.print(f"Document {name} would not be sent: {problem}")
    if made.refused > len(made.problems):
        console.print(f"... and {made.refused - len(made.problems)} more")
    console.print(f"The requests would go to {config.openai.base_url}. Nothing was sent.")


def _report(arguments: argparse.Namespace, processor: DocumentBatchProcessor, result: JobResult | None = None) -> None:
    rows = _rows(processor)
    if arguments.json:
        sys.stdout.write(json.dumps(_as_dict(result, rows), indent=2) + "\n")
        return
    if result is None and not rows:
        sys.stdout.write("This job has sent nothing yet.\n")
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.width = max(console.width, TABLE_WIDTH)  # without a terminal it is 80, which would cut ids
    console.print(_table(rows[-SHOWN_BATCHES:]))
    if len(rows) > SHOWN_BATCHES:
        console.print(f"and {len(rows) - SHOWN_BATCHES} earlier batches; --json shows all of them")
    open_batches = sum(shard.state not in ENDED for shard, _ in rows)
    if result is not None and (result.total_processed or result.retried or not open_batches):
        console.print(
            f"{counted(result.total_processed, 'document')} ended: {result.succeeded} completed, {result.failed} failed, "
            f"{result.skipped} skipped. {result.retried} pending again."
        )
    if open_batches:
        console.print(f"Open batches: {open_batches}. Check them with cli.py openai-batch poll.")


def _rows(processor: DocumentBatchProcessor) -> list[Row]:
    """Return the shards of the ledger with their counts; a job that was never started has no ledger."""
    if not processor.ledger_path.exists():
        return []
    with Ledger(processor.ledger_path) as ledger:
        return [(shard, ledger.counts(shard.number)) for shard in ledger.shards()]


def _table(rows: list[Row]) -> Table:
    table = Table(title="Batches", title_justify="left", box=None)
    for heading in ("shard", "batch", "state", "at OpenAI", "lines", "results"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("shard", "lines") else "left")
    for shard, counts in rows:
        names = {ItemState.SUBMITTED: "open"}
        results = ", ".join(f"{count} {names.get(state, state.value)}" for state, count in counts.items() if count)
        cells = (str(shard.number), shard.batch_id or "-", shard.state.value, shard.status or "-", str(shard.lines))
        table.add_row(*(Text(cell) for cell in (*cells, results)))
    return table


def _as_dict(result: JobResult | None, rows: list[Row]) -> dict[str, Any]:
    batches = [
        {
            "shard": shard.number,
            "batch_id": shard.batch_id,
            "state": shard.state,
            "status": shard.status,
            "problem": shard.problem,
            "submitted": shard.lines,
            **{state.value: counts[state] for state in ItemState if state is not ItemState.SUBMITTED},
        }
        for shard, counts in rows
    ]
    names = ("total_processed", "succeeded", "failed", "skipped", "retried") if result is not None else ()
    return {**{name: getattr(result, name) for name in names}, "batches": batches}


class JobProgress:
    """Shows texts such as ``shard 3: in_progress, 5 of 10 done`` on stderr. Use in ``with``, and call it.

    The part before the colon is the subject. A terminal shows the last text of each subject. Elsewhere a new text is
    printed if the last line is LINE_EVERY_S old; the final text is always printed.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True, markup=False)
        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None
        self._clock = clock
        self._texts: dict[str, str] = {}
        self._written = self._last = ""
        self._written_at = -LINE_EVERY_S

    def __enter__(self) -> JobProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self._write()

    def __call__(self, text: str) -> None:
        """Show *text*."""
        subject = text.partition(":")[0]
        self._texts.pop(subject, None)
        self._texts[subject] = self._last = text
        if self._live is not None:
            self._live.update(Text("\n".join(list(self._texts.values())[-SHOWN_SUBJECTS:])))
        elif self._clock() - self._written_at >= LINE_EVERY_S:
            self._write()

    def _write(self) -> None:
        if self._last != self._written:
            self._written, self._written_at = self._last, self._clock()
            self._console.print(Text(self._last))


@dataclass(slots=True)
class Preview:
    """The requests of the pending documents, and of those in files that are not sent yet (*waiting*).

    *usage* has, for each model, an upper estimate of the prompt tokens, the limit of all answers together, and the longest
    prompt: the files may be of another model. *usd* is the price of answers of the maximum length, None if the price of
    the model *unpriced* is unknown; *is_assumed*: see ``BatchPrice``. *examples* are the exact bodies of the first
    documents, *problems* the reasons of the first *refused* ones.
    """

    documents: int = 0
    waiting: int = 0
    refused: int = 0
    bytes: int = 0
    usage: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    usd: float | None = None
    is_assumed: bool = False
    unpriced: str | None = None
    problems: dict[str, str] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """The prompt tokens of all models."""
        return sum(prompt for prompt, _, _ in self.usage.values())

    @property
    def most_reply_tokens(self) -> int:
        """The answer tokens of all models."""
        return sum(reply for _, reply, _ in self.usage.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        names = ("documents", "waiting", "refused", "bytes", "prompt_tokens", "most_reply_tokens")
        return {
            **{name: getattr(self, name) for name in names},
            "most_usd": None if self.usd is None else round(self.usd, 6),
            "price_is_assumed": None if self.usd is None else self.is_assumed,
            "prices_from": price_source(),
            "examples": self.examples,
        }

    def count(self, model: str, prompt_tokens: int, reply_tokens: int) -> None:
        """Count the tokens of one or several requests to *model*; the longest prompt may have all of *prompt_tokens*."""
        prompt, reply, longest = self.usage.get(model, (0, 0, 0))
        self.usage[model] = (prompt + prompt_tokens, reply + reply_tokens, max(longest, prompt_tokens))

    def set_price(self) -> None:
        """Set the price of everything that was counted."""
        priced = {
            model: batch_prices(prompt, reply, [model], longest)
            for model, (prompt, reply, longest) in self.usage.items()
        }
        self.unpriced = next((model for model, prices in priced.items() if not prices), None)
        found = [price for prices in priced.values() for price in prices]
        self.usd = None if self.unpriced else math.fsum(price.usd for price in found)
        self.is_assumed = any(price.is_assumed for price in found)

    def add(self, document: Document, handling: Handling, config: AppConfig) -> None:
        """Count the request of *document*, or the reason why there is none."""
        name = id_text(document["_id"])
        try:
            body = handling.request(document)
            line = request_line("0" * 42, config.batch.endpoint, body)
        except JobProcessingError as exc:
            self.refused += 1
            if len(self.problems) < PROBLEMS:
                self.problems[name] = str(exc)
            return
        self.documents += 1
        self.bytes += len(line)
        self.count(config.openai.model, estimated_tokens(body), config.openai.max_tokens)
        if len(self.examples) < EXAMPLES:
            self.examples.append({"document": name, "body": body})


async def preview(
    config: AppConfig,
    store: JobStore,
    on_progress: Callable[[str], None],
    limit: int | None,
    waiting: Sequence[tuple[Shard, int | None]],
) -> Preview:
    """Return the preview of the pending documents (at most *limit*), and of shards that are not sent yet (*waiting*).

    Each of these comes with the answer tokens that its requests allow, None if they are unknown.
    """
    made = Preview()
    for shard, reply_tokens in waiting:
        made.waiting += shard.lines
        made.bytes += shard.bytes
        made.count(shard.model, shard.tokens, shard.lines * (reply_tokens or config.openai.max_tokens))
    async with contextlib.aclosing(store.pages(config.batch.batch_size)) as pages:
        async for page in pages:
            for document in page:
                if made.documents != limit:
                    made.add(document, store.handling, config)
            on_progress(f"{counted(made.documents, 'document')} read")
            if made.documents == limit:
                break
    made.set_price()
    return made


def require_affordable(made: Preview, most_usd: float) -> None:
    """Raise JobCostError if *made* may cost more than *most_usd*, or its price is unknown."""
    if made.usd is None:
        raise JobCostError(
            f"the price of {made.unpriced} is not known, so --max-cost cannot be checked; leave it out to send anyway."
        )
    if made.usd > most_usd:
        raise JobCostError(
            f"{counted(made.documents + made.waiting, 'document')} may cost up to {dollars(made.usd)} US dollars, more than "
            f"--max-cost {most_usd:g}; reduce --limit or OPENAI_MAX_TOKENS, or raise --max-cost."
        )
