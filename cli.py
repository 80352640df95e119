"""The command line: reads flags, runs a command, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    # Imported modules are never garbage: collections between imports take a sixth of the CPU of a start.
    gc.disable()  # until tune_garbage_collection

    from utils.interpreter import require_packages

    require_packages()

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from pydantic import SecretStr
from rich.console import Console

from batch_processor import BatchProcessor, Observers, built_in_classify, built_in_plan, find_model
from commands import flags, summary
from commands.subset_flags import subset_of
from config import Settings, load_taxonomy
from config.loading import changed_environment
from domain.text import counted
from error_handler import (
    ExitCode,
    LLMError,
    LLMUnavailableError,
    RunInterruptedError,
    StoreError,
    StoreUnavailableError,
)
from logger import configure_logging
from mongo_client import DocumentStore
from network.outgoing import origin
from storage.files import replace_file, require_replaceable
from storage.mongo_errors import translated
from utils.process import closest, exit_code_of, print_error, stop_on_signals, tell_line, tune_garbage_collection
from worker.checkpoint import RunStats
from worker.describe import require_sentence
from worker.intake import RunOptions
from worker.left_out import is_fruitless
from worker.metrics import serve_metrics
from worker.model_use import ModelUse
from worker.progress import ConsoleProgress, FileProgress, GroupLines, Reporter

EMBEDDED_DATA = Path(__file__).parent / "data" / "embedded"

# Modules of commands/. They are imported on demand: some need libraries that a run does not.
COMMANDS = (
    "doctor",
    "estimate",
    "plan",
    "quarantine",
    "evaluate",
    "report",
    "export",
    "review",
    "student",
    "prompt",
    "status",
    "openai-batch",
    "index",
)

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (None: of the process) and return its exit code.

    The only broad except: any error becomes one line on stderr.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    command = load_command(given[0]) if given and given[0] in COMMANDS else None
    shown = COMMANDS if {"-h", "--help"} & set(given) else ()
    parser = (
        flags.create_command_parser(command) if command else flags.create_parser(load_command(name) for name in shown)
    )
    if given and not command and not given[0].startswith("-"):
        why = "without a command, cli.py runs the worker."
        parser.error(f"unknown command {given[0]!r}; {why}{closest(given[0], COMMANDS)}".removesuffix("."))
    # Intermixed: flags may stand before, between and after the arguments of a command.
    arguments = parser.parse_intermixed_args(given[1:]) if command else parser.parse_args(given)
    tune_garbage_collection()

    def run() -> int:
        settings = flags.command_settings(arguments) if command else flags.settings_from(arguments)
        logs = arguments.verbose if command else flags.monitoring(arguments)[1]
        secrets = [settings.llm_api_key.get_secret_value()] if settings.llm_api_key else []
        configure_logging(settings.log_level if logs else "WARNING", secrets=secrets)
        return uvloop.run((command.run if command else _run)(arguments, settings))

    interrupted = "Interrupted." if command else "Interrupted; run the same command again to resume."
    try:
        return exit_code_of(run, parser.prog, verbose=arguments.verbose, interrupted=interrupted)
    except Exception as exc:
        first: BaseException = exc
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        sentence = f"Internal error ({type(first).__name__}); run again with --verbose and report the traceback."
        print_error(parser.prog, sentence, verbose=arguments.verbose)
        return ExitCode.CONFIGURATION


def load_command(name: str) -> flags.Command:
    """Return the command called *name*, one of COMMANDS."""
    command: flags.Command = importlib.import_module(f"commands.{name.replace('-', '_')}").COMMAND
    return command


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.output:
        require_replaceable(arguments.output, "--output")
    if arguments.only == "facts":
        return await _fill_facts(arguments, settings)
    if arguments.describe:
        require_sentence(load_taxonomy(settings.taxonomy_file))
    async with contextlib.AsyncExitStack() as stack:
        parts: dict[str, Any] = {}
        by_built_in = 0
        if arguments.embedded:
            settings, parts, by_built_in = await _embedded(stack, settings, with_student=arguments.embedded_student)
        options = RunOptions(
            settings.batch_size,
            arguments.limit,
            arguments.reprocess,
            arguments.retry_failed,
            only=arguments.only,
            dedupe=arguments.dedupe,
            subset=subset_of(arguments, settings),
        )
        after: RunOptions | None = None
        if by_built_in and not (options.only or options.reprocess or options.retry_failed):
            why = (
                "the model classifies" if "classify" not in parts else "with the fields of this taxonomy, it classifies"
            )
            sys.stderr.write(
                f"{counted(by_built_in, 'result')} of the built-in classifier: {why} these conversations again "
                "(--only new leaves them).\n"
            )
            options, after = replace(options, only="stale"), options
        elif settings.mode in ("continuous", "stream") and (options.reprocess or options.retry_failed):
            after = replace(options, reprocess=False, retry_failed=False)  # each pass would repeat all of them
        if settings.reply_style == "auto" and not parts and not arguments.dry_run:
            await _settle_style(settings, options)
        if arguments.dry_run:
            from commands.dry_run import dry_run  # noqa: PLC0415 - only for this flag

            return await dry_run(arguments, settings, options, parts.get("plan"))
        observers = _observers(arguments, settings, stack)
        if arguments.engine == "ray":
            return await _on_ray(arguments, settings, options, observers)
        processor = BatchProcessor(settings, options=options, observers=observers, **parts)
        connected = asyncio.Event()
        with stop_on_signals(processor.stop, connected.is_set):
            await stack.enter_async_context(processor)
            connected.set()
            passes = _stream if settings.mode == "stream" else _passes
            return await passes(arguments, settings, processor, after)


async def _on_ray(arguments: argparse.Namespace, settings: Settings, options: RunOptions, observers: Observers) -> int:
    """Run the workers on a Ray cluster, and report them as one run."""
    flags.require_packages("--engine ray", ["ray"], "pip install -r requirements-ray.txt")
    # Ray reads it when it is imported; with its default, a wrong address takes minutes.
    with changed_environment(RAY_NUM_REDIS_GET_RETRIES="1"):
        from cluster.engine import run_workers  # noqa: PLC0415 - only for --engine ray
    stats = await run_workers(settings, options, observers, arguments.workers, arguments.ray_address)
    await _report(arguments, settings, None, stats)
    for problem in stats["problems"]:
        tell_line(problem)
    if stats["exit_code"] == ExitCode.INTERRUPTED:
        raise RunInterruptedError("Stopped; run the same command again to resume.")
    return ExitCode.INCOMPLETE if is_fruitless(stats) and not stats["exit_code"] else ExitCode(stats["exit_code"])


async def _settle_style(settings: Settings, options: RunOptions) -> None:
    """Measure which style ``--reply auto`` stands for, unless it is known, or a run with *options* has nothing to do."""
    from commands.evaluate import INSTALL, NEEDED  # noqa: PLC0415

    flags.require_packages("--reply auto", NEEDED, INSTALL)
    from evaluation.style_choice import settle_style  # noqa: PLC0415 - only for --reply auto

    has_work = bool(options.only or options.reprocess or options.retry_failed)
    await settle_style(settings, tell_line, options.subset, has_work=has_work)


async def _embedded(
    stack: contextlib.AsyncExitStack, settings: Settings, *, with_student: bool
) -> tuple[Settings, dict[str, Any], int]:
    """Start the embedded MongoDB with the samples, and select a built-in classifier if no Ollama answers.

    *with_student* lets the trained student label before it. Also return how many results of built-in classifiers the model, or
    the fields of another taxonomy, replace.
    """
    from domain.conversation import BUILT_IN_MODELS  # noqa: PLC0415
    from embedded.choice import missing_packages, open_classifier  # noqa: PLC0415
    from embedded.replica_set import ReplicaSetMongod  # noqa: PLC0415
    from help_desks.reader import SAMPLES, read_documents  # noqa: PLC0415

    console = Console(stderr=True, soft_wrap=True)
    console.print("Starting the embedded MongoDB with its data under data/embedded/ ...")
    mongod = await asyncio.to_thread(stack.enter_context, ReplicaSetMongod(EMBEDDED_DATA / "db"))
    changes: dict[str, Any] = {"mongodb_uri": SecretStr(mongod.uri)}
    if "batch_files_dir" not in settings.model_fields_set:
        changes["batch_files_dir"] = EMBEDDED_DATA / "batch_files"
    settings = settings.model_copy(update=changes)
    model = await find_model(settings)
    taxonomy = load_taxonomy(settings.taxonomy_file)
    replaced: dict[str, Any] = {"processing_metadata.model_used": {"$in": BUILT_IN_MODELS}}
    if model is None:
        is_object = {"$eq": [{"$type": "$classification"}, "object"]}  # another program may have changed it
        keys = {"$map": {"input": {"$objectToArray": "$classification"}, "in": "$$this.k"}}
        replaced["$expr"] = {"$cond": [is_object, {"$not": {"$setEquals": [keys, list(taxonomy.keys)]}}, False]}
    store = DocumentStore(settings)
    try:
        await store.check()
        if not await store.upper_bound():
            added = await store.insert_documents(list(read_documents(SAMPLES)))
            console.print(f"Imported {added} sample conversations into {settings.source_collection}.")
        with translated("count the results"):
            by_built_in = await store.database[settings.results_collection].count_documents(replaced)
    finally:
        await store.close()
    if model is not None:
        server = "a model server" if settings.llm_api_url else "Ollama"
        console.print(f"Found {server} at {origin(settings.server_url)}; using {model}.")
        if with_student:
            console.print("--embedded-student has no effect beside a model; --student P lets the student answer first.")
        name = "llm_model" if settings.llm_api_url else "ollama_model"
        return settings.model_copy(update={name: model}), {}, by_built_in
    classifier = await asyncio.to_thread(open_classifier, taxonomy)
    if with_student:
        from student.choice import open_built_in  # noqa: PLC0415 - only for --embedded-student

        classifier = await asyncio.to_thread(open_built_in, settings.batch_files_dir, taxonomy, classifier)
    console.print(
        f"[yellow]No Ollama with a model that can chat found at {origin(settings.server_url)}; using the built-in classifier "
        f"{classifier.model}. Accuracy: docs/baseline.md.[/]"
    )
    if missing := missing_packages():
        console.print(f"Labels are better with requirements-embedding.txt installed (missing: {', '.join(missing)}).")
    plan = built_in_plan(taxonomy)
    return settings, {"classify": built_in_classify(classifier, plan), "plan": plan}, by_built_in


async def _stream(
    arguments: argparse.Namespace, settings: Settings, processor: BatchProcessor, after: RunOptions | None
) -> int:
    from commands.stream import follow  # noqa: PLC0415 - only for this mode

    report = partial(_report, arguments, settings, processor)
    return await follow(processor, report, after, float(arguments.poll_interval))


async def _passes(
    arguments: argparse.Namespace, settings: Settings, processor: BatchProcessor, after: RunOptions | None
) -> int:
    """Run once, or repeatedly as the mode says; a pass that fails because of an outage does not end the loop.

    *after* replaces the options once a pass has ended; documents that are pending then get a pass of their own, unless
    ``--limit`` is given.
    """
    options: RunOptions | None = None
    while True:
        try:
            stats = await processor.run(options)
            was_replaced, options, after = after is not None, after or options, None
            await _report(arguments, settings, processor, stats)
            undescribed = await _describe(arguments, processor, stats) if arguments.describe else 0
            if stats["interrupted"]:
                raise RunInterruptedError("Stopped; run the same command again to resume.")
            if was_replaced and arguments.limit is None and await processor.store.count("sweep"):
                continue
        except (LLMError, StoreError) as exc:
            if settings.mode == "batch" or not isinstance(exc, StoreUnavailableError | LLMUnavailableError):
                summary.tell_failed(settings.batch_files_dir)
                raise
            logger.warning("this pass failed; waiting for the next one: %s", exc)
        else:
            if settings.mode == "batch":
                has_failures = stats["failed"] or stats["in_retry_queue"] or stats["in_quarantine"] or undescribed
                return ExitCode.INCOMPLETE if has_failures or is_fruitless(stats) else ExitCode.DONE
        wait_s = float(arguments.poll_interval)
        if settings.mode == "scheduled":
            wait_s = flags.seconds_until_next(arguments.schedule, datetime.now().astimezone())
            logger.info("next run in %.0f s", wait_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(processor.stop.wait(), wait_s)
            raise RunInterruptedError("Stopped between two passes; no call was in flight.")


async def _describe(arguments: argparse.Namespace, processor: BatchProcessor, stats: dict[str, Any]) -> int:
    """Describe results after a run with *stats*, and add the counts to them; return how many failed."""
    if stats["interrupted"]:
        return 0
    counts = stats["descriptions"] = await processor.describe()
    stats["interrupted"] = counts["interrupted"]
    if arguments.output:
        replace_file(arguments.output, json.dumps(stats, indent=2).encode())
    reasons = "".join(f", {count} x {reason}" for reason, count in counts["reasons"].items())
    print(
        f"{counted(counts['described'], 'result')} described, {counts['failed']} failed{reasons}, {counts['left']} left "
        "(the conversation has changed or is gone)"
    )
    return int(counts["failed"])


async def _fill_facts(arguments: argparse.Namespace, settings: Settings) -> int:
    from worker.facts import fill_facts  # noqa: PLC0415 - only for --only facts

    store = DocumentStore(settings)
    try:
        await store.check()
        report = await fill_facts(store, settings, arguments.limit, tell_line, dry_run=arguments.dry_run)
    finally:
        await store.close()
    text = json.dumps(report, indent=2)
    if arguments.output:
        replace_file(arguments.output, text.encode())
    print(text)
    return ExitCode.DONE


async def _report(
    arguments: argparse.Namespace, settings: Settings, processor: BatchProcessor | None, stats: dict[str, Any]
) -> None:
    if arguments.output:
        replace_file(arguments.output, json.dumps(stats, indent=2).encode())
    # Labels are printed literally, and the emoji table is not loaded; without colours, nor are the patterns of numbers.
    console = Console(soft_wrap=True, emoji=False, highlight=sys.stdout.isatty())
    summary.print_run(console, stats, settings)
    if arguments.embedded and processor is not None:
        found = await processor.store.read_results([], 10_000)
        results = [one for one in found if isinstance(one.get("classification"), dict)]
        stored = RunStats()
        for result in results:
            stored.count_labels(result["classification"])
        summary.print_labels(console, stored.labels)
        summary.print_examples(console, results[:5])
        summary.print_next_steps(console, settings)
    else:
        summary.print_labels(console, stats["labels"])
        console.print(f"Results: collection {settings.results_collection} in database {settings.db_name}")


def _observers(arguments: argparse.Namespace, settings: Settings, stack: contextlib.AsyncExitStack) -> Observers:
    """Return the observers that *arguments* ask for; *stack* ends the HTTP server of the metrics."""
    console, _, files = flags.monitoring(arguments)
    model = ModelUse()
    reporters: list[Reporter] = []
    if console:
        reporters.append(GroupLines(sys.stderr) if settings.mode == "stream" else ConsoleProgress(sys.stderr, model))
    if files or settings.metrics_port is not None:
        progress = FileProgress(settings.batch_files_dir, model)
        reporters.append(progress)
        if settings.metrics_port is not None:
            served = serve_metrics(progress.metrics.registry, settings.metrics_address, settings.metrics_port)
            stack.enter_context(served)
    announce = partial(print, file=sys.stderr, flush=True) if console else None
    return Observers(reporters, announce=announce, model=model)


if __name__ == "__main__":
    sys.exit(main())
