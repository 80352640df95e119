"""The actions of ``cli.py openai-batch``: the steps of a document job, together or one by one."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from config import Settings
from error_handler import ConfigurationError, ExitCode, RunInterruptedError
from openai_batch.job_context import JobResult, Times
from openai_batch.job_preview import Preview, dollars, preview, require_affordable
from openai_batch.job_progress import JobProgress
from openai_batch.job_run import JobRun
from openai_batch.ledger import ENDED, NOT_SENT, ItemState, Ledger, Shard
from openai_batch.processor import DocumentBatchProcessor
from openai_batch.schema_file import load_schema_file
from utils.process import stop_on_signals

STEP_PATIENCE_S = 60.0  # how long a single step waits for OpenAI; ``run`` waits OUTAGE_LIMIT_S
SENDING_FLAGS = ("limit", "dry_run", "max_cost")
SHOWN_BATCHES = 50
TABLE_WIDTH = 120


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run one action; see ``Command``."""
    for name in SENDING_FLAGS:
        value = getattr(arguments, name)
        if arguments.action not in ("run", "submit") and value is not None and value is not False:
            raise ConfigurationError(f"--{name.replace('_', '-')} applies to run and submit only.")
    processor = _processor(arguments, settings)
    if arguments.action == "status":
        return _status(arguments, processor)
    stop, connected = asyncio.Event(), asyncio.Event()
    with stop_on_signals(stop, connected.is_set), JobProgress() as progress:
        if arguments.dry_run:
            made = await _dry_run(arguments, processor, progress)
        else:
            async with processor.opened(stop, progress) as job:
                await job.recover()  # until MongoDB answers, nothing must be finished after a signal
                connected.set()
                await _do(arguments, job)
                result = job.context.result
    if arguments.dry_run:
        return _report_preview(arguments, made, processor)
    with Ledger(processor.ledger_path) as ledger:
        _report(arguments, result, ledger)
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
    context, waiting = job.context, _not_sent(job.context.ledger)
    made = await preview(context.config, context.store, context.handling, context.on_progress, limit, waiting)
    require_affordable(made, arguments.max_cost, context.config.openai.model)
    return made.documents


def _not_sent(ledger: Ledger) -> list[Shard]:
    return [shard for shard in ledger.shards() if shard.state in NOT_SENT]


async def _dry_run(arguments: argparse.Namespace, processor: DocumentBatchProcessor, progress: JobProgress) -> Preview:
    waiting: list[Shard] = []
    if processor.ledger_path.exists():
        with Ledger(processor.ledger_path) as ledger:
            waiting = _not_sent(ledger)
    async with processor.reading() as (store, handling):
        return await preview(processor.config, store, handling, progress, arguments.limit, waiting)


def _report_preview(arguments: argparse.Namespace, made: Preview, processor: DocumentBatchProcessor) -> int:
    if arguments.json:
        bodies = [{"document": name, "body": body} for name, body in made.examples]
        sys.stdout.write(json.dumps({**made.as_dict(), "examples": bodies}, indent=2, ensure_ascii=False) + "\n")
    else:
        _print_preview(made, processor)
    if arguments.max_cost is not None:
        require_affordable(made, arguments.max_cost, processor.config.openai.model)
    return ExitCode.DONE


def _print_preview(made: Preview, processor: DocumentBatchProcessor) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for name, body in made.examples:
        console.print(Text(f"Request for document {name}:", style="bold"))
        console.print(Text(json.dumps(body, indent=2, ensure_ascii=False)))
    config = processor.config
    price = "price unknown"
    if made.price is not None:
        rate = "half the usual price, OpenAI's discount for batches" if made.price.is_assumed else "the batch rate"
        price = f"at most {dollars(made.price.usd)} US dollars at {rate}"
    console.print(
        f"{_counted(made.documents + made.waiting)}, {made.bytes:,} bytes, about {made.prompt_tokens:,} prompt tokens "
        f"and at most {made.most_reply_tokens:,} answer tokens with {config.openai.model}: {price}."
    )
    if made.waiting:
        console.print(f"{made.waiting} of them are in files of an earlier start that are not sent yet.")
    for name, problem in made.problems.items():
        console.print(Text(f"Document {name} would not be sent: {problem}"))
    if made.refused > len(made.problems):
        console.print(f"... and {made.refused - len(made.problems)} more")
    console.print(Text(f"The requests would go to {config.openai.base_url}. Nothing was sent."))


def _counted(documents: int) -> str:
    return "1 document" if documents == 1 else f"{documents} documents"


def _status(arguments: argparse.Namespace, processor: DocumentBatchProcessor) -> int:
    if not processor.ledger_path.exists():
        sys.stdout.write('{"batches": []}\n' if arguments.json else "This job has sent nothing yet.\n")
        return ExitCode.DONE
    with Ledger(processor.ledger_path) as ledger:
        _report(arguments, None, ledger)
    return ExitCode.DONE


def _report(arguments: argparse.Namespace, result: JobResult | None, ledger: Ledger) -> None:
    rows = [(shard, ledger.counts(shard.number)) for shard in ledger.shards()]
    if arguments.json:
        sys.stdout.write(json.dumps(_as_dict(result, rows), indent=2) + "\n")
        return
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # without a terminal it is 80, which would cut ids
    console.print(_table(rows[-SHOWN_BATCHES:]))
    if len(rows) > SHOWN_BATCHES:
        console.print(f"and {len(rows) - SHOWN_BATCHES} earlier batches; --json shows all of them")
    open_batches = sum(shard.state not in ENDED for shard, _ in rows)
    if result is not None and (result.total_processed or result.retried or not open_batches):
        console.print(
            f"{_counted(result.total_processed)} ended: {result.succeeded} completed, {result.failed} failed, "
            f"{result.skipped} skipped. {result.retried} pending again."
        )
    if open_batches:
        console.print(f"Open batches: {open_batches}. Check them with cli.py openai-batch poll.")


def _table(rows: list[tuple[Shard, dict[ItemState, int]]]) -> Table:
    table = Table(title="Batches", title_justify="left", box=None)
    for heading in ("shard", "batch", "state", "at OpenAI", "lines", "results"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("shard", "lines") else "left")
    for shard, counts in rows:
        parts = [
            f"{count} {'open' if state is ItemState.SUBMITTED else state.value}"
            for state, count in counts.items()
            if count
        ]
        cells = (str(shard.number), shard.batch_id or "-", shard.state.value, shard.status or "-", str(shard.lines))
        table.add_row(*(Text(cell) for cell in (*cells, ", ".join(parts))))
    return table


def _as_dict(result: JobResult | None, rows: list[tuple[Shard, dict[ItemState, int]]]) -> dict[str, Any]:
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
    if result is None:
        return {"batches": batches}
    names = ("total_processed", "succeeded", "failed", "skipped", "retried")
    return {**{name: getattr(result, name) for name in names}, "batches": batches}
