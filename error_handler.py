"""The errors of the product, in one tree. docs/architecture.md draws it, with what follows from each.

The module that owns a library translates its exceptions (``raise ... from exc``). A message says what happened and what
to do. It never quotes a document, a prompt, an answer or a secret, because it ends in logs, files and status fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Exit codes of ``cli.py``; docs/operations.md explains each."""

    DONE = 0
    INCOMPLETE = 1
    CONFIGURATION = 2
    UNREACHABLE = 3
    FAILURE_THRESHOLD = 4
    LOCKED = 5
    INTERRUPTED = 130


class ErrorClass(StrEnum):
    """The kind of an error: it decides whether another attempt can help."""

    TRANSIENT = "transient"  # another attempt may succeed soon
    RESOURCE = "resource"  # another attempt may succeed when slots, memory or disk are free
    PERMANENT = "permanent"  # each attempt fails in the same way


class Reason(StrEnum):
    """The reason why a document has no result. A closed list, counted in summaries and files."""

    TRANSPORT = "transport"
    BUSY = "busy"
    TIMEOUT = "timeout"
    CONTEXT_OVERFLOW = "context_overflow"
    CUT_OFF = "cut_off"
    EMPTY = "empty"
    NOT_JSON = "not_json"
    WRONG_SHAPE = "wrong_shape"
    LABEL_OUTSIDE = "label_outside"
    REFUSED = "refused"
    STORE_FAILED = "store_failed"
    SKIPPED_NO_TEXT = "skipped_no_text"
    SKIPPED_NO_CUSTOMER = "skipped_no_customer"
    POISON = "poison"
    UNREADABLE = "unreadable"


class TriadError(Exception):
    """Base class of all errors that this product raises on purpose."""

    exit_code = ExitCode.CONFIGURATION
    error_class = ErrorClass.PERMANENT
    reason = Reason.REFUSED


class ConfigurationError(TriadError):
    """A setting, flag or file is wrong; the message names it."""


class IndexBlockedError(ConfigurationError):
    """Existing data prevents an index; the message holds the query that finds the data."""


class StateDirectoryError(TriadError):
    """A file of ``batch_files/`` cannot be read or written (rights, full disk)."""

    error_class = ErrorClass.RESOURCE


class DirectoryLockedError(TriadError):
    """Another worker holds ``batch_files/``."""

    exit_code = ExitCode.LOCKED


class StoreError(TriadError):
    """MongoDB failed; the driver's error is in ``__cause__``."""

    exit_code = ExitCode.UNREACHABLE
    reason = Reason.STORE_FAILED


class StoreUnavailableError(StoreError):
    """MongoDB is not reachable. It is unknown whether a write in flight was stored."""

    error_class = ErrorClass.TRANSIENT


class StoreForbiddenError(StoreError):
    """MongoDB refuses the credentials, or a permission is missing."""


class StoreRejectedError(StoreError):
    """MongoDB will never accept this document (too large, not encodable)."""


class StoreUnreadableError(StoreError):
    """MongoDB holds a document that is not valid BSON, so the driver cannot read it, nor those that come with it."""


class LLMError(TriadError):
    """The model server failed."""

    exit_code = ExitCode.UNREACHABLE


class LLMUnavailableError(LLMError):
    """The server gave no usable HTTP answer; another attempt may help."""

    error_class = ErrorClass.TRANSIENT
    reason = Reason.TRANSPORT


class LLMConnectionError(LLMUnavailableError):
    """The connection was refused, reset or cut off. The circuit breaker counts it."""


class LLMAbsentError(LLMConnectionError):
    """No connection was made, so the server may have to be started."""


class LLMBusyError(LLMUnavailableError):
    """The server has no room (429, 503, out of memory)."""

    error_class = ErrorClass.RESOURCE
    reason = Reason.BUSY


class LLMTimeoutError(LLMUnavailableError):
    """No complete answer within the timeout."""

    reason = Reason.TIMEOUT


class LLMOutageError(LLMError):
    """The server was away for longer than OUTAGE_LIMIT_S. The run ends; its documents stay pending."""

    reason = Reason.TRANSPORT


class LLMElsewhereError(LLMError):
    """One of several servers is away. The same question goes to another one, and the document keeps its attempts."""

    reason = Reason.TRANSPORT


class LLMOutdatedError(LLMOutageError):
    """The server lacks what every request needs. The run ends; its documents stay pending."""

    exit_code = ExitCode.CONFIGURATION
    reason = Reason.REFUSED


class LLMRejectedError(LLMError):
    """The server will never accept this request."""


class LLMFormError(LLMRejectedError):
    """The server cannot bind answers to the form of the request; the same question in a longer reply style may do."""


class LLMContextError(LLMRejectedError):
    """The prompt does not fit into the context window; the counts are those of the server, None if unknown."""

    reason = Reason.CONTEXT_OVERFLOW

    def __init__(self, message: str, *, prompt_tokens: int | None = None, window_tokens: int | None = None) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.window_tokens = window_tokens


