"""The configuration objects of a document job: what they refuse, and the secrets that they never show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from config.settings import known_environment_names
from error_handler import JobValidationError
from openai_batch.documents import Variables
from openai_batch.job_config import (
    AppConfig,
    BatchConfig,
    DatabaseConfig,
    DocumentFields,
    NotificationConfig,
    OpenAIConfig,
    PromptConfig,
    SchemaConfig,
    StatusConfig,
)
from openai_batch.schema_file import explain, load_schema_file, resolve_function
from tests.cases import mostly_thorough


def refusal(kind: Any, **fields: Any) -> str:
    """Return why *fields* are refused, as people read it."""
    with pytest.raises(ValidationError) as caught:
        kind(**fields)
    return explain(caught.value)


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ({"$where": "sleep(5000)"}, "query_template.$where"),
        ({"a": {"$where": "1"}}, "query_template.a.$where"),
        ({"$expr": {"$function": {"body": "", "args": [], "lang": "js"}}}, "query_template.$expr"),
        ({"$and": [{"x": 1}, {"y": {"$not": {"$function": {}}}}]}, "query_template.$and[1].y.$not.$function"),
        ({"$or": [{"$accumulator": {}}]}, "query_template.$or[0].$accumulator"),
        ({"$lookup": {}}, "query_template.$lookup"),
        ({"$unionWith": {}}, "query_template.$unionWith"),
        ({"$out": "other"}, "query_template.$out"),
        ({"$merge": {}}, "query_template.$merge"),
        ({"$text": {"$search": "x"}}, "query_template.$text"),
        ({"$jsonSchema": {}}, "query_template.$jsonSchema"),
        ({"a": {"mapReduce": {"$where": 1}}}, "query_template.a.mapReduce.$where"),
        ({"a\x00b": 1}, "query_template.a\x00b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_query_with_forbidden_operator_is_refused(query: Any, path: str) -> None:
    """AT-5: the message names the path of the key."""
    assert f"{path} is not allowed" in refusal(SchemaConfig, query_template=query)


@pytest.mark.parametrize(
    ("update", "path"),
    [
        ({"$out": {}}, "$out is not allowed"),
        ({"$merge": {}}, "$merge is not allowed"),
        ({"$rename": {"a": "b"}}, "$rename is not allowed"),
        ({"name": 5}, "name is not allowed"),
        ({"$set": "{{response_content}}"}, "$set is not allowed"),
        ({"$set": {"$x": 1}}, "$set.$x is not a field"),
        ({"$set": {"a.$[].b": 1}}, "$set.a.$[].b is not a field"),
        ({"$set": {"_id": 1}}, "$set._id is not a field"),
        ({"$set": {"_id.x": 1}}, "$set._id.x is not a field"),
        ({"$set": {"a\n": 1}}, "$set.a\n is not a field"),
        ({"$set": {"{{response_content}}": 1}}, "$set.{{response_content}} is not a field"),
        ({"$set": {"a": {"$function": {"body": "x"}}}}, "$set.a.$function is not allowed"),
        ({"$set": {"a": [{"$where": 1}]}}, "$set.a[0].$where is not allowed"),
        ({"$set": {"a": {"$each": [1]}}}, "$set.a.$each is not allowed"),
        ({"$push": {"a": {"$each": [{"$where": 1}]}}}, "$push.a.$each[0].$where is not allowed"),
        ({"$set": {"ai_status": "completed"}}, "$set.ai_status: the job itself writes this field"),
        ({"$unset": {"processing_info": ""}}, "$unset.processing_info: the job itself writes this field"),
        ({"$set": {"processing_info.batch_id": 1}}, "$set.processing_info.batch_id: the job itself writes this field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("field", ["update_template", pytest.param("response_template", marks=pytest.mark.thorough)])
def test_update_with_forbidden_operator_or_field_is_refused(update: Any, path: str, field: str) -> None:
    """AT-5: operators, paths and the job's own fields."""
    assert f"{field}.{path}" in refusal(SchemaConfig, **{field: update})


@pytest.mark.parametrize(
    "fields",
    [
        {"response_field": "_id"},
        {"response_field": "ai_status"},
        {"response_field": "processing_info.answer"},
        {"response_field": "a b"},
        {"response_field": "a.$b"},
        {"response_field": "a..b"},
        {"response_field": "a\n"},
        {"processing_info_field": "_id"},
        {"processing_info_field": "ai_status"},
        {"processing_info_field": "ai_status.info"},
        {"status": StatusConfig(field_name="_id")},
        {"response_content_field": "a.b"},
        {"response_content_field": "same", "response_date_field": "same"},
        {"update_template": {"$set": {"event_response.x": 1}}},
        {"response_template": {"$set": {"a": "x"}}, "update_template": {"$inc": {"a.b": 1}}},
        {"response_template": {"$set": {"a": 1}, "$push": {"a": 1}}},
        {"querytemplate": {}},
    ],
    ids=str,
)
def test_conflicting_fields_are_refused(fields: dict[str, Any]) -> None:
    """The error comes when the schema is loaded, not after the first answer has been paid for."""
    refusal(SchemaConfig, **fields)


