"""A model reply becomes a validated Classification. Pure: no I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from config import Taxonomy
from config.taxonomy import fold_label
from domain.confidence import label_confidence
from domain.conversation import Classification, Conversation, Outcome, input_sha256, result_fingerprint
from domain.text import one_line, prompt_text
from error_handler import LLMContextError, LLMReplyError, Reason
from model_server.protocol import ChatReply, ChatTarget
from model_server.truncation import Fitted
from model_server.window import TranscriptTruncator
from prompt_builder import Message, PromptBuilder

FIELDS = ("categorization", "intent", "topic", "sentiment")
MAX_REPLY_CHARACTERS = 65_536  # num_predict 700 gives a few thousand; more is not an answer
MAX_CATEGORIZATION_CHARACTERS = 200

_REPAIR = (
    "Your answer could not be used: {problem}. Answer again for the same conversation with one JSON object with "
    "exactly the keys categorization, intent, topic and sentiment, and labels from the lists only."
)


class ReplyParser:
    """Parses replies against one taxonomy; *schema_json* is the JSON Schema that asks for such replies."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._labels = {
            field: {fold_label(name): name for name in taxonomy.names(field)}
            for field in ("intent", "topic", "sentiment")
        }
        self._names = {field: taxonomy.names(field) for field in self._labels}
        self.schema_json = json.dumps(classification_schema(taxonomy), ensure_ascii=False).encode()

    def parse(self, reply: str) -> Classification:
        """Return the classification in *reply*.

        Takes plain JSON, and the first complete JSON object inside a code fence or prose. Labels
        are matched without regard to case and spacing, and returned as the taxonomy writes them.

        Raises:
            LLMReplyError: empty, not_json, wrong_shape or label_outside. The message never quotes
                the reply.
        """
        fields = _first_object(reply)
        missing = [name for name in FIELDS if not isinstance(fields.get(name), str)]
        if missing:
            raise LLMReplyError(f"missing or not a text: {', '.join(missing)}", Reason.WRONG_SHAPE)
        categorization = one_line(fields["categorization"], MAX_CATEGORIZATION_CHARACTERS)
        if not categorization:
            raise LLMReplyError("categorization is empty", Reason.WRONG_SHAPE)
        return Classification(
            categorization,
            self._label("intent", fields["intent"]),
            self._label("topic", fields["topic"]),
            self._label("sentiment", fields["sentiment"]),
        )

    def answer(self, reply: ChatReply, calls: int) -> Answer:
        """Return *reply*, the one to call number *calls* (from 1), with what it says and how sure it is.

        Raises:
            LLMReplyError: As ``parse`` does.
        """
        classification = self.parse(reply.text)
        confidence = label_confidence(reply.tokens, reply.text, classification, self._names) if reply.tokens else None
        return Answer(classification, reply, calls, confidence)

    def _label(self, field: str, value: str) -> str:
        try:
            return self._labels[field][fold_label(value)]
        except KeyError:
            raise LLMReplyError(f"{field} is not a label of the taxonomy", Reason.LABEL_OUTSIDE) from None


def parse_classification(reply: str, taxonomy: Taxonomy) -> Classification:
    """Return the classification in *reply*; see ReplyParser.parse, which callers with many replies keep."""
    return ReplyParser(taxonomy).parse(reply)


