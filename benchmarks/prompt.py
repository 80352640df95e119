"""Ablation of the constant prompt: definitions, examples and rules, on the labelled sample conversations.

By default the model is SmolLM2 on llama.cpp. It counts tokens, but does not classify better than a constant answer. If the
environment names a model server and a model (``OLLAMA_MODEL``, or ``LLM_API_URL`` and ``LLM_MODEL``), that one is asked,
and its accuracy says what each part of the prompt is worth. ``REPLY_STYLE`` chooses the form of the answers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aggregator import aggregate_conversation
from benchmarks.real_engine import open_client, open_model
from benchmarks.table import Row
from classifier import Classifier
from config import Taxonomy, load_settings, load_taxonomy
from config.taxonomy import TRIAD
from domain.conversation import Conversation, chat_messages
from domain.reply_style import ReplyStyle
from error_handler import LLMReplyError
from evaluation.intervals import proportion
from help_desks.reader import read_documents
from llm_wrapper import LLMClient, open_session
from model_server.models import chat_target
from prompt_builder import build_system_prompt
from tests.fakes.fake_ollama_server.knobs import Knobs

SAMPLES = Path(__file__).parents[1] / "data/sample_conversations.jsonl"
EXPECTED = Path(__file__).parents[1] / "data/sample_expected.jsonl"
CONVERSATIONS, QUICK_CONVERSATIONS = 96, 1
ALL_EXAMPLES = 4
FIELDS = tuple(TRIAD.values())
_EXAMPLES, _RULES, _FENCE = "EXAMPLES:\n", "Rules:\n", "<conversation>"


@dataclass(frozen=True)
class Variant:
    """A prompt with a part of the product's: *examples* of them, with or without *definitions* and *rules*."""

    examples: int = ALL_EXAMPLES
    definitions: bool = True
    rules: bool = True

    def __str__(self) -> str:
        left_out = [name for name in ("definitions", "rules") if not getattr(self, name)]
        without = f", no {' and no '.join(left_out)}" if left_out else ""
        return f"{self.examples} example{'s' * (self.examples != 1)}{without}"


# Prompts that differ in their examples share all before them, so the cache holds it.
VARIANTS = (
    *(Variant(examples) for examples in range(ALL_EXAMPLES, -1, -1)),
    Variant(definitions=False),
    Variant(rules=False),
    Variant(examples=0, definitions=False),
    Variant(examples=0, definitions=False, rules=False),
)


@dataclass
class Measured:
    """The answers to one *variant*, whose constant prompt has *characters*; *right* counts correct labels of each field."""

    variant: Variant
    characters: int
    conversations: int = 0
    unusable: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))


Labelled = tuple[Conversation, dict[str, str]]  # with the expected label of each field


def prompt_of(taxonomy: Taxonomy, variant: Variant, style: ReplyStyle) -> str:
    """Return the constant prompt of *variant*. The rule about the tags around a conversation is never left out."""
    if not variant.definitions:
        fields = (
            replace(one, labels=tuple(replace(label, definition="") for label in one.labels)) for one in taxonomy.fields
        )
        taxonomy = replace(taxonomy, fields=tuple(fields))
    head, _, examples = build_system_prompt(taxonomy, style).partition(_EXAMPLES)
    if not variant.rules:
        task, _, rest = head.partition(_RULES)
        rules, _, labels = rest.partition("\n\n")
        kept = next(rule for rule in rules.split("\n") if _FENCE in rule)
        head = f"{task}{kept.partition('. ')[2]}\n\n{labels}"
    shown = examples.split("\n\n")[: variant.examples]
    return head + (_EXAMPLES + "\n\n".join(shown) if shown else "")


def measure(*, quick: bool) -> list[Row]:
    """Ask for CONVERSATIONS with each variant; *quick* one conversation."""
    return rows_of(collect(QUICK_CONVERSATIONS if quick else CONVERSATIONS))


def collect(count: int) -> list[Measured]:
    """Return the answers of each variant to *count* sample conversations.

    Raises:
        WorkerFailedError: No model is named, and SmolLM2 is not installed.
    """
    taxonomy, samples = load_taxonomy(), list(itertools.islice(labelled_samples(), count))
    found = []
    with _open_client() as (client, style):
        classifier = Classifier(taxonomy, reply_style=style)
        for number, variant in enumerate(VARIANTS, 1):
            measured = Measured(variant, len(prompt := prompt_of(taxonomy, variant, style)))
            for sample in samples:
                _ask(client, classifier, prompt, sample, measured)
            found.append(measured)
            print(f"prompt: {number} of {len(VARIANTS)} variants", file=sys.stderr)
    return found


@contextlib.contextmanager
def _open_client() -> Iterator[tuple[LLMClient, ReplyStyle]]:
    settings = load_settings(None)
    style: ReplyStyle = "full" if settings.reply_style == "auto" else settings.reply_style
    if not settings.model:
        with open_model() as model, open_client(model, slots=1) as client:
            yield client, style
        return
    with open_session() as session:
        own = LLMClient(settings, chat_target(settings, settings.model), session)
        own.prepare(settings)
        yield own, style


def labelled_samples() -> Iterator[Labelled]:
    """Yield the sample conversations with their expected labels."""
    lines = EXPECTED.read_text(encoding="utf-8").splitlines()  # in the order of the samples
    for document, line in zip(read_documents(SAMPLES), lines, strict=True):
        yield aggregate_conversation(document), json.loads(line)["expected"]


def _ask(client: LLMClient, classifier: Classifier, prompt: str, sample: Labelled, measured: Measured) -> None:
    conversation, expected = sample
    measured.conversations += 1
    try:
        reply = client.chat(chat_messages(prompt, conversation.transcript), classifier.schema_json)
        measured.prompt_tokens += reply.prompt_tokens or 0
        measured.reply_tokens += reply.reply_tokens or 0
        made = classifier.parse(reply.text)
    except LLMReplyError:
        measured.unusable += 1
        return
    for name in FIELDS:
        measured.right[name] += made.labels[name] == expected[name]


def rows_of(found: Sequence[Measured]) -> list[Row]:
    """Return the table: each variant compared with the product's prompt, which is the first one."""
    rows: list[Row] = []
    first = found[0]
    for one in found:
        ratio = one.prompt_tokens / first.prompt_tokens if first.prompt_tokens else 0.0
        rows += [
            Row(
                f"{one.variant}: tokens of prompt; constant, fake's count; reply",
                _tokens(one),
                _tokens(first),
                f"{ratio:.2f}",
            ),
            Row(f"  {', '.join(FIELDS)} right, of {one.conversations}; unusable", _right(one), _right(first)),
        ]
    low_high = [proportion(first.right[name], first.conversations) for name in FIELDS]
    shown = "; ".join(
        f"{each.value:.3f} ({each.low:.3f}-{each.high:.3f})" for each in low_high if each.value is not None
    )
    return [*rows, Row(f"accuracy of {first.variant}, 95 % intervals: {', '.join(FIELDS)}", shown)]


def _tokens(one: Measured) -> str:
    fake = math.ceil(one.characters / Knobs().chars_per_token)
    return f"{one.prompt_tokens / one.conversations:.0f}; {fake}; {one.reply_tokens / one.conversations:.1f}"


def _right(one: Measured) -> str:
    return f"{' '.join(str(one.right[name]) for name in FIELDS)}; {one.unusable}"
