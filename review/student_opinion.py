"""The opinion of a trained student on conversations to review, where there is a student."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from config import Taxonomy
from domain.conversation import Conversation
from error_handler import ConfigurationError, StateDirectoryError
from review.ranking import StudentOpinion
from student.choice import open_judge

logger = logging.getLogger(__name__)

AskStudent = Callable[[Conversation], StudentOpinion]


def open_student_opinion(directory: Path, taxonomy: Taxonomy) -> AskStudent | None:
    """Return what asks the student of the state directory *directory*; None if there is none that can be used."""
    try:
        judge = open_judge(directory, taxonomy)
    except (ConfigurationError, StateDirectoryError) as exc:
        logger.info("the review queue is ordered without the student: %s", exc)
        return None
    if judge is None:
        return None

    def ask(conversation: Conversation) -> StudentOpinion:
        judgement = judge(conversation)
        return StudentOpinion(judgement.labels, judgement.probability)

    return ask
