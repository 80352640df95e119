"""The flags of ``cli.py student``. Its packages are loaded when it runs."""

from __future__ import annotations

import argparse

from commands.flags import Command, add_model_flags, positive
from config import Settings
from student.choice import require_packages

RESULTS = 20_000


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["train", "report"],
        help="train: learn from the stored results and certify; report: print what the last training found",
    )
    group = parser.add_argument_group("student")
    group.add_argument(
        "--limit", type=positive, default=RESULTS, metavar="N", help=f"learn from the N newest results ({RESULTS:,})"
    )
    add_model_flags(parser.add_argument_group("model"))


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    require_packages("scipy")
    from commands import student_actions  # noqa: PLC0415 - other commands must not wait for numpy and scipy

    if arguments.action == "train":
        return await student_actions.train_student(settings, arguments.limit)
    return student_actions.report_student(settings)


COMMAND = Command("student", "Train a student on the stored results, or report how well it does.", _add_flags, _run)
