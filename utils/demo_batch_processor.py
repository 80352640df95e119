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

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from mongomock_motor import AsyncMongoMockClient

from batch_processor import BatchProcessor
from classifier import ReplyParser, classification_flow
from config import Settings, load_settings, load_taxonomy
from domain.conversation import Conversation, Outcome
from domain.text import one_line
from error_handler import ExitCode, LLMReplyError
from logger import configure_logging
from model_server.protocol import ChatReply, ChatTarget
from model_server.truncation import TranscriptTruncator
from prompt_builder import PromptBuilder
from utils.process import exit_code_of
from worker.intake import Classify


class ScriptedClient:
    """The client for ``classification_flow``; the answers come from SCRIPT."""

    target = ChatTarget("ollama_chat", "", "", "scripted-demo", None, 8192, "0")

    def truncator(self, prompts: PromptBuilder) -> TranscriptTruncator:
        """Return a new truncator; the conversations of the demo are short."""
        return TranscriptTruncator(prompts.system_prompt)


DOCUMENTS: list[dict[str, Any]] = [
    {
        "_id": "demo-1",
        "conversation_number": "1",
        "tweets": [
            {
                "tweet_id": 11,
                "author_id": "700",
                "inbound": True,
                "created_at": "Tue Mar 04 09:12:00 +0000 2025",
                "text": "@Lumo my parcel says delivered, but nothing is here!!",
            },
            {
                "tweet_id": 12,
                "author_id": "Lumo",
                "inbound": False,
                "created_at": "Tue Mar 04 09:20:00 +0000 2025",
                "text": "@700 Sorry! Could you send us the tracking number?",
            },
            {
                "tweet_id": 13,
                "author_id": "700",
                "inbound": True,
                "created_at": "Tue Mar 04 09:21:00 +0000 2025",
                "text": "@Lumo third time I am sending it...",
            },
        ],
        "status": "pending",
    },
    {
        "_id": "demo-2",
        "conversation_number": "2",
        "messages": [
            {"sender": "customer", "text": "Please send the money for the blue lamp back, it flickers."},
            {"sender": "agent", "text": "Of course, you will have it within five days."},
        ],
        "status": "pending",
    },
    {
        "_id": "demo-3",
        "conversation_number": "3",
        "messages": [{"sender": "customer", "text": "Your app is lovely, well done."}],
        "status": "pending",
    },
    {
        "_id": "demo-4",
        "conversation_number": "4",
        "messages": [{"sender": "agent", "text": "Dear customer, our shop is closed on Monday."}],
        "status": "pending",
    },
    {
        "_id": "demo-5",
        "text": "How do I get a spare card?",
        "metadata": {"source": "chat", "timestamp": "2025-03-04T10:00:00Z"},
        "processed": False,
        "processing_attempts": 0,
    },
]


def _reply(categorization: str, intent: str, topic: str, sentiment: str) -> str:
    return json.dumps({"categorization": categorization, "intent": intent, "topic": topic, "sentiment": sentiment})


_LATE = _reply("Parcel marked delivered is missing.", "Order Status", "Shipping/Delivery", "Negative")
_WRONG = _reply("Customer wants a refund.", "Wants Money", "Returns/Refunds", "Neutral")
_REFUND = _reply("Customer wants a refund for a flickering lamp.", "refund request", "Returns/Refunds", "Negative")
_CARD = _reply("Customer asks how to get a spare card.", "Information Request", "Banking/Cards", "Neutral")

# The replies of the model by the first words of the customer, in order; the last one repeats.
SCRIPT = {
    "@Lumo my parcel": [f"Here you are:\n```json\n{_LATE}\n```"],
    "Please send": [_WRONG, _REFUND],
    "Your app": ["I am happy to help with anything else."],
    "How do I": [_CARD],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration (*argv* None: flags of the process) and return its exit code."""
    arguments = _create_parser().parse_args(argv)
    configure_logging("DEBUG" if arguments.verbose else "ERROR")

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="triad-demo-") as folder:
            settings = load_settings(dotenv=None, batch_files_dir=Path(folder) / "batch_files", max_concurrent=2)
            asyncio.run(_demonstrate(settings))
        return ExitCode.DONE

    return exit_code_of(run, "demo_batch_processor.py", verbose=arguments.verbose)


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo_batch_processor.py",
        description="Show the batch worker on five conversations, without MongoDB and without a model.",
        allow_abbrev=False,
    )
    parser.add_argument("--verbose", action="store_true", help="show the log lines of the worker")
    return parser


async def _demonstrate(settings: Settings) -> None:
    client: Any = AsyncMongoMockClient()
    database = client[settings.db_name]
    source, results = database[settings.source_collection], database[settings.results_collection]

    _step(1, f"{len(DOCUMENTS)} documents go into the collection {settings.source_collection} of a MongoDB in memory")
    await source.insert_many(DOCUMENTS)
    async for document in source.find():
        print(f"   {document['_id']}  {_first_words(document)}")

    _step(2, "The worker runs; whenever the model is asked, its scripted answer is shown")
    async with BatchProcessor(settings, client=client, classify=scripted_model()) as processor:
        stats = await processor.run()
        shown = ("documents_processed", "successful", "failed", "skipped", "retried", "in_retry_queue", "in_quarantine")
        print("   run: " + ", ".join(f"{name} {stats[name]}" for name in shown))

        _step(3, f"The results are in the collection {settings.results_collection}")
        async for result in results.find():
            labels, asked = result["classification"], result["processing_metadata"]["attempts"]
            print(
                f"   {result['source_conversation_id']}  {labels['intent']} | {labels['topic']} | {labels['sentiment']}"
            )
            print(f"           {labels['categorization']} (model asked {asked}x)")

        _step(4, "The source documents with their final status")
        async for document in source.find():
            status = document.get("status") or f"processed: {document['processed']}"
            reason = document.get("status_reason")
            print(f"   {document['_id']}  {status}{f' ({reason})' if reason else ''}")

        _step(5, "The batch files: finished batches keep ids and counts, quarantine keeps what failed for good")
        for path in _files(settings.batch_files_dir):
            print(f"   {path.relative_to(settings.batch_files_dir)}")

        _step(6, "The same run again finds nothing left to do")
        again = await processor.run()
        print(
            f"   run: documents_processed {again['documents_processed']}, results {await results.count_documents({})}"
        )
    print("\nThe same with a real MongoDB and Ollama: python utils/mongodb_import.py && python cli.py --model NAME")


def scripted_model() -> Classify:
    """Return a model that answers by SCRIPT and prints what happens, in the form that BatchProcessor takes."""
    taxonomy = load_taxonomy()
    prompts, parser = PromptBuilder.from_taxonomy(taxonomy), ReplyParser(taxonomy)

    async def classify(conversation: Conversation, rounds: int) -> Outcome:
        await asyncio.sleep(0)
        start = next(words for words in SCRIPT if conversation.customer_texts[0].startswith(words))
        flow = classification_flow(conversation, ScriptedClient(), prompts, parser)
        next(flow)
        try:
            for reply in _endless(SCRIPT[start]):
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


def _endless(replies: list[str]) -> Iterator[str]:
    yield from replies
    while True:
        yield replies[-1]


def _step(number: int, sentence: str) -> None:
    print(f"\n{number}. {sentence}:")


def _first_words(document: dict[str, Any]) -> str:
    turns = document.get("tweets") or document.get("messages") or [document]
    return one_line(turns[0]["text"], 60)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if path.parent != folder)


if __name__ == "__main__":
    sys.exit(main())
