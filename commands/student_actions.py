"""Carries out ``cli.py student``: trains and stores a student, and prints its report."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console

from commands.student_report import print_report
from commands.student_results import LessonReader, Lessons
from config import Settings, load_prompt_taxonomy
from domain.text import counted
from embedded.bfloat16 import bfloat16_if_fast
from embedded.minilm import FLOAT32, open_encoder
from error_handler import ConfigurationError, ExitCode
from mongo_client import DocumentStore
from student.choice import require_one_model
from student.heads import one_thread
from student.model import TRAIN, load_student, save_student
from student.places import create_folder, student_path, vectors_path
from student.training import train
from student.vector_cache import VectorCache
from utils.process import tell_line
from worker.plan import ask_plan


async def train_student(settings: Settings, limit: int) -> int:
    """Train a student on the *limit* newest results, store it in the state directory, and print its report."""
    require_one_model(settings)
    taxonomy = load_prompt_taxonomy(settings)
    create_folder(settings.batch_files_dir)
    store = DocumentStore(settings)
    try:
        await store.check()
        plan = await ask_plan(settings)
        start_s = time.monotonic()
        with one_thread(), VectorCache(vectors_path(settings.batch_files_dir)) as cache:
            arithmetic = bfloat16_if_fast() or FLOAT32
            encoder = await asyncio.to_thread(open_encoder, arithmetic)
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
    tell_line(_timing(lessons, arithmetic.name, read_s, time.monotonic() - start_s))
    print_report(Console(emoji=False, highlight=False), student, settings.batch_files_dir)
    return ExitCode.DONE


def _timing(lessons: Lessons, arithmetic: str, read_s: float, total_s: float) -> str:
    embedded = f"{counted(lessons.embedded, 'conversation')} in {arithmetic} (the vectors of the others were known)"
    return (
        f"student: trained in {total_s:.1f} s: {read_s - lessons.embedding_s:.1f} s to read, {lessons.embedding_s:.1f} s to embed "
        f"{embedded}, {total_s - read_s:.1f} s to fit and certify"
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
    print_report(Console(emoji=False, highlight=False), student, settings.batch_files_dir)
    return ExitCode.DONE
