"""The service on a machine where requirements-index.txt is not installed."""

from __future__ import annotations

import sys
from typing import Any

# What was forked from has perhaps loaded them for others.
for name in [name for name in sys.modules if name.split(".")[0] in ("embedding_index", "main")]:
    del sys.modules[name]
missing: dict[str, Any] = dict.fromkeys(("chromadb", "numpy", "sqlalchemy", "bpe_openai", "tokenizers", "safetensors"))
sys.modules.update(missing)  # None makes an import fail as if the package were not there

import main  # noqa: E402 - after the packages are gone

app = main.app
