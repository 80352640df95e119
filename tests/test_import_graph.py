"""The layers of docs/architecture.md, drawn from the code. A violation names both modules."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import from the layers below its own; a package may import from itself as well.
LAYERS = (
    "error_handler",
    "config",
    "logger",
    "storage",
    "network",
    "utils",
    "domain",
    "model_server",
    "aggregator prompt_builder",
    "help_desks",
    "classifier",
    "mongo_client llm_wrapper async_llm_wrapper",
    "worker",
    "openai_batch",
    "embedded",
    "database_docs",
    "embedding_index",
    "student",
    "review",
    "evaluation",
    "analytics",
    "exporting",
    "service",
    "batch_processor api",
    "cluster",
    "commands",
    "cli",
    "main run_batch_processor check_mongo_connection api_client api_client_production",
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
PACKAGES = [name for name in RANKS if (ROOT / name).is_dir()]

OWNERS = {
    "pymongo": {
        *("mongo_client", "storage.mongo_connection", "storage.mongo_errors", "storage.mongo_indexes"),
        *(
            "storage.mongo_pages",
            "storage.service_lease",
            "storage.heartbeats",
            "storage.aggregation",
            "storage.window_agreement",
        ),
        "embedded.replica_set",
    },
    "motor": {"mongo_client"},
    "bson": {"storage.mongo_errors", "storage.mongo_pages", "storage.extended_json"},
    # of the model server; of our own service, by its clients; of webhooks
    "aiohttp": {
        "network.outgoing",
        "network.guarded_resolver",
        "async_llm_wrapper",
        "service.client.client",
        "openai_batch.notifications",
        "service.webhooks",
    },
    # of the model server, for chat and for embeddings
    "requests": {"llm_wrapper", "network.outgoing"},
    "urllib3": {"llm_wrapper"},
    "mongomock_motor": {"utils.demo_batch_processor"},
    "vaderSentiment": {"embedded.baseline"},
    "yaml": {"config.taxonomy"},
    "dotenv": {"config.loading"},
    "pydantic_settings": {"config.loading"},
    "filelock": {"storage.files"},
    "croniter": {"commands.flags"},
    "openai": {"openai_batch.openai_client"},
    # the openai package is built on it
    "httpx2": {"network.outgoing", "openai_batch.openai_client", "embedding_index.providers.openai_embeddings"},
    "chromadb": {"embedding_index.search_graph"},
    "sqlalchemy": {"database_docs.introspection"},
    "bpe_openai": {"embedding_index.providers.openai_embeddings"},
    "tokenizers": {"embedded.minilm"},
    "safetensors": {"embedded.minilm", "embedded.embedding_classifier", "student.model"},
    "threadpoolctl": {
        *("embedding_index.providers.local_embeddings", "embedded.embedding_classifier", "student.built_in"),
        "student.heads",
    },
    # prompts; the reports; the pages
    "jinja2": {
        *("openai_batch.documents", "evaluation.html_report", "analytics.report_page"),
        *("service.review", "service.dashboard"),
    },
    "scipy": {"evaluation.intervals", "student.certificate", "student.heads"},
    # comes with Jinja2
    "markupsafe": {"analytics.charts", "analytics.report_page", "analytics.svg"},
    "phonenumbers": {"openai_batch.masking"},
    "stdnum": {"openai_batch.masking"},
    "smtplib": {"openai_batch.notifications"},
    "fastapi": {
        *("main", "service.middleware", "service.openapi", "service.pages", "service.review_routes", "service.routes"),
        *("service.dashboard_routes", "service.dashboard_runs", "service.dashboard_review"),
        *("service.dashboard_quarantine", "service.dashboard_labels", "service.job_routes", "service.taxonomy_routes"),
    },
    # below FastAPI: ASGI types for middleware
    "starlette": {
        "main",
        "service.admission",
        "service.body_limits",
        "service.idempotency",
        "service.middleware",
        "service.routes",
    },
    "uvicorn": {"main", "service.slow_clients", "service.startup"},
    "prometheus_client": {"service.metrics", "worker.metrics"},  # of the service; of the worker
    "genai_prices": {"domain.prices"},
    "charset_normalizer": {"help_desks.files"},
    "pyarrow": {"exporting.parquet_file"},
    "xlsxwriter": {"exporting.xlsx_file"},
    "ray": {"cluster.ray_cluster"},
}


def product_files() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


def forget_trees() -> None:
    """Let go of the parsed modules: the garbage collector would look through half a million nodes in all later tests."""
    tree_of.cache_clear()
    nodes_of.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def trees() -> Iterator[None]:
    yield
    forget_trees()


@functools.cache
def imports(path: Path) -> list[str]:
    """Return every imported module, late imports inside functions included."""
    found: list[str] = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return found


def is_script_of_a_package(path: Path) -> bool:
    """Return whether *path* is a script that people run as ``python -m PACKAGE.NAME``; its ``__main__`` guard marks it."""
    if "__main__" not in path.read_text(
        encoding="utf-8"
    ):  # parsing every module takes each process that runs tests 0.2 s
        return False
    return path.parent != ROOT and any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree_of(path).body
    )


ENTRY_POINTS = [*LAYERS[-1].split(), *(module_name(path) for path in product_files() if is_script_of_a_package(path))]


def test_every_module_has_a_layer() -> None:
    """A new package or top-level module is placed in LAYERS, and no folder of the product is forgotten."""
    top = {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert top | folders == RANKS.keys()


def test_imports_point_to_lower_layers() -> None:
    """No package imports a package of the same layer or above, not even inside a function; scripts import anything."""
    wrong = []
    for path in product_files():
        module = module_name(path)
        package = module.split(".")[0]
        if is_script_of_a_package(path):
            continue
        for target in imports(path):
            other = target.split(".")[0]
            if other in RANKS and other != package and RANKS[other] >= RANKS[package]:
                wrong.append(f"{module} imports {target} from its own layer or above")
    assert not wrong


def test_each_library_is_imported_by_its_owner_only() -> None:
    """Replacing a client library touches one file; the owners are in OWNERS."""
    strayed = [
        f"{module_name(path)} imports {library}"
        for path in product_files()
        for library in {target.split(".")[0] for target in imports(path)} & OWNERS.keys()
        if module_name(path) not in OWNERS[library]
    ]
    assert not strayed


def test_scripts_that_people_start_are_imported_by_nobody() -> None:
    """Entry points are the top of the graph."""
    for path in product_files():
        for target in imports(path):
            assert not any(target == name or target.startswith(f"{name}.") for name in ENTRY_POINTS), (path, target)


def test_the_packages_have_no_cycles() -> None:
    """Inside a package imports form a hierarchy as well."""
    graph: dict[str, set[str]] = {}
    known = {module_name(path) for path in product_files()}
    for path in product_files():
        targets = set()
        for target in imports(path):
            targets |= {name for name in (target, target.rpartition(".")[0]) if name in known}
        graph[module_name(path)] = targets - {module_name(path), *PACKAGES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_budgets_hold() -> None:
    """Modules of at most 400 lines, functions of at most 60, at most 6 parameters."""
    over = []
    for path in product_files():
        module, lines = module_name(path), path.read_text(encoding="utf-8").count("\n")
        if lines > 400:
            over.append(f"{module} has {lines} lines")
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                parameters = [each for each in arguments if each.arg not in ("self", "cls")]
                if lines > 60:
                    over.append(f"{module}:{node.lineno} {node.name} has {lines} lines")
                if len(parameters) > 6:
                    over.append(f"{module}:{node.lineno} {node.name} has {len(parameters)} parameters")
    assert not over


def test_the_environment_is_read_in_config_only() -> None:
    """os.environ and os.getenv appear nowhere else."""
    readers = [
        f"{module_name(path)}:{node.lineno}"
        for path in product_files()
        for node in nodes_of(path)
        if path.parent.name != "config" and isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not readers


def test_broad_excepts_are_in_cli_main_only() -> None:
    """Errors are caught by name; what nobody named reaches the boundary."""
    broad = []
    for path in product_files():
        tree = tree_of(path)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        boundary = [f for f in functions if (path.name, f.name) == ("cli.py", "main")]
        allowed = {id(node) for function in boundary for node in ast.walk(function)}
        for node in nodes_of(path):
            if isinstance(node, ast.ExceptHandler) and id(node) not in allowed:
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
                if names & {"Exception", "BaseException", "everything"}:
                    broad.append(f"{module_name(path)}:{node.lineno}")
    assert not broad
