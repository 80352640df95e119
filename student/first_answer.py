"""The student before the model in a run: it answers where it is sure, and withdraws when its audit fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from config import Taxonomy
from domain.conversation import Conversation, Outcome
from error_handler import ConfigurationError
from student.audit import Audit
from student.audit_log import AuditLog
from student.built_in import Judge, judge_of
from student.certificate import Certificate
from student.model import TRAIN, Student, load_student
from student.places import audit_path, student_path
from worker.intake import Classify
from worker.staleness import Plan

logger = logging.getLogger(__name__)

TRAIN_AGAIN = "train it again (python cli.py student train), or leave out --student"


class FirstAnswer:
    """A classify step that asks the student before *model*, which it wraps.

    Conversations whose joint probability is at or above the threshold of *certificate* are the student's. The model gets the
    others, and those that *log* draws for the audit. When the audit says that the promise is broken, the model gets all, and
    *tell* gets a sentence.
    """

    def __init__(
        self, student: Student, judge: Judge, certificate: Certificate, log: AuditLog, tell: Callable[[str], None]
    ) -> None:
        if certificate.threshold is None:
            raise ValueError("nothing is certified")
        self._student, self._judge, self._threshold = student, judge, certificate.threshold
        self._log, self._tell = log, tell

    def before(self, model: Classify) -> Classify:
        """Return the classify step."""

        async def classify(conversation: Conversation, rounds: int) -> Outcome:
            if self._log.audit.is_broken:
                return await model(conversation, rounds)
            start_s = time.monotonic()
            judgement = await asyncio.to_thread(self._judge, conversation)
            if judgement.joint < self._threshold:
                return await model(conversation, rounds)
            key = conversation.transcript_sha256
            share = self._log.drawn(key)
            if share is None:
                return self._student.outcome(judgement, conversation, round((time.monotonic() - start_s) * 1000))
            outcome = await model(conversation, rounds)
            await self._compare(key, share, agreed=judgement.agrees_with(outcome.classification))
            return outcome

        return classify

    async def _compare(self, key: str, share: float, *, agreed: bool) -> None:
        if await asyncio.to_thread(self._log.record, key, share, agreed=agreed):
            logger.warning("%s withdraws: %s", self._student.name, self._log.audit.sentence())
            self._tell(withdrawn(self._student, self._log))


def withdrawn(student: Student, log: AuditLog) -> str:
    """Return the sentence about a student that has withdrawn."""
    return (
        f"{student.name} has withdrawn, and the model labels all conversations: {log.audit.sentence()}. --only student lets "
        "the model redo its results."
    )


def open_log(directory: Path, student: Student, promise: float) -> AuditLog:
    """Return the audit of *student* in the state directory *directory*; raise StateDirectoryError if it cannot be used."""
    found = student.certificate(promise)
    sample = (found.taken, found.taken - found.agreed) if found is not None else (0, 0)
    return AuditLog(audit_path(directory), student.name, Audit(promise, *sample))


def open_first_answer(
    directory: Path, promise: float, plan: Plan, taxonomy: Taxonomy, tell: Callable[[str], None]
) -> tuple[FirstAnswer | None, AuditLog]:
    """Return the student of the state directory *directory* for a run with *plan*, and its audit, which the caller closes.

    The student is None, and *tell* has got the sentence, if it has withdrawn.

    Raises:
        ConfigurationError: There is no student, it is damaged, it has no certificate for *promise*, or it imitates another
            model, prompt or taxonomy.
        StateDirectoryError: The audit cannot be used.
    """
    student = load_student(directory)
    if student is None:
        raise ConfigurationError(
            f"--student needs a trained student, and there is none at {student_path(directory)}; {TRAIN}"
        )
    student.require_fields(taxonomy)
    require_plan(student, plan)
    certificate = require_certificate(student, promise)
    judge = judge_of(student)
    log = open_log(directory, student, promise)
    if log.audit.is_broken:
        tell(withdrawn(student, log))
        return None, log
    audited = f" Audit: {log.audit.sentence()}." if log.audit.audited or log.audit.is_suspicious else ""
    tell(
        f"{student.name} answers where it is sure: {certificate.share:.0%} of the held-out conversations, of which it agrees "
        f"with the model on at least {certificate.lower_bound:.1%}.{audited}"
    )
    return FirstAnswer(student, judge, certificate, log, tell), log


def require_certificate(student: Student, promise: float) -> Certificate:
    """Return the certificate of *student* for *promise*.

    Raises:
        ConfigurationError: There is none.
    """
    certificate = student.certificate(promise)
    if certificate is not None and certificate.threshold is not None:
        return certificate
    certificates = student.provenance.certificates
    held = [f"{one.promise:g}" for one in certificates if one.threshold is not None]
    known = ", ".join(f"{one.promise:g}" for one in certificates)
    reason = certificate.reason if certificate is not None else f"training certifies only {known}"
    other = f"Use --student {held[-1]}, or leave it out" if held else "Leave out --student"
    raise ConfigurationError(f"--student {promise:g} is refused: {reason}. {other}.")


def require_plan(student: Student, plan: Plan) -> None:
    """Raise ConfigurationError if *student* imitates another model, prompt or options than *plan*."""
    learned = student.provenance
    same_digest = learned.model_digest is not None and learned.model_digest == plan.digest
    if plan.fingerprint == learned.plan:
        return
    if same_digest and plan.named is not None and plan.named(learned.model) == learned.plan:
        return  # the same model under another name
    raise ConfigurationError(
        f"--student is refused: since {student.name} was trained to imitate {learned.model}, the model, the prompt, the "
        f"taxonomy or the options of the model have changed; {TRAIN_AGAIN}."
    )
