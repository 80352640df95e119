"""Every error of the product, in one tree.

::

    TriadError                      anything this product raises on purpose
    ├── ConfigurationError          a setting, flag, file or index is wrong          exit 2
    │   └── IndexBlockedError       existing data prevents a needed index            exit 2
    ├── StateDirectoryError         batch_files/ cannot be read or written           exit 2
    ├── DirectoryLockedError        another worker holds batch_files/                exit 5
    ├── StoreError                  MongoDB
    │   ├── StoreUnavailableError   not reachable, or away for too long              exit 3
    │   ├── StoreForbiddenError     credentials or rights are missing                exit 3
    │   └── StoreRejectedError      MongoDB will never take this document            quarantine
    ├── LLMError                    the model server
    │   ├── LLMUnavailableError     no usable HTTP answer; another attempt may help  retry
    │   │   ├── LLMConnectionError  refused, reset or cut off                        circuit breaker
    │   │   ├── LLMBusyError        429, 503, or the server is out of memory         retry
    │   │   └── LLMTimeoutError     no answer within the time-out                    retry
    │   ├── LLMOutageError          the server stayed away beyond the limit          exit 3
    │   ├── LLMRejectedError        the server will never take this request          quarantine
    │   │   ├── LLMContextError     the prompt is longer than the context window     quarantine
    │   │   └── LLMModelError       the model is missing or not allowed              exit 2 or 3
    │   └── LLMReplyError           HTTP 200, and still not an answer                repair, then retry queue
    ├── SkippedDocumentError        nothing in the document to classify              status "skipped"
    ├── PoisonDocumentError         the document ended the worker twice              quarantine
    ├── JobError                    document jobs on the OpenAI Batch API
    │   ├── JobConnectionError      OpenAI or the webhook cannot be reached          exit 3
    │   ├── JobTimeoutError         no end before the deadline; the batch goes on    exit 1
    │   ├── JobValidationError      a schema, a document or a batch is not usable    exit 2
    │   │   └── JobCostError        the job would cost more than --max-cost          exit 2
    │   ├── JobTemplateError        a template cannot be rendered                    exit 2
    │   └── JobProcessingError      a document or its answer cannot be processed     status "failed"
    ├── IndexingError               the embedding index; vectors that were paid for are kept
    │   ├── ProviderUnavailableError  the embedding provider gives no usable answer  exit 3
    │   │   └── ProviderBusyError   it asks to wait, and took nothing                waits
    │   ├── ProviderRejectedError   it will never take this request                  item "failed"
    │   ├── UnusableVectorsError    its answer is not the vectors asked for          item "failed"
    │   ├── EmbeddingCostError      embedding would cost more than --max-cost        exit 2
    │   ├── MixedIndexError         the index holds vectors of another model         exit 2
    │   ├── VectorStoreError        ChromaDB cannot read or write its files          exit 2
    │   └── DatabaseUnavailableError  DATABASE_URL cannot be read                    exit 3
    ├── RequestError                the REST service refuses or fails one request    HTTP status
    ├── FailureThresholdError       too many documents fail; the run stops           exit 4
    └── RunInterruptedError         SIGINT or SIGTERM                                exit 130

A foreign exception is translated in the module that owns its library (``raise ... from exc``).
Messages are one sentence that says what is wrong and what to do; they never quote a document, a
prompt, an answer or a secret, because they end in logs, files and status fields.
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
    """What another attempt can do about an error."""

    TRANSIENT = "transient"  # the same attempt may work in a moment
    RESOURCE = "resource"  # it may work when something is freed: slots, memory, disk
    PERMANENT = "permanent"  # it will fail the same way each time


class Reason(StrEnum):
    """Why a document has no result: a closed list, counted in summaries and files."""

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


class TriadError(Exception):
    """Base of everything this product raises on purpose."""

    exit_code = ExitCode.CONFIGURATION
    error_class = ErrorClass.PERMANENT
    reason = Reason.REFUSED


class ConfigurationError(TriadError):
    """A setting, flag or file is wrong; the message names it."""


class IndexBlockedError(ConfigurationError):
    """Existing data prevents a needed index; the message holds the query that finds it."""


class StateDirectoryError(TriadError):
    """A file of ``batch_files/`` cannot be read or written (rights, full disk)."""

    error_class = ErrorClass.RESOURCE


class DirectoryLockedError(TriadError):
    """Another worker holds ``batch_files/``."""

    exit_code = ExitCode.LOCKED


class StoreError(TriadError):
    """MongoDB; the precise driver error is in ``__cause__``."""

    exit_code = ExitCode.UNREACHABLE
    reason = Reason.STORE_FAILED


class StoreUnavailableError(StoreError):
    """MongoDB is not reachable. Whether a write in flight was stored is unknown."""

    error_class = ErrorClass.TRANSIENT


class StoreForbiddenError(StoreError):
    """MongoDB refuses the credentials, or they lack a right."""


class StoreRejectedError(StoreError):
    """MongoDB will never take this document (too large, not encodable)."""


class LLMError(TriadError):
    """The model server."""

    exit_code = ExitCode.UNREACHABLE


class LLMUnavailableError(LLMError):
    """The server gave no usable HTTP answer; another attempt may help."""

    error_class = ErrorClass.TRANSIENT
    reason = Reason.TRANSPORT


class LLMConnectionError(LLMUnavailableError):
    """The connection was refused, reset or cut off; counted by the circuit breaker."""


class LLMBusyError(LLMUnavailableError):
    """The server has no room (429, 503, out of memory)."""

    error_class = ErrorClass.RESOURCE
    reason = Reason.BUSY


class LLMTimeoutError(LLMUnavailableError):
    """No complete answer within the time-out."""

    reason = Reason.TIMEOUT


class LLMOutageError(LLMError):
    """The server stayed away for longer than OUTAGE_LIMIT_S; the run ends, its documents wait."""

    reason = Reason.TRANSPORT


class LLMRejectedError(LLMError):
    """The server will never take this request as it is."""


class LLMContextError(LLMRejectedError):
    """The prompt does not fit in the model's context window; the counts are what the server told, or None."""

    reason = Reason.CONTEXT_OVERFLOW

    def __init__(self, message: str, *, prompt_tokens: int | None = None, window_tokens: int | None = None) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.window_tokens = window_tokens