def test_allowed_templates_are_accepted() -> None:
    """Queries and updates with every kind of allowed operator."""
    schema = SchemaConfig(
        query_template={"$or": [{"kind": {"$in": ["a"]}}, {"n": {"$gte": 5}}], "notes": {"$elemMatch": {"x": 1}}},
        response_template={"$set": {"out.text": "{{response_content}}"}, "$push": {"log": {"$each": ["{{batch_id}}"]}}},
        update_template={"$inc": {"version": 1}, "$unset": {"draft": ""}, "$currentDate": {"at": {"$type": "date"}}},
    )
    assert schema.query_template["notes"] == {"$elemMatch": {"x": 1}}


def test_checked_schema_cannot_be_changed() -> None:
    """Neither the object nor the values it was built from."""
    query: dict[str, Any] = {"a": {"$in": [1]}}
    schema = SchemaConfig(query_template=query)
    query["$where"] = "1"
    query["a"]["$where"] = "1"
    assert schema.query_template == {"a": {"$in": [1]}}
    with pytest.raises(ValidationError):
        schema.response_field = "other"  # type: ignore[misc]


def test_equal_status_values_are_refused() -> None:
    """Equal values would process a document forever."""
    assert "the status values must differ" in refusal(StatusConfig, pending_value="x", completed_value="x")
    assert "the status values must differ" in refusal(StatusConfig, failed_value="x", skipped_value="x")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"field_map": {"a b": "x"}}, "'a b' is not a variable name"),
        ({"field_map": {"__class__": "x"}}, "'__class__' is not a variable name"),
        ({"field_map": {"a": "x.$y"}}, "the path of a must be"),
        ({"field_map": {"a": ""}}, "the path of a must be"),
        ({"field_map": {"a": "x"}, "defaults": {"b": 1}}, "defaults: b is not in field_map"),
        ({"field_map": {"a": "x"}, "masked": {"b"}}, "masked: b is not in field_map"),
        ({"phone_region": "usa"}, "phone_region"),
    ],
    ids=str,
)
def test_unusable_document_fields_are_refused(fields: dict[str, Any], problem: str) -> None:
    """The message names the field."""
    assert problem in refusal(DocumentFields, **fields)


CANARY = "CANARY-SECRET-1"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (OpenAIConfig, {"api_key": [CANARY]}),
        (OpenAIConfig, {"base_url": f"https://user:{CANARY}@host/v1"}),
        (OpenAIConfig, {"base_url": f"file:///{CANARY}"}),
        (DatabaseConfig, {"uri": {"x": CANARY}}),
        (NotificationConfig, {"webhook_secret": [CANARY]}),
        (NotificationConfig, {CANARY.lower().replace("-", "_"): 1, "smtp_login": [CANARY]}),
    ],
    ids=str,
)
def test_validation_errors_show_no_secret(kind: Any, fields: dict[str, Any]) -> None:
    """Neither pydantic's text nor ours."""
    with pytest.raises(ValidationError) as caught:
        kind(**fields)
    assert CANARY not in f"{caught.value} {caught.value!r} {explain(caught.value)}"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in known_environment_names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "OPENAI_API_KEY": "sk-CANARY",
        "OPENAI_MODEL": "gpt-env",
        "OPENAI_TEMP": "0.5",
        "MONGODB_URI": "mongodb://user:CANARY@host",
        "MONGODB_DB": "env_db",
        "MONGODB_SOURCE_COLLECTION": "env_items",
        "MAX_RETRIES": "7",
        "BATCH_SIZE": "11",
        "SYSTEM_PROMPT": "env system",
        "USER_PROMPT_TEMPLATE": "env {{ text }}",
        "NOTIFICATION_WEBHOOK_SECRET": "CANARY",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_environment_fills_unset_fields_of_parts(environment: pytest.MonkeyPatch) -> None:
    """Fields that a part sets take precedence."""
    config = AppConfig.from_env(
        openai=OpenAIConfig(model="gpt-own"),
        batch=BatchConfig(batch_size=3),
        prompts=PromptConfig(user_prompt_template="own {{ text }}"),
        database=DatabaseConfig(collection="own_items"),
        notifications=NotificationConfig(email="a@example.org"),
    )
    key = config.openai.api_key
    assert key is not None
    assert key.get_secret_value() == "sk-CANARY"
    assert (config.openai.model, config.openai.temperature) == ("gpt-own", 0.5)
    assert (config.batch.batch_size, config.batch.max_retries) == (3, 7)
    assert (config.prompts.system_prompt, config.prompts.user_prompt_template) == ("env system", "own {{ text }}")
    assert (config.database.name, config.database.collection) == ("env_db", "own_items")
    assert config.notifications.webhook_secret == SecretStr("CANARY")
    assert "CANARY" not in f"{config!r} {config}"


