"""The actions of ``cli.py openai-batch``: the steps of a document job, together or apart."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from config import Settings
from error_handler import ConfigurationError, ExitCode, RunInterruptedError
from openai_batch.job_preview import Preview, dollars, preview, require_affordable
from openai_batch.job_progress import JobProgress
from openai_batch.ledger import ItemState, Ledger, Shard, ShardState
from openai_batch.processor import DocumentBatchProcessor, JobResult, OpenJob
from openai_batch.schema_file import load_schema_file
from utils.process import stop_on_signals

STEP_PATIENCE_S = 60.0  # how long a single step waits for an OpenAI that is away; ``run`` waits OUTAGE_LIMIT_S
SENDING_FLAGS = ("limit", "dry_run", "max_cost")
NOT_SENT = (ShardState.PLANNED, ShardState.UPLOADED, ShardState.CREATING)
SHOWN_BATCHES = 50
TABLE_WIDTH = 120


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do one action; see ``Command``."""
    for name in SENDING_FLAGS:
        if arguments.action not in ("run", "submit") and getattr(arguments, name) not in (None, False):
            raise ConfigurationError(f"--{name.replace('_', '-')} goes with run and submit.")
    processor = _processor(arguments, settings)
    if arguments.action == "status":
        return _status(arguments, processor)
    stop, connected = asyncio.Event(), asyncio.Event()
    with stop_on_signals(stop, connected.is_set):
        if arguments.dry_run:
            return await _dry_run(arguments, processor)
        result = await _steps(arguments, processor, stop, connected)
    if stop.is_set():
        raise RunInterruptedError("Stopped; the batches go on at OpenAI, and the same command goes on here.")
    return ExitCode.INCOMPLETE if result.failed else ExitCode.DONE


def _processor(arguments: argparse.Namespace, settings: Settings) -> DocumentBatchProcessor:
    processor = DocumentBatchProcessor(
        settings=settings, schema_file=load_schema_file(arguments.schema), state_dir=arguments.state_dir
    )
    changes: dict[str, Any] = {}
    if arguments.allow_external:
        changes["allow_external"] = True
    if arguments.mask_pii:
        changes["mask_pii"] = True
    processor.config = processor.config.model_copy(update=changes)
    patience_s = settings.outage_limit_s
    if arguments.action != "run":
        patience_s = min(patience_s, STEP_PATIENCE_S)
    processor.times = replace(processor.times, unreachable_limit_s=patience_s)
    if arguments.poll_interval is not None:
        processor.times = replace(processor.times, poll_s=arguments.poll_interval)
    return processor


async def _steps(
    arguments: argparse.Namespace, processor: DocumentBatchProcessor, stop: asyncio.Event, connected: asyncio.Event
) -> JobResult:
    with JobProgress() as progress:
        processor.on_progress = progress
        async with processor.opened() as job:
            job.run.stop = stop
            await job.planner.recover()  # until MongoDB has answered there is nothing that a signal could interrupt
            connected.set()
            limit = await _affordable(arguments, processor, job)
            await ACTIONS[arguments.action](job, limit)
            result = processor.counted(job)
    with Ledger(processor.ledger_path) as ledger:
        _report(arguments, result, ledger)
    return result


async def _affordable(arguments: argparse.Namespace, processor: DocumentBatchProcessor, job: OpenJob) -> int | None:
    """Return how many documents may be taken; raise JobCostError where they may cost too much.

    Documents that come later, or that are tried again, were not in the sum: they are left for another start.
    """
    if arguments.max_cost is None:
        return arguments.limit  # type: ignore[no-any-return]
    waiting = _not_sent(job.ledger)
    made = await preview(processor.config, job.store, job.handling, job.run.on_progress, arguments.limit, waiting)
    require_affordable(made, arguments.max_cost, processor.config.openai.model)
    return made.documents


async def _run(job: OpenJob, limit: int | None) -> None:
    await job.run.run(job.files, limit)


async def _submit(job: OpenJob, limit: int | None) -> None:
    await job.planner.plan(job.run.stop, job.run.on_progress, limit)
    await job.run.patiently(lambda: job.run.send(job.files))


async def _poll(job: OpenJob, _limit: int | None) -> None:
    # Sends, too, what waited, or was asked for and not noted; a refusal there keeps no answer away.
    await job.run.patiently(lambda: job.run.round(job.files))


async def _cancel(job: OpenJob, _limit: int | None) -> None:
    await job.run.patiently(lambda: job.run.cancel(job.files))
    await job.run.patiently(lambda: job.run.poll(job.files))


ACTIONS = {"run": _run, "submit": _submit, "poll": _poll, "cancel": _cancel}


def _not_sent(ledger: Ledger) -> list[Shard]:
    return [shard for shard in ledger.open_shards() if shard.state in NOT_SENT]


async def _dry_run(arguments: argparse.Namespace, processor: DocumentBatchProcessor) -> int:
    waiting: list[Shard] = []
    if processor.ledger_path.exists():
        with Ledger(processor.ledger_path) as ledger:
            waiting = _not_sent(ledger)
    with JobProgress() as progress:
        async with processor.reading() as (store, handling):
            made = await preview(processor.config, store, handling, progress, arguments.limit, waiting)
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
        console.print(Text(f"Document {name} would be sent as", style="bold"))
        console.print(Text(json.dumps(body, indent=2, ensure_ascii=False)))
    config = processor.config
    price = "price unknown"
    if made.price is not None:
        rate = "half the usual price, as OpenAI asks for batches" if made.price.is_assumed else "the batch rate"
        price = f"at most {dollars(made.price.usd)} US dollars at {rate}"
    console.print(
        f"{made.documents + made.waiting} documents, {made.bytes:,} bytes, about {made.prompt_tokens:,} prompt tokens "
        f"and at most {made.most_reply_tokens:,} tokens of answers with {config.openai.model}: {price}."
    )
    if made.waiting:
        console.print(f"{made.waiting} of them lie in files of an earlier start that are not sent yet.")
    for name, problem in made.problems.items():
        console.print(Text(f"Document {name} would not be sent: {problem}"))
    if made.refused > len(made.problems):
        console.print(f"... and {made.refused - len(made.problems)} more")
    console.print(Text(f"They would go to {config.openai.base_url}. Nothing was sent."))


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
    console.width = max(console.width, TABLE_WIDTH)  # elsewhere than on a terminal it is 80, and ids would be cut
    console.print(_table(rows[-SHOWN_BATCHES:]))
    if len(rows) > SHOWN_BATCHES:
        console.print(f"and {len(rows) - SHOWN_BATCHES} earlier ones: --json shows all")
    open_batches = sum(shard.state not in (ShardState.APPLIED, ShardState.CLEANED) for shard, _ in rows)
    if result is not None and (result.total_processed or result.retried or not open_batches):
        console.print(
            f"{result.total_processed} documents ended: {result.succeeded} completed, {result.failed} failed, "
            f"{result.skipped} skipped; {result.retried} go back to be sent again."
        )
    if open_batches:
        console.print(f"Open batches: {open_batches}; cli.py openai-batch poll looks at them.")


def _table(rows: list[tuple[Shard, dict[ItemState, int]]]) -> Table:
    table = Table(title="Batches", title_justify="left", box=None)
    for heading in ("shard", "batch", "here", "at OpenAI", "lines", "of which"):
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
    return {
        "total_processed": result.total_processed,
        "succeeded": result.succeeded,
        "failed": result.failed,
        "skipped": result.skipped,
        "retried": result.retried,
        "batches": batches,
    }
