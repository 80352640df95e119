"""The configuration of a document job: frozen pydantic models that a schema file builds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import combinations
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from config import Settings, load_settings
from config.loading import HttpAddress
from config.openai_settings import OpenAISettings, load_openai_settings

Document = dict[str, Any]
Messages = list[dict[str, str]]

MAX_LINES, MAX_FILE_BYTES = 50_000, 200_000_000  # limits of one batch (OpenAI API reference, files and batches)

MISSING = object()
_FIELD_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# Anchored, because pydantic searches for a pattern anywhere in the text; its $ does not match before a line end.
_WHOLE_NAME, _WHOLE_PATH = r"^[A-Za-z0-9_]+$", rf"^{_FIELD_PATH.pattern}$"
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Operators of queries; the others run code on the server, write, or read other collections.
QUERY_OPERATORS = frozenset(
    "$and $or $nor $not $eq $ne $gt $gte $lt $lte $in $nin $exists $type $all $elemMatch $size $mod $regex $options".split()
)
UPDATE_OPERATORS = frozenset("$set $unset $inc $min $max $push $addToSet $currentDate".split())
# Operators allowed below a field; anywhere else a key with $ would become a value that no query can match.
_ALLOWED_BELOW = {
    "$push": frozenset({"$each", "$position", "$slice"}),
    "$addToSet": frozenset({"$each"}),
    "$currentDate": frozenset({"$type"}),
}


class _Frozen(BaseModel):
    # Errors omit the values: one of them may be an API key.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)


class StatusConfig(_Frozen):
    """The status field of the documents and its distinct values.

    *missing_is_pending* also takes documents without the field. Documents with nothing to ask about get
    *skipped_value*; if it is None, they fail.
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
        values = [value for name, value in self if name.endswith("_value")]
        if len(set(values)) != len(values):
            raise ValueError("the status values must differ")
        return self


class SchemaConfig(_Frozen):
    """The documents that a job takes and the fields that it writes.

    Args:
        query_template: Narrows the pending documents; only operators of QUERY_OPERATORS.
        update_template: A further update of completed documents, written as it is; only UPDATE_OPERATORS.
        response_template: The update of completed documents, with the values of ``{{response_content}}``,
            ``{{current_date}}`` and ``{{batch_id}}`` filled in. None sets ``response_field`` to
            ``{response_content_field: answer, response_date_field: now}``.
        document_id_field: The field by which messages identify a document.
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
        own = ("_id", self.status.field_name, self.processing_info_field)
        if any(overlap(*pair) for pair in combinations(own, 2)):
            raise ValueError("status.field_name and processing_info_field must be two separate fields other than _id")
        written: dict[str, str] = {}
        for name, path in self._written():
            if any(overlap(path, field) for field in own):
                raise ValueError(f"{name}: the job itself writes this field; choose another one")
            for field, other in written.items():
                if overlap(path, field):
                    raise ValueError(f"{name}: {other} writes this field as well; MongoDB accepts one change per field")
            written[path] = name
        if self.response_content_field == self.response_date_field:
            raise ValueError("response_content_field and response_date_field must differ")
        return self

    def _written(self) -> Iterator[tuple[str, str]]:
        """Yield the name in the schema and the path of each field that is written to a completed document."""
        if self.response_template is None:
            yield f"response_field {self.response_field}", self.response_field
        for kind in ("response_template", "update_template"):
            for operator, changes in (getattr(self, kind) or {}).items():
                yield from ((f"{kind}.{operator}.{path}", path) for path in changes)

    @field_validator("query_template")
    @classmethod
    def _harmless_query(cls, value: dict[str, Any]) -> dict[str, Any]:
        require_operators(value, QUERY_OPERATORS, "query_template")
        return deepcopy(value)  # later changes by the caller would be unchecked

    @field_validator("update_template", "response_template")
    @classmethod
    def _harmless_update(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value is not None:
            require_update(value, str(info.field_name))
        return deepcopy(value)


class DocumentFields(_Frozen):
    """The mapping from document fields to prompt variables.

    Args:
        field_map: variable -> path, such as ``{"patient_name": "patient_details.first_name"}``; a number in
            a path is an index of a list. Empty: the variables are the document's own fields.
        defaults: variable -> value for documents without the field. Without a default a missing field is an error
            that names the document and the field.
        preprocess_functions: variable -> function of its value, or ``module:function``.
        masked: The variables whose whole values ``--mask-pii`` replaces as names of people, in addition to the
            patterns it finds in every prompt.
        phone_region: The country (ISO 3166, such as ``US``) whose national phone numbers ``--mask-pii`` finds. None:
            only numbers that begin with ``+``, because the same digits may be order numbers or dates.
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
                raise ValueError(f"field_map: {variable!r} is not a variable name")
            if not _FIELD_PATH.fullmatch(path):
                raise ValueError(f"field_map: the path of {variable} must be names and numbers joined by dots")
        for group in ("defaults", "preprocess_functions", "masked"):
            unknown = sorted(set(getattr(self, group)) - set(self.field_map))
            if unknown:
                raise ValueError(f"{group}: {unknown[0]} is not in field_map")
        return self


