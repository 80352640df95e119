"""Templates: no escape from the sandbox (AT-7), bombs end (AT-8), model text is only a value (AT-4)."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from error_handler import JobError, JobProcessingError, JobTemplateError
from openai_batch import render_process
from openai_batch.batch_protocol import Line
from openai_batch.documents import (
    MAX_PROMPT_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS,
    PromptTemplate,
    TemplateHandling,
    fill,
)
from openai_batch.job_config import AppConfig, DatabaseConfig, DocumentFields, PromptConfig, SchemaConfig
from openai_batch.job_store import Answer
from openai_batch.ledger import ItemState
from openai_batch.planning import estimated_tokens
from tests.cases import mostly_thorough

NOW = datetime(2026, 1, 2, tzinfo=UTC)
CANARY = "canary-of-the-file-system"

# {path} is a file with the canary, {touch} one that a successful command would make.
PAYLOADS = [
    "{{ cycler.__init__.__globals__.os.popen('touch {touch}').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch {touch}').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch {touch}') }}",
    "{{ namespace.__init__.__globals__.os.system('touch {touch}') }}",
    "{{ range.__class__.__mro__ }}",
    "{{ dict.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ {}.__class__.__base__ }}",
    "{{ text.__class__ }}",
    "{{ text['__class__'] }}",
    "{{ text|attr('__class__') }}",
    "{{ text|attr('_' ~ '_class_' ~ '_') }}",
    "{{ text|attr(['__cl', 'ass__']|join) }}",
    "{{ text|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ [text]|map(attribute='__class__')|list }}",
    "{{ [text]|map('attr', '__class__')|list }}",
    "{{ [text]|groupby('__class__') }}",
    "{{ [text]|sort(attribute='__class__') }}",
    "{{ [text]|sum(attribute='__class__') }}",
    "{{ [text]|selectattr('__class__')|list }}",
    "{{ '{0.__class__}'.format(text) }}",
    "{{ '{0.__class__.__mro__}'|format(text) }}{{ '%s'|format(text.__class__) }}",
    "{{ ['{0.__class__}']|map('format', text)|list }}{{ text.__len__ }}",
    "{% set f = '{0.__class__}'.format %}{{ f(text) }}",
    "{{ '{x.__class__}'.format_map({'x': text}) }}",
    "{{ text.format.__self__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__dict__ }}",
    "{{ loop.__class__ }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{{ caller.__init__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ config.items() }}",
    "{{ request.application.__globals__ }}",
    "{{ url_for.__globals__.os.popen('touch {touch}') }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ __builtins__ }}",
    "{{ __import__('os').system('touch {touch}') }}",
    "{{ open('{path}').read() }}",
    "{% include '{path}' %}",
    "{% import '{path}' as x %}{{ x }}",
    "{% extends '{path}' %}",
    "{% from '{path}' import x %}",
    "{{ (1).__class__.__base__ }}",
    "{{ (g for g in [1]).gi_frame }}",
    "{{ none.__class__.__base__ }}",
    "{{ numbers.append(4) }}",
    "{{ data.update({'x': 1}) }}",
    "{{ data.pop('x') }}{{ data.clear() }}",
    "{% do numbers.append(4) %}",
]
# Filters that look an attribute up and do not print it: Jinja puts its undefined value there.
HARMLESS = ("[Undefined]", "[(Undefined, ['seven'])]", "['seven']")
BOMBS = [
    "{{ 'x' * 10 ** 9 }}",
    "{{ text * 10 ** 9 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ 'x'|center(10 ** 9) }}",
    "{{ text.ljust(10 ** 10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(text) }}",
    "{{ (['x'] * 10 ** 9)|join }}",
    "{% for a in 'x' * 10 ** 4 %}{% for b in 'x' * 10 ** 4 %}{% for c in 'x' * 10 ** 4 %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() if text else '' }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{{ text|replace('', 'x' * 10 ** 8) }}",
    "{{ [[1] * 10 ** 4] * 10 ** 4 }}",
    "{{ 'x' * 3000000 }}",
]


def config_of(**prompts: Any) -> AppConfig:
    return AppConfig(
        schema_config=SchemaConfig(),
        fields=DocumentFields(field_map={"text": "text", "numbers": "numbers", "data": "data"}),
        prompts=PromptConfig(**prompts),
        database=DatabaseConfig(uri=SecretStr("mongodb://nowhere"), name="d", collection="c"),
    )


def document(text: str = "seven") -> dict[str, Any]:
    return {"_id": 1, "text": text, "numbers": [1, 2, 3], "data": {"x": "y"}}


def outcome(document: dict[str, Any], **prompts: Any) -> str:
    """Return what *document* makes of the prompts: their texts, or the error's."""
    try:
        with TemplateHandling(config_of(**prompts)) as handling:
            body = handling.request(document)
    except JobError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "\n".join(message["content"] for message in body["messages"])


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[dict[str, str]]:
    (tmp_path / "file").write_text(CANARY)
    yield {"path": str(tmp_path / "file"), "touch": str(tmp_path / "touched")}
    assert not (tmp_path / "touched").exists()


