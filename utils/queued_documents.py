"""Which documents wait in the local files of a worker. Reads only: a worker may be using them."""

from __future__ import annotations

import logging
from pathlib import Path

from utils import extended_json

logger = logging.getLogger(__name__)


def queued_keys(directory: Path) -> set[bytes]:
    """Return the ``id_key`` of each document in the retry queue or in quarantine under *directory*.

    A file that cannot be read is passed over with a warning; in MongoDB its documents say failed as well.
    """
    keys: set[bytes] = set()
    for path in sorted(path for kind in ("retry", "quarantine") for path in (directory / kind).glob("batch_*.json")):
        try:
            entries = extended_json.loads(path.read_bytes())
            keys |= {extended_json.id_key(entry["conversation_id"]) for entry in entries}
        except FileNotFoundError:
            continue  # worked off in this moment
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("%s cannot be read; its documents count by their status alone", path)
    return keys
