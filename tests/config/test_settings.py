"""Settings: arguments, then environment, then .env, then defaults; a wrong one is named and never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from config import Settings, load_settings
from config.loading import DOTENV, load_part, variables_of
from config.openai_settings import load_openai_settings
from config.queries import PriorityRule
from config.service_settings import load_service_settings
from config.settings import settings_classes
from error_handler import ConfigurationError
from tests.cases import mostly_thorough
from tests.config.values import read

SECRET = "hunter2"

# A valid value other than the default for each field, as the environment writes it and as it is read.
VALUES: dict[str, tuple[str, Any]] = {
    "mongodb_uri": ("mongodb://elsewhere:1", "mongodb://elsewhere:1"),
    "db_name": ("other_db", "other_db"),
    "source_collection": ("other_source", "other_source"),
    "results_collection": ("other.results", "other.results"),
    "batch_size": ("7", 7),
    "max_concurrent": ("9", 9),
    "mongodb_max_retries": ("2", 2),
    "mongodb_timeout_ms": ("5000", 5000),
    "mongodb_backoff_s": ("0.5", 0.5),
    "mode": ("continuous", "continuous"),
    "settle_s": ("5", 5.0),
    "ollama_model": ("llama3.2", "llama3.2"),
    "ollama_endpoint": ("http://gpu:1", "http://gpu:1"),
    "allow_mixed_models": ("true", True),
    "ollama_num_ctx": ("16384", 16384),
    "on_long": ("skip", "skip"),
    "llm_load_timeout_s": ("900", 900.0),
    "ollama_keep_alive": ("1h30m", "1h30m"),
    "llm_api_url": ("http://gpu:1/v1/chat/completions", "http://gpu:1/v1/chat/completions"),
    "llm_model": ("phi4", "phi4"),
    "llm_api_key": ("sk-1", "sk-1"),
    "llm_timeout_s": ("33.5", 33.5),
    "llm_max_attempts": ("1", 1),
    "llm_backoff_s": ("0", 0.0),
    "outage_limit_s": ("60", 60.0),
    "shutdown_grace_s": ("5", 5.0),
    "lease_s": ("60", 60.0),
    "service_lease": ("off", False),
    "worker_floor": ("2", 2),
    "worker_heartbeat": ("off", False),
    "batch_files_dir": ("elsewhere/files", Path("elsewhere/files")),
    "taxonomy_file": ("own.yaml", Path("own.yaml")),
    "prompt_examples_file": ("own.json", Path("own.json")),
    "reply_style": ("list", "list"),
    "review_below": ("0.6", 0.6),
    "student": ("0.95", 0.95),
    "store_original_conversation": ("true", True),
    "result_metadata": ("channel,tier", ("channel", "tier")),
    "status_field": ("triad_status", "triad_status"),
    "metrics_port": ("9464", 9464),
    "metrics_address": ("0.0.0.0", "0.0.0.0"),
    "log_level": ("debug", "DEBUG"),
    "priority_field": ("metadata.priority", "metadata.priority"),
    "priority_rules": (
        '[{"query": {"tier": "vip"}, "priority": 5}]',
        (PriorityRule('{"tier": "vip"}', 5.0),),
    ),
    "time_field": ("_id", "_id"),
}
ALIASES = [(field, name) for field in VALUES for name in variables_of(Settings, field)]


@pytest.fixture
def dotenv(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def refusal(dotenv: Path | None = None, **arguments: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(dotenv, **arguments)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_every_field_has_a_value_here() -> None:
    """A new setting must be tried below."""
    assert set(VALUES) == set(Settings.model_fields)


@pytest.mark.parametrize(("field", "name"), mostly_thorough(ALIASES, 5), ids=[name for _, name in ALIASES])
def test_each_name_in_the_environment(field: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Main names and aliases alike."""
    written, expected = VALUES[field]
    assert read(load_settings(None), field) != expected
    monkeypatch.setenv(name, written)
    assert read(load_settings(None), field) == expected


