"""A demonstration of the batch worker without servers: MongoDB in memory, and a model with scripted replies.

Everything between them is the real code: intake, batch files, aggregator, reply parser with its repair turn, retry
queue, quarantine, statuses and results.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: modules in this folder must not hide packages of the same name
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import asyncio
import json
import tempfile
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

from mongomock_motor import AsyncMongoMockClient

from batch_processor import BatchProcessor
from classifier import Classifier, classification_flow
from config import Settings, load_settings, load_taxonomy
from domain.conversation import Conversation, Outcome, stored_labels
from domain.text import one_line
from error_handler import ExitCode, LLMReplyError
from logger import configure_logging
from model_server.protocol import ChatReply, ChatTarget
from utils.process import Parser, exit_code_of
from worker.intake import Classify


class ScriptedClient:
    """The client for ``classification_flow``; the answers come from SCRIPT."""

    target = ChatTarget("ollama_chat", "", "", "scripted-demo", None, 8192, "0")


def _tweet(number: int, author: str, time: str, text: str) -> dict[str, Any]:
    created_at = f"Tue Mar 04 {time} +0000 2025"
    return {
        "tweet_id": number,
        "author_id": author,
        "inbound": author != "Lumo",
        "created_at": created_at,
        "text": text,
    }


def _conversation(number: int, **turns: Any) -> dict[str, Any]:
    return {"_id": f"demo-{number}", "conversation_number": str(number), **turns, "status": "pending"}


DOCUMENTS: list[dict[str, Any]] = [
    _conversation(
        1,
        tweets=[
            _tweet(11, "700", "09:12:00", "@Lumo my parcel says delivered, but nothing is here!!"),
            _tweet(12, "Lumo", "09:20:00", "@700 Sorry! Could you send us the tracking number?"),
            _tweet(13, "700", "09:21:00", "@Lumo third time I am sending it..."),
        ],
    ),
    _conversation(
        2,
        messages=[
            {"sender": "customer", "text": "Please send the money for the blue lamp back, it flickers."},
            {"sender": "agent", "text": "Of course, you will have it within five days."},
        ],
    ),
    _conversation(3, messages=[{"sender": "customer", "text": "Your app is lovely, well done."}]),
    _conversation(4, messages=[{"sender": "agent", "text": "Dear customer, our shop is closed on Monday."}]),
    {
        "_id": "demo-5",
        "text": "How do I get a spare card?",
        "metadata": {"source": "chat", "timestamp": "2025-03-04T10:00:00Z"},
        "processed": False,
        "processing_attempts": 0,
    },
]


def _reply(*values: str) -> str:
    return json.dumps(dict(zip(load_taxonomy().keys, values, strict=True)))


_LATE = _reply("Parcel marked delivered is missing.", "Order Status", "Shipping/Delivery", "Negative")

# The replies of the model by the first words of the customer, in order; the last one repeats.
SCRIPT = {
    "@Lumo my parcel": [f"Here you are:\n```json\n{_LATE}\n```"],
    "Please send": [
        _reply("Customer wants a refund.", "Wants Money", "Returns/Refunds", "Neutral"),
        _reply("Customer wants a refund for a flickering lamp.", "refund request", "Returns/Refunds", "Negative"),
    ],
    "Your app": ["I am happy to help with anything else."],
    "How do I": [_reply("Customer asks how to get a spare card.", "Information Request", "Banking/Cards", "Neutral")],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration (*argv* None: flags of the process) and return its exit code."""
    parser = Parser(
        prog="demo_batch_processor.py",
        description="Show the batch worker on five conversations, without MongoDB and without a model.",
        allow_abbrev=False,
    )
    parser.add_argument("--verbose", action="store_true", help="show the log lines of the worker")
    arguments = parser.parse_args(argv)
    configure_logging("DEBUG" if arguments.verbose else "ERROR")

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="triad-demo-") as folder:
            settings = load_settings(dotenv=None, batch_files_dir=Path(folder) / "batch_files", max_concurrent=2)
            asyncio.run(_demonstrate(settings))
        return ExitCode.DONE

    return exit_code_of(run, "demo_batch_processor.py", verbose=arguments.verbose)


async def _demonstrate(settings: Settings) -> None:
    client: Any = AsyncMongoMockClient()
    database = client[settings.db_name]
    source, results = database[settings.source_collection], database[settings.results_collection]

    _step(1, f"{len(DOCUMENTS)} documents go into the collection {settings.source_collection} of a MongoDB in memory")
    await source.insert_many(DOCUMENTS)
    for document in DOCUMENTS:
        turns = document.get("tweets") or document.get("messages") or [document]
        print(f"   {document['_id']}  {one_line(turns[0]['text'], 60)}")

    _step(2, "The worker runs; whenever the model is asked, its scripted answer is shown")
    async with BatchProcessor(settings, client=client, classify=scripted_model()) as processor:
        stats = await processor.run()
        shown = ("documents_processed", "successful", "failed", "skipped", "retried", "in_retry_queue", "in_quarantine")
        print("   run: " + ", ".join(f"{name} {stats[name]}" for name in shown))

        _step(3, f"The results are in the collection {settings.results_collection}")
        async for result in results.find():
            labels, asked = result["classification"], result["processing_metadata"]["attempts"]
            triad = " | ".join(label for found in stored_labels(labels).values() for label in found)
            print(f"   {result['source_conversation_id']}  {triad}")
            print(f"           {labels['categorization']} (model asked {asked}x)")

        _step(4, "The source documents with their final status")
        async for document in source.find():
            status = document.get("status") or f"processed: {document['processed']}"
            reason = document.get("status_reason")
            print(f"   {document['_id']}  {status}{f' ({reason})' if reason else ''}")

        _step(5, "The batch files: finished batches keep ids and counts, quarantine keeps what failed for good")
        for path in sorted(settings.batch_files_dir.glob("*/*.json")):
            print(f"   {path.relative_to(settings.batch_files_dir)}")

        _step(6, "The same run again finds nothing left to do")
        again = await processor.run()
        stored = await results.count_documents({})
        print(f"   run: documents_processed {again['documents_processed']}, results {stored}")
    print("\nThe same with a real MongoDB and Ollama: python utils/mongodb_import.py && python cli.py --model NAME")


def scripted_model() -> Classify:
    """Return a model that answers by SCRIPT and prints what happens, in the form that BatchProcessor takes."""
    classifier = Classifier(load_taxonomy())

    async def classify(conversation: Conversation, rounds: int) -> Outcome:
        await asyncio.sleep(0)
        start = next(words for words in SCRIPT if conversation.customer_texts[0].startswith(words))
        flow = classification_flow(conversation, ScriptedClient(), classifier)
        next(flow)
        try:
            for reply in chain(SCRIPT[start], repeat(SCRIPT[start][-1])):
                print(f'   "{start} ...", round {rounds + 1}: model answers {one_line(reply, 60)}')
                flow.send(ChatReply(reply, None, None))
                print("      not usable: asked again, with the reason")
        except StopIteration as finished:
            outcome: Outcome = finished.value
            print(f"      accepted as {outcome.classification.intent}")
            return outcome
        except LLMReplyError as problem:
            print(f"      not usable again ({problem}): this round failed")
            raise
        raise AssertionError("the flow returns or raises")

    return classify


def _step(number: int, sentence: str) -> None:
    print(f"\n{number}. {sentence}:")


if __name__ == "__main__":
    sys.exit(main())
