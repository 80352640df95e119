"""``cli.py index``: the flags. ChromaDB and the providers are loaded when one of them is used."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from commands.flags import Command, dollars, positive
from config import Settings
from error_handler import ConfigurationError

NEEDED = ("numpy", "chromadb", "sqlalchemy")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``index``."""
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--batch", action="store_true", help="index what is new or changed, many texts in one call")
    action.add_argument("--individual", action="store_true", help="the same with one text in each call")
    action.add_argument(
        "--estimate-costs", action="store_true", help="say what --batch would send and cost; send nothing"
    )
    action.add_argument(
        "--rebuild",
        action="store_true",
        help="make the index anew, after another model or damage; known vectors cost nothing",
    )
    action.add_argument("--search", metavar="TEXT", help="show what is most like TEXT")
    parser.add_argument(
        "--source",
        choices=("database", "conversations"),
        default="database",
        help="what to index or to search (database)",
    )
    parser.add_argument(
        "--sample", action="store_true", help="document a small sample database instead of DATABASE_URL"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="show N hits (5); index at most N conversations")
    parser.add_argument("--max-cost", type=dollars, metavar="USD", help="ask before spending more, US dollars")
    parser.add_argument("--yes", action="store_true", help="spend it without asking")
    parser.add_argument("--allow-external", action="store_true", help="customer text may be sent to OpenAI")
    parser.add_argument("--provider", choices=("openai", "ollama", "local"), help="(EMBEDDING_PROVIDER; ollama)")
    parser.add_argument("--embedding-model", metavar="NAME", help="(EMBEDDING_MODEL; the usual one of the provider)")
    parser.add_argument("--index-dir", type=Path, help="where the index is (INDEX_DIR; data/index)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the outcome as JSON to FILE")


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Do one action; see ``Command``."""
    _check_flags(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"The index needs packages that are not installed ({', '.join(missing)}): "
            "run pip install -r requirements-index.txt, or make index."
        )
    from embedding_index import actions  # noqa: PLC0415 - a run of the batch worker must not wait for it

    return await actions.run(arguments, settings)


def _check_flags(arguments: argparse.Namespace) -> None:
    """A flag that would do nothing, or fail at the very end, is a mistake of whoever gave it."""
    is_search, is_database = arguments.search is not None, arguments.source == "database"
    sends = not is_search and not arguments.estimate_costs
    useless = {
        "--limit is for --search and for --source conversations": arguments.limit and is_database and not is_search,
        "--sample is a database: leave out --source conversations": arguments.sample and not is_database,
        "--max-cost is for what sends texts to be indexed": arguments.max_cost is not None and not sends,
        "--allow-external is for --source conversations": arguments.allow_external and is_database,
    }
    for sentence, is_so in useless.items():
        if is_so:
            raise ConfigurationError(f"{sentence}.")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output {arguments.output}: there is no such folder; make it, or name another.")


COMMAND = Command(
    "index", "Find tables, relationships and past conversations by meaning: the embedding index.", add_flags, run
)
