"""The model's time with each reply style: the same conversations through SmolLM2 on llama.cpp, one call after the other.

The engine has a slot for each style, so each keeps its prompt in the prefix cache; ``score`` has an engine for itself,
because it would find the whole prompt of ``list``. Every conversation is labelled in all styles before the next one, so a
load on the machine meets all styles alike. The conversations are as long as real ones; see REAL_TWEETS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from aggregator import aggregate_conversation
from benchmarks.documents import REAL_TWEETS, conversations
from benchmarks.real_engine import EngineCall, RecordingClient, open_client, open_model
from benchmarks.table import Row, figure
from classifier import Classifier
from config import load_taxonomy
from domain.conversation import Conversation
from domain.reply_style import STYLES
from error_handler import LLMReplyError
from llm_wrapper import ollama_classify

CONVERSATIONS, QUICK_CONVERSATIONS = 100, 1
REFERENCE = "full"
MOST_GENERATION = {"list": 0.30, "score": 0.15}  # share of the generation time of full
LEAST_SPEEDUP = {"list": 2.0}  # documents per minute, compared with full


@dataclass
class StyleRun:
    """The calls of one style (a repair turn is a further call), the time of its documents, and its unusable answers."""

    documents: int = 0
    unusable: int = 0
    seconds: float = 0.0
    calls: list[EngineCall] = field(default_factory=list)

    @property
    def generation_ms(self) -> float:
        """Milliseconds of generation for one document."""
        return sum(call.reply_ms for call in self.calls) / self.documents

    @property
    def model_s(self) -> float:
        """Seconds of the model for one document: prompt and generation."""
        return sum(call.prompt_ms + call.reply_ms for call in self.calls) / self.documents / 1000

    @property
    def documents_per_minute(self) -> float:
        """Documents per minute, one after the other, including the client."""
        return 60 * self.documents / self.seconds

    @property
    def reply_tokens(self) -> float:
        """Tokens of the answers to one document."""
        return sum(call.reply_tokens for call in self.calls) / self.documents

    @property
    def evaluated_tokens(self) -> float:
        """Prompt tokens that the engine read for one document."""
        return sum(call.evaluated_tokens for call in self.calls) / self.documents

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens that came from the prefix cache."""
        cached = sum(call.cached_tokens for call in self.calls)
        return cached / (cached + sum(call.evaluated_tokens for call in self.calls))


def measure(*, quick: bool) -> list[Row]:
    """Label CONVERSATIONS in each style, *quick* one. Calls that fill the caches are not counted."""
    return rows_of(collect(QUICK_CONVERSATIONS if quick else CONVERSATIONS))


def collect(count: int) -> dict[str, StyleRun]:
    """Return the run of each style over the same *count* conversations.

    Raises:
        WorkerFailedError: The model is not installed.
    """
    taxonomy = load_taxonomy()
    first, *counted = [aggregate_conversation(document) for document in conversations(count + 1, REAL_TWEETS)]
    runs: dict[str, StyleRun] = {style: StyleRun() for style in STYLES}
    with (
        open_model() as model,
        open_client(model, slots=len(STYLES) - 1) as client,
        open_client(model, slots=1) as client_of_score,
    ):
        classifiers = [Classifier(taxonomy, reply_style=style) for style in STYLES]
        clients = {style: client_of_score if style == "score" else client for style in STYLES}
        for classifier in classifiers:
            _label(first, clients[classifier.reply_style], classifier, StyleRun())
        for number, conversation in enumerate(counted, 1):
            for classifier in classifiers:
                style = classifier.reply_style
                _label(conversation, clients[style], classifier, runs[style])
            print(f"model: {number} of {count} conversations", file=sys.stderr)
    return runs


def _label(conversation: Conversation, client: RecordingClient, classifier: Classifier, run: StyleRun) -> None:
    before, start_s = len(client.calls), time.monotonic()
    try:
        ollama_classify(conversation, client, classifier)
    except LLMReplyError:
        run.unusable += 1
    run.seconds += time.monotonic() - start_s
    run.documents += 1
    calls = client.calls[before:]
    run.calls += calls if classifier.reply_style != "score" else [calls[0], *map(_as_generation, calls[1:])]


def _as_generation(call: EngineCall) -> EngineCall:
    """Return a further call of ``score`` about a conversation: what it reads, the other styles have written."""
    return replace(call, cached_tokens=0, evaluated_tokens=0, prompt_ms=0.0, reply_ms=call.prompt_ms + call.reply_ms)


def rows_of(runs: Mapping[str, StyleRun]) -> list[Row]:
    """Return the table: each style compared with ``full``."""
    full = runs[REFERENCE]
    rows: list[Row] = []
    for style, run in runs.items():
        most, least = MOST_GENERATION.get(style), LEAST_SPEEDUP.get(style)
        share, speedup = run.generation_ms / full.generation_ms, run.documents_per_minute / full.documents_per_minute
        rows += [
            Row(
                f"{style}, {run.documents} conversations: generation, ms per conversation",
                *_figures(run.generation_ms, full.generation_ms),
                f"<= {most:.2f}" if most else "",
                share <= most if most else None,
            ),
            Row(
                "  documents per minute",
                *_figures(run.documents_per_minute, full.documents_per_minute),
                f">= {least:g}" if least else "",
                speedup >= least if least else None,
            ),
            Row("  prompt and generation, s per conversation", *_figures(run.model_s, full.model_s)),
            Row("  reply tokens per conversation", *_figures(run.reply_tokens, full.reply_tokens)),
            Row("  prompt tokens evaluated per conversation", *_figures(run.evaluated_tokens, full.evaluated_tokens)),
            Row("  prompt tokens from the cache, %", f"{100 * run.cached_share:.1f}", f"{100 * full.cached_share:.1f}"),
            Row("  calls; conversations without usable answer", f"{len(run.calls)}; {run.unusable}"),
        ]
    return rows


def _figures(value: float, reference: float) -> tuple[str, str, str]:
    return figure(value), figure(reference), f"{value / reference:.2f}"
