"""Headers and the same-origin check that all pages of the service share."""

from __future__ import annotations

from fastapi import Request

from error_handler import RequestError
from service import errors

_OWN_SITES = (b"same-origin", b"none")  # none: a person typed the address


def page_headers(form_action: str = "'none'") -> dict[str, str]:
    """Return the headers of a page and its files; *form_action* is where its forms may be sent, by the syntax of CSP."""
    return {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
            f"base-uri 'none'; form-action {form_action}; frame-ancestors 'none'"
        ),
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


async def require_own_page(request: Request) -> None:
    """Refuse what a page of another site sends: a browser adds the key of Basic to it as well.

    Browsers send Sec-Fetch-Site to https and to this machine, and Origin with each POST. Programs send neither.

    Raises:
        RequestError: CROSS_SITE.
    """
    headers = request.state.headers
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        is_own = site in _OWN_SITES
    else:
        is_own = origin is None or origin.partition(b"://")[2].lower() == headers.get(b"host", b"none").lower()
    if not is_own:
        raise RequestError(errors.CROSS_SITE)