class LLMModelError(LLMRejectedError):
    """The model is missing on the server, or not allowed."""


class LLMReplyError(LLMError):
    """The server answered 200, and it is still not an answer.

    *reason* is one of cut_off, empty, not_json, wrong_shape, label_outside, context_overflow.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class SkippedDocumentError(TriadError):
    """The document is not to be classified; *reason* is a ``skipped_`` one, or context_overflow with ON_LONG=skip."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class PoisonDocumentError(TriadError):
    """The worker process died while it handled this document, more than once."""

    reason = Reason.POISON


class JobError(TriadError):
    """A document job on the OpenAI Batch API; what was billed is in the ledger, so the same command goes on."""


class JobConnectionError(JobError):
    """OpenAI (or another server of the job) gives no usable answer; the batches there go on."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


class JobTimeoutError(JobError):
    """The job is not done before its deadline; its batches go on and are found by the next run."""

    exit_code = ExitCode.INCOMPLETE
    error_class = ErrorClass.TRANSIENT


class JobValidationError(JobError):
    """A schema, a document or a batch is not what it must be; the message names the place."""


class JobCostError(JobValidationError):
    """The job would cost more than it may; nothing was sent."""


class JobTemplateError(JobError):
    """A template cannot be parsed or rendered; the message names the template and the field, never a value."""


class JobProcessingError(JobError):
    """One document cannot be prepared, or its answer not be used; the others go on.

    *is_final* where another attempt cannot help; *is_skip* where there is nothing in the document to ask about.
    """

    def __init__(self, message: str, *, is_final: bool = False, is_skip: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.is_skip = is_skip


class IndexingError(TriadError):
    """The embedding index; every vector that was paid for is kept, so the same command goes on."""


class ProviderUnavailableError(IndexingError):
    """The embedding provider gives no usable answer; whether it billed the call is unknown."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


class ProviderBusyError(ProviderUnavailableError):
    """The provider takes nothing now, and has taken nothing; *wait_s* is what it says, None where it says nothing."""

    error_class = ErrorClass.RESOURCE

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class ProviderRejectedError(IndexingError):
    """The provider refuses this request; in halves, what is not at fault passes."""


class UnusableVectorsError(IndexingError):
    """An answer without the vectors that were asked for: count, dimension, NaN, zero."""


class EmbeddingCostError(IndexingError):
    """Embedding would cost more than it may; nothing was sent."""


class MixedIndexError(IndexingError):
    """The index holds vectors of another model or dimension; they cannot be compared."""


class VectorStoreError(IndexingError):
    """There is no index to search, or ChromaDB cannot read or write its files, which are built from the stored vectors."""

    error_class = ErrorClass.RESOURCE


class DatabaseUnavailableError(IndexingError):
    """The database of DATABASE_URL cannot be reached or read."""

    exit_code = ExitCode.UNREACHABLE
    error_class = ErrorClass.TRANSIENT


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One way in which the REST service does not answer: ``error.type`` of the body, its HTTP status, its sentence."""

    name: str
    status: int
    message: str


class RequestError(TriadError):
    """The REST service refuses or fails one request; docs/service.md lists every *kind*.

    *message* None is the sentence of the kind. *retry_after_s* None: waiting alone does not help.
    """

    def __init__(self, kind: ErrorKind, message: str | None = None, *, retry_after_s: int | None = None) -> None:
        super().__init__(message or kind.message)
        self.kind = kind
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """The body of the answer, the same shape for every error."""
        return {"error": {"type": self.kind.name, "message": str(self)}}


class FailureThresholdError(TriadError):
    """Too large a share of the documents fails; the run was stopped to save the rest."""

    exit_code = ExitCode.FAILURE_THRESHOLD


class RunInterruptedError(TriadError):
    """A signal asked the run to stop; everything is saved."""

    exit_code = ExitCode.INTERRUPTED
