"""Makes plain text of HTML, and leaves out the e-mail history that a reply quotes. The source document keeps both.

Time and memory grow with the length of a text, whatever is in it: tags are read one after the other, and no tree is built.
Only tags of HTML are removed, and only from a text that is HTML: a price (``<50 EUR``), an address (``<a@example.com>``), XML
and code stay as they are.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

MAX_CHARACTERS = 2_000_000  # a longer text is left as it is
_MAX_WROTE = 90  # characters of the verb and what follows it
_MAX_HEADER = 400  # characters of the line before a quotation ("On ..., ... wrote:"), which may be wrapped twice
_REFERS_WITHIN = 300  # characters before a quotation in which the customer may refer to it

_BREAKS = (
    "p div br hr ul ol li dl dt dd table caption thead tbody tfoot tr h1 h2 h3 h4 h5 h6 blockquote pre center address "
    "section article header footer main nav aside figure figcaption form fieldset details summary"
).split()
_INLINE = (
    "html head body meta link base title style script noscript template span b strong i em u s strike del ins small big sub "
    "sup font a img abbr acronym code tt kbd samp var cite q mark label button input textarea select option td th col "
    "colgroup wbr bdo bdi time iframe svg path object embed param video audio source picture legend map area"
).split()
_HIDDEN = frozenset(("script", "style", "title", "template"))
# An XML document can begin with the names of the others.
_FIRST = frozenset(
    "html head body meta style p div span br hr b strong i em u font a img ul ol table h1 h2 h3 h4 h5 h6 blockquote pre center".split()
)
_VOID = frozenset("br hr img meta".split())
_SPACES = re.compile(r"\s+")
_BREAK = re.compile(r"<(?:br|p|div|li|tr)(?=[\s/>])", re.IGNORECASE)
_KNOWN = frozenset((*_BREAKS, *_INLINE))
_OFFICE = ("o:", "v:", "w:", "m:", "?xml")
# A tag of any language, the start and the end of a comment, or a declaration.
_TOKEN = re.compile(
    r"""<(?P<end>/?)(?P<name>[a-z?][\w:.-]*+)(?=[\s/>])(?:[^<>"']++|"[^"<]*+"|'[^'<]*+')*+>"""
    r"|(?P<comment><!--)|(?P<close>-->)|<!(?:doctype\b|\[)[^<>]*>",
    re.IGNORECASE,
)
_BREAK_IN_TEXT = re.compile(
    r"(?<=[\w.,!?:;)])<(?:br(?=[\s/>])|(?P<name>p|div|ul|ol|table|blockquote)(?=[\s>]))[^<>]*>", re.IGNORECASE
)
_ALT = re.compile(r"""\salt\s*=\s*(?:"([^"]{1,40})"|'([^']{1,40})')""", re.IGNORECASE)

# "On Mon, 3 Mar 2026 at 10:00, Support <help@example.com> wrote:", in the languages of common mail programs.
_WROTE = re.compile(
    r"(?:\b(?:wrote|writes|schrieb\b.{0,80}|a [ée]crit|escribi[óo]|ha scritto|schreef\b.{0,80}|escreveu|skrev\b.{0,80}|kirjoitti"
    r"|napisał(?:a|\(a\))?|napsal(?:a|\(a\))?|написал(?:а|\(а\))?|пишет)|写道|寫道|작성하였습니다|<[^<>\s]+@[^<>\s]+>)\s*[:：]$",
    re.IGNORECASE,
)
_ON = re.compile(
    r"(?:On|Am|Le|El|Il|Op|Em|Den|På|W dniu|Dnia|Dne|\d{1,4}[./年-]|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,)\s*\S"
)
_DATE, _CLOCK, _ADDRESS = re.compile(r"\d{4}|\d[./-]\d"), re.compile(r"\d[:.h]\d\d"), re.compile(r"\S@\S")
_ORIGINAL = re.compile(
    r"[-_]{3,}\s*(?:original (?:message|appointment)|reply message|urspr.ngliche nachricht|message d.origine|mensaje original"
    r"|messaggio originale|oorspronkelijk bericht|mensagem original|ursprungligt meddelande|oprindelig meddelelse"
    r"|opprinnelig melding|wiadomo.. oryginalna|p.vodn. zpr.va|исходное сообщение)\s*[-_]{3,}|##- .{0,120} -##",
    re.IGNORECASE,
)
_FROM = re.compile(r"(?:From|Von|De|Da|Van|Från|Fra|Od|От|Expéditeur|Remitente)\s?:\*?\s*\S", re.IGNORECASE)
_SUBJECT = re.compile(
    r"(?:Subject|Betreff|Objet|Asunto|Oggetto|Onderwerp|Assunto|Ämne|Emne|Temat|Předmět|Тема)\s?:", re.I
)
_SENT_OR_TO = re.compile(
    r"(?:Sent|Date|Gesendet|Datum|Envoyé|Enviado|Inviato|Data|Fecha|Verzonden|Skickat|Sendt|Wysłano|Odesláno|Отправлено"
    r"|To|An|À|A|Para|Aan|Till|Til|Do|Komu|Кому)\s?:",
    re.IGNORECASE,
)
_HEADER_LINES = 8
# What the customer forwards, or asks to read, belongs to the conversation.
_REFERS = re.compile(
    r"forward|\bfw:|\bfwd:|below|weitergeleitet|weiterleit|unten|transf[ée]r|ci-dessous|reenv|abajo|inoltr|sotto|qui di seguito"
    r"|doorgestuurd|hieronder|encaminha|abaixo|vidarebefordra|nedan|videresend|nedenfor|przekaz|poniżej|přeposl|níže|пересыл|ниже",
    re.IGNORECASE,
)


def plain_text(text: str) -> str:
    """Return *text* without markup and quoted history; *text* itself if it has none, or nothing but a quotation."""
    if len(text) > MAX_CHARACTERS:
        return text
    plain = _without_markup(text) if "<" in text and _is_html(text) else text
    return _without_history(plain) if "\n" in plain else plain


def _is_html(text: str) -> bool:
    """Return whether *text* is HTML, and no plain text that has or shows tags.

    It is if tags enclose it, if the first one is ended again, or if a line break stands directly behind a word. A text
    in which most tags are of another language is XML.
    """
    found = _TOKEN.match(text, len(text) - len(text.lstrip()))
    if found is not None and not found["close"]:
        name = (found["name"] or "html").lower()
        if name == "html" and not found["comment"]:
            return True
        end = _TOKEN.match(text, text.rfind("<"))
        is_enclosed = end is not None and not text[end.end() :].strip() and not found["end"]
        if is_enclosed and name in _FIRST and (name in _VOID or f"</{name}" in text.lower()):
            return _has_mostly_html_tags(text)
    found = _BREAK_IN_TEXT.search(text)
    if found is None or (found["name"] and f"</{found['name'].lower()}" not in text.lower()):
        return False
    return _has_mostly_html_tags(text)


def _has_mostly_html_tags(text: str) -> bool:
    names = [found["name"].lower() for found in _TOKEN.finditer(text) if found["name"]]
    return 2 * sum(map(_is_known, names)) >= len(names)


def _is_known(name: str) -> bool:
    return name in _KNOWN or name.startswith(_OFFICE)


def _without_markup(text: str) -> str:
    """Return the visible text of the HTML *text*, a line for each block; items of lists and quotations keep a mark."""
    lines = _Lines(keeps_breaks=not _BREAK.search(text))
    hidden, at = "", 0  # the tag whose content is not shown
    for found in _TOKEN.finditer(text):
        name = "<!--" if found["comment"] else (found["name"] or "").lower()
        if name and name != "<!--" and not _is_known(name):
            continue  # text
        if not hidden:
            lines.add(text[at : found.start()])
        at = found.end()
        if hidden:
            is_end = found["close"] if hidden == "<!--" else found["end"] and name == hidden
            hidden = "" if is_end else hidden
        elif name == "<!--" or (name in _HIDDEN and not found["end"]):
            hidden = name
        else:
            lines.tag(name, found.group(), is_end=bool(found["end"]))
    if not hidden:
        lines.add(text[at:])
    lines.end_line()
    return "\n".join(lines.lines)


class _Lines:
    """The lines of HTML that is read tag by tag. With *keeps_breaks*, a line break in the source is one in the text."""

    def __init__(self, *, keeps_breaks: bool) -> None:
        self.lines: list[str] = []
        self._line: list[str] = []
        self._mark = ""  # of the next line
        self._literal, self._quotations = int(keeps_breaks), 0

    def add(self, piece: str) -> None:
        """Add *piece*, which is text with entities."""
        self._line.append(piece if self._literal else _SPACES.sub(" ", piece))

    def tag(self, name: str, tag: str, *, is_end: bool) -> None:
        """Go on after *tag* of *name*."""
        if name == "img" and (alt := _ALT.search(tag)):  # an emoji, for example
            self.add(alt[1] or alt[2])
        elif name in ("td", "th"):
            self.add(" ")
        if name not in _BREAKS:
            return
        self.end_line()
        step = -1 if is_end else 1
        if name == "pre":
            self._literal = max(0, self._literal + step)
        elif name == "blockquote":
            self._quotations = max(0, self._quotations + step)
        elif name == "li":
            self._mark = "" if is_end else "- "

    def end_line(self) -> None:
        """End the line, unless it is empty."""
        content = html.unescape("".join(self._line)).replace("\xa0", " ").strip()
        self._line.clear()
        if content:
            prefix = ("> " if self._quotations else "") + self._mark
            self.lines += [prefix + line.rstrip() for line in content.split("\n")]
            self._mark = ""


def _without_history(text: str) -> str:
    """Return *text* without what it quotes; *text* itself if that is all, or if the customer refers to it."""
    lines = text.split("\n")
    kept: list[str] = []
    is_reply = False
    for at, line in enumerate(lines):
        before = _lines_of_header(lines, at)
        if before is None:
            kept.append(line)
            continue
        del kept[max(0, len(kept) - before) :]
        if _REFERS.search("\n".join(kept)[-_REFERS_WITHIN:]):
            return text
        is_reply = True
        if not _is_quoted_next(lines, at):
            break  # the rest is history
    if is_reply:
        kept = [line for line in kept if not _is_quoted(line)]
        while kept and not kept[-1].strip(" \t\r_-"):  # the rule above a header of Outlook
            kept.pop()
    else:
        kept = _without_quoted_edges(lines)
    if len(kept) == len(lines):
        return text
    return "\n".join(kept).strip() or text


def _is_quoted(line: str) -> bool:
    return line.lstrip().startswith(">")


def _is_quoted_next(lines: Sequence[str], at: int) -> bool:
    following = lines[at + 1 : at + 4]
    return _is_quoted(next((line for line in following if line.strip()), ""))


def _lines_of_header(lines: Sequence[str], at: int) -> int | None:
    """Return how many lines before *at* belong to the header of a quotation; None if *at* is not in one."""
    line = lines[at].strip(" \t\r*")
    if not line or line[0] == ">" or len(line) > _MAX_HEADER:
        return None
    if line[-1] in ":：":
        return _lines_of_sentence(lines, at)
    if line[0] in "-_#" and _ORIGINAL.fullmatch(line):
        return 0
    if _FROM.match(line):
        block = [one.strip(" \t\r*") for one in lines[at + 1 : at + 1 + _HEADER_LINES]]
        if any(map(_SUBJECT.match, block)) and any(map(_SENT_OR_TO.match, block)):
            return 0
    return None


def _lines_of_sentence(lines: Sequence[str], at: int) -> int | None:
    """Do the same for a sentence that ends with *at*; a mail program may have wrapped it."""
    if not _WROTE.search(f"{lines[at - 1][-_MAX_WROTE:] if at else ''} {lines[at].rstrip()}"):
        return None
    is_quoted = _is_quoted_next(lines, at)
    found: int | None = None
    for before in range(min(3, at + 1)):
        sentence = " ".join(line.strip(" \t\r*") for line in lines[at - before : at + 1])
        if len(sentence) > _MAX_HEADER or sentence.startswith(">"):
            break
        if not _WROTE.search(sentence):
            continue
        is_dated = _DATE.search(sentence) and _CLOCK.search(sentence)
        is_certain = is_quoted or _ADDRESS.search(sentence) or is_dated
        if is_certain and _ON.match(sentence):
            return before
        if before == 0 and (is_quoted or _ADDRESS.search(sentence)):
            found = 0  # "Support <help@example.com> wrote:", or the last line of a longer sentence
    return found


def _without_quoted_edges(lines: list[str]) -> list[str]:
    """Return *lines* without quotations of two and more lines at the start and the end, if an empty line sets them apart."""
    start, end = _edge(lines), len(lines) - _edge(lines[::-1])
    return lines[start:end] if start or end < len(lines) else lines


def _edge(lines: Sequence[str]) -> int:
    """Return the number of lines that such a quotation at the start of *lines* takes, with the empty lines around it."""
    first = next((at for at, line in enumerate(lines) if line.strip()), len(lines))
    after = next((at for at in range(first, len(lines)) if not _is_quoted(lines[at])), len(lines))
    is_apart = after < len(lines) and not lines[after].strip()
    return after if is_apart and after - first >= 2 and not lines[first].lstrip().startswith(">>>") else 0
