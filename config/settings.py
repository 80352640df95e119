"""Settings: read once, frozen, from arguments, the environment, ``.env`` and defaults, in this order."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.loading import env, variables_of
from error_handler import ConfigurationError

DOTENV = Path(".env")
MOST_AUTO = 64  # where MAX_CONCURRENT=auto ends

Protocol = Literal["ollama_chat", "ollama_generate", "openai_chat"]

# The path of LLM_API_URL decides how the server is spoken to.
PROTOCOL_PATHS: dict[str, Protocol] = {
    "/api/chat": "ollama_chat",
    "/api/generate": "ollama_generate",
    "/v1/chat/completions": "openai_chat",
}

# What MongoDB and its driver take as names.
CollectionName = Annotated[str, Field(max_length=120, pattern=r"^[^$.\x00]+(\.[^$.\x00]+)*$")]
DatabaseName = Annotated[str, Field(min_length=1, max_length=63, pattern=r'^[^/\\. "$*<>:|?\x00]+$')]


class Settings(BaseSettings):
    """Everything that can be set. Seconds and tokens, unless the name says otherwise."""

    # Unknown names are refused by load_settings, which also knows those of the service.
    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    mongodb_uri: SecretStr = Field(
        SecretStr("mongodb://localhost:27017"),
        validation_alias=env("MONGODB_URI", "MONGODB_CONNECTION_STRING"),
        description="where MongoDB is",
    )
    db_name: DatabaseName = Field(
        "customer_support", validation_alias=env("MONGODB_DB", "MONGODB_DATABASE_NAME"), description="database"
    )
    source_collection: CollectionName = Field(
        "conversation_set",
        validation_alias=env("MONGODB_SOURCE_COLLECTION", "MONGODB_QUERIES_COLLECTION"),
        description="collection that holds the conversations",
    )
    results_collection: CollectionName = Field(
        "sentimental_analysis",
        validation_alias=env("MONGODB_RESULTS_COLLECTION"),
        description="collection that gets one result per conversation",
    )
    batch_size: int = Field(
        100, ge=1, le=1000, validation_alias=env("BATCH_SIZE", "MONGODB_BATCH_SIZE"), description="documents per batch"
    )
    max_concurrent: int | Literal["auto"] = Field(
        5, validation_alias=env("MAX_CONCURRENT"), description="model calls in flight at once; auto follows the server"
    )
    mongodb_max_retries: int = Field(
        3, ge=1, le=10, validation_alias=env("MONGODB_MAX_RETRIES"), description="attempts of each MongoDB call"
    )
    mongodb_timeout_ms: int = Field(
        20_000,
        ge=100,
        le=600_000,
        validation_alias=env("MONGODB_TIMEOUT_MS"),
        description="longest wait of one MongoDB call, milliseconds",
    )
    mongodb_backoff_s: float = Field(
        1.0,
        ge=0,
        le=60,
        validation_alias=env("MONGODB_BACKOFF_S"),
        description="wait after the first failed MongoDB attempt; it doubles each time",
    )
    mode: Literal["batch", "continuous", "scheduled"] = Field(
        "batch", validation_alias=env("BATCH_PROCESSOR_MODE"), description="run until done, poll, or follow a schedule"
    )
    ollama_model: str | None = Field(None, validation_alias=env("OLLAMA_MODEL"), description="model to ask")
    ollama_endpoint: str = Field(
        "http://localhost:11434", validation_alias=env("OLLAMA_ENDPOINT"), description="where Ollama is"
    )
    ollama_num_ctx: int | None = Field(
        None,
        ge=2048,  # less has no room for instructions and answer
        le=1_048_576,
        validation_alias=env("OLLAMA_NUM_CTX"),
        description="context window, tokens: prompt and answer together; unset: chosen once for the whole run",
    )
    on_long: Literal["fit", "skip", "fail"] = Field(
        "fit", validation_alias=env("ON_LONG"), description="what becomes of a conversation longer than the window"
    )
    llm_load_timeout_s: float = Field(
        600.0,
        gt=0,
        le=7200,
        validation_alias=env("LLM_LOAD_TIMEOUT_S"),
        description="longest wait for a model to load",
    )
    ollama_keep_alive: str = Field(
        "10m",
        pattern=r"^-?(\d+|(\d+(\.\d+)?(ns|us|ms|s|m|h))+)$",
        validation_alias=env("OLLAMA_KEEP_ALIVE"),
        description="how long Ollama keeps the model loaded after the last call",
    )
    llm_api_url: str | None = Field(
        None,
        validation_alias=env("LLM_API_URL"),
        description="another model server; its path decides the protocol: " + ", ".join(PROTOCOL_PATHS),
    )
    llm_model: str | None = Field(None, validation_alias=env("LLM_MODEL"), description="model for LLM_API_URL")
    llm_api_key: SecretStr | None = Field(
        None, validation_alias=env("LLM_API_KEY"), description="sent to LLM_API_URL as a bearer token"
    )
    llm_timeout_s: float = Field(
        120.0, gt=0, le=3600, validation_alias=env("LLM_TIMEOUT_S"), description="longest wait of one model call"
    )
    llm_max_attempts: int = Field(
        3, ge=1, le=10, validation_alias=env("LLM_MAX_ATTEMPTS"), description="attempts of each model call"
    )
    llm_backoff_s: float = Field(
        2.0,
        ge=0,
        le=60,
        validation_alias=env("LLM_BACKOFF_S"),
        description="wait after the first failed model attempt; it doubles each time",
    )
    outage_limit_s: float = Field(
        3600.0,
        gt=0,
        validation_alias=env("OUTAGE_LIMIT_S"),
        description="a model server that stays away for longer ends the run with exit code 3",
    )
    shutdown_grace_s: float = Field(
        30.0,
        ge=0,
        le=600,
        validation_alias=env("SHUTDOWN_GRACE_S"),
        description="how long calls in flight may take to finish after SIGTERM",
    )
    lease_s: float = Field(
        300.0,
        ge=1,
        le=86_400,
        validation_alias=env("LEASE_S"),
        description="a worker that is silent for longer loses its documents to the others",
    )
    batch_files_dir: Path = Field(
        Path("batch_files"), validation_alias=env("BATCH_FILES_DIR"), description="run-time state of one worker"
    )
    taxonomy_file: Path | None = Field(
        None, validation_alias=env("TAXONOMY_FILE"), description="labels to use instead of config/taxonomy.yaml"
    )
    review_below: float | None = Field(
        None,
        ge=0,
        le=1,
        validation_alias=env("REVIEW_BELOW"),
        description="mark results for review where the probability of a label is below this",
    )
    store_original_conversation: bool = Field(
        False,
        validation_alias=env("STORE_ORIGINAL_CONVERSATION"),
        description="keep a copy of the conversation in its result",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias=env("LOG_LEVEL"), description="least severe log line that is written"
    )

    @field_validator("max_concurrent", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        text = str(value).strip().lower()
        if text == "auto":
            return text
        if not text.isdecimal() or not 1 <= int(text) <= 256:
            raise ValueError("must be a whole number from 1 to 256, or auto")
        return int(text)

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("mongodb_uri")
    @classmethod
    def _mongodb_scheme(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("must start with mongodb:// or mongodb+srv://")
        return value

    @field_validator("ollama_endpoint", "llm_api_url")
    @classmethod
    def _plain_http_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        form = "must be http(s)://host[:port][/path], without user name, password or query"
        try:
            parts = urlsplit(value)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError as exc:  # it quotes the address
            raise ValueError(form) from exc
        if not is_usable or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(form)
        return value.rstrip("/")

    @field_validator("llm_api_url")
    @classmethod
    def _known_protocol(cls, value: str | None) -> str | None:
        if value is not None and not any(urlsplit(value).path.endswith(path) for path in PROTOCOL_PATHS):
            raise ValueError("must end in " + ", ".join(PROTOCOL_PATHS))
        return value

    @field_validator("llm_api_key")
    @classmethod
    def _fits_in_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        text = value.get_secret_value() if value else "-"
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError("must be printable ASCII without spaces and line ends")
        return value

    @field_validator("results_collection")
    @classmethod
    def _not_the_source(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("source_collection"):
            raise ValueError("must be another collection than the source")
        return value

    @property
    def most_concurrent(self) -> int:
        """The most model calls that are ever in flight at once."""
        return MOST_AUTO if self.max_concurrent == "auto" else self.max_concurrent

    @property
    def chat_url(self) -> str:
        """The address that a chat request is posted to."""
        return self.llm_api_url or f"{self.ollama_endpoint}/api/chat"

    @property
    def protocol(self) -> Protocol:
        """How ``chat_url`` is spoken to."""
        return next(name for path, name in PROTOCOL_PATHS.items() if self.chat_url.endswith(path))

    @property
    def server_url(self) -> str:
        """``chat_url`` without the path of the chat request."""
        path = next(path for path in PROTOCOL_PATHS if self.chat_url.endswith(path))
        return self.chat_url.removesuffix(path)

    @property
    def model(self) -> str | None:
        """The model that is asked; None where none was named."""
        return self.llm_model if self.llm_api_url else self.ollama_model


def environment_names(field: str) -> tuple[str, ...]:
    """Return the environment variables that set *field* of Settings, the main one first."""
    return variables_of(Settings, field)


def known_environment_names() -> frozenset[str]:
    """Return every environment variable that this product reads."""
    # Only a .env is compared with all of them, and to make a class of settings takes milliseconds of each start.
    from config.index_settings import IndexSettings, index_environment_names  # noqa: PLC0415
    from config.openai_settings import OpenAISettings, openai_environment_names  # noqa: PLC0415
    from config.service_settings import ServiceSettings, service_environment_names  # noqa: PLC0415

    own = {name for field in Settings.model_fields for name in environment_names(field)}
    of_service = {name for field in ServiceSettings.model_fields for name in service_environment_names(field)}
    of_openai = {name for field in OpenAISettings.model_fields for name in openai_environment_names(field)}
    of_index = {name for field in IndexSettings.model_fields for name in index_environment_names(field)}
    return frozenset(own | of_service | of_openai | of_index)


def load_settings(dotenv: Path | None = DOTENV, **arguments: Any) -> Settings:
    """Read the settings; *arguments* (field names) win over the environment, that over *dotenv*.

    An argument that is None counts as not given; *dotenv* None reads no file.

    Raises:
        ConfigurationError: A value is malformed, or the file names an unknown variable. The
            message names each one and never shows a secret.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    unknown = set(given) - set(Settings.model_fields)
    if unknown:
        raise ConfigurationError(f"Unknown setting {_with_suggestion(min(unknown), set(Settings.model_fields))}.")
    if dotenv is not None and dotenv.is_file():
        _require_known_names(dotenv)
    # By the names of the environment: if fields had a second name, any variable of that name (MODE, DB_NAME) would count.
    arguments = {environment_names(name)[0]: value for name, value in given.items()}
    try:
        return Settings(_env_file=dotenv, **arguments)
    except ValidationError as exc:
        raise ConfigurationError(_explain(exc)) from exc


def _require_known_names(dotenv: Path) -> None:
    try:
        names = list(dotenv_values(dotenv))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{dotenv} cannot be read; make it a UTF-8 file that this user may read.") from exc
    for name in names:
        if name not in known_environment_names():
            raise ConfigurationError(
                f"{dotenv} sets the unknown variable {_with_suggestion(name, set(known_environment_names()))}; "
                "config/.env.example lists all of them."
            )


def _with_suggestion(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name} (did you mean {close[0]}?)" if close else name


def _explain(exc: ValidationError) -> str:
    """Turn pydantic's report into sentences without the values: one of them may be a secret."""
    problems = []
    for error in exc.errors(include_input=False, include_url=False):
        name = str(error["loc"][0])
        field = next((f for f in Settings.model_fields if name == f or name in environment_names(f)), name)
        shown = environment_names(field)[0] if field in Settings.model_fields else name
        problems.append(f"{shown} (setting {field}): {error['msg'].removeprefix('Value error, ')}")
    return "Wrong setting: " + "; ".join(problems) + "."
