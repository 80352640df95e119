"""``cli.py openai-batch run|submit|poll|status|cancel``: the flags. The openai package is loaded on use."""

from __future__ import annotations

import argparse
from pathlib import Path

from commands.flags import Command, dollars, positive
from config import Settings
from utils.process import number_between

ACTIONS = {
    "run": "send, wait and apply until nothing is pending; can be stopped and resumed",
    "submit": "send the pending documents, then exit",
    "poll": "check the batches once, apply the answers of those that have ended",
    "status": "show the state of each batch; no network calls",
    "cancel": "cancel the batches at OpenAI; answers that exist are billed, and applied by the next poll",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``openai-batch``."""
    parser.add_argument("action", choices=ACTIONS, help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()))
    parser.add_argument("--schema", type=Path, required=True, help="Python file that defines the job")
    parser.add_argument("--limit", type=positive, help="send at most this many documents")
    parser.add_argument("--dry-run", action="store_true", help="show the requests and their price; send nothing")
    parser.add_argument(
        "--max-cost", type=dollars, metavar="USD", help="send nothing if it may cost more than this, in US dollars"
    )
    parser.add_argument("--allow-external", action="store_true", help="allow sending customer text to OpenAI")
    parser.add_argument("--mask-pii", action="store_true", help="replace personal data by placeholders before sending")
    parser.add_argument(
        "--poll-interval",
        type=number_between(float, 0.001),
        metavar="S",
        help="seconds between two checks of the batches (POLL_INTERVAL)",
    )
    parser.add_argument("--state-dir", type=Path, help="folder of the ledger of this job (below --batch-files-dir)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run one action; see ``Command``."""
    from openai_batch import actions  # noqa: PLC0415 - slow to load, and the batch worker does not need it

    return await actions.run(arguments, settings)


COMMAND = Command(
    "openai-batch",
    "Send documents through prompt templates to the OpenAI Batch API and store the answers.",
    add_flags,
    run,
)
