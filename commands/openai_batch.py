"""``cli.py openai-batch run|submit|poll|status|cancel``: the flags. The openai package is loaded when one of them is used."""

from __future__ import annotations

import argparse
from pathlib import Path

from commands.flags import Command, dollars, positive
from config import Settings

ACTIONS = {
    "run": "send, wait and apply until nothing is pending; can be stopped and started again",
    "submit": "send what is pending and end",
    "poll": "look at the batches once, apply what has ended",
    "status": "say how far each batch is; asks nobody",
    "cancel": "end the batches at OpenAI; what ran by then is billed and applied by the next poll",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``openai-batch``."""
    parser.add_argument("action", choices=ACTIONS, help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()))
    parser.add_argument("--schema", type=Path, required=True, help="Python file with the parts of the job")
    parser.add_argument("--limit", type=positive, help="take at most this many documents")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent and its price; send nothing")
    parser.add_argument("--max-cost", type=dollars, metavar="USD", help="send nothing that may cost more, US dollars")
    parser.add_argument("--allow-external", action="store_true", help="customer text may be sent to OpenAI")
    parser.add_argument("--mask-pii", action="store_true", help="replace personal data by placeholders before sending")
    parser.add_argument("--poll-interval", type=_seconds, metavar="S", help="seconds between two looks (POLL_INTERVAL)")
    parser.add_argument("--state-dir", type=Path, help="where the ledger of this job is (under --batch-files-dir)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do one action; see ``Command``."""
    from openai_batch import actions  # noqa: PLC0415 - a run of the batch worker must not wait for it

    return await actions.run(arguments, settings)


def _seconds(text: str) -> float:
    value = dollars(text)
    if not value:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


COMMAND = Command(
    "openai-batch",
    "Send documents through prompt templates to the OpenAI Batch API, and the answers back.",
    add_flags,
    run,
)