@pytest.mark.parametrize(("field", "name"), mostly_thorough(ALIASES, 5, first=1), ids=[name for _, name in ALIASES])
def test_each_name_in_the_file(field: str, name: str, dotenv: Path) -> None:
    """The same names as in the environment."""
    written, expected = VALUES[field]
    dotenv.write_text(f"# comment\n{name}={written}\n")
    assert read(load_settings(dotenv), field) == expected


@pytest.mark.parametrize("field", mostly_thorough(VALUES, 5))
def test_each_argument(field: str) -> None:
    """An argument has the name of the field; None counts as not given."""
    assert read(load_settings(None, **{field: VALUES[field][1]}), field) == VALUES[field][1]
    assert load_settings(None, **{field: None}) == load_settings(None)


@pytest.mark.parametrize("in_environment", variables_of(Settings, "mongodb_uri"))
@pytest.mark.parametrize("in_file", variables_of(Settings, "mongodb_uri"))
def test_precedence_is_argument_environment_file_default(
    in_environment: str, in_file: str, dotenv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argument > environment > file > default, whichever of its names each uses."""

    def uri(**arguments: Any) -> Any:
        return read(load_settings(dotenv, **arguments), "mongodb_uri")

    assert uri() == "mongodb://localhost:27017"
    dotenv.write_text(f"{in_file}=mongodb://file\n")
    assert uri() == "mongodb://file"
    monkeypatch.setenv(in_environment, "mongodb://environment")
    assert uri() == "mongodb://environment"
    assert uri(mongodb_uri="mongodb://argument") == "mongodb://argument"


def test_the_main_name_wins_over_the_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds if both are set."""
    monkeypatch.setenv("MONGODB_BATCH_SIZE", "7")
    monkeypatch.setenv("BATCH_SIZE", "8")
    assert load_settings(None).batch_size == 8


@pytest.mark.parametrize("name", ["MODE", "DB_NAME", "SOURCE_COLLECTION", "TAXONOMY", "RESULTS_COLLECTION", "MODEL"])
def test_variables_of_other_programs_decide_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field's own name is no variable: MODE and DB_NAME are set on many machines."""
    monkeypatch.setenv(name, "production")
    assert load_settings(None) == load_settings(None)
    assert load_settings(None).mode == "batch"
    assert load_settings(None).db_name == "customer_support"


@pytest.mark.parametrize("field", mostly_thorough(VALUES, 5))
def test_an_empty_variable_counts_as_not_set(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass variables on that are not there."""
    default = load_settings(None)
    monkeypatch.setenv(variables_of(Settings, field)[0], "")
    assert load_settings(None) == default


def test_the_file_of_the_working_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, and only there."""
    assert Path(".env") == DOTENV
    (tmp_path / ".env").write_text("BATCH_SIZE=7\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings().batch_size == 7
    assert load_settings(None).batch_size == 100


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [("MONGODB_URL=x", "did you mean MONGODB_URI?"), ("BATCHSIZE=3", "did you mean BATCH_SIZE?"), ("XYZZY=1", "XYZZY")],
)
def test_unknown_name_in_the_file_is_refused(line: str, suggestion: str, dotenv: Path) -> None:
    """A typo must not be a silent default."""
    dotenv.write_text(f"BATCH_SIZE=3\n{line}{SECRET}\n")
    message = refusal(dotenv)
    assert line.split("=", 1)[0] in message
    assert suggestion in message
    assert str(dotenv) in message


def test_unknown_argument_is_refused() -> None:
    """The same for BatchProcessor(...)."""
    assert "did you mean batch_size?" in refusal(batch_sise=3)


@pytest.mark.parametrize("content", [b"BATCH_SIZE=\xff\xfe\n", "BATCH_SIZE=5\n".encode("utf-16")])
def test_file_that_is_not_utf_8_is_refused(content: bytes, dotenv: Path) -> None:
    """Editors of other systems write others."""
    dotenv.write_bytes(content)
    assert str(dotenv) in refusal(dotenv)


WRONG = [
    ("MONGODB_URI", f"http://user:{SECRET}@host"),
    ("MONGODB_URI", SECRET),
    ("MONGODB_CONNECTION_STRING", f"user:{SECRET}@host"),
    ("MONGODB_DB", "a.b"),
    ("MONGODB_DB", "a b"),
    ("MONGODB_DB", "a/b"),
    ("MONGODB_DB", "x" * 64),
    ("MONGODB_SOURCE_COLLECTION", "a$b"),
    ("MONGODB_SOURCE_COLLECTION", ".a"),
    ("MONGODB_RESULTS_COLLECTION", "a..b"),
    ("BATCH_SIZE", "many"),
    ("BATCH_SIZE", "0"),
    ("BATCH_SIZE", "1001"),
    ("BATCH_SIZE", "1.5"),
    ("MONGODB_BATCH_SIZE", "-1"),
    ("MAX_CONCURRENT", "0"),
    ("MONGODB_MAX_RETRIES", "0"),
    ("MONGODB_TIMEOUT_MS", "5s"),
    ("BATCH_PROCESSOR_MODE", "sometimes"),
    ("OLLAMA_ENDPOINT", f"user:{SECRET}@host"),
    ("OLLAMA_ENDPOINT", "ftp://host"),
    ("OLLAMA_ENDPOINT", "http://"),
    ("OLLAMA_ENDPOINT", f"http://user:{SECRET}@host"),
    ("OLLAMA_ENDPOINT", f"http://:{SECRET}@host"),
    ("OLLAMA_ENDPOINT", f"http://host:{SECRET}"),
    ("OLLAMA_ENDPOINT", "http://host:70000"),
    ("OLLAMA_ENDPOINT", f"http://host?key={SECRET}"),
    ("OLLAMA_ENDPOINT", f"http://[{SECRET}"),
    ("OLLAMA_NUM_CTX", "1024"),
    ("OLLAMA_NUM_CTX", "8k"),
    ("ON_LONG", "cut"),
    ("LLM_LOAD_TIMEOUT_S", "0"),
    ("OLLAMA_KEEP_ALIVE", "10 minutes"),
    ("OLLAMA_KEEP_ALIVE", "1d"),
    ("LLM_API_URL", "http://host/v1/completions"),
    ("LLM_API_URL", "http://host/api/chat#here"),
    ("LLM_API_URL", f"http://host/api/chat?key={SECRET}"),
    ("LLM_API_KEY", f"{SECRET}\nsecond line"),
    ("LLM_API_KEY", f"{SECRET} "),
    ("LLM_API_KEY", f"{SECRET}é"),
    ("LLM_TIMEOUT_S", "0"),
    ("LLM_TIMEOUT_S", "nan"),
    ("LLM_TIMEOUT_S", "inf"),
    ("LLM_MAX_ATTEMPTS", "three"),
    ("LLM_BACKOFF_S", "-1"),
    ("OUTAGE_LIMIT_S", "nan"),
    ("LEASE_S", "0"),
    ("STORE_ORIGINAL_CONVERSATION", "maybe"),
    ("LOG_LEVEL", "LOUD"),
]


@pytest.mark.parametrize(
    ("name", "value"),
    mostly_thorough(WRONG, 3, first=2),
    ids=[f"{name}-{number}" for number, (name, _) in enumerate(WRONG)],
)
def test_a_malformed_value_is_named_and_not_shown(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any value may be a secret put in the wrong place."""
    monkeypatch.setenv(name, value)
    message = refusal()
    main_name = next(variables_of(Settings, field)[0] for field in VALUES if name in variables_of(Settings, field))
    assert main_name in message
    assert message.startswith("Wrong setting: ")
    assert "pattern" not in message


def test_only_the_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of MONGODB_DB comes from MONGODB_URI."""
    monkeypatch.setenv("MONGODB_URI", "mongo://localhost")
    assert refusal() == "Wrong setting: MONGODB_URI: must start with mongodb:// or mongodb+srv://."


def test_several_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants to find them one by one."""
    monkeypatch.setenv("BATCH_SIZE", "many")
    message = refusal(max_concurrent=0)
    assert "BATCH_SIZE" in message
    assert "MAX_CONCURRENT" in message


def test_results_in_the_source_collection_are_refused() -> None:
    """They would be classified in turn."""
    assert "MONGODB_RESULTS_COLLECTION" in refusal(source_collection="same", results_collection="same")
    assert "MONGODB_RESULTS_COLLECTION" in refusal(source_collection="sentimental_analysis")


def test_settings_are_frozen() -> None:
    """Read once; nobody changes them in the middle of a run."""
    settings = load_settings(None)
    with pytest.raises(ValidationError):
        settings.batch_size = 3


def test_no_secret_in_a_repr() -> None:
    """Settings end in tracebacks."""
    settings = load_settings(None, mongodb_uri=f"mongodb://user:{SECRET}@host", llm_api_key=SECRET)
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert settings.mongodb_uri.get_secret_value() == f"mongodb://user:{SECRET}@host"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        pytest.param("MONGODB_URI: mongodb://prod-host:27017", 1, id="B1-colon"),
        pytest.param(f"MONGODB_DB='{SECRET}", 1, id="B1-open-quote"),
        pytest.param("export MONGODB_DB", 1, id="B1-no-value"),
        pytest.param(f"# database\n\nBATCH_SIZE=3\n\n\nMONGODB_DB {SECRET}", 6, id="space-after-empty-lines"),
        pytest.param(f"BATCH_SIZE=3\nset MONGODB_DB={SECRET}", 2, id="windows-set"),
        pytest.param(f"BATCH_SIZE=3\n[database]\nMONGODB_DB={SECRET}", 2, id="ini"),
    ],
)
def test_line_of_the_file_that_cannot_be_read_is_refused_with_its_number(
    content: str, line: int, dotenv: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Such a line must not be a silent default, for any part of the settings."""
    dotenv.write_text(content)
    assert f"Line {line} of {dotenv} cannot be read" in refusal(dotenv)
    with pytest.raises(ConfigurationError, match=f"Line {line} of"):
        load_service_settings(dotenv)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_file_with_a_byte_order_mark_is_read(dotenv: Path) -> None:
    """Windows editors write one."""
    dotenv.write_text("\ufeffBATCH_SIZE=7\n", encoding="utf-8")
    assert load_settings(dotenv).batch_size == 7


def test_tilde_in_a_path_is_the_home_directory(dotenv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand it in a file."""
    monkeypatch.setenv("HOME", "/home/ann")
    paths = [
        (one, field)
        for one in settings_classes()
        for field, about in one.model_fields.items()
        if "Path" in str(about.annotation) or field.endswith(("_file", "_dir", "_bundle"))
    ]
    assert len(paths) == 9
    for one, field in paths:
        dotenv.write_text(f"{variables_of(one, field)[0]}=~/x\n", encoding="utf-8")
        assert str(getattr(load_part(one, dotenv), field)) == "/home/ann/x", field


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_value_are_removed(quote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B7: ``docker run --env-file`` keeps them."""
    monkeypatch.setenv("MONGODB_URI", f"{quote}mongodb://elsewhere:1{quote}")
    monkeypatch.setenv("API_PORT", f"{quote}9000{quote}")
    monkeypatch.setenv("SYSTEM_PROMPT", f"{quote}a{quote} and {quote}b{quote}")
    assert read(load_settings(None), "mongodb_uri") == "mongodb://elsewhere:1"
    assert read(load_settings(None, db_name=f"{quote}shop{quote}"), "db_name") == "shop"
    assert load_service_settings(None).port == 9000
    assert load_openai_settings(None).system_prompt == f"{quote}a{quote} and {quote}b{quote}"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("mongodb://host/shop", "shop"),
        ("mongodb+srv://user:pass@host/shop?retryWrites=true", "shop"),
        ("mongodb://a:1,b:2/my%2Dshop", "my-shop"),
        ("mongodb://%2Ftmp%2Fmongod.sock/shop", "shop"),
        ("mongodb://host/admin?w=1", "customer_support"),
        ("mongodb://host/", "customer_support"),
        ("mongodb://host?appName=a/b", "customer_support"),
        ("mongodb://u:p@ss/w@127.0.0.1:27017", "customer_support"),
    ],
)
def test_database_of_the_address_is_used(uri: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a database is set; ``/admin`` is where the user is stored."""
    assert load_settings(None, mongodb_uri=uri).db_name == expected
    monkeypatch.setenv("MONGODB_DB", "named")
    assert load_settings(None, mongodb_uri=uri).db_name == "named"


@pytest.mark.parametrize("name", variables_of(Settings, "ollama_endpoint"))
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("http://0.0.0.0:11434", "http://127.0.0.1:11434", id="B18"),
        pytest.param("http://127.0.0.1:11434/v1", "http://127.0.0.1:11434", id="X4-v1"),
        pytest.param("http://127.0.0.1:11434/api", "http://127.0.0.1:11434", id="X4-api"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("gpu", "http://gpu:11434"),
        ("[::]:11434", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("https://gpu/proxy/api/chat", "https://gpu/proxy"),
        ("http://gpu:1/v1/chat/completions/", "http://gpu:1"),
        ("http://gpu:1/v1beta", "http://gpu:1/v1beta"),
    ],
)
def test_address_of_ollama_is_read_as_ollama_reads_it(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under the name of Ollama's own variable, which says where the server listens."""
    monkeypatch.setenv(name, value)
    settings = load_settings(None)
    assert settings.ollama_endpoint == expected
    assert settings.chat_url == f"{expected}/api/chat"


def test_several_addresses_of_ollama_are_read_one_by_one() -> None:
    """Each once, from a text with commas or from a flag that is repeated."""
    expected = ("http://gpu:11434", "http://b:1")
    for value in ("gpu, http://b:1/api,http://gpu:11434,", ["gpu", "http://b:1"], ["gpu,b:1"]):
        settings = load_settings(None, ollama_endpoint=value, max_concurrent=4)
        assert settings.ollama_endpoints == expected
        assert settings.chat_url == "http://gpu:11434/api/chat"
        assert [one.server_url for one in settings.for_each_server()] == list(expected)
        assert settings.most_in_flight == 8
    assert (
        load_settings(None, ollama_endpoint=["a", "b"], llm_api_url="http://c/v1").for_each_server()[0].server_url
        == "http://c"
    )
    assert "without user name" in refusal(None, ollama_endpoint=f"http://a,http://user:{SECRET}@b")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://0.0.0.0:8000/v1", "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://gpu:8000/v1/", "http://gpu:8000/v1/chat/completions"),
        ("http://gpu/api", "http://gpu/api/chat"),
    ],
)
def test_address_of_another_server_may_end_before_the_route(url: str, expected: str) -> None:
    """As the address for other tools does."""
    assert load_settings(None, llm_api_url=url).chat_url == expected


@pytest.mark.parametrize(
    ("url", "protocol", "server_url"),
    [
        ("http://h/api/chat", "ollama_chat", "http://h"),
        ("http://h:1/api/generate/", "ollama_generate", "http://h:1"),
        ("https://h/proxy/v1/chat/completions", "openai_chat", "https://h/proxy"),
        ("http://[::1]:8000/v1/chat/completions", "openai_chat", "http://[::1]:8000"),
    ],
)
def test_the_path_decides_the_protocol(url: str, protocol: str, server_url: str) -> None:
    """And with the address goes its own model."""
    settings = load_settings(None, llm_api_url=url, llm_model="a", ollama_model="b")
    assert (settings.protocol, settings.server_url, settings.model) == (protocol, server_url, "a")
    assert settings.chat_url == url.rstrip("/")


def test_ollama_is_the_default_server() -> None:
    """Its model, its protocol; LLM_MODEL alone changes nothing."""
    settings = load_settings(None, ollama_model="b", llm_model="a", ollama_endpoint="http://gpu:1/")
    assert (settings.protocol, settings.chat_url, settings.model) == ("ollama_chat", "http://gpu:1/api/chat", "b")
    assert load_settings(None).model is None
