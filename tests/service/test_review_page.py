"""/review over HTTP and in a real browser: access, decisions, undo, hostile texts, and the OpenAPI document."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from config.service_settings import load_service_settings
from error_handler import ConfigurationError
from tests.review.review_site import AGREED, fill, result
from tests.service.chromium import Visit, visit
from tests.service.service_process import NO_MODEL, WITH_PHRASES, ServiceProcess, serve
from tests.service.test_schema import document, schemathesis

Data = Database[dict[str, Any]]
ANNA, BEN = "anna-key-0123456789abcd", "ben-key-0123456789abcdef"
SHARES = {"REVIEW_CONTROL_SHARE": "0", "REVIEW_DOUBLE_SHARE": "0"}
JSON = {"Content-Type": "application/json"}


def key(value: str) -> dict[str, str]:
    return {"X-API-Key": value}


@pytest.fixture
def service(tmp_path: Path, mongodb_uri: str, db_name: str) -> Iterator[ServiceProcess]:
    """A service with the page, and two callers."""
    settings = {"API_KEYS": f"anna:{ANNA},ben:{BEN}", **NO_MODEL, "API_EXPOSE_REVIEW": "key", **SHARES}
    with serve(tmp_path, app=WITH_PHRASES, **settings, MONGODB_URI=mongodb_uri, MONGODB_DB=db_name) as process:
        yield process


def corrections(database: Data) -> list[dict[str, Any]]:
    return list(database["sentimental_analysis_corrections"].find().sort([("source_conversation_id", 1), ("field", 1)]))


def test_review_is_off_unless_it_is_switched_on(tmp_path: Path) -> None:
    """No page, no route, no operation in the document."""
    with serve(tmp_path, **NO_MODEL) as process:
        for path in ("/review", "/review/next", "/review/page.js"):
            assert (process.get(path).status, process.get(path).error) == (404, "NotFoundError")
        assert process.request("POST", "/review/decisions", {}).status == 404
    assert not [path for path in document()["paths"] if "review" in path]
    assert "/review/next" in document(expose_review="key")["paths"]


def test_review_without_keys_is_not_open_to_other_machines() -> None:
    with pytest.raises(ConfigurationError, match=r"API_EXPOSE_REVIEW: shows conversations, so set API_KEYS"):
        load_service_settings(None, expose_review="key", allow_unauthenticated=True)


def test_every_review_route_requires_a_key(service: ServiceProcess) -> None:
    """Basic makes a browser ask for it; the page itself is behind it as well."""
    requests = [("GET", "/review"), ("GET", "/review/page.js"), ("GET", "/review/next")]
    requests += [("POST", "/review/decisions"), ("POST", "/review/skip"), ("DELETE", "/review/decisions/last")]
    for method, path in requests:
        for headers in ({}, key("wrong-key-0123456789")):
            answer = service.request(method, path, {} if method == "POST" else None, headers)
            assert (answer.status, answer.error) == (401, "AuthenticationError"), path
            assert "Basic" in answer.headers["www-authenticate"]
    basic = base64.b64encode(f"any:{ANNA}".encode()).decode()
    page = service.get("/review", {"Authorization": f"Basic {basic}"})
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy
    assert b"<script>" not in page.body


def test_decision_is_stored_under_the_name_of_the_key(service: ServiceProcess, database: Data) -> None:
    fill(database, [result(1, 0.3), result(2, 0.9)])
    state = service.get("/review/next", key(ANNA)).json
    shown = state["conversation"]
    assert state["reviewer"] == "anna"
    assert (shown["source_id"], shown["labels"]) == ('{"$numberInt": "1"}', AGREED)
    assert [turn["sender"] for turn in shown["turns"]] == ["customer", "agent"]
    assert service.get("/review/next", key(BEN)).json["conversation"]["source_id"] == '{"$numberInt": "2"}'
    body = {"source_id": shown["source_id"], "labels": {**AGREED, "topic": "Other"}, "note": "n"}
    assert service.request("POST", "/review/decisions", body, key(BEN)).error == "ReviewConflictError"
    assert service.request("POST", "/review/decisions", body, key(ANNA)).json == {"saved": True}
    assert [(one["field"], one["from"], one["to"], one["reviewer"]) for one in corrections(database)] == [
        ("intent", "Complaint", "Complaint", "anna"),
        ("sentiment", "Negative", "Negative", "anna"),
        ("topic", "Shipping/Delivery", "Other", "anna"),
    ]
    assert service.request("POST", "/review/decisions", body, key(ANNA)).error == "ReviewConflictError"
    assert service.get("/review/next", key(ANNA)).json["conversation"] is None
    undone = service.request("DELETE", "/review/decisions/last", headers=key(ANNA)).json
    assert (undone["undone"], undone["conversation"]["labels"]) == (True, AGREED)
    assert not corrections(database)
    skipped = service.request("POST", "/review/skip", {"source_id": shown["source_id"]}, key(ANNA))
    assert skipped.json == {"saved": True}
    assert service.get("/review/next", key(ANNA)).json["conversation"] is None
    assert service.request("DELETE", "/review/decisions/last", headers=key(BEN)).json["undone"] is False
    assert "parcel" not in service.log


def test_wrong_decisions_are_refused(service: ServiceProcess, database: Data) -> None:
    """The message names the field, and never the label that was sent."""
    fill(database, [result(1)])
    source_id = service.get("/review/next", key(ANNA)).json["conversation"]["source_id"]
    wrong: list[tuple[Any, str]] = [
        ({"intent": "Nonsense"}, "intent has a label"),
        ({"priority": "High"}, "a field"),
        ({}, "labels"),
        (3, "labels"),
        ({"Nonsense of a customer": 3}, "labels"),
    ]
    for labels, message in wrong:
        answer = service.request("POST", "/review/decisions", {"source_id": source_id, "labels": labels}, key(ANNA))
        assert (answer.status, answer.error) == (422, "ValidationError"), labels
        assert message in answer.json["error"]["message"]
        assert "Nonsense" not in answer.body.decode()
    assert not corrections(database)


def test_requests_of_other_sites_are_refused(service: ServiceProcess, database: Data) -> None:
    """The browser would add the key of Basic to them."""
    fill(database, [result(1)])
    for site in ("cross-site", "same-site"):
        for method, path in (("GET", "/review/next"), ("DELETE", "/review/decisions/last")):
            answer = service.request(method, path, headers={**key(ANNA), "Sec-Fetch-Site": site})
            assert (answer.status, answer.error) == (403, "CrossSiteError")
    assert not database["sentimental_analysis_review_leases"].count_documents({})
    form = {**key(ANNA), "Content-Type": "text/plain"}  # what a form of another site can send
    for path in ("/review/decisions", "/review/skip"):
        bodies = [service.request("POST", path + end, b'{"source_id": "1"}', form).error for end in ("", "%0A")]
        assert bodies == ["UnsupportedMediaTypeError", "NotFoundError"], path
    assert service.get("/review", {**key(ANNA), "Sec-Fetch-Site": "cross-site"}).status == 200


def test_review_answers_503_while_mongodb_is_away(tmp_path: Path) -> None:
    """/classify still works."""
    away = {"MONGODB_URI": "mongodb://127.0.0.1:1", "MONGODB_TIMEOUT_MS": "200", "MONGODB_BACKOFF_S": "0"}
    with serve(tmp_path, app=WITH_PHRASES, API_EMBEDDED="true", API_EXPOSE_REVIEW="key", **away) as process:
        answer = process.get("/review/next")
        assert (answer.status, answer.error) == (503, "StoreUnavailableError")
        assert "retry-after" in answer.headers
        assert process.classify().status == 200


@pytest.mark.parametrize("examples", [pytest.param(20, marks=pytest.mark.thorough)])
def test_schemathesis_finds_no_deviation_of_the_review_routes(
    mongodb_uri: str, database: Data, tmp_path: Path, examples: int
) -> None:
    fill(database, [result(number) for number in range(5)])
    place = {"MONGODB_URI": mongodb_uri, "MONGODB_DB": database.name}
    with serve(tmp_path, app=WITH_PHRASES, **NO_MODEL, API_EXPOSE_REVIEW="key", **place) as open_service:
        # The labels are those of the taxonomy, which the document does not name.
        options = ("--max-examples", str(examples), "--exclude-checks", "positive_data_acceptance")
        schemathesis(open_service, tmp_path, "^/review", *options)
        assert "Traceback" not in open_service.log


async def shown(seen: Visit, number: int) -> None:
    """Return as soon as the page asks for conversation *number*."""
    await seen.page.locator("#review-status").get_by_text(f"Conversation {number} ").wait_for()


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_fits_a_phone_in_light_and_dark(service: ServiceProcess, database: Data, scheme: str) -> None:
    """No horizontal scrolling at 360 pixels, buttons of at least 40 pixels, readable contrast."""
    fill(database, [result(1, 0.2)])
    database["conversation_set"].update_one({"_id": 1}, {"$set": {"messages.0.text": "x" * 400}})
    async with visit(ANNA, color_scheme=scheme, viewport={"width": 360, "height": 740}, is_mobile=True) as seen:
        page = seen.page
        await page.goto(f"{service.url}/review")
        await shown(seen, 1)
        assert not await seen.is_too_wide()
        heights = await page.locator("button:visible").evaluate_all("all => all.map(one => one.offsetHeight)")
        assert min(heights) >= 40
        colours = await page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        text, ground = (luminance(colour) for colour in colours)
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 7
        assert (text < ground) is (scheme == "light")
        assert not seen.problems


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2 of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
