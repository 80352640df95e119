"""The taxonomy: the shipped file keeps its promise, a file of one's own is read or refused with the place."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from config import load_taxonomy
from config.taxonomy import DEFAULT_TAXONOMY, Field, Label, Taxonomy, fold_label
from error_handler import ConfigurationError

OWN = """
intents:
  Ask: wants to know
  Other: {definition: "anything\\n else", phrases: [hm, um]}
topics:
  Bill: money
sentiments: [Good, Bad]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_taxonomy(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_shipped_taxonomy() -> None:
    """10 to 14 intents and topics, each with a one-line definition and an Other; three sentiments."""
    taxonomy = load_taxonomy()
    assert taxonomy.field_names == ("intent", "topic", "sentiment")
    assert taxonomy.has_categorization
    for labels in (taxonomy.labels("intent"), taxonomy.labels("topic")):
        assert 10 <= len(labels) <= 14
        assert labels[-1].name == "Other"
        for label in labels:
            assert label.definition
            assert "\n" not in label.definition
    assert taxonomy.names("sentiment") == ("Positive", "Neutral", "Negative")
    assert load_taxonomy(None) == load_taxonomy(DEFAULT_TAXONOMY) == taxonomy


def test_names_are_those_of_the_file_in_its_order(own: Path) -> None:
    """A definition may be only a text, or a text with phrases."""
    taxonomy = load_taxonomy(own)
    assert taxonomy == Taxonomy(
        (
            Field("intent", (Label("Ask", "wants to know"), Label("Other", "anything else", ("hm", "um")))),
            Field("topic", (Label("Bill", "money"),)),
            Field("sentiment", (Label("Good", ""), Label("Bad", ""))),
        )
    )
    assert taxonomy.names("intent") == ("Ask", "Other")
    assert taxonomy.names("topic") == ("Bill",)
    assert taxonomy.names("sentiment") == ("Good", "Bad")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        pytest.param("topics:", "topic:", "topics", id="misspelt-group"),
        pytest.param("sentiments: [Good, Bad]", "", "sentiments", id="missing-group"),
        pytest.param("intents:", "colours: {}\nintents:", "intents", id="surplus-group"),
        pytest.param("[Good, Bad]", "[]", "sentiments", id="no-sentiments"),
        pytest.param("[Good, Bad]", "Good", "sentiments", id="text-for-list"),
        pytest.param("[Good, Bad]", "[Good, 5]", "sentiments", id="number-for-name"),
        pytest.param("[Good, Bad]", "[Good, ' ']", "sentiments", id="blank-name"),
        pytest.param("[Good, Bad]", "[Good, 'g ood']", "sentiments", id="same-sentiment"),
        pytest.param("  Bill: money", "  {}", "topics", id="no-topics"),
        pytest.param("  Bill: money", "  [Bill]", "topics", id="list-of-topics"),
        pytest.param("Bill: money", "Bill:", "topics > Bill", id="no-definition"),
        pytest.param("Bill: money", "Bill: 5", "topics > Bill", id="number-for-definition"),
        pytest.param("Bill: money", "Bill: {phrases: [x]}", "topics > Bill", id="phrases-alone"),
        pytest.param(
            "Bill: money", "Bill: {definition: x, phrases: y}", "topics > Bill > phrases", id="text-for-phrases"
        ),
        pytest.param(
            "Bill: money", "Bill: {definition: x, phrases: [1]}", "topics > Bill > phrases", id="number-phrase"
        ),
        pytest.param("Bill: money", "Bill: money\n  b ILL: more", "topics", id="same-without-case-and-space"),
        pytest.param("Bill: money", "'': money", "topics", id="empty-label"),
    ],
)
def test_error_names_file_and_entry(own: Path, old: str, new: str, named: str) -> None:
    """The file and the entry."""
    assert old in OWN
    own.write_text(OWN.replace(old, new))
    assert named in refusal(own)


def test_unknown_key_of_a_label_is_named_once_and_ignored(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    own.write_text(OWN.replace("Bill: money", "Bill: {definition: money, phrase: [invoice]}"))
    for _ in range(2):
        assert load_taxonomy(own).labels("topic") == (Label("Bill", "money"),)
    (message,) = caplog.messages
    assert message.startswith(f"In the taxonomy {own}, topics > Bill has the unknown key phrase, which is ignored;")


@pytest.mark.parametrize(
    "content", [b"intents: [", b"\xff\xfe", b"", b"- a", b"!!python/object:os.system {}", b"a: &a [*a"]
)
def test_file_without_a_taxonomy_is_refused(own: Path, content: bytes) -> None:
    """YAML is read without the power to make objects."""
    own.write_bytes(content)
    assert "taxonomy" in refusal(own)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """The variable that names it is named."""
    assert "TAXONOMY_FILE" in refusal(tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", ["404", "2024-01-01", "null"])
def test_label_that_is_not_a_string_in_yaml_is_refused(own: Path, name: str) -> None:
    """Results would hold a number; in quotes it is a label like any other."""
    own.write_text(OWN.replace("Bill: money", f"{name}: agreed"))
    assert "quotes" in refusal(own)
    own.write_text(OWN.replace("Bill: money", f"'{name}': agreed"))
    assert load_taxonomy(own).names("topic") == (name,)


def test_fold_label() -> None:
    """Case, Unicode form, and white space of any kind and anywhere, do not count."""
    assert fold_label(" Order\u00a0STATUS\n") == fold_label("orderstatus") == "orderstatus"
    assert fold_label("Straße") == fold_label("STRASSE")
    for label in ("Crédit refusé", "ΰ ΐ", "한국어", "Ǆ"):
        forms = {fold_label(unicodedata.normalize(form, label.upper())) for form in ("NFC", "NFD")}
        assert forms == {fold_label(label)}
