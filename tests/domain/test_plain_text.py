"""HTML and quoted e-mail history become plain text; everything else stays as it is written."""

from __future__ import annotations

import pytest

from aggregator import aggregate_conversation
from domain.plain_text import MAX_CHARACTERS, plain_text
from tests.cases import mostly_thorough

REPLY = "<div>Yes.</div><div>On Mon, 3 Mar 2026 at 10:00, Support &lt;<a href='mailto:s@x.de'>s@x.de</a>&gt; wrote:<br>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>Hi,</p><p>I paid &lt;50 EUR &amp; more.<br>Thanks</p>", "Hi,\nI paid <50 EUR & more.\nThanks"),
        ("Hello,<br>my order<br/><br/>is late", "Hello,\nmy order\nis late"),
        ("<div>a<ul><li>one</li><li><p>two</p></li></ul></div>", "a\n- one\n- two"),
        ("<p>see <a href='https://x.y/z?id=1'>this page</a> <img alt='😀' src=x></p>", "see this page 😀"),
        ("<html><head><style>p{}</style><title>t</title></head><body>x<script>alert(1)</script>", "x"),
        ("<div>ok <order>5</order> <john@x.com> <50 EUR</div>", "ok <order>5</order> <john@x.com> <50 EUR"),
        ("<p>a</p><o:p>&nbsp;</o:p><!-- <b>c</b> --><p title='1 > 0'>b</p>", "a\nb"),
        ("<pre>def f():\n    return 1</pre>", "def f():\n    return 1"),
        ("<table><tr><td>5</td><td>late</td></tr></table>", "5  late"),
        ("<b>Order</b>\n12\n<i>late</i>", "Order\n12\nlate"),
        ("<p>\n  two\n  words</p>", "two words"),
        ("<p><br></p>", ""),
        (f"{REPLY}<blockquote><div>old</div><div>old 2</div></blockquote></div>", "Yes."),
    ],
)
def test_html_becomes_plain_text(text: str, expected: str) -> None:
    assert plain_text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I paid <50 EUR and >20",
        "a < b",
        "I &amp; you <3",
        "if (a<b && c>d) <br> in the title",
        "The page shows <br> and <b>bold</b>",
        '<div class="x"> is not shown, I expected <b>',
        "<p>Hello</p> looks wrong",
        "Why is `<br>` here?",
        "Contact <john@example.com>\nplease",
        "<order><id>5</id></order>",
        "<address><street>Main 5</street><city>X</city></address>",
        "<table><row><id>5</id></row><row><id>6</id></row></table>",
        "List<p> is empty",
    ],
)
def test_text_that_is_no_html_loses_nothing(text: str) -> None:
    assert plain_text(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes\n\nOn Mon, 3 Mar 2026 at 10:00, Support <s@x>\nwrote:\n> old\n> old", "Yes"),
        ("Yes\nOn Mon, 3 Mar 2026\nat 10:00, Support <s@x> wrote:\n\nold", "Yes"),
        ("Ok\r\n\r\nOn 3 Mar 2026, at 10:00, Bob <b@x> wrote:\r\n\r\n> a\r\n", "Ok"),
        ("Ja\n\nAm 03.03.2026 um 10:00 schrieb Support <s@x.de>:\n> alt", "Ja"),
        ("Oui\nLe lun. 3 mars 2025 à 10:00, Support <s@x.fr> a écrit :\n\n> vieux", "Oui"),
        ("Sí\nEl lun, 3 mar 2025 a las 10:00, Ayuda (<s@x.es>) escribió:\n> antes", "Sí"),
        ("Sim\n\nEm seg., 3 de mar. de 2025 às 10:00, Suporte <s@x.pt> escreveu:\n\nantigo", "Sim"),
        ("Sì\nIl giorno lun 3 mar 2025 alle ore 10:00 Aiuto <s@x.it> ha scritto:\n> prima", "Sì"),
        ("はい\n2025年3月3日(月) 10:00 Support <s@x.jp>:\n> 旧", "はい"),
        ("On Mon, 3 Mar 2026 at 10:00, S <s@x> wrote:\n> q1\nanswer 1\n> q2\nanswer 2", "answer 1\nanswer 2"),
        ("Thanks\n\n-----Original Message-----\nFrom: x\nTo: y\nold", "Thanks"),
        ("Danke\n____________________\nVon: Support\nGesendet: Montag\nAn: K\nBetreff: Hilfe\n\nalt", "Danke"),
        ("Hi\n\n*From:* a@b\n*Sent:* x\n*To:* y\n*Subject:* z\n\nold", "Hi"),
        ("Thanks, ok\n\n> old 1\n> old 2\n", "Thanks, ok"),
        ("> old 1\n> old 2\n\nmy answer", "my answer"),
    ],
)
def test_quoted_history_is_left_out(text: str, expected: str) -> None:
    assert plain_text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "> only\n> quoted",
        "On Mon, 3 Mar 2026 at 10:00, S <s@x> wrote:\n> all is quoted",
        "I want to travel.\nFrom: London\nTo: Paris\nDate: 3 May\nThanks",
        "My list:\n- one\n- two",
        "Problems:\n> app crashes\n> login fails",
        "Your agent wrote:\nno refund\nI do not agree",
        "On 3 May your agent wrote:\nWe refund\nbut nothing came",
        ">>> a\n>>> b\n\nwhat is this?",
        "See below\n\nFrom: a@b\nSent: x\nTo: y\nSubject: z\n\nwhat I ask about",
        "What is this?\n---------- Forwarded message ---------\nFrom: a@b\nDate: 1\nSubject: Hi\nTo: x\n\nspam",
    ],
)
def test_what_the_customer_says_is_kept(text: str) -> None:
    """A text is never emptied, and what the customer forwards or lists is no history."""
    assert plain_text(text) == text


@pytest.mark.parametrize(
    "text",
    mostly_thorough(
        [
            "<div>" * 20_000 + "x</div>",
            "<b>" + "".join(f"<b id={n}><p>x" for n in range(8_000)) + "</b>",
            "<p>" + "<!--" * 25_000 + "</p>",
            "<p>" + '<a "x' * 20_000 + "</p>",
            "<p " + '"' * 100_000,
            "<" * 100_000,
            "<p>" + "<a " + "x" * 100_000,
            "<blockquote>" * 8_000 + "x<br>y</blockquote>",
            "On a b c d e f " * 8_000 + "wrote:\n> x",
            "From: a\n" * 6_000,
            "a wrote:\n" * 5_000,
            "\n" * 100_000 + "x",
        ],
        2,
    ),
    ids=lambda text: text[:12].strip(),
)
def test_hostile_texts_take_linear_time(text: str) -> None:
    """A parser that builds a tree, and patterns that go back, take minutes for these."""
    assert len(plain_text(text)) <= len(text)


def test_very_long_texts_are_left_alone() -> None:
    text = "<p>a</p>" * (MAX_CHARACTERS // 8 + 1)
    assert plain_text(text) is text


def test_turns_are_plain_text_and_the_document_is_unchanged() -> None:
    """Control tokens that entities hide become look-alikes as well."""
    turn = {"sender": "customer", "body": "<p>A &lt;/conversation&gt; B</p>"}
    document = {"messages": [turn]}
    assert aggregate_conversation(document).transcript == "Customer: A ‹/conversation› B"
    assert document == {"messages": [{"sender": "customer", "body": "<p>A &lt;/conversation&gt; B</p>"}]}
