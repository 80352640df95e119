"""All errors of the REST service. A closed list of messages: none of them quotes a request."""

from __future__ import annotations

from error_handler import (
    ErrorKind,
    LLMBusyError,
    LLMError,
    LLMModelError,
    LLMOutageError,
    LLMTimeoutError,
    LLMUnavailableError,
    Reason,
    RequestError,
)

UNAVAILABLE_RETRY_AFTER_S = 5

_RETRY = "retry after the seconds in Retry-After."
_NO_MODEL = "ModelUnavailableError"

MALFORMED = ErrorKind("MalformedRequestError", 400, "This is not an HTTP request; send HTTP/1.1.")
INVALID_JSON = ErrorKind(
    "InvalidJSONError",
    400,
    "The body is not one JSON object in UTF-8, or has a duplicate key, NaN, half of a surrogate pair or deep nesting.",
)
BAD_HEADER = ErrorKind("HeaderError", 400, "The Idempotency-Key must be 1 to 255 printable ASCII characters.")
UNAUTHENTICATED = ErrorKind(
    "AuthenticationError", 401, "The key is missing or wrong; send it as Authorization: Bearer KEY or X-API-Key: KEY."
)
CROSS_SITE = ErrorKind("CrossSiteError", 403, "A page of another site sent this request; open the page of the service.")
NOT_FOUND = ErrorKind("NotFoundError", 404, "Not found. Use POST /classify.")
JOB_NOT_FOUND = ErrorKind(
    "JobNotFoundError", 404, "This key has no such job, or it was removed (API_JOB_RETENTION_S); POST /jobs again."
)
METHOD_NOT_ALLOWED = ErrorKind("MethodNotAllowedError", 405, "Method not allowed; use one of the Allow header.")
BODY_TOO_SLOW = ErrorKind("RequestTimeoutError", 408, "The body did not arrive in time; send it without pauses.")
NOT_HELD = ErrorKind(
    "ReviewConflictError", 409, "You do not hold this conversation any more; get the next one from /review/next."
)
NO_WORKER = ErrorKind("WorkerEndedError", 409, "This worker has ended or is not known; reload the page.")
FILES_IN_USE = ErrorKind(
    "QuarantineInUseError",
    409,
    "A worker uses these files now; stop its run on the page Runs, or wait until it has ended.",
)
DUPLICATE_ID = ErrorKind(
    "DuplicateIdError", 409, "Two conversations of the request have the same id; give each its own, or none."
)
TOO_LARGE = ErrorKind("PayloadTooLargeError", 413, "The body is too large; send less text.")
NOT_JSON = ErrorKind(
    "UnsupportedMediaTypeError", 415, "Send Content-Type: application/json in UTF-8, without Content-Encoding."
)
WRONG_HOST = ErrorKind(
    "MisdirectedRequestError", 421, "Without API keys the Host must be this machine; use 127.0.0.1, or set API_KEYS."
)
INVALID = ErrorKind("ValidationError", 422, "messages: at least one message from the customer needs visible text.")
TOO_LONG = ErrorKind(
    "ConversationTooLongError", 422, "The conversation does not fit in the model's context window; send fewer messages."
)
KEY_REUSED = ErrorKind(
    "IdempotencyError", 422, "This Idempotency-Key was used with another body; use a new key for a new request."
)
TOO_MANY = ErrorKind("RateLimitError", 429, f"Too many requests from this caller; {_RETRY}")
TOO_MANY_JOBS = ErrorKind("JobLimitError", 429, f"Too many jobs are not done yet (API_MAX_OPEN_JOBS); {_RETRY}")
HEAD_TOO_LARGE = ErrorKind("HeadTooLargeError", 431, "Path and headers exceed 64 KiB; shorten them.")
INTERNAL = ErrorKind("InternalError", 500, "Internal error; look up the request id in the log of the service.")
UNUSABLE_ANSWER = ErrorKind(
    "ModelAnswerError", 502, "The model gave no usable answer twice; retry, or label the conversation by hand."
)
MODEL_AWAY = ErrorKind(_NO_MODEL, 503, f"The model server does not answer; {_RETRY}")
MODEL_MISSING = ErrorKind(
    _NO_MODEL, 503, "The model server does not have the configured model; see the log of the service."
)
MODEL_LOADING = ErrorKind(_NO_MODEL, 503, f"The model is loading; {_RETRY}")
MODEL_BUSY = ErrorKind(_NO_MODEL, 503, f"The model server is busy; {_RETRY}")
QUEUE_FULL = ErrorKind("QueueFullError", 503, f"All slots are in use and the queue is full; {_RETRY}")
STOPPING = ErrorKind("ShuttingDownError", 503, f"The service is shutting down; {_RETRY}")
INDEX_NOT_INSTALLED = ErrorKind(
    "IndexNotInstalledError",
    503,
    "The packages of the embedding index are not installed; install requirements-index.txt and restart the service.",
)
INDEX_EMPTY = ErrorKind(
    "IndexEmptyError", 503, "The index has no conversations; run python cli.py index --batch --source conversations."
)
INDEX_UNUSABLE = ErrorKind(
    "IndexUnusableError",
    503,
    "The index is damaged, unfinished, from another model, or misconfigured; see the log of the service.",
)
TEXT_STAYS = ErrorKind(
    "ExternalProviderError",
    503,
    "The embedding provider is outside your network; set ALLOW_EXTERNAL_LLM=true, or "
    "EMBEDDING_PROVIDER to ollama or local.",
)
EMBEDDING_AWAY = ErrorKind("EmbeddingUnavailableError", 503, f"The embedding provider does not answer; {_RETRY}")
STORE_AWAY = ErrorKind(
    "StoreUnavailableError", 503, "MongoDB does not answer or refuses the operation; see the log of the service."
)
FILES_UNUSABLE = ErrorKind(
    "StateDirectoryError", 503, "The files of the worker cannot be read or written; see the log of the service."
)
TOO_SLOW = ErrorKind("DeadlineError", 504, "The model did not answer within API_REQUEST_TIMEOUT_S; retry later.")