def classification_schema(taxonomy: Taxonomy) -> dict[str, Any]:
    """Return the JSON Schema of an answer.

    Flat, with enums and nothing that grammar compilers are known to stumble over (pattern, format,
    unions). The order of the keys makes the model say what the conversation is about before it labels.
    """
    return {
        "type": "object",
        "properties": {
            "categorization": {"type": "string", "minLength": 1, "maxLength": MAX_CATEGORIZATION_CHARACTERS},
            **{
                field: {"type": "string", "enum": list(taxonomy.names(field))}
                for field in ("intent", "topic", "sentiment")
            },
        },
        "required": list(FIELDS),
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable reply, what it says, and how many model calls it took (from 1); *confidence* as in Outcome."""

    classification: Classification
    reply: ChatReply
    calls: int
    confidence: dict[str, float] | None = None


def classification_flow(messages: list[Message], parser: ReplyParser) -> Generator[list[Message], ChatReply, Answer]:
    """Yield the messages to send, receive the reply, return the answer.

    A driver, synchronous or not, sends what is yielded and throws in the LLMReplyError that its
    client raised. One repair turn follows an unusable reply; then the error is raised. A prompt
    that did not fit is not asked again: it would be cut again.
    """
    reply: ChatReply | None = None
    try:
        reply = yield messages
        return parser.answer(reply, 1)
    except LLMReplyError as problem:
        if problem.reason is Reason.CONTEXT_OVERFLOW:
            raise
        again = repair_messages(messages, reply, problem)
    reply = yield again
    return parser.answer(reply, 2)


def build_outcome(
    answer: Answer, conversation: Conversation, target: ChatTarget, plan: str, duration_s: float
) -> Outcome:
    """Return *answer* with how it was made; *plan* is ollama_protocol.plan_fingerprint of the run."""
    input_hash = input_sha256(conversation)
    return Outcome(
        classification=answer.classification,
        model_used=target.model,
        model_digest=target.digest,
        attempts=answer.calls,
        duration_ms=round(duration_s * 1000),
        prompt_tokens=answer.reply.prompt_tokens,
        reply_tokens=answer.reply.reply_tokens,
        input_sha256=input_hash,
        fingerprint=result_fingerprint(plan, input_hash),
        confidence=answer.confidence,
    )


def repair_messages(messages: list[Message], reply: ChatReply | None, problem: LLMReplyError) -> list[Message]:
    """Return *messages* with the unusable *reply* and a turn that says what was wrong with it.

    Without a reply (None: cut off, empty) there is nothing to point at, and the question is asked again.
    """
    if reply is None:
        return messages
    return [
        *messages,
        {"role": "assistant", "content": one_line(prompt_text(reply.text), 500)},
        {"role": "user", "content": _REPAIR.format(problem=problem)},
    ]


def _first_object(reply: str) -> dict[str, Any]:
    """Return the first complete JSON object in *reply*; duplicate keys and NaN are refused."""
    text = reply.strip().removeprefix("\ufeff")
    if not text:
        raise LLMReplyError("the answer is empty", Reason.EMPTY)
    if len(text) > MAX_REPLY_CHARACTERS:
        raise LLMReplyError("the answer is too long to be one", Reason.NOT_JSON)
    start = text.find("{")
    # Bounded: a reply of nothing but opening braces would otherwise cost a scan from each of them.
    for _ in range(20):
        if start < 0:
            break
        try:
            value, _end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value  # type: ignore[no-any-return]
    raise LLMReplyError("the answer holds no complete JSON object", Reason.NOT_JSON)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise LLMReplyError("the answer names a key twice", Reason.WRONG_SHAPE)
    return fields


def _no_constant(name: str) -> Any:
    raise LLMReplyError(f"the answer holds {name}", Reason.WRONG_SHAPE)


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)


@dataclass(frozen=True, slots=True)
class FittedAnswer:
    """A usable answer, and what of the conversation it is about."""

    answer: Answer
    fitted: Fitted

    def complete(self, outcome: Outcome, calls: int) -> Outcome:
        """Return *outcome* with what was seen, and with all *calls* that were made, refused ones included."""
        fitted = self.fitted
        if calls == outcome.attempts and fitted.is_complete and fitted.turns_used is None:
            return outcome  # it says so already, as nearly all do
        return replace(outcome, attempts=calls, input_complete=fitted.is_complete, turns_used=fitted.turns_used)


@dataclass(frozen=True, slots=True)
class FlowParts:
    """What each conversation of a run is asked with; *target* returns the one of the moment."""

    prompts: PromptBuilder
    parser: ReplyParser
    fitter: TranscriptTruncator
    target: Callable[[], ChatTarget]


def classify_with_truncation(
    conversation: Conversation, parts: FlowParts
) -> Generator[list[Message], ChatReply, FittedAnswer]:
    """Yield the messages to send, receive the reply, return the answer; see ``classifier.classification_flow``.

    Where the server refuses the prompt as too long, or its count betrays that it cut it, the conversation is fitted
    once more with what that taught; LLMReplyError and LLMContextError are to be thrown in.

    Raises:
        LLMContextError, SkippedDocumentError: It does not fit and shall not be cut.
        LLMError: It did not fit at the second time either, or there was no usable answer.
    """
    fitted = parts.fitter.fit(conversation, parts.target())
    try:
        return (yield from _ask(fitted, parts))
    except (LLMContextError, LLMReplyError) as problem:
        if problem.reason is not Reason.CONTEXT_OVERFLOW:
            raise
        fitted = parts.fitter.fit_again(conversation, fitted, parts.target(), problem)
    return (yield from _ask(fitted, parts))


def _ask(fitted: Fitted, parts: FlowParts) -> Generator[list[Message], ChatReply, FittedAnswer]:
    answer = yield from classification_flow(parts.prompts.build_transcript(fitted.transcript), parts.parser)
    if answer.calls == 1:  # a repair turn makes the prompt longer
        parts.fitter.require_whole(fitted, parts.target(), answer.reply.prompt_tokens)
        parts.fitter.learn(fitted, answer.reply.prompt_tokens)
    return FittedAnswer(answer, fitted)
