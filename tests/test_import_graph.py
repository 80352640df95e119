"""The layers of docs/architecture.md, drawn from the code. A violation names both modules."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Lower layers first; a module may import from layers below its own. A new module must be given a layer here.
LAYERS: list[set[str]] = [
    {"error_handler"},
    {"config"},
    {"logger", "utils"},
    {"aggregator", "prompt_builder", "classifier"},
    {"utils.fitted_flow"},
    {"mongo_client", "llm_wrapper", "async_llm_wrapper", "utils.service_requests"},
    {"utils.window_sample", "utils.shared_window", "utils.stored_results", "utils.run_plan", "utils.plan_command"},
    {"batch_processor", "api", "utils.document_sample", "openai_batch"},
    {
        "utils.estimate_command",
        "utils.mongo_diagnosis",
        "utils.slot_probe",
        "utils.model_diagnosis",
        "utils.window_diagnosis",
        "utils.doctor_command",
    },
    {"embedding_index"},
    {
        "cli",
        "main",
        "run_batch_processor",
        "check_mongo_connection",
        "api_client",
        "api_client_production",
        "utils.mongodb_import",
        "utils.demo_batch_processor",
        "utils.concurrency_check",
    },
]
# A second name for the command line, so it may import it.
SAME_LAYER_ALLOWED = {("run_batch_processor", "cli")}

OWNERS = {
    "pymongo": {"mongo_client"},
    "motor": {"mongo_client"},
    "bson": {"mongo_client", "utils.extended_json"},
    # of the model server; of our own service, by its clients; of webhooks
    "aiohttp": {"async_llm_wrapper", "utils.service_client", "openai_batch.webhook"},
    # of the model server, for chat and for embeddings
    "requests": {"llm_wrapper"},
    "urllib3": {"llm_wrapper"},
    "mongomock_motor": {"utils.demo_batch_processor"},
    "vaderSentiment": {"utils.baseline"},
    "yaml": {"config.taxonomy"},
    "dotenv": {"config.settings", "config.settings_origins"},
    "pydantic_settings": {
        "config.settings",
        "config.service_settings",
        "config.openai_settings",
        "config.index_settings",
        "config.loading",
    },
    "filelock": {"utils.directory_lock"},
    "croniter": {"utils.schedule"},
    "openai": {"openai_batch.openai_client", "embedding_index.providers.openai_embeddings"},
    # what the openai package is made of
    "httpx2": {"openai_batch.openai_client", "embedding_index.providers.openai_embeddings"},
    "chromadb": {"embedding_index.chroma_folder"},
    "sqlalchemy": {"embedding_index.introspection", "embedding_index.database_connection"},
    "bpe_openai": {"embedding_index.token_counts"},
    "tokenizers": {"embedding_index.providers.local_embeddings"},
    "safetensors": {"embedding_index.providers.local_embeddings"},
    "threadpoolctl": {"embedding_index.providers.local_embeddings"},
    "jinja2": {"openai_batch.templates"},
    "phonenumbers": {"openai_batch.masking"},
    "stdnum": {"openai_batch.masking"},
    "smtplib": {"openai_batch.mail"},
    "fastapi": {"main"},
    "starlette": {"main"},
    "uvicorn": {"main", "utils.slow_client_guard"},
    "prometheus_client": {"utils.service_metrics", "utils.worker_metrics"},  # of the service; of the worker
    "genai_prices": {"utils.batch_prices"},
}


def product_files() -> list[Path]:
    packages = ["config", "utils", "openai_batch", "embedding_index", "embedding_index/providers"]
    folders = [ROOT, *(ROOT / package for package in packages)]
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


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


def layer_of(module: str) -> int | None:
    """Return the layer of *module*, None for foreign packages; a listed script wins over its package."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, layer in enumerate(LAYERS):
            if prefix in layer:
                return number
    return None


def test_imports_point_to_lower_layers() -> None:
    """No module imports its own layer or one above, not even inside a function."""
    wrong = []
    for path in product_files():
        module = module_name(path)
        own = layer_of(module)
        assert own is not None, f"{module} has no layer: add it to LAYERS"
        for target in imports(path):
            other = layer_of(target)
            if other is None or other < own:
                continue
            same_package = other == own and target.split(".")[0] == module.split(".")[0]
            if not same_package and (module, target.split(".")[0]) not in SAME_LAYER_ALLOWED:
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
    entry_points = LAYERS[-1] - {"cli"}
    for path in product_files():
        for target in imports(path):
            assert not any(target == name or target.startswith(f"{name}.") for name in entry_points), (path, target)


def test_the_packages_have_no_cycles() -> None:
    """Inside utils/ and config/ imports form a hierarchy as well."""
    graph: dict[str, set[str]] = {}
    known = {module_name(path) for path in product_files()}
    for path in product_files():
        targets = set()
        for target in imports(path):
            targets |= {name for name in (target, target.rpartition(".")[0]) if name in known}
        graph[module_name(path)] = targets - {module_name(path), "config", "utils"}
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
