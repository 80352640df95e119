"""Elements of HTML and SVG that escape what they contain. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

# A pattern for each series, so that a chart is readable without colour: lines, dots, crosses of the ink on the colour.
_DRAWINGS = (
    "",
    "M0 8L8 0M-2 2L2 -2M6 10L10 6",
    "M2 2h2v2h-2zM6 6h2v2h-2z",
    "M0 4h8",
    "M4 0v8",
    "M0 0L8 8M-2 6L2 10M6 -2L10 2",
    "M0 4h8M4 0v8",
    "M0 0L8 8M0 8L8 0",
)
SERIES = len(_DRAWINGS)  # series that can be told apart; a chart puts the others together
_MARKS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
    "m-3 -3h6v6h-6z",
    "m0 -4l4 7h-8z",
    "m0 -4l4 4l-4 4l-4 -4z",
    "m0 4l4 -7h-8z",
    "m-4 -1h3v-3h2v3h3v2h-3v3h-2v-3h-3z",
    "m-1 -4h2v8h-2z",
    "m-4 -1h8v2h-8z",
)
_SHAPES = frozenset({"path", "rect", "line"})  # elements of SVG without content


def element(tag: str, *children: Markup | str, **attributes: str | float | None) -> Markup:
    """Return an element; names of attributes have ``_`` for ``-`` and may end in one. None leaves an attribute out."""
    written = Markup("").join(
        Markup(' {}="{}"').format(
            name.rstrip("_").replace("_", "-"), number(value) if isinstance(value, float) else value
        )
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _SHAPES and not children:
        return Markup("<{0}{1}/>").format(tag, written)
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, written, inside)


def number(value: float) -> str:
    """Return *value* as a coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def patterns() -> Markup:
    """Return what charts refer to, the patterns of shapes and the marks of lines: once in each page, before the charts."""
    made = [
        element(
            "pattern",
            element("rect", width=8, height=8, class_=f"s{place}"),
            *([element("path", d=drawing, class_="ink")] if drawing else []),
            id=f"p{place}",
            width=8,
            height=8,
            patternUnits="userSpaceOnUse",
        )
        for place, drawing in enumerate(_DRAWINGS)
    ]
    marks = [
        element(
            "marker",
            element("path", d=f"M0 0{drawing}", class_=f"dot m{place}"),
            id=f"m{place}",
            viewBox="-5 -5 10 10",
            markerWidth=10,
            markerHeight=10,
            markerUnits="userSpaceOnUse",
        )
        for place, drawing in enumerate(_MARKS)
    ]
    return element(
        "svg", element("defs", *made, *marks), width=0, height=0, aria_hidden="true", focusable="false", class_="defs"
    )


def fill(place: int) -> str:
    """Return the fill of the series at *place*, from 0."""
    return f"url(#p{place % SERIES})"


def mark(place: int, *where: str) -> dict[str, str]:
    """Return the attributes that put the mark of the series at *place* on points of a line: its start, mid or end."""
    return {f"marker_{one}": f"url(#m{place % SERIES})" for one in where}


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Return a table whose first column names its rows; the other columns are figures."""
    titles = [element("th", text, scope="col") for text in head]
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    inside = (element("caption", caption), element("thead", element("tr", *titles)), element("tbody", *body))
    # A table that is wider than a phone scrolls; the keyboard can reach what scrolls.
    return element("div", element("table", *inside), class_="scroll", tabindex="0", role="group", aria_label=caption)