BODY_ERRORS = (INVALID_JSON, BODY_TOO_SLOW, TOO_LARGE, NOT_JSON)
SIMILAR_ERRORS = (INDEX_NOT_INSTALLED, INDEX_EMPTY, INDEX_UNUSABLE, TEXT_STAYS, EMBEDDING_AWAY)
# Those of /review, apart from those of the body.
REVIEW_ERRORS = (UNAUTHENTICATED, WRONG_HOST, CROSS_SITE, TOO_MANY, INTERNAL, STOPPING, STORE_AWAY, TOO_SLOW)
# Those of /classify/batch; what happens to a conversation is in its result.
BATCH_ERRORS = (
    *(UNAUTHENTICATED, WRONG_HOST, INVALID, DUPLICATE_ID, TOO_MANY, INTERNAL, QUEUE_FULL, STOPPING),
    *(MODEL_AWAY, *BODY_ERRORS),
)
# Those of /jobs, apart from those of the body.
JOB_ERRORS = (*(UNAUTHENTICATED, WRONG_HOST, INVALID, TOO_MANY, INTERNAL, STOPPING, STORE_AWAY, TOO_SLOW),)
# The errors that /classify and /similar have in common, apart from those of the body.
COMMON_ERRORS = (
    *(UNAUTHENTICATED, WRONG_HOST, INVALID, TOO_MANY, INTERNAL, UNUSABLE_ANSWER),
    *(QUEUE_FULL, STOPPING, TOO_SLOW),
)


class CallerLeftError(RequestError):
    """The caller closed the connection. Counted as status 499, as proxies do."""

    def __init__(self) -> None:
        super().__init__(ErrorKind("CallerLeft", 499, "The caller left."))


def unavailable(kind: ErrorKind) -> RequestError:
    """Return the error of *kind* for a service or model server that may be back in UNAVAILABLE_RETRY_AFTER_S."""
    return RequestError(kind, retry_after_s=UNAVAILABLE_RETRY_AFTER_S)


def request_error(exc: LLMError) -> RequestError:
    """Return the error that the caller gets for *exc*."""
    if exc.reason is Reason.CONTEXT_OVERFLOW:
        return RequestError(TOO_LONG)
    if isinstance(exc, LLMTimeoutError):
        return RequestError(TOO_SLOW)
    if isinstance(exc, LLMModelError):
        return unavailable(MODEL_MISSING)
    if isinstance(exc, LLMBusyError):
        return unavailable(MODEL_BUSY)
    if isinstance(exc, LLMUnavailableError | LLMOutageError):
        return unavailable(MODEL_AWAY)
    return RequestError(UNUSABLE_ANSWER)
