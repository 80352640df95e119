"""Each setting with its origin, secrets masked; and the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from commands.diagnosis.findings import Finding
from commands.diagnosis.settings import diagnose_labels, diagnose_settings, shown
from config import load_settings
from config.loading import variables_of
from config.settings import Settings, settings_origins
from config.taxonomy import DEFAULT_TAXONOMY
from storage.mongo_connection import hosts_of
from tests.cases import mostly_thorough

PASSWORDS = [
    "x@sec/ret",
    "secret",
    "s3cr3t%40%2F",
    "sec@ret",
    "sec/ret",
    "sec?ret",
    "sec#ret",
    "sec:ret@",
    "@secret",
    "se,cret",
    "sec\nret",
]


pytestmark = pytest.mark.usefixtures("nothing_is_set")


def findings(flags: dict[str, str] | None = None, **given: Any) -> dict[str, Finding]:
    """Return the findings by field; a finding without a field by its sentence."""
    found = diagnose_settings(load_settings(**given), flags or {})
    return {finding.numbers.get("setting", finding.sentence): finding for finding in found}


def test_every_setting_is_listed_with_its_value_and_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("BATCH_SIZE=7\nLEASE_S=60\n")
    Path(".env").chmod(0o600)
    monkeypatch.setenv("MONGODB_BATCH_SIZE", "")  # empty counts as not set
    monkeypatch.setenv("LEASE_S", "90")
    found = findings({"db_name": "--db-name"}, db_name="shop")
    assert set(found) == set(Settings.model_fields)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["db_name"].sentence == "MONGODB_DB = shop (flag --db-name)"
    assert found["batch_size"].sentence == "BATCH_SIZE = 7 (BATCH_SIZE in .env)"
    assert found["lease_s"].sentence == ("LEASE_S = 90.0 (environment variable LEASE_S, overrides LEASE_S in .env)")
    assert found["llm_timeout_s"].sentence == "LLM_TIMEOUT_S = 120.0 (default)"
    assert found["ollama_model"].sentence == "OLLAMA_MODEL = not set (default)"
    assert found["batch_size"].numbers == {
        "setting": "batch_size",
        "variable": "BATCH_SIZE",
        "value": "7",
        "origin": "dotenv",
        "origin_name": "BATCH_SIZE",
    }


PLACES = [
    ("environment", "dotenv"),
    ("dotenv",),
    ("environment",),
    (),
]


@pytest.mark.parametrize("places", PLACES, ids=lambda places: "+".join(places) or "none")
@pytest.mark.parametrize("is_argument", [False, True])
@pytest.mark.parametrize("lower", mostly_thorough([False, True], 2))
def test_reported_origin_is_the_effective_one(
    places: tuple[str, ...], is_argument: bool, lower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a setting with two names, every combination of places and names."""
    names = variables_of(Settings, "db_name")
    for mask in range(1, 4 ** len(places)) if places else [0]:
        values: dict[tuple[str, str], str] = {}
        for position, place in enumerate(places):
            for bit, name in enumerate(names):
                if mask >> (2 * position + bit) & 1:
                    values[place, name] = f"{place}{bit}"
        Path(".env").write_text("".join(f"{n}={v}\n" for (place, n), v in values.items() if place == "dotenv"))
        with monkeypatch.context() as context:
            for (place, name), value in values.items():
                if place == "environment":
                    context.setenv(name.lower() if lower else name, value)
            settings = load_settings(db_name="flag" if is_argument else None)
            found = settings_origins({"db_name": "--db-name"} if is_argument else {})["db_name"]
        wanted = {("argument", "--db-name"): "flag", None: "customer_support"} | values
        assert settings.db_name == wanted[found[0] if found else None]
        assert len(found) == len(values) + is_argument


def test_every_field_has_an_origin() -> None:
    assert set(settings_origins({})) == set(Settings.model_fields)
    assert settings_origins({"lease_s": "--lease"})["lease_s"] == [("argument", "--lease")]


