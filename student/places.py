"""Where the files of a student are in a state directory."""

from __future__ import annotations

from pathlib import Path

from storage.files import explained

FOLDER = "student"


def student_path(directory: Path) -> Path:
    """Return the file of the student in the state directory *directory*."""
    return directory / FOLDER / "student.safetensors"


def audit_path(directory: Path) -> Path:
    """Return the file of its audits."""
    return directory / FOLDER / "audit.sqlite"


def vectors_path(directory: Path) -> Path:
    """Return the file of the vectors of conversations."""
    return directory / FOLDER / "vectors.sqlite"


def create_folder(directory: Path) -> None:
    """Create the folder of these files with mode 0700; raise StateDirectoryError if that fails."""
    folder = directory / FOLDER
    with explained(f"{folder} cannot be created"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
