"""The flags of ``cli.py index``. The packages of the index are loaded when an action needs them."""

from __future__ import annotations

import argparse
from pathlib import Path

from commands.flags import Command, dollars, positive, require_packages
from config import Settings
from error_handler import ConfigurationError
from storage.files import require_replaceable

NEEDED = ("numpy", "chromadb", "sqlalchemy")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``index``."""
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--batch", action="store_true", help="index new and changed items, many texts in one call")
    action.add_argument("--individual", action="store_true", help="like --batch, with one text in each call")
    action.add_argument(
        "--estimate-costs", action="store_true", help="show what --batch would send and cost; send nothing"
    )
    action.add_argument(
        "--rebuild",
        action="store_true",
        help="rebuild the index, for example with another model; stored vectors cost nothing",
    )
    action.add_argument("--search", metavar="TEXT", help="show the items most similar to TEXT")
    parser.add_argument(
        "--source",
        choices=("database", "conversations"),
        default="database",
        help="what to index or search (default: database)",
    )
    parser.add_argument("--sample", action="store_true", help="use a small sample database instead of DATABASE_URL")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="show N hits (default: 5), or index at most N conversations"
    )
    parser.add_argument(
        "--max-cost", type=dollars, metavar="USD", help="ask before spending more than this, in US dollars"
    )
    parser.add_argument("--yes", action="store_true", help="spend more than --max-cost without asking")
    parser.add_argument("--allow-external", action="store_true", help="allow sending customer text to OpenAI")
    parser.add_argument(
        "--provider",
        choices=("openai", "ollama", "local"),
        help="embedding provider (EMBEDDING_PROVIDER; default: ollama)",
    )
    parser.add_argument(
        "--embedding-model", metavar="NAME", help="embedding model (EMBEDDING_MODEL; default: the provider's usual one)"
    )
    parser.add_argument("--index-dir", type=Path, help="directory of the index (INDEX_DIR; default: data/index)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the outcome as JSON to FILE")


async def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run one action; see ``Command``."""
    _check_flags(arguments)
    require_packages("The index", NEEDED, "pip install -r requirements-index.txt, or make index")
    from embedding_index import actions  # noqa: PLC0415 - other commands must not wait for it

    return await actions.run(arguments, settings)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, and an --output that would fail at the end."""
    is_search, is_database = arguments.search is not None, arguments.source == "database"
    sends = not is_search and not arguments.estimate_costs
    useless = {
        "--limit works with --search and with --source conversations": arguments.limit
        and is_database
        and not is_search,
        "--sample is a database: leave out --source conversations": arguments.sample and not is_database,
        "--max-cost works with actions that send texts to be indexed": arguments.max_cost is not None and not sends,
        "--allow-external works with --source conversations": arguments.allow_external and is_database,
    }
    for sentence, is_so in useless.items():
        if is_so:
            raise ConfigurationError(f"{sentence}.")
    if arguments.output is not None:
        require_replaceable(arguments.output, "--output")


COMMAND = Command(
    "index", "Find tables, relationships and past conversations by meaning: the embedding index.", add_flags, run
)
