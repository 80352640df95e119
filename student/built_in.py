"""The student as a classifier that needs no model server: for ``--embedded-student`` and the review queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from config import Taxonomy
from domain.conversation import Conversation, student_plan
from embedded.baseline import Answer
from embedded.choice import BuiltInClassifier
from embedded.minilm import open_encoder
from error_handler import ConfigurationError
from student.model import TRAIN, Judgement, Student, load_student
from student.places import student_path

Judge = Callable[[Conversation], Judgement]

SURE = 0.5  # joint probability from which the labels of the student are more likely right than not


class StudentClassifier:
    """Labels a conversation with the student where it is sure, otherwise with *other*. Safe for several threads."""

    def __init__(self, student: Student, judge: Judge, other: BuiltInClassifier) -> None:
        self.model = student.name
        self._student, self._judge, self._other = student, judge, other

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        """Return ``answer`` of each conversation."""
        return [self.answer(conversation) for conversation in conversations]

    def answer(self, conversation: Conversation) -> Answer:
        """Return the labels, and whose they are: the student's if all of them are right with a probability of SURE."""
        judgement = self._judge(conversation)
        if judgement.joint < SURE:
            return self._other.answer(conversation)
        outcome = self._student.outcome(judgement, conversation, 0)
        plan = student_plan(self._student.provenance.plan, self.model)
        return Answer(outcome.classification, self.model, outcome.confidence, plan)


def open_student_classifier(directory: Path, taxonomy: Taxonomy, other: BuiltInClassifier) -> StudentClassifier:
    """Return the classifier of the student in the state directory *directory*.

    Raises:
        ConfigurationError: There is no student, it is damaged, or it does not fit *taxonomy*.
    """
    student = _loaded(directory, taxonomy)
    return StudentClassifier(student, judge_of(student), other)


def open_judge(directory: Path, taxonomy: Taxonomy) -> Judge:
    """Return what the student in the state directory *directory* says about a conversation; raises as above."""
    return judge_of(_loaded(directory, taxonomy))


def judge_of(student: Student) -> Judge:
    """Return what *student* says about a conversation; raise ConfigurationError if the encoder is missing or damaged.

    From now on, each matrix product of numpy in this process uses one thread: several wait for each other by spinning.
    """
    threadpool_limits(1, user_api="blas")
    return partial(student.answer, open_encoder())


def _loaded(directory: Path, taxonomy: Taxonomy) -> Student:
    student = load_student(directory)
    if student is None:
        raise ConfigurationError(f"There is no trained student at {student_path(directory)}; {TRAIN}")
    student.require_fields(taxonomy)
    return student
