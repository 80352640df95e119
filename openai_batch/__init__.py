"""Document jobs on the OpenAI Batch API: any MongoDB collection through prompt templates, and back.

Other packages import the names below, ``openai_batch.schema_file``, and ``openai_batch.actions`` for the command line. It
imports the layers below ``worker`` only. docs/openai-batch.md is the tutorial and names the modules.
"""

from __future__ import annotations

from error_handler import JobConnectionError as ConnectionError  # noqa: A004 - the names of the contract
from error_handler import JobProcessingError as ProcessingError
from error_handler import JobTemplateError as TemplateError
from error_handler import JobTimeoutError as TimeoutError  # noqa: A004
from error_handler import JobValidationError as ValidationError
from openai_batch.job_config import (
    AppConfig,
    BatchConfig,
    DatabaseConfig,
    DocumentFields,
    NotificationConfig,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
    StatusConfig,
)
from openai_batch.processor import DocumentBatchProcessor, JobResult

__all__ = [
    "AppConfig",
    "BatchConfig",
    "ConnectionError",
    "DatabaseConfig",
    "DocumentBatchProcessor",
    "DocumentFields",
    "JobResult",
    "NotificationConfig",
    "OpenAIConfig",
    "ProcessingError",
    "PromptConfig",
    "SchemaConfig",
    "StatusConfig",
    "TemplateError",
    "TimeoutError",
    "ValidationError",
]
