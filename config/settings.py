"""The settings, read once and frozen. Precedence: arguments, environment, ``.env``, defaults."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator

from config.loading import (
    DOTENV,
    HeaderSecret,
    HomePath,
    HttpAddress,
    NameList,
    OllamaAddresses,
    PartSettings,
    load_part,
    read_dotenv,
    shaped,
    variables_of,
)
from config.queries import PriorityRules
from error_handler import ConfigurationError

DEFAULT_DATABASE = "customer_support"
MAX_AUTO = 64  # the highest limit of MAX_CONCURRENT=auto
DEFAULT_STATUS_FIELD = "status"
MAX_METADATA_FIELDS = 20  # of RESULT_METADATA
_FIELD_NAME = re.compile(r"[^$.,\x00][^.,\x00]{0,59}")
_STATE_FIELDS = frozenset(
    "_id conversation_number processed processing_attempts status_reason last_processed_at".split()
)
_TEXT_FIELDS = frozenset("tweets messages text content body message description metadata".split())

Protocol = Literal["ollama_chat", "ollama_generate", "openai_chat"]
OriginKind = Literal["argument", "environment", "dotenv"]

# The path of LLM_API_URL decides the protocol.
PROTOCOL_PATHS: dict[str, Protocol] = {
    "/api/chat": "ollama_chat",
    "/api/generate": "ollama_generate",
    "/v1/chat/completions": "openai_chat",
}

# Names that MongoDB and its driver accept.
DottedName = Annotated[  # of a collection or a field
    str,
    Field(max_length=120),
    shaped(r"[^$.\x00]+(\.[^$.\x00]+)*", "must be a name without $ and without a dot at an end"),
]
DatabaseName = Annotated[
    str,
    Field(max_length=63),
    shaped(r'[^/\\. "$*<>:|?\x00]+', 'must be the name of a database, without spaces and / \\ . " $ * < > : | ?'),
]
KeepAlive = Annotated[
    str,
    shaped(r"-?(\d+|(\d+(\.\d+)?(ns|us|ms|s|m|h))+)", "must be a duration such as 90s, 10m or 1h30m, or -1 for no end"),
]
MongoAddress = Annotated[SecretStr, shaped(r"(?s)mongodb(\+srv)?://.*", "must start with mongodb:// or mongodb+srv://")]


def _with_chat_path(address: str) -> str:
    """Return *address* with the route for chats if it ends in that of the API, which other tools want."""
    for base, route in (("/v1", "/chat/completions"), ("/api", "/chat")):
        if address.endswith(base):
            return address + route
    return address


ChatAddress = Annotated[
    HttpAddress,
    AfterValidator(_with_chat_path),
    shaped(f".*({'|'.join(PROTOCOL_PATHS)})", "must end in " + " or ".join(PROTOCOL_PATHS)),
]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(lambda name: str(name).upper())]


def database_in(uri: str) -> str | None:
    """Return the database that *uri* names; None if it names none, or only that of a user (``/admin``)."""
    path = re.match(r"mongodb(?:\+srv)?://[^/?]*/([^?]*)", uri)
    name = unquote(path[1]) if path else ""
    is_usable = re.fullmatch(r'[^/\\. "$*<>:|?@\x00]{1,63}', name) and name not in ("admin", "config", "local")
    return name if is_usable else None


def _default_database(values: dict[str, Any]) -> str:
    uri = values.get("mongodb_uri")
    return (uri and database_in(uri.get_secret_value())) or DEFAULT_DATABASE


class Settings(PartSettings):
    """The settings of the worker and of the model server; ``.env.example`` explains each variable.

    Times are in seconds and lengths in tokens, unless the name says otherwise. A field without an alias is set by the
    variable of its name in capitals.
    """

    mongodb_uri: MongoAddress = Field(
        SecretStr("mongodb://localhost:27017"),
        validation_alias=AliasChoices("MONGODB_URI", "MONGODB_CONNECTION_STRING"),
    )
    db_name: DatabaseName = Field(
        default_factory=_default_database, validation_alias=AliasChoices("MONGODB_DB", "MONGODB_DATABASE_NAME")
    )
    source_collection: DottedName = Field(
        "conversation_set", validation_alias=AliasChoices("MONGODB_SOURCE_COLLECTION", "MONGODB_QUERIES_COLLECTION")
    )
    status_field: str = DEFAULT_STATUS_FIELD
    priority_field: DottedName = "priority"
    priority_rules: PriorityRules = None
    time_field: DottedName = "created_at"
    results_collection: DottedName = Field("sentimental_analysis", validation_alias="MONGODB_RESULTS_COLLECTION")
    batch_size: int = Field(100, ge=1, le=1000, validation_alias=AliasChoices("BATCH_SIZE", "MONGODB_BATCH_SIZE"))
    max_concurrent: int | Literal["auto"] = 5
    mongodb_max_retries: int = Field(3, ge=1, le=10)
    mongodb_timeout_ms: int = Field(20_000, ge=100, le=600_000)
    mongodb_backoff_s: float = Field(1.0, ge=0, le=60)
    mode: Literal["batch", "continuous", "scheduled", "stream"] = Field(
        "batch", validation_alias="BATCH_PROCESSOR_MODE"
    )
    settle_s: float = Field(30.0, ge=0, le=86_400)
    ollama_model: str | None = None
    ollama_endpoint: OllamaAddresses = Field(
        "http://localhost:11434", validation_alias=AliasChoices("OLLAMA_ENDPOINT", "OLLAMA_HOST")
    )
    allow_mixed_models: bool = False
    # A smaller window cannot hold instructions and answer.
    ollama_num_ctx: int | None = Field(None, ge=2048, le=1_048_576)
    on_long: Literal["fit", "skip", "fail"] = "fit"
    llm_load_timeout_s: float = Field(600.0, gt=0, le=7200)
    ollama_keep_alive: KeepAlive = "10m"
    llm_api_url: ChatAddress | None = None
    llm_model: str | None = None
    llm_api_key: HeaderSecret | None = None
    llm_timeout_s: float = Field(120.0, gt=0, le=3600)
    llm_max_attempts: int = Field(3, ge=1, le=10)
    llm_backoff_s: float = Field(2.0, ge=0, le=60)
    outage_limit_s: float = Field(3600.0, gt=0)
    shutdown_grace_s: float = Field(30.0, ge=0, le=600)
    lease_s: float = Field(300.0, ge=1, le=86_400)
    service_lease: bool = True
    worker_floor: int = Field(1, ge=1, le=256)
    worker_heartbeat: bool = True
    batch_files_dir: HomePath = Path("batch_files")
    taxonomy_file: HomePath | None = None
    prompt_examples_file: HomePath | None = None
    reply_style: Literal["full", "labels", "list", "score", "auto"] = "full"
    review_below: float | None = Field(None, ge=0, le=1)
    student: float | None = Field(None, ge=0.5, lt=1)
    store_original_conversation: bool = False
    result_metadata: NameList = ("channel",)
    metrics_port: int | None = Field(None, ge=1, le=65_535)
    metrics_address: str = "127.0.0.1"
    log_level: LogLevel = "INFO"

    @field_validator("max_concurrent", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        text = str(value).strip().lower()
        if text == "auto":
            return text
        if not text.isdecimal() or not 1 <= int(text) <= 256:
            raise ValueError("must be a whole number from 1 to 256, or auto")
        return int(text)

    @field_validator("results_collection")
    @classmethod
    def _not_the_source(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("source_collection"):
            raise ValueError("must differ from the source collection")
        return value

    @field_validator("status_field")
    @classmethod
    def _field_of_its_own(cls, value: str) -> str:
        if not _FIELD_NAME.fullmatch(value) or value in _TEXT_FIELDS | _STATE_FIELDS:
            raise ValueError("must be the name of a field without dots that holds neither text nor other state")
        return value

    @field_validator("result_metadata")
    @classmethod
    def _fields_without_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > MAX_METADATA_FIELDS or any(not _FIELD_NAME.fullmatch(name) for name in value):
            raise ValueError(
                f"must be at most {MAX_METADATA_FIELDS} names of fields without dots, with commas between them"
            )
        if has_text := _TEXT_FIELDS.intersection(value):
            raise ValueError(f"must not name fields with the text of conversations: {', '.join(sorted(has_text))}")
        return value

    @property
    def most_concurrent(self) -> int:
        """The highest number of concurrent calls of one model server."""
        return MAX_AUTO if self.max_concurrent == "auto" else self.max_concurrent

    @property
    def most_in_flight(self) -> int:
        """The highest number of concurrent calls of a run on all its model servers."""
        return self.most_concurrent * len(self.ollama_endpoints)

    @property
    def ollama_endpoints(self) -> tuple[str, ...]:
        """The addresses of the model servers of a run; the first one alone if LLM_API_URL names the server."""
        addresses = tuple(self.ollama_endpoint.split(","))
        return addresses[:1] if self.llm_api_url else addresses

    def for_each_server(self) -> tuple[Settings, ...]:
        """Return these settings for each model server alone."""
        return tuple(self.model_copy(update={"ollama_endpoint": one}) for one in self.ollama_endpoints)

    @property
    def chat_url(self) -> str:
        """The address for chat requests to the first model server."""
        return self.llm_api_url or f"{self.ollama_endpoints[0]}/api/chat"

    @property
    def protocol(self) -> Protocol:
        """The protocol of ``chat_url``."""
        return next(name for path, name in PROTOCOL_PATHS.items() if self.chat_url.endswith(path))

    @property
    def server_url(self) -> str:
        """``chat_url`` without the path of the chat request."""
        path = next(path for path in PROTOCOL_PATHS if self.chat_url.endswith(path))
        return self.chat_url.removesuffix(path)

    @property
    def model(self) -> str | None:
        """The model to use; None if none is set."""
        return self.llm_model if self.llm_api_url else self.ollama_model


def settings_classes() -> tuple[type[PartSettings], ...]:
    """Return the class of each part of the settings."""
    # Imported late, because creating a settings class takes milliseconds of each start; only a .env needs all names.
    from config.index_settings import IndexSettings  # noqa: PLC0415
    from config.network_settings import NetworkSettings  # noqa: PLC0415
    from config.openai_settings import OpenAISettings  # noqa: PLC0415
    from config.report_settings import ReportSettings  # noqa: PLC0415
    from config.review_settings import ReviewSettings  # noqa: PLC0415
    from config.service_settings import ServiceSettings  # noqa: PLC0415

    return (
        *(Settings, ServiceSettings, OpenAISettings, IndexSettings, NetworkSettings),
        *(ReviewSettings, ReportSettings),
    )


@cache
def known_environment_names() -> frozenset[str]:
    """Return every environment variable that this product reads."""
    return frozenset(
        name for one in settings_classes() for field in one.model_fields for name in variables_of(one, field)
    )


def forget_settings() -> None:
    """Remove every variable of this product from the environment of this process, which runs functions of users."""
    for name in known_environment_names():
        os.environ.pop(name, None)


def load_settings(dotenv: Path | None = DOTENV, **arguments: Any) -> Settings:
    """Return the settings; see ``load_part`` for *dotenv* and *arguments*.

    Raises:
        ConfigurationError: A value or an argument is wrong, or *dotenv* sets an unknown variable. The message names
            each one and never shows a secret.
    """
    for name in sorted(arguments.keys() - Settings.model_fields.keys()):
        raise ConfigurationError(f"Unknown setting {_with_suggestion(name, Settings.model_fields)}.")
    names = read_dotenv(dotenv)
    known = known_environment_names() if names else frozenset()
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"{dotenv} sets the unknown variable {_with_suggestion(name, known)}; config/.env.example lists all of "
                "them."
            )
    return load_part(Settings, dotenv, **arguments)


def settings_origins(flags: Mapping[str, str], dotenv: Path | None = DOTENV) -> dict[str, list[tuple[OriginKind, str]]]:
    """Return the places that set each field of Settings, as (kind, name). The first one wins; [] means the default.

    *flags* maps each field that was set by a flag to the flag. As in pydantic-settings, empty variables count as not
    set, the first name of a setting wins over its other names, and names are compared without regard to case.

    Raises:
        ConfigurationError: *dotenv* cannot be read.
    """
    places: dict[OriginKind, Mapping[str, str | None]] = {"environment": os.environ, "dotenv": read_dotenv(dotenv)}
    filled = {kind: {name.lower() for name, value in values.items() if value} for kind, values in places.items()}
    origins: dict[str, list[tuple[OriginKind, str]]] = {}
    for field in Settings.model_fields:
        origins[field] = [("argument", flags[field])] if field in flags else []
        for kind, names in filled.items():
            origins[field] += [(kind, name) for name in variables_of(Settings, field) if name.lower() in names]
    return origins


def _with_suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name} (did you mean {close[0]}?)" if close else name