def test_build_messages_replaces_template_of_environment(environment: pytest.MonkeyPatch) -> None:
    """A schema with both is refused."""
    config = AppConfig.from_env(prompts=PromptConfig(build_messages=lambda _: []))
    assert config.prompts.user_prompt_template == ""
    assert "not both" in refusal(PromptConfig, build_messages=lambda _: [], user_prompt_template="x")


def test_config_without_collection_is_refused() -> None:
    """uri, name and collection are needed."""
    parts = {"schema_config": SchemaConfig(), "fields": DocumentFields(), "prompts": PromptConfig()}
    assert "give uri, name and collection" in refusal(AppConfig, **parts, database=DatabaseConfig(name="x"))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own_functions.py"
    path.write_text(
        "from os import system\nimport subprocess\n"
        "def year(value): return value[:4]\n"
        "def two(a, b): return a\n"
        "def _hidden(value): return value\n"
        "class Kind:\n    pass\n"
        "number = 5\n"
    )
    (tmp_path / "broken_functions.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_functions", raising=False)
    return path


REFUSED = (
    "os:system posix:system builtins:eval builtins:exec subprocess:getoutput subprocess:run ../x.py ../x:f /tmp/x.py:f x.py "
    "os.path:join importlib:import_module pickle:loads runpy:run_path ctypes:CDLL code:interact timeit:timeit pty:spawn "
    "own_functions:system own_functions:_hidden own_functions:__import__ own_functions.__builtins__:eval _own:f "
    "own_functions:subprocess own_functions:subprocess.run own_functions:two own_functions:Kind own_functions:number "
    "own_functions:nothing missing_module:f broken_functions:f own_functions own_functions: :year own_functions:year:x"
).split()


@pytest.mark.parametrize(
    "name", mostly_thorough([*REFUSED, "", "own functions:year", "own_functions:year\n", "öwn:f"], 3)
)
def test_foreign_functions_are_refused(name: str, own_module: Path) -> None:
    """AT-20: also under the name of a module of the operator."""
    with pytest.raises(JobValidationError):
        Variables(AppConfig.from_env(fields=DocumentFields(field_map={"a": "a"}, preprocess_functions={"a": name})))


def test_modules_of_python_are_not_imported() -> None:
    """Some have side effects."""
    with pytest.raises(JobValidationError):
        resolve_function("this:c", "a")
    assert "this" not in sys.modules


def test_own_function_is_resolved_by_name(own_module: Path) -> None:
    """As module:function."""
    assert resolve_function("own_functions:year", "a")("1961-03-07") == "1961"


def test_world_writable_code_is_refused(own_module: Path, tmp_path: Path) -> None:
    """For functions and for schema files."""
    schema = tmp_path / "schema.py"
    schema.write_text("from openai_batch import SchemaConfig\nschema_config = SchemaConfig()\n")
    load_schema_file(schema)
    for path in (own_module, schema):
        path.chmod(0o666)
    with pytest.raises(JobValidationError, match="can be changed by everybody"):
        resolve_function("own_functions:year", "a")
    with pytest.raises(JobValidationError, match="can be changed by everybody"):
        load_schema_file(schema)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "defines no SchemaConfig"),
        ("schema_config = 5 +", "line 1: not valid Python"),
        ("import nowhere", "cannot be run"),
        ("1 / 0", "cannot be run"),
        ("assert False", "cannot be run"),
        (
            "from openai_batch import SchemaConfig\na = SchemaConfig()\nb = SchemaConfig()",
            "defines two objects of type SchemaConfig",
        ),
        (
            "from openai_batch import SchemaConfig\nx = SchemaConfig(query_template={'$where': '1'})",
            "query_template.\\$where is not allowed",
        ),
        ("from openai_batch import SchemaConfig\na = SchemaConfig()\nresponse_processor = 5", "must be a function"),
    ],
)
def test_unusable_schema_file_is_explained(text: str, problem: str, tmp_path: Path) -> None:
    """One sentence with the file and the problem."""
    path = tmp_path / "schema.py"
    path.write_text(text)
    with pytest.raises(JobValidationError, match=problem):
        load_schema_file(path)
    with pytest.raises(JobValidationError, match="there is no schema file"):
        load_schema_file(tmp_path / "other.py")
