"""The local files of one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.batch_file_manager import BatchFiles


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return the folder of ``files``; it does not exist yet."""
    return tmp_path / "batch_files"


@pytest.fixture
def files(directory: Path) -> BatchFiles:
    """Return the local files of a worker, with nothing in them."""
    return BatchFiles(directory)
