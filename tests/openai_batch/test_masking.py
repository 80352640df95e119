"""Personal data becomes placeholders and is restored; look-alikes stay."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from error_handler import JobProcessingError, JobValidationError
from openai_batch.documents import PromptTemplate
from openai_batch.masking import MAX_CHARACTERS, Masking

PLACEHOLDER = re.compile(r"<(EMAIL|PHONE|CARD|IBAN|NAME)_[A-Z2-9]{3}>")


def masked(text: str, region: str | None = "US", names: tuple[str, ...] = ()) -> str:
    """Return *text* as it leaves, with kinds for placeholders; the way back is checked as well."""
    mask = Masking(region).of([text], "1", names)
    hidden = mask.hide(text)
    assert mask.restore(hidden) == text
    return PLACEHOLDER.sub(r"<\1>", hidden)


TRUE = [
    ("mail a.b+c@x-y.co.uk, please", "mail <EMAIL>, please"),
    ("<bob@example.org>", "<<EMAIL>>"),
    ("jürgen@bücher.example", "<EMAIL>"),
    ("BOB@EXAMPLE.ORG.", "<EMAIL>."),
    ("mailto:bob@example.org?subject=x", "mailto:<EMAIL>?subject=x"),
    ("call (415) 555-2671 now", "call <PHONE> now"),
    ("call 415-555-2671 or 415.555.2671", "call <PHONE> or <PHONE>"),
    ("+49 30 901820 and +442079460958", "<PHONE> and <PHONE>"),
    ("+1 555 123 4567, +44 7700 900123", "<PHONE>, <PHONE>"),  # no such numbers were assigned yet
    ("card 4111 1111 1111 1111", "card <CARD>"),
    ("4111-1111-1111-1111, 378282246310005", "<CARD>, <CARD>"),
    ("4111111111111111", "<CARD>"),
    ("5500.0000.0000.0004", "<CARD>"),
    ("order number 1234 4111 1111 1111 1111", "order number 1234 <CARD>"),
    ("٤١١١ ١١١١ ١١١١ ١١١١", "<CARD>"),
    ("DE89 3704 0044 0532 0130 00 please", "<IBAN> please"),
    ("IBAN: GB82WEST12345698765432", "IBAN: <IBAN>"),
    ("gb82 west 1234 5698 7654 32.", "<IBAN>."),
    ("DE89-3704-0044-0532-0130-00", "<IBAN>"),
]
FALSE = [
    "order 1234567 and order 4711-0815-22",
    "order 1234567890123456",  # as long as a card, another checksum
    "4111 1111 1111 1112",
    "7992739871 0000 0008",
    "version 3.11.9, build 20240131.2",
    "2024-01-02 12:33:11 and 01/02/2024",
    "Tue Oct 31 21:45:10 +0000 2017, GMT+1 2017-10-31, +100 points, 1 + 1 = 2",
    "192.168.10.20:8080",
    "tracking 1Z999AA10123456784",
    "price 1,299.00, 10% off 45 items",
    "order 302-1234567-1234567",
    "DE89 3704 0044 0532 0130 01",  # another checksum
    "DE12 is a code",
    "user@localhost said @everyone a@b",
    "@example.org",
    "the meeting is at 10:00-11:30, room 415",
    "x" * 5000,
]


@pytest.mark.parametrize(("text", "wanted"), TRUE)
def test_personal_data_is_masked(text: str, wanted: str) -> None:
    """Completely, and nothing beside it."""
    assert masked(text) == wanted


@pytest.mark.parametrize("text", FALSE)
def test_look_alikes_are_not_masked(text: str) -> None:
    """Orders, versions, dates, addresses of machines."""
    assert masked(text) == text


def test_national_numbers_need_a_region() -> None:
    """Without one only numbers with a + are masked."""
    assert masked("call 030 901820", "DE") == "call <PHONE>"
    assert masked("call 030 901820 or +49 30 901820", None) == "call 030 901820 or <PHONE>"
    with pytest.raises(JobValidationError, match="no region 'ZZ'"):
        Masking("ZZ")


def test_names_match_whole_words_in_any_case() -> None:
    """With any spaces between their words."""
    names = ("Anna Schmidt", "Al", " ", "")
    assert masked("ANNA\n SCHMIDT's Al-Al, also Alan", names=names) == "<NAME>'s <NAME>-<NAME>, also Alan"
    assert masked("anna.schmidt@example.org", names=("anna",)) == "<EMAIL>"
    assert masked("a.b? (x)", names=("a.b?",)) == "<NAME> (x)"


@pytest.mark.parametrize("template", ["{{ name }}", "{{ name | e }}", "{{ name | tojson }}", "{{ [name] | tojson }}"])
def test_names_are_masked_as_templates_write_them(template: str) -> None:
    """With an apostrophe, quotation marks, an ampersand or a line end."""
    for name in ("Conan O'Brien", 'Dwayne "The Rock" Johnson', "Smith & <Sons>", "Ada\nLovelace"):
        shown = masked(PromptTemplate("user_prompt_template", template).render({"name": name}), names=(name,))
        assert shown.strip('[]"') == "<NAME>"


def test_overlapping_spans_are_merged() -> None:
    """A name that reaches into an address."""
    assert masked("Dr bob@example.org x", names=("Dr bob",)) == "<EMAIL> x"


def test_placeholders_are_stable_within_a_document() -> None:
    """The same value has the same one in all messages; other documents have others."""
    texts = ["from bob@example.org", "to eve@example.org, not bob@example.org"]
    mask = Masking().of(texts, "1")
    first, second = map(mask.hide, texts)
    bob, (eve, again) = PLACEHOLDER.search(first), [match[0] for match in PLACEHOLDER.finditer(second)]
    assert bob is not None
    assert again == bob[0] != eve
    assert Masking().of(texts, "1").hide(texts[0]) == first
    assert Masking().of(texts, "2").hide(texts[0]) != first


@pytest.mark.parametrize("change", ["{}", "<{}>", "< {} >", "**{}**", '"{}"', "({}).", "{}'s", "{}\n"])
@pytest.mark.parametrize("case", [str, str.lower, str.title])
@pytest.mark.parametrize("gap", ["_", " ", "-"])
def test_rewritten_placeholder_is_restored(change: str, case: Any, gap: str) -> None:
    """In another case, with another separator, without brackets."""
    mask = Masking().of(["bob@example.org"], "1")
    name = mask.hide("bob@example.org")[1:-1].replace("_", gap)
    assert mask.restore(change.format(case(name))).strip(" *\"().'s\n") == "bob@example.org"


@pytest.mark.parametrize(
    "text", ["EMAIL_", "EMAIL {}Q", "XEMAIL_{}", "EMAIL_{}X", "NAME_{}", "EMAIL{}", "{}", "EMAIL  {}"]
)
def test_similar_words_are_not_restored(text: str) -> None:
    """Only the document's own placeholders are matched tolerantly."""
    mask = Masking().of(["bob@example.org"], "1")
    text = text.format(mask.hide("bob@example.org")[-4:-1])
    assert mask.restore(text) == text