def filled(payload: str, canary: dict[str, str]) -> str:
    return payload.replace("{path}", canary["path"]).replace("{touch}", canary["touch"])


def in_both_prompts(templates: list[str], often: int, usual: int) -> list[Any]:
    """Each of *templates* in the prompt of the user, and in that of the system, which is rendered the same way.

    Each run of the tests has each *often*-th of the first, and each *usual*-th of the others.
    """
    in_one = [pytest.param(template, "user_prompt_template", id=f"user-{template}") for template in templates]
    return mostly_thorough(in_one, often) + [
        pytest.param(
            template, "system_prompt", id=f"system-{template}", marks=pytest.mark.thorough if place % usual else ()
        )
        for place, template in enumerate(templates)
    ]


@pytest.mark.parametrize(("payload", "setting"), in_both_prompts(PAYLOADS, often=7, usual=27))
def test_payload_in_template_does_not_escape_the_sandbox(payload: str, setting: str, canary: dict[str, str]) -> None:
    """AT-7: an error or harmless text; no file, no command, no changed document."""
    source = document()
    prompts = {"user_prompt_template": "{{ text }}"} | {setting: filled(payload, canary)}
    text = outcome(source, **prompts)
    for leak in (CANARY, "<class", "<function", "<built-in", "<module", "__globals__'", "<slot", "<method"):
        assert leak not in text
    shown = text.removesuffix("\nseven")
    assert shown.startswith(("JobProcessingError: ", "JobTemplateError: ")) or shown in HARMLESS
    assert source == document()


@pytest.fixture(scope="module")
def plain() -> Iterator[TemplateHandling]:
    with TemplateHandling(config_of(user_prompt_template="{{ text }}")) as handling:
        yield handling


@pytest.mark.parametrize("payload", mostly_thorough(PAYLOADS, 3))
def test_payload_in_data_stays_text(payload: str, canary: dict[str, str], plain: TemplateHandling) -> None:
    """AT-7: values are never rendered."""
    text = filled(payload, canary)
    assert [message["content"] for message in plain.request(document(text))["messages"]] == [text]
    template = {"$set": {"a": "{{response_content}}", "b": "says {{response_content}}."}}
    assert fill(template, text, NOW, "batch_1") == {"$set": {"a": text, "b": f"says {text}."}}


@pytest.mark.slow
@pytest.mark.parametrize(("bomb", "setting"), in_both_prompts(BOMBS, often=6, usual=len(BOMBS)))
def test_bombs_end(bomb: str, setting: str) -> None:
    """AT-8: with a clear error, and without memory of this process."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    text = outcome(document(), **({"user_prompt_template": "{{ text }}"} | {setting: bomb}))
    assert text.startswith(("JobProcessingError: ", "JobTemplateError: ")), text[:100]
    assert len(text) < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert time.monotonic() - started < 60  # two seconds of its own, on whatever machine


def test_bomb_fails_one_document_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is rendered by a new child."""
    monkeypatch.setattr(render_process, "TIME_LIMIT_S", 1.0)
    template = "{% for a in text %}{% for b in text %}{% for c in text %}{% endfor %}{% endfor %}{% endfor %}{{ text }}"
    with TemplateHandling(config_of(user_prompt_template=template)) as handling:
        with pytest.raises(JobProcessingError, match="the prompt takes longer than 1 s"):
            handling.request(document("x" * 5000))
        assert handling.request(document())["messages"] == [{"role": "user", "content": "seven"}]


