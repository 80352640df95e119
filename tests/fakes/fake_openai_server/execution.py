"""One request of /v1/chat/completions or /v1/embeddings, sent alone or as a line of a batch."""

from collections.abc import Mapping
from typing import Any

from .answers import (
    chat_completion,
    embedding_inputs,
    native_dimensions,
    packed_embedding,
    prompt_tokens,
    sparse_vector,
)
from .knobs import Knobs

_API_REFERENCE = "Please check the API reference: https://platform.openai.com/docs/api-reference."


class ApiError(Exception):
    """An answer that is not 2xx."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, code, param, kind)


def error_body(
    message: str, code: str | None = None, param: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def execute(url: str, body: Mapping[str, Any], request_id: str, created: int, knobs: Knobs) -> dict[str, Any]:
    """The body of the 200.

    Raises:
        ApiError: The request is refused.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "you must provide a model parameter")
    if knobs.models is not None and model not in knobs.models:
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise ApiError(404, message, "model_not_found")
    if url == "/v1/embeddings":
        return _embed(body, knobs)
    if url == "/v1/chat/completions":
        return _chat(body, request_id, created, knobs)
    raise ApiError(404, f"The fake does not play {url}: use /v1/chat/completions or /v1/embeddings.")


def _chat(body: Mapping[str, Any], request_id: str, created: int, knobs: Knobs) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise ApiError(400, "Missing required parameter: 'messages'.", "missing_required_parameter", "messages")
    if not messages:
        message = (
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
        )
        raise ApiError(400, message, "empty_array", "messages")
    if body.get("stream"):
        raise ApiError(400, "The fake does not stream: send stream=false.", "unsupported_value", "stream")
    if knobs.reasoning:
        _require_options_of_reasoning(body)
    tokens = prompt_tokens(body)
    if tokens > knobs.context_length:
        message = (
            f"This model's maximum context length is {knobs.context_length} tokens. However, your messages resulted"
            f" in {tokens} tokens. Please reduce the length of the messages."
        )
        raise ApiError(400, message, "context_length_exceeded", "messages")
    return chat_completion(body, request_id, created, knobs.reply)


def _require_options_of_reasoning(body: Mapping[str, Any]) -> None:
    """Refuse what the o series and GPT-5 refuse, one field at a time."""
    if "max_tokens" in body:
        message = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        raise ApiError(400, message, "unsupported_parameter", "max_tokens")
    if body.get("temperature", 1) != 1:
        given = body["temperature"]
        message = f"Unsupported value: 'temperature' does not support {given} with this model. Only the default (1) value is supported."
        raise ApiError(400, message, "unsupported_value", "temperature")


def vector_length(body: Mapping[str, Any], knobs: Knobs) -> int:
    """Length of the vectors that the request asks for.

    Raises:
        ApiError: ``dimensions`` is not allowed for the model, or out of range.
    """
    model = str(body["model"])
    native = knobs.dimensions or native_dimensions(model)
    wanted = body.get("dimensions")
    if wanted is None:
        return native
    if not model.startswith("text-embedding-3") and knobs.dimensions is None:
        raise ApiError(400, "This model does not support specifying dimensions.")
    if not isinstance(wanted, int) or not 1 <= wanted <= native:
        message = f"Invalid value for 'dimensions' = {wanted}. Must be between 1 and {native}."
        raise ApiError(400, message, None, "dimensions")
    return wanted


def checked_inputs(body: Mapping[str, Any], knobs: Knobs) -> list[tuple[str, int]]:
    """Texts and tokens of an embeddings request within all limits.

    Raises:
        ApiError: With the message and code of the real service.
    """
    try:
        inputs = embedding_inputs(body.get("input"))
    except ValueError:
        raise ApiError(400, f"'$.input' is invalid. {_API_REFERENCE}") from None
    if len(inputs) > knobs.max_inputs or not all(text for text, _ in inputs):
        raise ApiError(400, f"'$.input' is invalid. {_API_REFERENCE}")
    for _, tokens in inputs:
        if tokens > knobs.max_input_tokens:
            message = (
                f"This model's maximum context length is {knobs.max_input_tokens} tokens, however you requested"
                f" {tokens} tokens ({tokens} in your prompt; 0 for the completion)."
                " Please reduce your prompt; or completion length."
            )
            raise ApiError(400, message)
    total = sum(tokens for _, tokens in inputs)
    if total > knobs.max_request_tokens:
        message = f"Requested {total} tokens, max {knobs.max_request_tokens} tokens per request"
        raise ApiError(400, message, "max_tokens_per_request", None, "max_tokens_per_request")
    return inputs


def _embed(body: Mapping[str, Any], knobs: Knobs) -> dict[str, Any]:
    inputs = checked_inputs(body, knobs)
    length = vector_length(body, knobs)
    packed = body.get("encoding_format", "float") == "base64"
    data = [
        {"object": "embedding", "index": place, "embedding": encoded(sparse_vector(text, length), length, packed)}
        for place, (text, _) in enumerate(inputs)
    ]
    tokens = sum(tokens for _, tokens in inputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body["model"], "usage": usage}


def encoded(sparse: Mapping[int, float], length: int, packed: bool) -> str | list[float]:
    """A vector in the form that the request asked for."""
    if packed:
        return packed_embedding(sparse, length)
    vector = [0.0] * length
    for place, value in sparse.items():
        vector[place] = value
    return vector
