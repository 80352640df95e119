"""Parses and validates model replies, and drives one conversation to its outcome. No I/O."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator
from typing import Any, Protocol

from config import Taxonomy
from config.taxonomy import fold_label
from domain.confidence import label_confidence
from domain.conversation import Classification, Conversation, Message, Outcome, chat_messages, result_fingerprint
from domain.reply_style import (
    LONGER,
    MAX_CATEGORIZATION_CHARACTERS,
    ReplyStyle,
    answer_schema,
    answered,
    is_array,
    required_form,
)
from domain.text import one_line, prompt_text
from error_handler import LLMContextError, LLMError, LLMReplyError, Reason
from model_server.protocol import ChatReply, ChatTarget, plan_fingerprint
from model_server.window import OnLong, TranscriptTruncator
from prompt_builder import build_system_prompt

MAX_REPLY_CHARACTERS = 65_536  # an answer has a few thousand (num_predict is 700)
MAX_BROKEN_OBJECTS = 200
MAX_TRUNCATIONS = 2  # after a refusal; the second one helps if the kept part has more tokens than the rest

# The tags of reasoning that servers leave in the text: <think> (most), [THINK] (Magistral), <|channel|>
# (gpt-oss), <|START_THINKING|> (Command), a triangle (Kimi).
_NAMES = "(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
_REASONING_TAG = re.compile(
    rf"(?P<close></(?:\w+:)?{_NAMES}\s*>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|channel\|>final\s*<\|message\|>)"
    rf"|<(?:\w+:)?{_NAMES}\b[^<>]{{0,40}}>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|channel\|>(?:analysis|commentary)",
    re.IGNORECASE,
)

_OPENING = re.compile(r"[\[{]")
_TAG_SIGN = re.compile("<|\\[[/tT]|\N{WHITE LEFT-POINTING TRIANGLE}")  # how the tags begin

_REPAIR = (
    "Your answer could not be used: {problem}. Answer again for the same conversation with {form} and labels from the "
    "lists only."
)


class Classifier:
    """The parts that follow from a taxonomy and a reply style: prompt, JSON Schema of a reply, and parser.

    Keep one for each model. *truncator* fits long conversations into the window as *on_long* says, and learns from the
    answers of the model.
    """

    def __init__(self, taxonomy: Taxonomy, on_long: OnLong = "fit", reply_style: ReplyStyle = "full") -> None:
        self.reply_style = reply_style
        self._taxonomy, self._on_long = taxonomy, on_long
        self.system_prompt = build_system_prompt(taxonomy, reply_style)
        self.truncator = TranscriptTruncator(self.system_prompt, on_long)
        self._is_array = is_array(reply_style)
        longer = LONGER.get(reply_style)
        self._longer = self if longer is None else self.restyled(longer)
        self._form = required_form(taxonomy, reply_style)
        self._fields = taxonomy.field_names
        self._lists = tuple(field.name for field in taxonomy.fields if field.is_multiple)
        self._texts = tuple(key for key in answered(taxonomy, reply_style).keys if key not in self._lists)
        self._names = {field.name: field.names for field in taxonomy.fields}
        self._labels = {field: {fold_label(name): name for name in names} for field, names in self._names.items()}
        self.schema_json = json.dumps(classification_schema(taxonomy, reply_style), ensure_ascii=False).encode()

    def restyled(self, reply_style: ReplyStyle) -> Classifier:
        """Return the classifier of the same taxonomy for another style."""
        return Classifier(self._taxonomy, self._on_long, reply_style)

    def for_target(self, target: ChatTarget) -> Classifier:
        """Return the classifier for *target*: this one, or that of the next longer style that the server offers."""
        offered = {"score": "scores" not in target.refused, "list": not target.refuses_arrays}
        return self if offered.get(self.reply_style, True) else self._longer.for_target(target)

    def messages(self, transcript: str) -> list[Message]:
        """Return the messages that ask for the labels of *transcript*."""
        return chat_messages(self.system_prompt, transcript)

    def plan(self, target: ChatTarget) -> str:
        """Return the plan_fingerprint of answers from *target*."""
        return plan_fingerprint(target, self.system_prompt, self.schema_json)

    def parse(self, reply: str) -> Classification:
        """Return the classification in *reply*.

        Accepts plain JSON, or JSON inside a code fence or prose. Reasoning is removed first; of several objects (or
        arrays, see ``is_array``), the last complete and valid one counts. Labels match without regard to case, spacing
        and Unicode form, and are returned as the taxonomy spells them.

        Raises:
            LLMReplyError: empty, not_json, wrong_shape or label_outside. The message never quotes the reply.
        """
        text = _without_reasoning(reply)
        found: Classification | None = None
        problem: LLMReplyError | None = None
        start, failures = self._next_value(text, 0), 0
        # The limit keeps a reply of opening braces from costing a scan for each of them.
        while start >= 0 and failures <= MAX_BROKEN_OBJECTS:
            end = start + 1
            try:
                value, end = _DECODER.raw_decode(text, start)
                found = self._classification(self._keyed(value))
            except LLMReplyError as exc:
                problem = exc
            except (ValueError, RecursionError):
                failures += 1
            start = self._next_value(text, end)
        if found is None or failures > MAX_BROKEN_OBJECTS:  # beyond the limit a later object could correct this one
            kind = "array" if self._is_array else "object"
            raise problem or LLMReplyError(f"the answer holds no complete JSON {kind}", Reason.NOT_JSON)
        return found

    def _next_value(self, text: str, place: int) -> int:
        """Return where the next object or, if answers are arrays, array or object begins in *text*; -1 if none does."""
        if not self._is_array:
            return text.find("{", place)
        opening = _OPENING.search(text, place)
        return -1 if opening is None else opening.start()

    def _keyed(self, value: Any) -> dict[str, Any]:
        """Return the fields of a decoded answer."""
        if not self._is_array:
            fields: dict[str, Any] = value
            return fields
        if not isinstance(value, list) or len(value) != len(self._fields):
            raise LLMReplyError(f"not an array of {len(self._fields)} values", Reason.WRONG_SHAPE)
        return dict(zip(self._fields, value, strict=True))

    def _classification(self, fields: dict[str, Any]) -> Classification:
        missing = [key for key in self._texts if not isinstance(fields.get(key), str)]
        if missing:
            raise LLMReplyError(f"missing or not a text: {', '.join(missing)}", Reason.WRONG_SHAPE)
        if self._lists and (missing := [key for key in self._lists if not _is_list_of_texts(fields.get(key))]):
            raise LLMReplyError(f"missing or not a list of labels: {', '.join(missing)}", Reason.WRONG_SHAPE)
        categorization = None
        if "categorization" in self._texts:
            categorization = one_line(fields["categorization"], MAX_CATEGORIZATION_CHARACTERS)
            if not categorization:
                raise LLMReplyError("categorization is empty", Reason.WRONG_SHAPE)
        labels = {name: self._value(name, fields[name]) for name in self._names}
        return Classification(categorization=categorization, **labels)

    def _value(self, field: str, value: str | list[str]) -> str | tuple[str, ...]:
        """Return the label, or the labels of a multi-valued field: each once, in the order of the taxonomy."""
        if isinstance(value, str):
            return self._label(field, value)
        found = {self._label(field, one) for one in value}
        return tuple(name for name in self._names[field] if name in found)

    def confidence(self, reply: ChatReply, classification: Classification) -> dict[str, float] | None:
        """Return the probability of each label that was parsed from *reply*; None if it has no log probabilities."""
        if reply.scores:
            return dict(zip(self._fields, reply.scores, strict=True))
        if not reply.tokens:
            return None
        text = _without_reasoning(reply.text)
        return label_confidence(reply.tokens, text, classification, self._names, is_array=self._is_array)

    def repair_messages(self, messages: list[Message], reply: ChatReply | None, problem: LLMError) -> list[Message]:
        """Return *messages* with the unusable *reply* and a turn that explains the error.

        If there is no reply (cut off, empty), *messages* are returned to be sent again.
        """
        if reply is None:
            return messages
        return [
            *messages,
            {"role": "assistant", "content": one_line(prompt_text(reply.text), 500)},
            {"role": "user", "content": _REPAIR.format(problem=problem, form=self._form)},
        ]

    def _label(self, field: str, value: str) -> str:
        label = value if value in self._names[field] else self._labels[field].get(fold_label(value))
        if label is None:
            raise LLMReplyError(f"{field} is not a label of the taxonomy", Reason.LABEL_OUTSIDE)
        return label


def parse_classification(reply: str, taxonomy: Taxonomy) -> Classification:
    """Return the classification in one *reply*; see ``Classifier.parse``. For many replies, keep a Classifier."""
    return Classifier(taxonomy).parse(reply)


def classification_schema(taxonomy: Taxonomy, reply_style: ReplyStyle = "full") -> dict[str, Any]:
    """Return the JSON Schema of an answer.

    It is flat and uses only enums and lists of enums, because grammar compilers fail on patterns, formats, unions and,
    some of them, uniqueItems. The order of the keys makes the model describe the conversation before it labels it.
    """
    return answer_schema(taxonomy, reply_style)


class ModelClient(Protocol):
    """The client that asks the model. Its target may change between two requests, so it is read for each."""

    @property
    def target(self) -> ChatTarget:
        """The current model, its options and its window."""


def classification_flow(
    conversation: Conversation, client: ModelClient, classifier: Classifier
) -> Generator[list[Message], ChatReply, Outcome]:
    """Classify *conversation*: yield the messages to send, receive the reply, return the outcome.

    The driver, synchronous or not, sends what is yielded, and throws in each LLMError of its client. One repair turn
    follows an unusable reply. If the prompt was too long, or was cut by the server, the conversation is truncated again,
    at most twice with the token counts of the failure, or once for each usual window if the server names no size. A failed
    trial (see TranscriptTruncator.fit) is followed by a fitted prompt.

    Raises:
        LLMContextError, SkippedDocumentError: The conversation does not fit, and ON_LONG forbids truncation.
        LLMError: The second attempt failed as well; LLMFormError: ``for_target`` returns the classifier to use instead.
    """
    start_s = time.monotonic()
    truncator, calls, is_repair, truncations = classifier.truncator, 0, False, 0
    fitted = truncator.fit(conversation, client.target)
    messages = classifier.messages(fitted.transcript)
    while True:
        calls += 1
        reply: ChatReply | None = None
        try:
            reply = yield messages
            if not is_repair:  # a repair turn makes the prompt longer
                truncator.require_whole(fitted, client.target, reply.prompt_tokens)
            classification = classifier.parse(reply.text)
            if not is_repair:
                truncator.learn(fitted, reply.prompt_tokens)
            break
        except LLMError as problem:
            if fitted.is_trial:
                fitted = truncator.fit_again(conversation, fitted, client.target, problem)
                messages = classifier.messages(fitted.transcript)
            elif not isinstance(problem, LLMContextError | LLMReplyError):
                raise
            elif problem.reason is Reason.CONTEXT_OVERFLOW and truncations < MAX_TRUNCATIONS:
                fitted = truncator.fit_again(conversation, fitted, client.target, problem)
                truncations, is_repair = truncations + (not fitted.assumed_window), False  # sizes are tried to the last
                messages = classifier.messages(fitted.transcript)
            elif problem.reason is Reason.CONTEXT_OVERFLOW or is_repair:
                raise
            else:
                is_repair = True
                messages = classifier.repair_messages(messages, reply, problem)
    target, plan = client.target, classifier.plan(client.target)
    return Outcome(
        classification,
        model_used=target.model,
        model_digest=target.digest,
        input_sha256=conversation.transcript_sha256,
        fingerprint=result_fingerprint(plan, conversation.transcript_sha256),
        plan=plan,
        attempts=calls,
        duration_ms=round((time.monotonic() - start_s) * 1000),
        prompt_tokens=reply.prompt_tokens,
        reply_tokens=reply.reply_tokens,
        input_complete=fitted.is_complete,
        turns_used=fitted.turns_used,
        confidence=classifier.confidence(reply, classification),
    )


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _without_reasoning(reply: str) -> str:
    """Return *reply* without the parts that its tags mark as reasoning; raise if that leaves nothing.

    Everything before a closing tag is reasoning, because chat templates often put the opening tag into the prompt.
    """
    text = reply.strip().removeprefix("\ufeff")
    if not text:
        raise LLMReplyError("the answer is empty", Reason.EMPTY)
    if len(text) > MAX_REPLY_CHARACTERS:
        raise LLMReplyError("the answer is too long", Reason.NOT_JSON)
    kept: list[str] = []
    place, is_reasoning = 0, False
    tags = list(_REASONING_TAG.finditer(text)) if _TAG_SIGN.search(text) else []
    for tag in () if tags and _is_json(text) else tags:
        if tag["close"]:
            kept = [] if not is_reasoning else kept
            place, is_reasoning = tag.end(), False
        elif not is_reasoning:
            kept.append(text[place : tag.start()])
            is_reasoning = True
    if not is_reasoning:
        kept.append(text[place:])
    if not (answer := "".join(kept).strip()):
        raise LLMReplyError("the answer holds only reasoning", Reason.EMPTY)
    return answer


def _is_json(text: str) -> bool:
    """Return whether *text* is JSON as a whole, so that a tag in it is part of a value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise LLMReplyError("the answer has a key twice", Reason.WRONG_SHAPE)
    return fields


def _no_constant(name: str) -> Any:
    raise LLMReplyError(f"the answer holds {name}", Reason.WRONG_SHAPE)


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)