def test_placeholder_written_by_customer_is_avoided() -> None:
    """The value gets another one, and theirs stays text."""
    name = Masking().of(["bob@example.org"], "1").hide("bob@example.org")
    for theirs in (name, name.lower(), name[1:-1], name.replace("_", " ")):
        text = f"{theirs} bob@example.org"
        mask = Masking().of([text], "1")
        hidden = mask.hide(text)
        assert hidden.startswith(f"{theirs} <EMAIL_")
        assert hidden != f"{theirs} {name}"
        assert mask.restore(hidden) == text
        assert mask.unresolved(mask.restore(hidden)) == 0


def test_unicode_case_folding_does_not_match() -> None:
    """The Kelvin sign is not K, although both have the same lower case."""
    for salt in map(str, range(200)):
        name = Masking().of(["bob@example.org"], salt).hide("bob@example.org")
        if "K" in name:
            text = f"{name.replace('K', chr(0x212A))} bob@example.org"
            mask = Masking().of([text], salt)
            assert mask.restore(mask.hide(text)) == text
            return
    raise AssertionError("no tag with a K")


def test_placeholder_of_changed_document_is_counted() -> None:
    """It is never restored to a new value."""
    before = Masking().of(["bob@example.org"], "1").hide("bob@example.org")
    mask = Masking().of(["eve@example.org"], "1")
    answer = {"to": [before, "x"], "n": 5}
    assert mask.restore(answer) == answer
    assert mask.unresolved(answer) == 1


def test_answers_of_any_shape_are_restored() -> None:
    """Texts at any depth; keys stay."""
    name = 'Anna "Annie"\nSchmidt\\'
    mask = Masking().of([name], "1", [name])
    hidden = mask.hide(name)
    assert mask.restore({"a": [{"b": f"to {hidden}"}], hidden: 1, "n": None}) == {
        "a": [{"b": f"to {name}"}],
        hidden: 1,
        "n": None,
    }


def test_too_long_prompt_fails() -> None:
    """It is not sent unsearched."""
    with pytest.raises(JobProcessingError, match="too many for --mask-pii"):
        Masking().of(["x" * MAX_CHARACTERS, "y"], "1")


FRAGMENTS = st.sampled_from(
    "bob@example.org a@b.cd 4111111111111111 4111 1111 +49 30 901820 (415) 555-2671 DE89370400440532013000 Anna Schmidt "
    "<EMAIL_ BCD > < EMAIL NAME_ CARD- K7Q @ . - _ \n \t \u212a ſ".split(" ")
)
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=6)), max_size=12).map("".join)


@given(TEXTS, TEXTS, st.sampled_from([None, "US", "DE"]), st.lists(st.text(max_size=8), max_size=2))
def test_restore_inverts_hide(text: str, other: str, region: str | None, names: list[str]) -> None:
    """For all texts of a document."""
    mask = Masking(region).of([text, other], "1", ["Anna", *names])
    assert mask.restore([mask.hide(text), mask.hide(other)]) == [text, other]
