"""Measure the built-in classifiers on labelled conversations: ``python -m benchmarks.baseline_accuracy DIR``.

DIR holds JSONL files with a ``gold`` field and ``label_map.json`` (docs/baseline.md names their origin);
``--samples`` measures on the sample conversations of this repository instead of, or beside, DIR.
"""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator import aggregate_conversation
from config.taxonomy import load_taxonomy
from domain.conversation import BASELINE_MODEL, Conversation
from embedded.baseline import Answer, BaselineClassifier
from embedded.choice import BuiltInClassifier, missing_packages, open_classifier
from error_handler import SkippedDocumentError
from storage.extended_json import loads

FIELDS = ("intent", "topic", "sentiment")

# Phrases were tuned, and variants of the embedding classifier chosen, on even lines (from 0) only. The phrases were not
# tuned on any line of FREE_OF_TUNING.
TUNED_ON_EVEN_LINES = ("airline", "bitext", "multidogo", "star", "twacs", "xlmt")
FREE_OF_TUNING = ("cfpb", "queries_c")

# Sources whose licence permits weights under another one. The embedding classifier is fitted on their odd lines, and on
# all lines of FREE_OF_TUNING.
FITTED = ("banking77", "cfpb", "dstc11_track2", "multidogo", "nlupp", "star")

# Real threads without labels, to see how often the answer is Other.
UNLABELLED = ("twcs_conversations", "ibm_conversations_a")

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

TOGETHER = 16  # conversations labelled at once

BANDS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the reliability table


@dataclass(frozen=True)
class Example:
    """One labelled conversation; *gold* has no entry for an unlabelled field, and None if no label of the taxonomy matches.

    *part* is "development" (used for choices), "fitted" (weights were fitted on it) or "test".
    """

    conversation: Conversation
    part: str
    gold: dict[str, str | None]
    source: str = ""  # of the text; a file may have several


