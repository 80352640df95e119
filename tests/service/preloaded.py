"""Does the slow parts of a service start once, so that forks of this process inherit them."""

from __future__ import annotations

import main
from config import load_taxonomy
from embedded.baseline import BaselineClassifier
from service.dashboard import compiled_templates

main.app.openapi()  # FastAPI keeps it; it takes three quarters of a start
BaselineClassifier(load_taxonomy())  # re keeps its patterns
compiled_templates()
