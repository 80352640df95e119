"""What ``cli.py student`` does: train and store a student, and print its report."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from commands.student_results import LessonReader, Lessons
from config import Settings, load_prompt_taxonomy
from domain.text import counted
from embedded.minilm import open_encoder
from error_handler import ConfigurationError, ExitCode
from evaluation.intervals import proportion
from mongo_client import DocumentStore
from student.certificate import Certificate
from student.first_answer import open_log
from student.model import TRAIN, Student, load_student, save_student
from student.places import create_folder, student_path, vectors_path
from student.training import train
from student.vector_cache import VectorCache
from utils.process import tell_line
from worker.plan import ask_plan

BINS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


async def train_student(settings: Settings, limit: int) -> int:
    """Train a student on the *limit* newest results, store it in the state directory, and print its report."""
    taxonomy = load_prompt_taxonomy(settings)
    create_folder(settings.batch_files_dir)
    store = DocumentStore(settings)
    try:
        await store.check()
        plan = await ask_plan(settings)
        start_s = time.monotonic()
        with threadpool_limits(1, user_api="blas"), VectorCache(vectors_path(settings.batch_files_dir)) as cache:
            encoder = await asyncio.to_thread(open_encoder)
            lessons = await LessonReader(store, settings, taxonomy, plan, tell_line).read(limit, encoder, cache)
            read_s = time.monotonic() - start_s
            model = lessons.models.most_common(1)[0][0] if lessons.models else ""
            imitated = (model, plan.digest, plan.fingerprint)
            student = await asyncio.to_thread(
                train, lessons.examples, lessons.features, taxonomy, imitated, lessons.left_out, _StepLines()
            )
            await asyncio.to_thread(cache.keep_only, [one.input_sha256 for one in lessons.examples])
        student = save_student(settings.batch_files_dir, student)
    finally:
        await store.close()
    tell_line(_timing(lessons, read_s, time.monotonic() - start_s))
    print_report(Console(emoji=False, highlight=False), student, settings)
    return ExitCode.DONE


def _timing(lessons: Lessons, read_s: float, total_s: float) -> str:
    return (
        f"student: trained in {total_s:.1f} s: {read_s - lessons.embedding_s:.1f} s to read, {lessons.embedding_s:.1f} s to embed "
        f"{counted(lessons.embedded, 'conversation')} (the vectors of the others were known), {total_s - read_s:.1f} s to fit "
        "and certify"
    )


class _StepLines:
    """Prints a line for every 25th iteration."""

    def __call__(self, field: str, number: int) -> None:
        if number % 25 == 0:
            tell_line(f"student: fitting {field}, iteration {number}")


def report_student(settings: Settings) -> int:
    """Print the report of the student in the state directory; raise ConfigurationError if there is none."""
    student = load_student(settings.batch_files_dir)
    if student is None:
        raise ConfigurationError(f"There is no trained student at {student_path(settings.batch_files_dir)}; {TRAIN}")
    print_report(Console(emoji=False, highlight=False), student, settings)
    return ExitCode.DONE


def print_report(console: Console, student: Student, settings: Settings) -> None:
    """Print whether *student* can pay, how often it agrees with the model, and what is certified."""
    about = student.provenance
    console.print(
        f"{student.name}, trained {about.trained_at} to imitate {about.model}: {counted(about.trained, 'conversation')} learned "
        f"({about.corrected} with corrections), {about.held_out} held out.",
        markup=False,
        soft_wrap=True,
    )
    for reason, count in about.left_out.items():
        console.print(f"  {counted(count, 'result')} left out: {reason}", markup=False, soft_wrap=True)
    console.print("\nAgreement with the model on the held-out conversations, with 95 % intervals", markup=False)
    table = Table("confidence", *student.heads, "all fields", box=None)
    sample = student.sample
    agreed = np.column_stack([sample.agreed, sample.agreed.all(axis=1)])
    sure = np.column_stack([sample.probability, sample.scores])
    table.add_row("any", *(_cell(agreed[:, place]) for place in range(agreed.shape[1])))
    for low, high in zip(BINS, (*BINS[1:], 1.01), strict=True):
        inside = (sure >= low) & (sure < high)
        cells = [_cell(agreed[inside[:, place], place]) for place in range(agreed.shape[1])]
        table.add_row(f"{low:g} to {min(high, 1):g}", *cells)
    console.print(table)
    console.print("\nCertificates", markup=False)
    for one in about.certificates:
        console.print(f"  --student {one.promise:g}: {_certificate(one)}", markup=False, soft_wrap=True)
    for one in about.certificates:
        if one.threshold is not None:
            _print_audit(console, student, one, settings)


def _cell(agreed: NDArray[Any]) -> str:
    """Return the share, its interval and the number as text."""
    found = proportion(int(agreed.sum()), len(agreed))
    if found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f}, n {len(agreed)})"


def _certificate(one: Certificate) -> str:
    if one.threshold is None or one.lower_bound is None:
        return f"refused. {one.reason}"
    return (
        f"it takes {one.share:.0%} of the conversations (joint confidence {one.threshold:.3f} or more); {one.agreed} of "
        f"{one.taken} agreed, at least {one.lower_bound:.1%}"
    )


def _print_audit(console: Console, student: Student, one: Certificate, settings: Settings) -> None:
    with open_log(settings.batch_files_dir, student, one.promise) as log:
        if log.audit.audited:
            state = "withdrawn" if log.audit.is_broken else "in use"
            console.print(
                f"  audit of --student {one.promise:g}: {state}. {log.audit.sentence()}", markup=False, soft_wrap=True
            )
