"""The student as a classifier that needs no model server: for ``--embedded-student`` and the review queue."""

from __future__ import annotations

from pathlib import Path

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from config import Taxonomy
from domain.conversation import Conversation
from embedded.baseline import Answer
from embedded.choice import BuiltInClassifier
from embedded.minilm import Encoder, open_encoder
from error_handler import ConfigurationError
from student.model import TRAIN, Judgement, Student, load_student, student_path

SURE = 0.5  # joint probability from which the labels of the student are more likely right than not


class StudentClassifier:
    """Labels a conversation with the student where it is sure, otherwise with *other*. Safe for several threads."""

    def __init__(self, student: Student, encoder: Encoder, other: BuiltInClassifier) -> None:
        self.model = student.name
        self.student = student
        self._encoder = encoder
        self._other = other
        self._limits = threadpool_limits(1, user_api="blas")

    def answer(self, conversation: Conversation) -> Answer:
        """Return the labels, and whose they are: the student's if all of them are right with a probability of SURE."""
        judgement = self.judge(conversation)
        if judgement.joint < SURE:
            return self._other.answer(conversation)
        outcome = self.student.outcome(judgement, conversation, 0)
        return Answer(outcome.classification, self.model, outcome.confidence)

    def judge(self, conversation: Conversation) -> Judgement:
        """Return what the student says about *conversation*, sure or not."""
        return self.student.answer(self._encoder, conversation)


def open_student_classifier(directory: Path, taxonomy: Taxonomy, other: BuiltInClassifier) -> StudentClassifier:
    """Return the classifier of the student in the state directory *directory*.

    Raises:
        ConfigurationError: There is no student, it is damaged, or it does not fit *taxonomy*.
    """
    student = load_student(directory)
    if student is None:
        raise ConfigurationError(f"There is no trained student at {student_path(directory)}; {TRAIN}")
    student.require_fields(taxonomy)
    return StudentClassifier(student, open_encoder(), other)