class DatabaseConfig(_Frozen):
    """The collection of the documents; values that are left out come from the environment."""

    uri: SecretStr = SecretStr("")
    name: str = ""
    collection: str = ""


class OpenAIConfig(_Frozen):
    """The model and its parameters. *response_format* is the API's; None for free text."""

    model: str = "gpt-4o-mini"
    temperature: float = Field(0.1, ge=0, le=2)
    max_tokens: int = Field(500, ge=1)
    response_format: dict[str, Any] | None = None
    api_key: SecretStr | None = None
    base_url: HttpAddress = "https://api.openai.com/v1"  # it is printed and logged, so it has no password


class BatchConfig(_Frozen):
    """The limits and intervals of batches. Units: seconds, bytes and tokens.

    *batch_size* documents are read and claimed at a time. A shard is closed at *max_lines*, at *max_file_bytes*, or
    before *enqueued_token_limit* is exceeded (None: learned from OpenAI's refusals).
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
    """The prompts: Jinja2 templates over the variables of DocumentFields.

    *build_messages*, a function of the whole document, replaces both templates.
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
    """The receivers of a notification for each batch that ends; None: no receiver."""

    webhook_url: SecretStr | None = None
    webhook_secret: SecretStr | None = None
    email: str | None = None
    smtp_server: str | None = None
    smtp_login: SecretStr | None = None
    smtp_from: str | None = None


class AppConfig(_Frozen):
    """The whole configuration of one job."""

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
            raise ValueError("database: give uri, name and collection, or use AppConfig.from_env")
        return self

    @property
    def source(self) -> str:
        """The database, collection and status field that the ledger of this job belongs to."""
        return f"{self.database.name}.{self.database.collection} by {self.schema_config.status.field_name}"

    @classmethod
    def from_env(
        cls, *, settings: Settings | None = None, openai_settings: OpenAISettings | None = None, **parts: Any
    ) -> AppConfig:
        """Return the job that the environment describes; *parts* (fields of AppConfig) take precedence.

        Raises ConfigurationError if a variable is malformed, pydantic's ValidationError if a part is not usable.
        """
        settings = settings or load_settings()
        given = openai_settings or load_openai_settings()
        values = dict(given) | {
            "uri": settings.mongodb_uri,
            "name": settings.db_name,
            "collection": settings.source_collection,
            "poll_interval": given.poll_interval_s,
            "system_prompt": given.system_prompt or "",
            "user_prompt_template": given.user_prompt_template or "",
        }
        made: dict[str, Any] = {"allow_external": given.allow_external, **parts}
        for kind, name in PARTS.items():
            part = made.get(name, kind())
            if type(part) is kind:
                made[name] = _with_defaults(part, values)
        return cls(**made)


# The names in AppConfig of the objects that a job consists of.
PARTS: dict[type[BaseModel], str] = {
    field.annotation: name
    for name, field in AppConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, _Frozen)
}


def _with_defaults(part: BaseModel, values: Mapping[str, Any]) -> BaseModel:
    """Return a checked copy of *part* with the fields that it does not set taken from *values*, if they are there."""
    fields = {name: values[name] for name in type(part).model_fields if name in values}
    own = {name: getattr(part, name) for name in part.model_fields_set}
    if own.get("build_messages") is not None:
        fields["user_prompt_template"] = ""  # replaced by the function
    return type(part)(**{**fields, **own})


def value_at(document: Any, path: str, default: Any = MISSING) -> Any:
    """Return the value at *path*, which joins names and list indexes by dots; KeyError without it and *default*."""
    for name in path.split("."):
        if isinstance(document, Mapping) and name in document:
            document = document[name]
        elif isinstance(document, list) and name.isdecimal() and int(name) < len(document):
            document = document[int(name)]
        elif default is MISSING:
            raise KeyError(path)
        else:
            return default
    return document


def overlap(path: str, other: str) -> bool:
    """Return whether one of two field paths contains the other: MongoDB cannot change both in one update."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def require_operators(value: Any, allowed: frozenset[str], path: str) -> None:
    """Raise ValueError, naming its path, for a key in *value* that begins with $ and is not *allowed*."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) or (key.startswith("$") and key not in allowed) or "\x00" in key:
                raise ValueError(f"{path}.{key!s} is not allowed")
            require_operators(inner, allowed, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            require_operators(inner, allowed, f"{path}[{place}]")


def require_update(value: Mapping[str, Any], name: str = "update") -> None:
    """Raise ValueError if *value*, called *name*, is not an update with UPDATE_OPERATORS over plain field paths."""
    for operator, changes in value.items():
        if operator not in UPDATE_OPERATORS or not isinstance(changes, Mapping):
            raise ValueError(f"{name}.{operator} is not allowed; use {', '.join(sorted(UPDATE_OPERATORS))}")
        for path, inner in changes.items():
            if not isinstance(path, str) or not _FIELD_PATH.fullmatch(path) or overlap(path, "_id"):
                raise ValueError(f"{name}.{operator}.{path!s} is not a field that may be written")
            allowed = _ALLOWED_BELOW.get(operator, frozenset())
            require_operators(inner, allowed, f"{name}.{operator}.{path}")
