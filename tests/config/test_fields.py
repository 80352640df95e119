"""Fields beside the triad: the forms that a taxonomy file may give them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import Taxonomy, load_taxonomy
from config.taxonomy import Field, Label
from database_docs.items import CONVERSATION_FACTS
from error_handler import ConfigurationError

TRIAD = """
intents: {Other: anything}
topics: {Other: anything}
sentiments: [Good, Bad]
"""
FIELDS = """
fields:
  urgency: [Low, High]
  escalate:
    definition: Whether a manager
      should look at it
    labels: {Yes: "asks for one", No: {definition: does not, phrases: [fine]}}
  channels:
    multiple: true
    labels: [Phone, Chat]
"""


def loaded(folder: Path, content: str) -> Taxonomy:
    path = folder / "own.yaml"
    path.write_text(content, encoding="utf-8")
    return load_taxonomy(path)


def test_fields_follow_the_triad_in_the_order_of_the_file(tmp_path: Path) -> None:
    taxonomy = loaded(tmp_path, FIELDS + TRIAD)
    assert taxonomy.field_names == ("intent", "topic", "sentiment", "urgency", "escalate", "channels")
    assert taxonomy.keys == ("categorization", *taxonomy.field_names)
    assert taxonomy.fields[3:] == (
        Field("urgency", (Label("Low", ""), Label("High", ""))),
        Field(
            "escalate",
            (Label("Yes", "asks for one"), Label("No", "does not", ("fine",))),
            "Whether a manager should look at it",
        ),
        Field("channels", (Label("Phone", ""), Label("Chat", "")), is_multiple=True),
    )
    assert taxonomy.names("escalate") == ("Yes", "No")
    assert taxonomy.labels("channels") == taxonomy.fields[-1].labels


@pytest.mark.parametrize("left_out", ["intents", "topics", "sentiments"])
def test_a_file_with_fields_may_leave_out_a_part_of_the_triad(tmp_path: Path, left_out: str) -> None:
    rest = "".join(f"{line}\n" for line in TRIAD.splitlines() if not line.startswith(left_out))
    assert left_out[:-1] not in loaded(tmp_path, rest + FIELDS).field_names
    with pytest.raises(ConfigurationError, match=left_out):
        loaded(tmp_path, rest)


def test_a_file_may_have_nothing_but_one_field(tmp_path: Path) -> None:
    taxonomy = loaded(tmp_path, "fields: {language: [English, Other]}\ncategorization: false")
    assert (taxonomy.keys, taxonomy.has_categorization) == (("language",), False)


@pytest.mark.parametrize("words", [("Yes", "No"), ("yes", "no"), ("On", "Off"), ("True", "False"), ("y", "n")])
def test_words_that_yaml_reads_as_booleans_are_labels_as_written(tmp_path: Path, words: tuple[str, str]) -> None:
    assert loaded(tmp_path, f"fields: {{escalate: [{', '.join(words)}]}}").names("escalate") == words
    as_keys = f"fields:\n  escalate:\n    labels:\n      {words[0]}: it is\n      {words[1]}: it is not\n"
    assert loaded(tmp_path, as_keys).names("escalate") == words


def test_sentiments_may_have_definitions(tmp_path: Path) -> None:
    taxonomy = loaded(tmp_path, TRIAD.replace("[Good, Bad]", "{Good: happy, Bad: not happy}"))
    assert taxonomy.labels("sentiment") == (Label("Good", "happy"), Label("Bad", "not happy"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        pytest.param("fields: {}", "fields must map", id="no-fields"),
        pytest.param("fields: [urgency]", "fields must map", id="list-of-fields"),
        pytest.param("fields: {urgency: }", "fields > urgency must be a list", id="no-labels"),
        pytest.param("fields: {urgency: High}", "fields > urgency must be a list", id="text-for-labels"),
        pytest.param("fields: {urgency: {definition: x}}", "fields > urgency must be a list", id="definition-alone"),
        pytest.param("fields: {urgency: {labels: [A], colour: red}}", "fields > urgency must be", id="unknown-key"),
        pytest.param("fields: {urgency: []}", "fields > urgency > labels must hold distinct", id="empty-list"),
        pytest.param("fields: {urgency: [A, a]}", "fields > urgency > labels must hold distinct", id="same-label"),
        pytest.param(
            "fields:\n  urgency: [A]\n  urgency: [B]", r"\(line \d+: urgency is there twice\)", id="same-field"
        ),
        pytest.param("fields: {urgency: [A", r"is not valid YAML \(line \d+: ", id="no-yaml"),
        pytest.param("fields: {urgency: [A, 5]}", "fields > urgency > labels must be .* quotes", id="number"),
        pytest.param("fields: {urgency: {labels: {A: }}}", "fields > urgency > labels > A needs", id="no-definition"),
        pytest.param("fields: {urgency: {labels: {5: x}}}", "fields > urgency > labels > 5 .* quotes", id="number-key"),
        pytest.param("fields: {urgency: {labels: [A], definition: 5}}", "urgency > definition", id="number-definition"),
        pytest.param("fields: {urgency: {labels: [A], multiple: often}}", "urgency > multiple .* true", id="switch"),
        pytest.param("fields: {urgency: [A]}\ncategorization: short", "categorization must be true", id="sentence"),
        pytest.param("fields: {how urgent: [A]}", "fields > how urgent is not a field name", id="space-in-name"),
        pytest.param("fields: {$where: [A]}", r"fields > \$where is not a field name", id="operator"),
        pytest.param("fields: {a.b: [A]}", "fields > a.b is not a field name", id="dotted"),
        pytest.param("fields: {5: [A]}", "fields > 5 is not a field name", id="number-name"),
        pytest.param("fields: {categorization: [A]}", "fields > categorization has a name that is taken", id="taken"),
        pytest.param("fields: {Topics: [A]}", "fields > Topics has a name that is taken", id="heading-of-the-triad"),
        pytest.param("fields: {urgency: [A], Urgency: [B]}", "fields > urgency has a name", id="same-name"),
        pytest.param("field: {urgency: [A]}", "unknown key field", id="unknown-top-key"),
    ],
)
def test_refused_field_is_named_with_its_file(tmp_path: Path, content: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        loaded(tmp_path, content)
    assert str(tmp_path / "own.yaml") in str(caught.value)


@pytest.mark.parametrize("name", CONVERSATION_FACTS)
def test_no_field_is_named_like_a_fact_of_the_index(tmp_path: Path, name: str) -> None:
    """It would replace the source id or the number of each found conversation."""
    with pytest.raises(ConfigurationError, match="taken"):
        loaded(tmp_path, f"fields: {{{name}: [A]}}")
