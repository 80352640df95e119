"""Measure the built-in baseline on labelled conversations: ``python -m benchmarks.baseline_accuracy DIR``.

DIR holds JSONL files with a ``gold`` field and ``label_map.json`` (docs/baseline.md names their origin);
``--samples`` measures on the sample conversations of this repository instead of, or beside, DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from aggregator import aggregate_conversation
from config.taxonomy import load_taxonomy
from domain.conversation import Conversation
from embedded.baseline import BASELINE_MODEL, BaselineClassifier
from error_handler import SkippedDocumentError
from storage.extended_json import loads

FIELDS = ("intent", "topic", "sentiment")

# Phrases, thresholds and weights were tuned on the even lines (from 0) of these files only.
TUNED_ON_EVEN_LINES = ("airline", "bitext", "multidogo", "star", "twacs", "xlmt")
NEVER_SEEN = ("cfpb", "queries_c")

INTENTS = {
    "complaint": "Complaint",
    "technical_problem": "Technical Support",
    "information_request": "Information Request",
    "status_check": "Order Status",
    "refund_return": "Refund Request",
    "billing_dispute": "Billing Dispute",
    "change_update": "Change Request",
    "cancellation": "Cancellation",
    "purchase_booking": "Purchase/Booking",
    "account_access": "Account Access",
    "payment_transfer": "Payment/Transfer",
    "security_fraud_loss": "Security/Fraud/Loss",
    "contact_agent": "Information Request",
    "feedback_praise": "Feedback/Praise",
    "other": "Other",
}
TOPICS = {
    "billing_payments": "Account/Billing",
    "account_access": "Account Access",
    "order_delivery": "Shipping/Delivery",
    "returns_refunds": "Returns/Refunds",
    "product_info": "Product Information",
    "technical_issue": "Technical Issue",
    "travel_operations": "Travel Operations",
    "travel_booking": "Travel Booking",
    "baggage_lost_property": "Baggage/Lost Property",
    "banking_cards": "Banking/Cards",
    "insurance_loans_credit": "Insurance/Loans/Credit",
    "subscription_plan": "Subscription/Plan",
    "staff_service_quality": "Service Quality",
    "general_other": "Other",
}
OURS = {"intent": INTENTS, "topic": TOPICS, "sentiment": {s.lower(): s for s in ("Positive", "Neutral", "Negative")}}

# Sources with different names in the files and the map.
SOURCE_IN_MAP = {"nlu_eval_corpora": "nlu_eval", "dstc11_track2": "dstc11", "twcs_ericsson": "ericsson"}

Key = tuple[str, str, str]  # file, field, part
Answer = tuple[str | None, str]  # gold (None: no matching label), answer


@dataclass(frozen=True)
class Example:
    """One labelled conversation; *gold* has no entry for an unlabelled field, and None if no label of the taxonomy matches."""

    conversation: Conversation
    part: str
    gold: dict[str, str | None]


def read_jsonl(path: Path) -> list[Any]:
    """Return the documents of *path*, one line of Extended JSON each."""
    return [loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def directory_examples(directory: Path) -> Iterator[tuple[str, Example]]:
    """Yield the labelled conversations in *directory* with the name of their file, without duplicates."""
    label_map = json.loads((directory / "label_map.json").read_text(encoding="utf-8"))["map"]
    seen: set[str] = set()
    for name in TUNED_ON_EVEN_LINES + NEVER_SEEN:
        path = directory / f"{name}.public.jsonl"
        if not path.exists():
            print(f"{path.name} is missing and was skipped", file=sys.stderr)
            continue
        documents = read_jsonl(path)
        apart = directory / f"{name}.public.gold.jsonl"
        records = {record["_id"]: record for record in read_jsonl(apart)} if apart.exists() else {}
        for line, document in enumerate(documents):
            record = records.get(document["_id"]) if records else document
            if record is None or record["conversation_number"] in seen:
                continue
            seen.add(record["conversation_number"])
            language = _language(record)
            part = "not seen" if name in NEVER_SEEN or language else ("held out" if line % 2 else "tuned")
            if (conversation := _aggregated(document)) is not None:
                yield name + language, Example(conversation, part, gold_labels(record, label_map))


def sample_examples(directory: Path) -> Iterator[tuple[str, Example]]:
    """Yield the sample conversations of this repository with their expected labels."""
    expected = {repr(row["_id"]): row for row in read_jsonl(directory / "sample_expected.jsonl")}
    for document in read_jsonl(directory / "sample_conversations.jsonl"):
        row = expected[repr(document["_id"])]
        english = str(row.get("language", "en")).startswith("en")
        if (conversation := _aggregated(document)) is not None:
            yield "samples" + ("" if english else " (not English)"), Example(conversation, "not seen", row["expected"])


def gold_labels(record: dict[str, Any], label_map: dict[str, Any]) -> dict[str, str | None]:
    """Map the labels of *record* to the taxonomy; several of its fields may give the intent and the topic."""
    gold = record["gold"]
    tables = label_map.get(SOURCE_IN_MAP.get(record["source"], record["source"]), {})
    mapped: dict[str, str] = {}
    for field, table in tables.items():
        if field.startswith("intents "):  # several per text; the order of the map decides
            entry: dict[str, str | None] = next((table[name] for name in table if name in gold.get("intents", [])), {})
        else:
            entry = table.get(gold.get(field)) or {}
        mapped.update({key: label for key, label in entry.items() if label is not None and key in OURS})
    if "sentiment" in gold:
        mapped["sentiment"] = gold["sentiment"]
    fields = {field for field in FIELDS if field in mapped or field in gold}
    return {field: OURS[field].get(mapped.get(field, "")) for field in fields}


def _aggregated(document: dict[str, Any]) -> Conversation | None:
    try:
        return aggregate_conversation(document)
    except SkippedDocumentError:
        return None


def _language(record: dict[str, Any]) -> str:
    language = record.get("meta", {}).get("lang", "german" if record["source"].startswith("germeval") else "english")
    return "" if language == "english" else " (not English)"


def macro_f1(pairs: list[tuple[str, str]]) -> float:
    """Return the mean F1 over the gold labels of *pairs* (gold, answer)."""
    golds = Counter(gold for gold, _ in pairs)
    answers = Counter(answer for _, answer in pairs)
    hits = Counter(gold for gold, answer in pairs if gold == answer)
    return sum(2 * hits[label] / (golds[label] + answers[label]) for label in golds) / len(golds)


def add_vader_alone(examples: list[tuple[str, Example]], results: defaultdict[Key, list[Answer]]) -> None:
    """Add the answers of VADER as published: all customer turns as one text, thresholds of 0.05, its own lexicon."""
    vader = SentimentIntensityAnalyzer()
    for name, example in examples:
        if "sentiment" in example.gold:
            compound = vader.polarity_scores("\n".join(example.conversation.customer_texts))["compound"]
            answer = "Positive" if compound >= 0.05 else "Negative" if compound <= -0.05 else "Neutral"
            results[name, "sentiment, VADER as published", example.part].append((example.gold["sentiment"], answer))


def print_table(results: dict[Key, list[Answer]]) -> None:
    """Print one line per file, field and part; *results* has their (gold or None, answer) pairs."""
    print("| file | field | part | n | left out | accuracy | majority class | macro-F1 |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for (name, field, part), answers in sorted(results.items(), key=lambda item: item[0]):
        pairs = [(gold, answer) for gold, answer in answers if gold is not None]
        if not pairs:
            continue
        accuracy = sum(gold == answer for gold, answer in pairs) / len(pairs)
        majority = Counter(gold for gold, _ in pairs).most_common(1)[0][1] / len(pairs)
        scores = f"{accuracy:.3f} | {majority:.3f} | {macro_f1(pairs):.3f}"
        print(f"| {name} | {field} | {part} | {len(pairs)} | {len(answers) - len(pairs)} | {scores} |")


def print_confusion(results: dict[Key, list[Answer]]) -> None:
    """Print the confusion matrix of the sentiment."""
    labels = list(OURS["sentiment"].values())
    print(f"\n| file | part | gold | {' | '.join(f'answered {label}' for label in labels)} |")
    print("|---|---|---|" + "---:|" * len(labels))
    for (name, field, part), answers in sorted(results.items(), key=lambda item: item[0]):
        if field != "sentiment":
            continue
        counts = Counter(answers)
        for gold in labels:
            print(f"| {name} | {part} | {gold} | {' | '.join(str(counts[gold, label]) for label in labels)} |")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return 0, or 2 if there are no files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline_accuracy", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="directory with the labelled files")
    parser.add_argument("--samples", action="store_true", help="measure on data/sample_conversations.jsonl")
    options = parser.parse_args(arguments)
    if options.directory is None and not options.samples:
        parser.error("name a directory with labelled files, or give --samples")
    try:
        examples = list(directory_examples(options.directory)) if options.directory else []
        if options.samples:
            examples += sample_examples(Path(__file__).parents[1] / "data")
    except OSError as exc:
        print(f"Cannot read {exc.filename} ({exc.strerror}); docs/baseline.md lists the files.", file=sys.stderr)
        return 2
    classifier = BaselineClassifier(load_taxonomy())
    results: defaultdict[Key, list[Answer]] = defaultdict(list)
    start = time.perf_counter()
    for name, example in examples:
        answer = classifier.classify(example.conversation).as_dict()
        for field in FIELDS:
            if field in example.gold:
                results[name, field, example.part].append((example.gold[field], answer[field]))
    duration_ms = (time.perf_counter() - start) * 1000 / max(len(examples), 1)
    add_vader_alone(examples, results)
    print_table(results)
    print_confusion(results)
    print(f"\n{BASELINE_MODEL}: {len(examples)} conversations, {duration_ms:.2f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
