"""What each start of a service does and a fork of a process that has imported this need not do again."""

from __future__ import annotations

import main
from config import load_taxonomy
from embedded.baseline import BaselineClassifier
from service.dashboard import compiled_templates

main.app.openapi()  # FastAPI keeps it; it takes three quarters of a start
BaselineClassifier(load_taxonomy())  # re keeps its patterns
compiled_templates()