@pytest.mark.parametrize(
    ("first", "second"), [("environment", "environment"), ("environment", "dotenv"), ("dotenv", "dotenv")]
)
def test_two_names_of_one_setting_are_a_warning(first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ""
    for name, place in zip(variables_of(Settings, "batch_size"), (first, second), strict=True):
        if place == "environment":
            monkeypatch.setenv(name, "50")
        else:
            lines += f"{name}=50\n"
    Path(".env").write_text(lines)
    warning = findings()["batch_size"]
    assert warning.level == "warning"
    assert "BATCH_SIZE" in warning.sentence
    assert warning.remedy == "Remove MONGODB_BATCH_SIZE."
    assert findings({"batch_size": "--batch-size"}, batch_size=9)["batch_size"].level == "warning"


@pytest.mark.parametrize(("mode", "is_said"), [(0o644, True), (0o640, True), (0o600, False)])
def test_dotenv_readable_by_others_is_a_warning(mode: int, is_said: bool) -> None:
    Path(".env").write_text("LLM_API_KEY=a-key\n")
    Path(".env").chmod(mode)
    found = findings().get("Other users of this machine can read .env.")
    assert (found is not None) == is_said
    assert found is None or (found.level, found.remedy) == ("warning", "chmod 600 .env")


# Secrets


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:{}@db.example:27017/?x=y",
        "mongodb+srv://user:{}@db.example/shop",
        "mongodb://user:{}@db.example",
    ],
)
def test_passwords_are_masked_completely(password: str, uri: str) -> None:
    text = shown("mongodb_uri", SecretStr(uri.format(password)))
    assert text.startswith(("mongodb://***@", "mongodb+srv://***@"))
    for part in ("sec", "ret", "s3cr3t", "user", "se,", "cret"):
        assert part not in text
        assert part not in hosts_of(uri.format(password))


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("mongodb://localhost:27017", "mongodb://localhost:27017"),
        ("mongodb://u:p@a:1,b:2,[::1]:3/db?replicaSet=rs", "mongodb://***@a:1,b:2,[::1]:3/?***"),
        ("mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:abc", "mongodb://h/?***"),
        ("mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:abc@def", "mongodb://***@***/?***"),
        ("mongodb://user:half-typed", "mongodb://***"),
    ],
)
def test_hosts_stay_visible(uri: str, text: str) -> None:
    assert shown("mongodb_uri", SecretStr(uri)) == text


def test_other_secrets_are_masked_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_KEY", "a-key-of-the-test")
    monkeypatch.setenv("MONGODB_URI", "mongodb://user:p%40ssword@h:1/?authSource=admin")
    found = str(findings())
    assert "a-key-of-the-test" not in found
    assert "p%40ssword" not in found
    assert "mongodb://***@h:1/?***" in found
    assert findings()["llm_api_key"].numbers["value"] == "***"


# Labels


def test_shipped_labels_load() -> None:
    (only,) = diagnose_labels(load_settings())
    assert only.level == "ok"
    assert only.numbers["sentiment"] == 3


@pytest.mark.parametrize(
    ("intents", "topics", "words"),
    [("Other", "Delivery", "for topic;"), ("Refund", "Other", "for intent;"), ("A", "B", "for intent and topic;")],
)
def test_labels_without_other_are_a_warning(intents: str, topics: str, words: str) -> None:
    Path("t.yaml").write_text(f"intents: {{{intents}: x}}\ntopics: {{{topics}: x}}\nsentiments: [Negative]\n")
    found = list(diagnose_labels(load_settings(taxonomy_file="t.yaml")))
    assert [finding.level for finding in found] == ["ok", "warning"]
    assert words in found[1].sentence
    assert "Other" in DEFAULT_TAXONOMY.read_text()


@pytest.mark.parametrize("content", [None, "intents: [", "intents: {}\n"])
def test_invalid_labels_are_an_error(content: str | None) -> None:
    if content is not None:
        Path("t.yaml").write_text(content)
    (only,) = diagnose_labels(load_settings(taxonomy_file="t.yaml"))
    assert only.level == "error"
    assert "t.yaml" in only.sentence
    assert "TAXONOMY_FILE" in only.remedy
