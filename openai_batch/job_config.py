"""What a document job is made of: frozen objects that a schema file builds, checked when they are built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from config import Settings, load_settings
from config.openai_settings import OpenAISettings, load_openai_settings

Document = dict[str, Any]
Messages = list[dict[str, str]]

MAX_LINES, MAX_FILE_BYTES = 50_000, 200_000_000  # of one batch (OpenAI API reference, files and batches)

_FIELD_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# pydantic looks for a pattern anywhere in the text, and its $ does not forgive a line end.
_WHOLE_NAME, _WHOLE_PATH = r"^[A-Za-z0-9_]+$", rf"^{_FIELD_PATH.pattern}$"
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# What a query may hold: everything else runs code on the server, writes, or reads elsewhere.
QUERY_OPERATORS = frozenset(
    "$and $or $nor $not $eq $ne $gt $gte $lt $lte $in $nin $exists $type $all $elemMatch $size $mod $regex $options".split()
)
UPDATE_OPERATORS = frozenset("$set $unset $inc $min $max $push $addToSet $currentDate".split())
# What stands below the fields of these; elsewhere a key with $ would be a value that nothing can be asked for.
_ALLOWED_BELOW = {
    "$push": frozenset({"$each", "$position", "$slice"}),
    "$addToSet": frozenset({"$each"}),
    "$currentDate": frozenset({"$type"}),
}


class _Frozen(BaseModel):
    # Errors without the values: one of them may be a key.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)


class StatusConfig(_Frozen):
    """The status field of the documents and its values; all distinct.

    *missing_is_pending* takes documents without the field, too. *skipped_value* None fails documents that have
    nothing to ask about.
    """

    field_name: str = Field("ai_status", pattern=_WHOLE_PATH)
    pending_value: str = "pending"
    in_progress_value: str = "in_progress"
    completed_value: str = "completed"
    failed_value: str = "failed"
    missing_is_pending: bool = False
    skipped_value: str | None = None

    @model_validator(mode="after")
    def _distinct(self) -> StatusConfig:
        values = [
            self.pending_value,
            self.in_progress_value,
            self.completed_value,
            self.failed_value,
            self.skipped_value,
        ]
        if len(set(values)) != len(values):
            raise ValueError("the status values must differ")
        return self


class SchemaConfig(_Frozen):
    """Which documents a job takes and what it writes to them.

    Args:
        query_template: Narrows the pending documents; only the operators of QUERY_OPERATORS.
        update_template: Further changes of a completed document, written as they are: an update with
            operators of UPDATE_OPERATORS.
        response_template: The update of a completed document, in which the texts ``{{response_content}}``,
            ``{{current_date}}`` and ``{{batch_id}}`` stand for values. None sets ``response_field`` to
            ``{response_content_field: answer, response_date_field: now}``.
        document_id_field: By which field messages call a document.
    """

    status: StatusConfig = StatusConfig()
    response_field: str = Field("event_response", pattern=_WHOLE_PATH)
    response_date_field: str = Field("created_date", pattern=_WHOLE_NAME)
    response_content_field: str = Field("talking_points", pattern=_WHOLE_NAME)
    document_id_field: str = Field("_id", pattern=_WHOLE_PATH)
    processing_info_field: str = Field("processing_info", pattern=_WHOLE_PATH)
    query_template: dict[str, Any] = Field(default_factory=dict)
    update_template: dict[str, Any] | None = None
    response_template: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _own_fields_stay(self) -> SchemaConfig:
        own = {
            "_id": "_id",
            self.status.field_name: "status.field_name",
            self.processing_info_field: "processing_info_field",
        }
        if len(own) < 3 or any(overlap(path, other) for path in own for other in own if path != other):
            raise ValueError("status.field_name and processing_info_field must be fields of their own, and not _id")
        written: dict[str, str] = {}
        for name, path in self._written():
            if any(overlap(path, field) for field in own):
                raise ValueError(f"{name}: the job itself writes this field")
            twice = next((other for field, other in written.items() if overlap(path, field)), None)
            if twice is not None:
                raise ValueError(f"{name}: {twice} writes this field, too; MongoDB takes one change of it")
            written[path] = name
        if self.response_content_field == self.response_date_field:
            raise ValueError("response_content_field and response_date_field must differ")
        return self

    def _written(self) -> Iterator[tuple[str, str]]:
        """Yield the name in the schema and the path of everything a completed document gets."""
        if self.response_template is None:
            yield f"response_field {self.response_field}", self.response_field
        for kind in ("response_template", "update_template"):
            for operator, changes in (getattr(self, kind) or {}).items():
                yield from ((f"{kind}.{operator}.{path}", path) for path in changes)

    @field_validator("query_template")
    @classmethod
    def _harmless_query(cls, value: dict[str, Any]) -> dict[str, Any]:
        require_operators(value, QUERY_OPERATORS, "query_template")
        return deepcopy(value)  # what the caller changes later was not checked

    @field_validator("update_template", "response_template")
    @classmethod
    def _harmless_update(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value is not None:
            require_update(value, str(info.field_name))
        return deepcopy(value)


class DocumentFields(_Frozen):
    """How prompt variables are taken from a document.

    Args:
        field_map: variable -> path, such as ``{"patient_name": "patient_details.first_name"}``; a number in
            a path is a place in a list. Empty: the variables are the fields of the document itself.
        defaults: variable -> value where the document has none. Without a default, a missing one is an error
            that names document and field.
        preprocess_functions: variable -> function of its value, or ``module:function``.
        masked: The variables in which ``--mask-pii`` replaces whole values as names of people, beside the
            patterns that it finds in all of them.
        phone_region: The country (ISO 3166, such as ``US``) whose national phone numbers ``--mask-pii`` finds; None:
            only numbers that begin with ``+``, since elsewhere the same digits are orders and dates.
    """

    field_map: dict[str, str] = Field(default_factory=dict)
    defaults: dict[str, Any] = Field(default_factory=dict)
    preprocess_functions: dict[str, Callable[[Any], Any] | str] = Field(default_factory=dict)
    masked: frozenset[str] = frozenset()
    phone_region: str | None = Field(None, pattern="^[A-Z]{2}$")

    @model_validator(mode="after")
    def _known_names(self) -> DocumentFields:
        for variable, path in self.field_map.items():
            if not _VARIABLE.fullmatch(variable):
                raise ValueError(f"field_map: {variable!r} is no name for a variable")
            if not _FIELD_PATH.fullmatch(path):
                raise ValueError(f"field_map: the path of {variable} must be names and numbers joined by dots")
        for group in ("defaults", "preprocess_functions", "masked"):
            unknown = sorted(set(getattr(self, group)) - set(self.field_map))
            if unknown:
                raise ValueError(f"{group}: {unknown[0]} is not in field_map")
        return self


class DatabaseConfig(_Frozen):
    """Where the documents are; what is left out comes from the environment."""

    uri: SecretStr = SecretStr("")
    name: str = ""
    collection: str = ""


class OpenAIConfig(_Frozen):
    """Which model is asked, and how. *response_format* is that of the API, None for free text."""

    model: str = "gpt-4o-mini"
    temperature: float = Field(0.1, ge=0, le=2)
    max_tokens: int = Field(500, ge=1)
    response_format: dict[str, Any] | None = None
    api_key: SecretStr | None = None
    base_url: str = "https://api.openai.com/v1"

    @field_validator("base_url")
    @classmethod
    def _without_password(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or "@" in value:  # it is shown and logged
            raise ValueError("must be http(s)://host[:port][/path], without user name and password")
        return value


class BatchConfig(_Frozen):
    """How documents become batches. Seconds, bytes and tokens.

    *batch_size* documents are read and claimed at once; a shard is closed at *max_lines*, *max_file_bytes* or
    when the next document would pass *enqueued_token_limit* (None: as OpenAI says when it refuses).
    """

    batch_size: int = Field(100, ge=1, le=MAX_LINES)
    completion_window: Literal["24h"] = "24h"
    poll_interval: float = Field(300.0, gt=0)
    endpoint: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    max_retries: int = Field(3, ge=1)
    max_lines: int = Field(MAX_LINES, ge=1, le=MAX_LINES)
    max_file_bytes: int = Field(MAX_FILE_BYTES, ge=10_000, le=MAX_FILE_BYTES)
    enqueued_token_limit: int | None = Field(None, ge=1000)


class PromptConfig(_Frozen):
    """The prompts: Jinja2 over the variables of DocumentFields.

    *build_messages* replaces both templates by a function of the whole document.
    """

    system_prompt: str = ""
    user_prompt_template: str = ""
    build_messages: Callable[[Document], Messages] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> PromptConfig:
        if self.build_messages is not None and self.user_prompt_template:
            raise ValueError("give a user_prompt_template or build_messages, not both")
        return self


class NotificationConfig(_Frozen):
    """Who is told that a batch completed, failed or is tried again; None: nobody."""

    webhook_url: SecretStr | None = None
    webhook_secret: SecretStr | None = None
    email: str | None = None
    smtp_server: str | None = None
    smtp_login: SecretStr | None = None
    smtp_from: str | None = None


class AppConfig(_Frozen):
    """One job, whole. *state_dir* holds its ledger and files; two jobs never share a collection and a name."""

    schema_config: SchemaConfig
    fields: DocumentFields
    prompts: PromptConfig
    database: DatabaseConfig
    openai: OpenAIConfig = OpenAIConfig()
    batch: BatchConfig = BatchConfig()
    notifications: NotificationConfig = NotificationConfig()
    allow_external: bool = False
    mask_pii: bool = False

    @model_validator(mode="after")
    def _knows_its_documents(self) -> AppConfig:
        if not (self.database.uri.get_secret_value() and self.database.name and self.database.collection):
            raise ValueError("database: give uri, name and collection, or take AppConfig.from_env")
        return self

    @classmethod
    def from_env(
        cls,
        schema_config: SchemaConfig | None = None,
        fields: DocumentFields | None = None,
        settings: Settings | None = None,
        openai_settings: OpenAISettings | None = None,
        **parts: Any,
    ) -> AppConfig:
        """Return the job that the environment describes; what *parts* (fields of AppConfig) set wins over it.

        Raises:
            ConfigurationError: A variable is malformed.
            pydantic.ValidationError: A part is not usable.
        """
        settings = settings or load_settings()
        given = openai_settings or load_openai_settings()
        made: dict[str, Any] = {
            "schema_config": schema_config or SchemaConfig(),
            "fields": fields or DocumentFields(field_map={}),
            "database": DatabaseConfig(
                uri=settings.mongodb_uri, name=settings.db_name, collection=settings.source_collection
            ),
            "openai": OpenAIConfig(
                model=given.model,
                temperature=given.temperature,
                max_tokens=given.max_tokens,
                api_key=given.api_key,
                base_url=given.base_url,
            ),
            "batch": BatchConfig(
                batch_size=given.batch_size,
                completion_window=given.completion_window,
                poll_interval=given.poll_interval_s,
                max_retries=given.max_retries,
            ),
            "notifications": NotificationConfig(
                **{name: getattr(given, name) for name in NotificationConfig.model_fields}
            ),
            "prompts": PromptConfig(
                system_prompt=given.system_prompt or "", user_prompt_template=given.user_prompt_template or ""
            ),
            "allow_external": given.allow_external,
        }
        for name, part in parts.items():
            base = made.get(name)
            # What a part leaves open, such as the key, comes from the environment.
            made[name] = _filled(part, base) if isinstance(base, _OPEN_PARTS) and type(part) is type(base) else part
        return cls(**made)


_OPEN_PARTS = (OpenAIConfig, BatchConfig, NotificationConfig, PromptConfig, DatabaseConfig)


def _filled(part: BaseModel, base: BaseModel) -> BaseModel:
    """Return *part*, checked, with the fields of *base* where it says nothing itself."""
    fields = {name: getattr(base, name) for name in type(base).model_fields}
    own = {name: getattr(part, name) for name in part.model_fields_set}
    if own.get("build_messages") is not None:
        fields["user_prompt_template"] = ""  # a function takes its place
    return type(part)(**{**fields, **own})


def overlap(path: str, other: str) -> bool:
    """Whether one of two field paths lies in the other: MongoDB cannot change both in one update."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def require_operators(value: Any, allowed: frozenset[str], path: str) -> None:
    """Raise ValueError with the path of the first key in *value* that begins with $ and is not *allowed*."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) or (key.startswith("$") and key not in allowed) or "\x00" in key:
                raise ValueError(f"{path}.{key!s} is not allowed")
            require_operators(inner, allowed, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            require_operators(inner, allowed, f"{path}[{place}]")


def require_update(value: Mapping[str, Any], name: str = "update") -> None:
    """Raise ValueError where *value*, called *name*, is no update of harmless operators over plain field paths."""
    for operator, changes in value.items():
        if operator not in UPDATE_OPERATORS or not isinstance(changes, Mapping):
            raise ValueError(f"{name}.{operator} is not allowed; an update has {', '.join(sorted(UPDATE_OPERATORS))}")
        for path, inner in changes.items():
            if not isinstance(path, str) or not _FIELD_PATH.fullmatch(path) or overlap(path, "_id"):
                raise ValueError(f"{name}.{operator}.{path!s} is no field that may be written")
            allowed = _ALLOWED_BELOW.get(operator, frozenset())
            require_operators(inner, allowed, f"{name}.{operator}.{path}")
