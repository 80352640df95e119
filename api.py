"""The contract of POST /classify for programs: its request and response models, and a blocking ``classify_conversation``.

``classify_conversation`` needs no running service: it calls the model server itself, for scripts and notebooks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import llm_wrapper
from aggregator import aggregate_conversation
from config import Settings, load_prompt_taxonomy, load_settings
from error_handler import RequestError, SkippedDocumentError
from model_server.models import chat_target
from model_server.window import choose_window
from service import errors
from service.contract import (
    ClassificationRequest,
    ClassificationResponse,
    ConversationAnswer,
    ErrorDetail,
    ErrorResponse,
    Labels,
    Message,
)
from worker.reply_choice import classifier_for

__all__ = [
    "ClassificationRequest",
    "ClassificationResponse",
    "ConversationAnswer",
    "ErrorDetail",
    "ErrorResponse",
    "Labels",
    "Message",
    "classify_conversation",
]

logger = logging.getLogger(__name__)


def classify_conversation(
    request: ClassificationRequest | Mapping[str, Any], settings: Settings | None = None
) -> ConversationAnswer:
    """Return what POST /classify would answer. Calls the model server and blocks until it has answered.

    ``input_complete`` of the answer is False if the model saw only a part of the conversation (the ``X-Input-Complete``
    header of the service). It is not part of the dumped answer.

    Each call opens its own connection. The size limits of the service do not apply.

    Args:
        request: The conversation, as the model or as a mapping.
        settings: None reads them from the environment.

    Raises:
        RequestError: There is no text from the customer, or the conversation is too long and ON_LONG is not ``fit``.
        ConfigurationError: The model is not configured, or the server does not have it.
        LLMError: The model server gave no usable answer.
        pydantic.ValidationError: *request* does not match ClassificationRequest.
    """
    if not isinstance(request, ClassificationRequest):
        request = ClassificationRequest.model_validate(request)
    settings = settings or load_settings()
    try:
        conversation = aggregate_conversation(request.model_dump())
    except SkippedDocumentError as exc:
        raise RequestError(errors.INVALID) from exc
    taxonomy = load_prompt_taxonomy(settings)
    with llm_wrapper.open_session() as session:
        client = llm_wrapper.LLMClient(settings, chat_target(settings, settings.model or ""), session)
        classifier = classifier_for(settings, client.prepare(settings), taxonomy)
        client.warm_up(choose_window(None, client.target.context_limit, settings.ollama_num_ctx), logger.info)
        try:
            outcome = llm_wrapper.ollama_classify(conversation, client, classifier)
        except SkippedDocumentError as exc:
            raise RequestError(errors.TOO_LONG) from exc
    return ConversationAnswer(
        conversation_number=request.conversation_number,
        messages=request.messages,
        classification=Labels(**outcome.classification.as_dict()),
        input_complete=outcome.input_complete,
    )