class LLMModelError(LLMRejectedError):
    """The model is missing on the server, or not allowed."""


class LLMReplyError(LLMError):
    """Status 200 without a usable answer: cut_off, empty, not_json, wrong_shape, label_outside, context_overflow.

    *kept_tokens* is the server's count for a prompt that it cut.
    """

    def __init__(self, message: str, reason: Reason, kept_tokens: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.kept_tokens = kept_tokens


class SkippedDocumentError(TriadError):
    """The document is not classified. *reason* starts with ``skipped_``, or is context_overflow with ON_LONG=skip."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class UnreadableDocumentError(SkippedDocumentError):
    """The document is not valid BSON. A run quarantines it; elsewhere it has nothing to classify."""

    def __init__(self) -> None:
        super().__init__(
            "MongoDB holds it as invalid BSON, which the driver cannot read; replace or remove the broken field (often "
            "binary data of an old driver), then use --retry-failed",
            Reason.UNREADABLE,
        )


class PoisonDocumentError(TriadError):
    """The worker process died more than once while it handled this document."""

    reason = Reason.POISON


class JobError(TriadError):
    """A document job on the OpenAI Batch API failed. The ledger keeps billed work, so the same command resumes."""


class JobConnectionError(JobError):
    """OpenAI, or another server of the job, gives no usable answer. Its batches continue."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


class JobTimeoutError(JobError):
    """The job is not done by its deadline. Its batches continue, and the next run finds them."""

    exit_code = ExitCode.INCOMPLETE
    error_class = ErrorClass.TRANSIENT


class JobValidationError(JobError):
    """A schema, a document or a batch is not valid; the message names the place."""


class JobCostError(JobValidationError):
    """The job would cost more than ``--max-cost``; nothing was sent."""


class JobTemplateError(JobError):
    """A template cannot be parsed or rendered; the message names the template and the field, never a value."""


class JobProcessingError(JobError):
    """One document or its answer cannot be processed; the other documents continue.

    *is_final*: another attempt cannot help. *is_skip*: there is nothing to process in the document.
    """

    def __init__(self, message: str, *, is_final: bool = False, is_skip: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.is_skip = is_skip


class IndexingError(TriadError):
    """The embedding index failed. Paid vectors are kept, so the same command resumes."""


class ProviderUnavailableError(IndexingError):
    """The embedding provider gives no usable answer. It is unknown whether it billed the call."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


class ProviderBusyError(ProviderUnavailableError):
    """The provider is busy and processed nothing. *wait_s* is the wait that it asks for, None if unknown."""

    error_class = ErrorClass.RESOURCE

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class ProviderRejectedError(IndexingError):
    """The provider refuses this request. If it is split into halves, the valid part passes."""


class UnusableVectorsError(IndexingError):
    """The answer does not hold the requested vectors: wrong count or dimension, NaN, or zero."""


class EmbeddingCostError(IndexingError):
    """Embedding would cost more than ``--max-cost``; nothing was sent."""


class MixedIndexError(IndexingError):
    """The index holds vectors of another model or dimension, which cannot be compared."""


class VectorStoreError(IndexingError):
    """There is no index to search, or ChromaDB cannot use its files. They can be rebuilt from the stored vectors."""

    error_class = ErrorClass.RESOURCE


class DatabaseUnavailableError(IndexingError):
    """The database of DATABASE_URL cannot be reached or read."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One kind of error of the REST service: ``error.type`` in the body, the HTTP status, and the message."""

    name: str
    status: int
    message: str


class ReviewConflictError(TriadError):
    """A reviewer does not hold a conversation any more: its lease expired and another reviewer has it, or it is decided."""


class ReviewLabelError(TriadError):
    """A decision of a reviewer names a field or a label that is not in the taxonomy."""


class RequestError(TriadError):
    """The REST service refuses or fails one request; docs/service.md lists every *kind*.

    *message* None means that of the kind. *retry_after_s* None means that waiting does not help.
    """

    def __init__(self, kind: ErrorKind, message: str | None = None, *, retry_after_s: int | None = None) -> None:
        super().__init__(message or kind.message)
        self.kind = kind
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """The response body. All errors have the same shape."""
        return {"error": {"type": self.kind.name, "message": str(self)}}


class FailureThresholdError(TriadError):
    """Too many documents failed, so the run stopped."""

    exit_code = ExitCode.FAILURE_THRESHOLD


class ClusterUnavailableError(TriadError):
    """There is no Ray cluster at the address, or it does not accept this machine."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


class WorkerLostError(TriadError):
    """A worker on a Ray cluster died; other workers take over its documents when its leases have expired."""

    exit_code = ExitCode.INCOMPLETE
    error_class = ErrorClass.TRANSIENT


class RunInterruptedError(TriadError):
    """A signal stopped the run; everything is saved."""

    exit_code = ExitCode.INTERRUPTED
