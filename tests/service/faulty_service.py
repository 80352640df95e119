"""The service with an unexpected bug in it."""

from __future__ import annotations

import main
from service import routes
from service.contract import ClassificationRequest


def fail(request: ClassificationRequest, _settings: object) -> None:
    raise RuntimeError(f"unexpected: {request}")


routes.conversation_of = fail  # type: ignore[assignment]
app = main.app
