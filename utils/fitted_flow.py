"""The classification of one conversation that may be too long for the window, as a flow both wrappers drive. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from classifier import Answer, ReplyParser, classification_flow
from error_handler import LLMContextError, LLMReplyError, Reason
from prompt_builder import Message, PromptBuilder
from utils.classification import Outcome
from utils.context_window import ConversationFitter
from utils.conversation import Conversation
from utils.conversation_fit import Fitted
from utils.ollama_protocol import ChatReply, ChatTarget


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
    fitter: ConversationFitter
    target: Callable[[], ChatTarget]


def fitted_flow(conversation: Conversation, parts: FlowParts) -> Generator[list[Message], ChatReply, FittedAnswer]:
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