def read_jsonl(path: Path) -> list[Any]:
    """Return the documents of *path*, one line of Extended JSON each."""
    return [loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of *path* that can be read."""
    return [each for document in read_jsonl(path) if (each := _aggregated(document)) is not None]


def directory_examples(directory: Path) -> Iterator[tuple[str, Example]]:
    """Yield the labelled conversations in *directory* with the name of their file, without duplicates."""
    label_map = json.loads((directory / "label_map.json").read_text(encoding="utf-8"))["map"]
    seen: set[str] = set()
    for name in TUNED_ON_EVEN_LINES + FREE_OF_TUNING:
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
            part = "test" if line % 2 else "development"
            if record["source"] in FITTED and (line % 2 or name in FREE_OF_TUNING):
                part = "fitted"
            if (conversation := _aggregated(document)) is not None:
                gold = gold_labels(record, label_map)
                yield name + language, Example(conversation, part, gold, record["source"])


def sample_examples(directory: Path) -> Iterator[tuple[str, Example]]:
    """Yield the sample conversations of this repository with their expected labels."""
    expected = {repr(row["_id"]): row for row in read_jsonl(directory / "sample_expected.jsonl")}
    for line, document in enumerate(read_jsonl(directory / "sample_conversations.jsonl")):
        row = expected[repr(document["_id"])]
        english = str(row.get("language", "en")).startswith("en")
        if (conversation := _aggregated(document)) is not None:
            part = "test" if line % 2 else "development"
            yield "samples" + ("" if english else " (not English)"), Example(conversation, part, row["expected"])


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


@dataclass(frozen=True, slots=True)
class Case:
    """The gold label of one field of one conversation (None: no matching label), and the answer of each classifier."""

    file: str
    field: str
    part: str
    gold: str | None
    baseline: str
    embedding: str
    model: str
    confidence: float | None

    @property
    def is_unseen_english(self) -> bool:
        """True if the file is English and neither classifier was fitted on its source."""
        return (
            "not English" not in self.file and self.file not in ("multidogo", "star", "cfpb") and self.part != "fitted"
        )


def together(classifier: BuiltInClassifier, conversations: list[Conversation]) -> list[Answer]:
    """Return the answers of *classifier* to *conversations*, some at once as in a run."""
    starts = range(0, len(conversations), TOGETHER)
    return [each for start in starts for each in classifier.answers(conversations[start : start + TOGETHER])]


def answered(
    examples: list[tuple[str, Example]], baseline: BaselineClassifier, embedding: BuiltInClassifier
) -> list[list[Case]]:
    """Return the cases of each example."""
    found = []
    answers = together(embedding, [example.conversation for _, example in examples])
    for (name, example), answer in zip(examples, answers, strict=True):
        plain = baseline.classify(example.conversation).as_dict()
        labels, sure = answer.classification.as_dict(), answer.confidence or {}
        found.append(
            [
                Case(name, f, example.part, example.gold[f], plain[f], str(labels[f]), answer.model, sure.get(f))
                for f in FIELDS
                if f in example.gold
            ]
        )
    return found


def scores(cases: list[Case]) -> str:
    """Return n, left out, majority, and accuracy and macro-F1 of both classifiers as cells of a table."""
    golds = [case.gold for case in cases if case.gold is not None]
    cells = [str(len(golds)), str(len(cases) - len(golds))]
    cells.append(f"{Counter(golds).most_common(1)[0][1] / len(golds):.3f}")
    for name in ("baseline", "embedding"):
        pairs = [(case.gold, str(getattr(case, name))) for case in cases if case.gold is not None]
        cells += [f"{sum(gold == answer for gold, answer in pairs) / len(pairs):.3f}", f"{macro_f1(pairs):.3f}"]
    return " | ".join(cells)


def print_table(cases: list[Case], key: Callable[[Case], tuple[str, ...]], heads: tuple[str, ...]) -> None:
    """Print one line for each *key* of the cases, whose parts *heads* names."""
    columns = (*heads, "n", "left out", "majority", "baseline", "macro-F1", "embedded", "macro-F1")
    print(f"\n| {' | '.join(columns)} |")
    print("|---" * len(heads) + "|---:" * (len(columns) - len(heads)) + "|")
    groups: defaultdict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in cases:
        groups[key(case)].append(case)
    for parts, group in sorted(groups.items()):
        if any(case.gold is not None for case in group):
            print(f"| {' | '.join(parts)} | {scores(group)} |")


def print_reliability(cases: list[Case]) -> None:
    """Print how often answers of each confidence are right, and the expected calibration error."""
    print("\n| field | confidence | n | mean confidence | accuracy |\n|---|---|---:|---:|---:|")
    for field in FIELDS:
        known = [(c.confidence, c.gold == c.embedding) for c in cases if c.field == field and c.gold is not None]
        sure = [(confidence, right) for confidence, right in known if confidence is not None]
        error = 0.0
        for low, high in zip(BANDS, (*BANDS[1:], 1.01), strict=True):
            band = [pair for pair in sure if low <= pair[0] < high]
            if band:
                mean, accuracy = (sum(pair[place] for pair in band) / len(band) for place in (0, 1))
                error += len(band) / len(sure) * abs(mean - accuracy)
                print(f"| {field} | {low:.1f} to {min(high, 1.0):.1f} | {len(band)} | {mean:.3f} | {accuracy:.3f} |")
        print(f"| {field} | all: calibration error {error:.3f} | {len(sure)} | | |")


def print_confusion(cases: list[Case]) -> None:
    """Print the confusion matrix of the embedding classifier's sentiment."""
    labels = list(OURS["sentiment"].values())
    print(f"\n| file | part | gold | {' | '.join(f'answered {label}' for label in labels)} |")
    print("|---|---|---|" + "---:|" * len(labels))
    chosen = [case for case in cases if case.field == "sentiment"]
    for file, part in sorted({(case.file, case.part) for case in chosen}):
        counts = Counter((case.gold, case.embedding) for case in chosen if (case.file, case.part) == (file, part))
        for gold in labels:
            print(f"| {file} | {part} | {gold} | {' | '.join(str(counts[gold, label]) for label in labels)} |")


def print_all_right(cases: list[list[Case]]) -> None:
    """Print the share of English samples with three right labels."""
    for part in ("development", "test"):
        rows = [each for each in cases if each[0].file == "samples" and each[0].part == part]
        if rows:
            shares = [
                sum(all(case.gold == getattr(case, name) for case in row) for row in rows) / len(rows)
                for name in ("baseline", "embedding")
            ]
            print(
                f"All labels right, {len(rows)} English samples, {part}: baseline {shares[0]:.3f}, embedded {shares[1]:.3f}"
            )


def print_unlabelled(directory: Path, baseline: BaselineClassifier, embedding: BuiltInClassifier) -> None:
    """Print how often real threads are labelled Other, and how many of them by the phrases because they are not English."""
    for name in UNLABELLED:
        path = directory / f"{name}.public.jsonl"
        if not path.exists():
            print(f"{path.name} is missing and was skipped", file=sys.stderr)
            continue
        threads = read_conversations(path)
        plain = [baseline.classify(each).as_dict() for each in threads]
        answers = together(embedding, threads)
        print(f"{name}: {len(threads)} threads, {sum(a.model == BASELINE_MODEL for a in answers)} not English")
        for field in ("intent", "topic"):
            before = sum(each[field] == "Other" for each in plain) / len(threads)
            after = sum(a.classification.as_dict()[field] == "Other" for a in answers) / len(threads)
            print(f"  {field} is Other: baseline {before:.3f}, embedded {after:.3f}")


def print_languages(cases: list[list[Case]]) -> None:
    """Print how many conversations the language check took for not English."""
    print("\n| file | conversations | labelled by the phrases |\n|---|---:|---:|")
    files = Counter(each[0].file for each in cases)
    phrases = Counter(each[0].file for each in cases if each[0].model == BASELINE_MODEL)
    for file in sorted(files):
        print(f"| {file} | {files[file]} | {phrases[file]} |")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return 0, or 2 if there are no files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline_accuracy", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="directory with the labelled files")
    parser.add_argument("--samples", action="store_true", help="measure on data/sample_conversations.jsonl")
    parser.add_argument("--development", action="store_true", help="leave out the lines of the test part")
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
    if options.development:
        examples = [each for each in examples if each[1].part != "test"]
    taxonomy = load_taxonomy()
    baseline, embedding = BaselineClassifier(taxonomy), open_classifier(taxonomy)
    if embedding.model == BASELINE_MODEL:
        print(
            f"The packages {', '.join(missing_packages())} are missing; both columns are the baseline.", file=sys.stderr
        )
    rows = [row for row in answered(examples, baseline, embedding) if row]
    cases = [case for row in rows for case in row]
    print_table(cases, lambda case: (case.file, case.field, case.part), ("file", "field", "part"))
    unseen = [case for case in cases if case.is_unseen_english]
    print_table(unseen, lambda case: (case.field, case.part), ("unseen English", "part"))
    print_table(unseen, lambda case: (case.field,), ("unseen English, both parts",))
    judged = [case for case in unseen if options.development or case.part == "test"]
    print_reliability(judged)
    print_confusion(cases)
    print_languages(rows)
    print_all_right(rows)
    if options.directory is not None:
        print_unlabelled(options.directory, baseline, embedding)
    return 0


if __name__ == "__main__":
    sys.exit(main())
