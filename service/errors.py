"""Every way in which the REST service does not answer: a closed list, so that no sentence is made of what was sent."""

from __future__ import annotations

from error_handler import (
    ErrorKind,
    LLMBusyError,
    LLMContextError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    LLMReplyError,
    LLMTimeoutError,
    LLMUnavailableError,
    Reason,
    RequestError,
)

UNAVAILABLE_RETRY_AFTER_S = STOPPING_RETRY_AFTER_S = 5

MALFORMED = ErrorKind("MalformedRequestError", 400, "This is not an HTTP request; send HTTP/1.1.")
INVALID_JSON = ErrorKind("InvalidJSONError", 400, "The body is not one JSON object; send UTF-8 JSON.")
BAD_HEADER = ErrorKind("HeaderError", 400, "The Idempotency-Key must be 1 to 255 printable ASCII characters.")
UNAUTHENTICATED = ErrorKind(
    "AuthenticationError", 401, "The key is missing or wrong; send it as Authorization: Bearer KEY or X-API-Key: KEY."
)
NOT_FOUND = ErrorKind("NotFoundError", 404, "There is nothing at this path; POST /classify is the one to ask.")
METHOD_NOT_ALLOWED = ErrorKind(
    "MethodNotAllowedError", 405, "This path does not take this method; see the Allow header."
)
BODY_TOO_SLOW = ErrorKind("RequestTimeoutError", 408, "The body did not arrive in time; send it at once.")
TOO_LARGE = ErrorKind("PayloadTooLargeError", 413, "The body is larger than the service takes; send less text.")
NOT_JSON = ErrorKind(
    "UnsupportedMediaTypeError", 415, "Send Content-Type: application/json in UTF-8, without Content-Encoding."
)
WRONG_HOST = ErrorKind(
    "MisdirectedRequestError",
    421,
    "Without API keys only requests to this machine's own name are answered; ask 127.0.0.1, or set API_KEYS.",
)
INVALID = ErrorKind("ValidationError", 422, "messages: at least one message of the customer needs text.")
TOO_LONG = ErrorKind(
    "ConversationTooLongError", 422, "The conversation does not fit in the model's context window; send fewer messages."
)
KEY_REUSED = ErrorKind(
    "IdempotencyError", 422, "This Idempotency-Key was used with another body; use a new key for a new request."
)
TOO_MANY = ErrorKind("RateLimitError", 429, "Too many requests from this caller; wait for the seconds in Retry-After.")
HEAD_TOO_LARGE = ErrorKind("HeadTooLargeError", 431, "Path and headers are larger than 64 KiB; send less of them.")
INTERNAL = ErrorKind("InternalError", 500, "Something went wrong in the service; its log has the request id.")
UNUSABLE_ANSWER = ErrorKind(
    "ModelAnswerError", 502, "The model gave no usable answer, also when asked again; try once more or review by hand."
)
MODEL_AWAY = ErrorKind("ModelUnavailableError", 503, "The model server does not answer; try again after Retry-After.")
MODEL_MISSING = ErrorKind(
    "ModelUnavailableError",
    503,
    "The model server does not have the model that is configured; the service's log says more.",
)
MODEL_LOADING = ErrorKind("ModelUnavailableError", 503, "The model is being loaded; try again after Retry-After.")
MODEL_BUSY = ErrorKind(
    "ModelUnavailableError", 503, "The model server has no room for another request; try again after Retry-After."
)
QUEUE_FULL = ErrorKind(
    "QueueFullError", 503, "All places are taken and the queue is full; try again after Retry-After."
)
STOPPING = ErrorKind("ShuttingDownError", 503, "The service is being stopped; try again after Retry-After.")
INDEX_NOT_INSTALLED = ErrorKind(
    "IndexNotInstalledError",
    503,
    "The packages of the embedding index are missing here; install requirements-index.txt and start the service again.",
)
INDEX_EMPTY = ErrorKind(
    "IndexEmptyError",
    503,
    "There are no conversations in the index yet; run python cli.py index --batch --source conversations.",
)
INDEX_UNUSABLE = ErrorKind(
    "IndexUnusableError",
    503,
    "The index is damaged, not finished, of another model, or not set up right; the service's log says what to do.",
)
TEXT_STAYS = ErrorKind(
    "ExternalProviderError",
    503,
    "The text would be sent to an embedding provider outside this house; set ALLOW_EXTERNAL_LLM=true, or "
    "EMBEDDING_PROVIDER to ollama or local.",
)
EMBEDDING_AWAY = ErrorKind(
    "EmbeddingUnavailableError", 503, "The embedding provider does not answer; try again after Retry-After."
)
TOO_SLOW = ErrorKind("DeadlineError", 504, "The model did not answer within the time of a request; try again later.")


class CallerLeftError(RequestError):
    """The caller closed the connection; nobody reads the answer. Counted as status 499, as proxies do."""

    def __init__(self) -> None:
        super().__init__(ErrorKind("CallerLeft", 499, "The caller left."))


def request_error(exc: LLMError) -> RequestError:
    """Return what a caller is told about *exc*."""
    overflow = isinstance(exc, LLMContextError) or (
        isinstance(exc, LLMReplyError) and exc.reason is Reason.CONTEXT_OVERFLOW
    )
    if overflow:
        return RequestError(TOO_LONG)
    if isinstance(exc, LLMTimeoutError):
        return RequestError(TOO_SLOW)
    if isinstance(exc, LLMModelError):
        return RequestError(MODEL_MISSING, retry_after_s=UNAVAILABLE_RETRY_AFTER_S)
    if isinstance(exc, LLMBusyError):
        return RequestError(MODEL_BUSY, retry_after_s=UNAVAILABLE_RETRY_AFTER_S)
    if isinstance(exc, LLMUnavailableError | LLMOutageError):
        return RequestError(MODEL_AWAY, retry_after_s=UNAVAILABLE_RETRY_AFTER_S)
    return RequestError(UNUSABLE_ANSWER)