@pytest.mark.parametrize(
    ("template", "name"),
    mostly_thorough(
        [
            ("{{ nme }}", "nme"),
            ("{{ data.nme }}", "nme"),
            ("{{ data[text] }}", "an attribute"),
            ("{{ text.nme.other }}", "nme"),
            ("{% if nme %}x{% endif %}", "nme"),
        ],
        3,
    ),
)
def test_undefined_name_is_an_error_without_values(template: str, name: str) -> None:
    """The message has the name in the template, and no data."""
    text = outcome(document("secret"), user_prompt_template=template)
    assert text == f"JobProcessingError: user_prompt_template uses an undefined name: {name}"


@pytest.mark.parametrize(
    "template", mostly_thorough(["{{ text + 1 }}", "{{ data.x.y() }}", "{{ 1 / 0 }}", "{{ numbers[text] }}"], 2)
)
def test_failing_template_is_an_error_without_values(template: str) -> None:
    """The message has the class of the error."""
    text = outcome(document("secret"), user_prompt_template=template)
    assert text.startswith("JobProcessingError: user_prompt_template ")
    assert "secret" not in text


def test_size_limits_of_templates_and_prompts() -> None:
    """A template that is too long, and one that renders too much."""
    with pytest.raises(JobTemplateError, match="more than 100000 characters"):
        PromptTemplate("system_prompt", "x" * (MAX_TEMPLATE_CHARACTERS + 1))
    with pytest.raises(JobProcessingError, match="more than 2000000 characters"):
        PromptTemplate("system_prompt", "{{ t }}").render({"t": "x" * (MAX_PROMPT_CHARACTERS + 1)})
    with pytest.raises(JobTemplateError, match="system_prompt, line 2"):
        PromptTemplate("system_prompt", "x\n{{ x")


async def test_answer_in_the_text_format_is_a_text() -> None:
    """It is OpenAI's default, written out; parsed as JSON, each answer would be paid for three times and stored never."""
    config = config_of(user_prompt_template="{{ text }}")
    openai = config.openai.model_copy(update={"response_format": {"type": "text"}})
    line = Line("a:1", ItemState.OK, "plain words")
    with TemplateHandling(config.model_copy(update={"openai": openai})) as handling:
        [update] = await handling.deliver([Answer(document(), line, 1)], "batch_1")
    assert not isinstance(update, JobProcessingError)
    assert update["$set"]["event_response"]["talking_points"] == "plain words"


def test_token_estimate_of_data_is_not_too_low() -> None:
    """JSON and numbers have few bytes for each token. The counts are those of o200k_base, the encoding of GPT-4o."""
    rows = [{"id": number, "at": f"2026-11-{number % 28 + 1:02}T10:00:00Z", "ok": None} for number in range(100)]
    numbers = [
        f"{n * 7919 % 1000:03}-{n * 104729 % 10**7:07}-{n * 1299709 % 10**7:07}: {n}.{n % 100:02} EUR"
        for n in range(1, 101)
    ]
    for text, tokens in ((json.dumps(rows), 2901), ("\n".join(numbers), 1599)):
        estimate = estimated_tokens({"messages": [{"role": "user", "content": text}]})
        assert tokens <= estimate < 1.5 * tokens
        as_schema = estimated_tokens({"response_format": {"type": text}})
        assert as_schema >= tokens


def test_fill_keeps_types_and_keys() -> None:
    """A placeholder alone is the value, inside a text it is text; placeholders in the answer stay text."""
    content = {"points": [1, {"deep": "{{current_date}}"}], "n": None}
    template = {
        "$set": {
            "a": "{{response_content}}",
            "b": {"c": ["{{ response_content }}", "{{current_date}}", 5, None, True]},
            "d": "batch {{batch_id}} of {{ current_date }}: {{ response_content }}",
        },
        "$inc": {"n": 1},
    }
    made = fill(template, content, NOW, "batch_1")
    assert made == {
        "$set": {
            "a": content,
            "b": {"c": [content, NOW, 5, None, True]},
            "d": f"batch batch_1 of 2026-01-02T00:00:00+00:00: {json.dumps(content)}",
        },
        "$inc": {"n": 1},
    }
    assert fill("{{response_content}}", "{{batch_id}} $set", NOW, "b") == "{{batch_id}} $set"
    assert fill("x {{response_content}}", "{{batch_id}}", NOW, "b") == "x {{batch_id}}"
