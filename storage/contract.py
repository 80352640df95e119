"""The types of the document store, ``mongo_client.DocumentStore``."""

from __future__ import annotations

from typing import Any, Literal

Document = dict[str, Any]
Selection = Literal["pending", "sweep", "failed", "all"]
FinalStatus = Literal["processed", "failed", "skipped"]
