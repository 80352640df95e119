"""``python cli.py doctor``: is everything ready for a run, and what to do where it is not."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from rich.console import Console

from async_llm_wrapper import AsyncLLMClient
from commands.diagnosis.disk import diagnose_disk
from commands.diagnosis.findings import Finding, print_finding
from commands.diagnosis.model import Probing, diagnose_model
from commands.diagnosis.mongo import clock_check, diagnose
from commands.diagnosis.settings import diagnose_labels, diagnose_settings
from commands.flags import Command, add_model_flags, positive
from config import Settings, load_taxonomy
from error_handler import ExitCode, TriadError
from mongo_client import DocumentStore
from prompt_builder import PromptBuilder
from worker.plan import sample_needs

DEFAULT_MAX_PROBE = 8
SAMPLE_TIMEOUT_MS = 5000

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Area:
    """A part of the diagnosis; *title* heads its lines."""

    name: str
    title: str
    findings: AsyncGenerator[Finding]


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--no-probe", action="store_true", help="do not ask the model: no load, no test conversation, no slots"
    )
    parser.add_argument(
        "--max-probe",
        type=positive,
        default=DEFAULT_MAX_PROBE,
        metavar="N",
        help=f"most requests at once when the slots are looked for ({DEFAULT_MAX_PROBE})",
    )


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    talk, out = Console(stderr=True), Console()
    findings: list[Finding] = []
    title = ""
    with talk.status("Looking at MongoDB ...") as status:
        areas = _areas(arguments, settings, status.update)
        async with contextlib.aclosing(examine(areas, status.update)) as found:
            async for heading, finding in found:
                findings.append(finding)
                if arguments.json:
                    continue
                status.stop()  # both may be the same terminal
                if heading != title:
                    out.print(heading, style="bold", highlight=False)
                    title = heading
                print_finding(out, finding)
                status.start()
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    if arguments.json:
        listed = [asdict(finding) for finding in findings]
        sys.stdout.write(json.dumps({"errors": errors, "warnings": warnings, "findings": listed}, indent=2) + "\n")
    else:
        out.print(f"Errors: {errors}, warnings: {warnings}.", highlight=False)
    return ExitCode.UNREACHABLE if errors else ExitCode.DONE


def _areas(arguments: argparse.Namespace, settings: Settings, tell: Tell) -> list[Area]:
    once = settings.model_copy(update={"mongodb_max_retries": 1})
    probing = Probing(0 if arguments.no_probe else arguments.max_probe, tell)
    clock = clock_check(lambda: datetime.now(UTC))
    return [
        Area("mongodb", "MongoDB", diagnose(once, clock)),
        Area("model", "Model server", diagnose_model(settings, probing, lambda client: _sample(once, client))),
        Area("disk", "Disk and process", _in_turn(diagnose_disk(settings))),
        Area("labels", "Labels", _in_turn(diagnose_labels(settings))),
        Area("settings", "Settings", _in_turn(diagnose_settings(settings, given_flags(arguments, settings)))),
    ]


async def _sample(settings: Settings, client: AsyncLLMClient) -> list[int]:
    """Return what a run would learn about the documents of *settings*; the connection is open for that long."""
    prompts = PromptBuilder.from_taxonomy(load_taxonomy(settings.taxonomy_file))
    # One that is away was waited for before, at the length that was set.
    patience_ms = min(settings.mongodb_timeout_ms, SAMPLE_TIMEOUT_MS)
    store = DocumentStore(settings.model_copy(update={"mongodb_timeout_ms": patience_ms}))
    try:
        return await sample_needs(store, client.fitter(prompts).estimator)
    finally:
        await store.close()


async def examine(areas: Iterable[Area], tell: Tell) -> AsyncGenerator[tuple[str, Finding]]:
    """Yield (title, finding) of each area in turn; an area that fails ends with an error of its own."""
    for area in areas:
        tell(f"Looking at {area.title} ...")
        try:
            async with contextlib.aclosing(area.findings) as findings:
                async for finding in findings:
                    yield area.title, replace(finding, area=area.name)
        except (TriadError, OSError) as exc:
            sentence = str(exc) if isinstance(exc, TriadError) else f"{exc.filename}: {exc.strerror}."
            yield area.title, Finding("error", sentence, "Correct that; then look again.", area=area.name)


def given_flags(arguments: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Return the fields of Settings that flags gave, each with its flag."""
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
        await asyncio.sleep(0)  # a signal has its turn between two lines
        yield finding


COMMAND = Command(
    "doctor", "Say whether everything is ready for a run, and what to do where it is not.", _add_flags, _run
)
