"""The flags of ``cli.py evaluate``. Its packages are loaded when it runs."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from pathlib import Path

from pydantic import SecretStr

from commands.flags import Command, add_model_flags, positive, require_packages
from commands.subset_flags import add_subset_flags, subset_of
from config import Settings
from error_handler import ConfigurationError
from storage.files import require_replaceable

NEEDED, INSTALL = ("numpy", "scipy"), "pip install -r requirements-evaluation.txt"
EMBEDDED_DATABASE = Path(__file__).parent.parent / "data" / "embedded" / "db"


def _field_and_share(text: str) -> tuple[str, float]:
    name, separator, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not separator or not name or not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be FIELD=SHARE with a share from 0 to 1, for example intent=0.8")
    return name, share


def _add_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("evaluation")
    what.add_argument(
        "--gold",
        metavar="SOURCE",
        help="gold labels: a JSONL or CSV file, collection:NAME, corrections (of the reviewers), or "
        "control (those of the random control sample)",
    )
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two results collections, or files that --output has written; with --gold also by accuracy",
    )
    what.add_argument(
        "--shares", action="store_true", help="estimate the share of each label among all results, with intervals"
    )
    what.add_argument(
        "--fail-under",
        type=_field_and_share,
        action="append",
        default=[],
        metavar="FIELD=SHARE",
        help="exit with 1 if the accuracy of FIELD is below SHARE (0 to 1); repeatable",
    )
    what.add_argument("--html", type=Path, metavar="FILE", help="write the report to FILE as one HTML page")
    what.add_argument("--output", type=Path, metavar="FILE", help="write the report to FILE as JSON")
    what.add_argument("--embedded", action="store_true", help="use the embedded MongoDB, with the results of make run")
    add_subset_flags(parser.add_argument_group("subset"))
    fresh = parser.add_argument_group("fresh results")
    fresh.add_argument(
        "--run", type=positive, metavar="N", help="classify N gold conversations first; the source is not changed"
    )
    fresh.add_argument(
        "--run-into", metavar="NAME", help="collection for the results of --run (the results collection + _evaluation)"
    )
    fresh.add_argument(
        "--max-concurrent", "--concurrent", metavar="N", help="concurrent model calls (MAX_CONCURRENT; 5)"
    )
    add_model_flags(fresh)


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run the evaluation; see ``Command``."""
    _check_flags(arguments)
    arguments.subset = subset_of(arguments, settings)
    if arguments.shares and arguments.subset.name:
        raise ConfigurationError("--shares reads all results: leave out --filter, --since and --until.")
    require_packages("evaluate", NEEDED, INSTALL)
    from evaluation import actions  # noqa: PLC0415 - other commands must not wait for scipy

    with ExitStack() as stack:
        if arguments.embedded:
            from embedded.replica_set import ReplicaSetMongod  # noqa: PLC0415 - only for --embedded

            mongod = await asyncio.to_thread(stack.enter_context, ReplicaSetMongod(EMBEDDED_DATABASE))
            settings = settings.model_copy(update={"mongodb_uri": SecretStr(mongod.uri)})
        return await actions.run(arguments, settings)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or would have no effect, and files that could not be written."""
    if not arguments.gold and not arguments.compare:
        raise ConfigurationError(
            "evaluate requires --gold SOURCE (a file, collection:NAME, corrections or control) or --compare A B."
        )
    useless = {
        "--run, --shares and --fail-under judge one results collection: leave out --compare": arguments.compare
        and (arguments.run or arguments.shares or arguments.fail_under),
        "--run-into requires --run N": arguments.run_into and not arguments.run,
        "--shares requires gold labels drawn at random: use --gold control": arguments.shares
        and arguments.gold == "corrections",
        "--shares reads all results, and --run makes only N: leave out one of them": arguments.shares and arguments.run,
    }
    for sentence, is_so in useless.items():
        if is_so:
            raise ConfigurationError(f"{sentence}.")
    for name in ("output", "html"):
        if getattr(arguments, name):
            require_replaceable(getattr(arguments, name), f"--{name}")


COMMAND = Command(
    "evaluate",
    "Compare labels with gold labels: accuracy, confusions, calibration, two models, shares.",
    _add_flags,
    _run,
)
