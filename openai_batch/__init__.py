"""Document jobs on the OpenAI Batch API; docs/openai-batch.md is the tutorial.

Names are loaded when they are used: the openai package takes longer to load than the rest of the product.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "error_handler": {
        "ConnectionError": "JobConnectionError",
        "ProcessingError": "JobProcessingError",
        "TemplateError": "JobTemplateError",
        "TimeoutError": "JobTimeoutError",
        "ValidationError": "JobValidationError",
    },
    "openai_batch.job_config": {
        name: name
        for name in (
            "AppConfig",
            "BatchConfig",
            "DatabaseConfig",
            "DocumentFields",
            "NotificationConfig",
            "OpenAIConfig",
            "PromptConfig",
            "SchemaConfig",
            "StatusConfig",
        )
    },
    "openai_batch.processor": {"DocumentBatchProcessor": "DocumentBatchProcessor", "JobResult": "JobResult"},
}

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


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), names[name])
    raise AttributeError(f"openai_batch has no {name}")
