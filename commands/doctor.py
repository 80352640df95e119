"""``cli.py doctor``: check MongoDB, the model server, the disk and the settings."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import asdict, replace
from functools import partial

from rich.console import Console

from commands.diagnosis.disk import diagnose_disk
from commands.diagnosis.findings import Finding, count_levels, error, exit_code, print_finding, print_totals
from commands.diagnosis.model import diagnose_model
from commands.diagnosis.mongo import diagnose
from commands.diagnosis.servers import diagnose_servers
from commands.diagnosis.settings import diagnose_labels, diagnose_settings
from commands.flags import Command, add_model_flags, positive
from commands.subset_flags import add_subset_flags, subset_of
from config import Settings, load_prompt_taxonomy
from error_handler import TriadError
from model_server.tokens import TokenEstimator
from mongo_client import DocumentStore
from network.outgoing import origin
from prompt_builder import build_system_prompt
from worker.plan import sample_needs

SAMPLE_TIMEOUT_MS = 5000


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_subset_flags(parser.add_argument_group("subset"))
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--no-probe", action="store_true", help="send the model no requests: no load, no test conversation, no slots"
    )
    parser.add_argument(
        "--max-probe",
        type=positive,
        default=8,
        metavar="N",
        help="maximum concurrent requests when probing for slots (8)",
    )


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    talk, out = Console(stderr=True), Console()
    found: list[Finding] = []
    with talk.status("Starting ...") as status:
        for area, title, checks in _areas(arguments, settings, status.update):
            status.update(f"Checking {title} ...")
            heading = title
            async with contextlib.aclosing(_guarded(checks)) as findings:
                async for finding in findings:
                    found.append(replace(finding, area=area))
                    if arguments.json:
                        continue
                    status.stop()  # both may be the same terminal
                    if heading:
                        out.print(heading, style="bold", highlight=False)
                        heading = ""
                    print_finding(out, finding)
                    status.start()
    if arguments.json:
        report = {**count_levels(found), "findings": [asdict(finding) for finding in found]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_totals(out, found)
    return exit_code(found)


def _areas(
    arguments: argparse.Namespace, settings: Settings, tell: Callable[[str], None]
) -> list[tuple[str, str, AsyncGenerator[Finding]]]:
    """Return name, title and checks of each area; *tell* gets the progress."""
    once = settings.model_copy(update={"mongodb_max_retries": 1})
    at_most = 0 if arguments.no_probe else arguments.max_probe
    each = settings.for_each_server()
    titles = ["Model server"] if len(each) == 1 else [f"Model server {origin(one.server_url)}" for one in each]
    return [
        ("mongodb", "MongoDB", diagnose(once, tell=tell, subset=subset_of(arguments, settings))),
        *(
            ("model", title, diagnose_model(one, partial(_sample, once), at_most, tell))
            for title, one in zip(titles, each, strict=True)
        ),
        *([("servers", "All model servers", diagnose_servers(settings))] if len(each) > 1 else []),
        ("disk", "Disk and process", _in_turn(diagnose_disk(settings))),
        ("labels", "Labels", _in_turn(diagnose_labels(settings))),
        ("settings", "Settings", _in_turn(diagnose_settings(settings, _given_flags(arguments, settings)))),
    ]


async def _sample(settings: Settings) -> list[int]:
    """Return the token counts of the documents that a run would sample to choose its window."""
    estimator = TokenEstimator(build_system_prompt(load_prompt_taxonomy(settings)))
    # The diagnosis of MongoDB has already waited for the full timeout.
    timeout_ms = min(settings.mongodb_timeout_ms, SAMPLE_TIMEOUT_MS)
    store = DocumentStore(settings.model_copy(update={"mongodb_timeout_ms": timeout_ms}))
    try:
        return await sample_needs(store, estimator)
    finally:
        await store.close()


async def _guarded(checks: AsyncGenerator[Finding]) -> AsyncGenerator[Finding]:
    """Yield the findings of *checks*; if they fail, the last finding is that error."""
    try:
        async with contextlib.aclosing(checks):
            async for finding in checks:
                yield finding
    except (TriadError, OSError) as exc:
        sentence = str(exc) if isinstance(exc, TriadError) else f"{exc.filename}: {exc.strerror}."
        yield error(sentence, "Fix this, then run the diagnosis again.")


def _given_flags(arguments: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Return the fields of Settings that were set by flags, each with its flag."""
    given = {
        field: f"--{field.replace('_', '-')}"
        for field in type(settings).model_fields
        if getattr(arguments, field, None) is not None
    }
    if arguments.model is not None:
        given["llm_model" if settings.llm_api_url else "ollama_model"] = "--model"
    if arguments.verbose:
        given["log_level"] = "--verbose"
    return given


async def _in_turn(findings: Iterable[Finding]) -> AsyncGenerator[Finding]:
    for finding in findings:
        await asyncio.sleep(0)  # so that Ctrl-C is handled between two findings
        yield finding


COMMAND = Command(
    "doctor", "Check MongoDB, the model server, disk and settings, and show how to fix problems.", _add_flags, _run
)
