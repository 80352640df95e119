"""The contract of the service: every body and status of POST /classify, the other routes, the blocking form."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from typing import Any

import pytest

import api
from config import load_settings
from domain.conversation import BASELINE_MODEL, EMBEDDING_MODEL
from embedded.choice import missing_packages
from error_handler import RequestError
from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import CONVERSATION, ServiceProcess, conversation, serve

CANARY = "CANARY-4929-1234"


@pytest.fixture(scope="module")
def shared(fake: FakeOllama, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    settings = {"API_MAX_BODY_BYTES": "20000", "API_MAX_MESSAGES": "50", "API_MAX_TEXT_CHARACTERS": "6000"}
    folder = tmp_path_factory.mktemp("service")
    with serve(folder, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", LOG_LEVEL="DEBUG", **settings) as process:
        yield process


@pytest.fixture
def service(shared: ServiceProcess, fake: FakeOllama) -> ServiceProcess:
    fake.configure(faults=[])
    return shared


def test_answer_repeats_the_messages_as_sent_and_adds_labels(service: ServiceProcess) -> None:
    """Order, absent and null time stamps, emoji and spaces come back as they were."""
    sent = {
        "conversation_number": "7-a",
        "messages": [
            {"sender": "agent", "timestamp": None, "text": "  Hello \U0001f600 "},
            {"sender": "customer", "text": "Wo ist mein Paket? \u4f60\u597d\u0000"},
            {"sender": "customer", "timestamp": "yesterday", "text": ""},
        ],
    }
    answer = service.classify(sent)
    assert answer.status == 200
    assert list(answer.json) == ["conversation_number", "messages", "classification"]
    assert answer.json["conversation_number"] == "7-a"
    assert answer.json["messages"] == sent["messages"]
    assert list(answer.json["classification"]) == ["intent", "topic", "sentiment", "categorization"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-model"] == "llama3.2"
    assert "server" not in answer.headers


def test_valid_request_id_appears_in_answer_log_and_model_call(service: ServiceProcess, fake: FakeOllama) -> None:
    """Another form is replaced, and never shown."""
    assert service.classify(X_Request_ID="helpdesk-77.b_1").headers["x-request-id"] == "helpdesk-77.b_1"
    assert fake.requests()[-1]["request_id"] == "helpdesk-77.b_1"
    service.wait_for_log("request_id=helpdesk-77.b_1")
    for wild in ("two words", "x" * 65, "<b>", "caf\u00e9"):
        given = service.classify(X_Request_ID=wild).headers["x-request-id"]
        assert given != wild
        assert given == fake.requests()[-1]["request_id"]
        assert wild not in service.log


INVALID: list[tuple[str, Any, str]] = [
    ("no messages", {"conversation_number": "1"}, "messages"),
    ("no number", {"messages": [{"sender": "customer", "text": CANARY}]}, "conversation_number"),
    ("number is no text", {**conversation(CANARY), "conversation_number": 1}, "conversation_number"),
    ("empty number", conversation(CANARY, number=""), "conversation_number"),
    ("long number", conversation(number=CANARY * 50), "conversation_number"),
    ("messages no list", {"conversation_number": CANARY, "messages": {"a": CANARY}}, "messages"),
    ("no message", {"conversation_number": CANARY, "messages": []}, "messages"),
    ("message no object", {"conversation_number": "1", "messages": [CANARY]}, "messages[0]"),
    ("other sender", {"conversation_number": "1", "messages": [{"sender": CANARY, "text": "a"}]}, "messages[0].sender"),
    ("no text", {"conversation_number": "1", "messages": [{"sender": "customer"}]}, "messages[0].text"),
    (
        "text no text",
        {"conversation_number": "1", "messages": [{"sender": "customer", "text": [CANARY]}]},
        "messages[0].text",
    ),
    (
        "long time",
        {"conversation_number": "1", "messages": [{"sender": "customer", "timestamp": CANARY * 9, "text": "a"}]},
        "time",
    ),
    ("extra field", {**conversation(CANARY), CANARY: 1}, "body"),
    ("extra field named as a setting", {**conversation(CANARY), "model": CANARY}, "body"),
    (
        "extra field inside",
        {"conversation_number": "1", "messages": [{"sender": "customer", "text": "a", CANARY: "b"}]},
        "messages[0]",
    ),
    ("too many messages", {"conversation_number": "1", "messages": conversation(CANARY)["messages"] * 51}, "50"),
    ("too much text", conversation(CANARY * 400), "6000"),
    ("agent only", {"conversation_number": "1", "messages": [{"sender": "agent", "text": CANARY}]}, "customer"),
    ("nothing visible", conversation("\u200b \u202e \U000e0041"), "customer"),
]


@pytest.mark.parametrize(("body", "place"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_invalid_request_gets_422_that_names_the_field_without_its_content(
    service: ServiceProcess, fake: FakeOllama, body: Any, place: str
) -> None:
    """422, nothing of it in answer or log, and the model is not asked."""
    asked = fake.stats()["chat_requests"]
    answer = service.classify(body)
    assert (answer.status, answer.error) == (422, "ValidationError")
    assert place in answer.json["error"]["message"]
    assert "CANARY" not in answer.body.decode()
    assert "CANARY" not in service.log
    assert fake.stats()["chat_requests"] == asked


MALFORMED: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("not JSON", b"CANARY"),
    ("cut off", b'{"conversation_number": "CANARY'),
    ("two objects", b"{} {}"),
    ("a list", b'["CANARY"]'),
    ("byte order mark", b"\xef\xbb\xbf{}"),
    ("not UTF-8", b'{"conversation_number": "\xff"}'),
    ("UTF-16", '{"conversation_number": "1"}'.encode("utf-16")),
    ("a key twice", b'{"conversation_number": "1", "conversation_number": "CANARY", "messages": []}'),
    (
        "a key twice inside",
        b'{"conversation_number":"1","messages":[{"sender":"agent","sender":"customer","text":"a"}]}',
    ),
    ("NaN", b'{"conversation_number": NaN}'),
    ("Infinity", b'{"conversation_number": -Infinity}'),
    ("a lone surrogate", b'{"conversation_number":"1","messages":[{"sender":"customer","text":"CANARY \\uD83D"}]}'),
    ("a lone surrogate in a key", b'{"\\ud83d": 1}'),
    ("a number of 5000 digits", b'{"conversation_number": ' + b"9" * 5000 + b"}"),
    ("19,000 deep", b"[" * 19_000),
    ("objects 3,000 deep", b'{"a":' * 3_000),
]


@pytest.mark.parametrize("body", [case[1] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_body_that_is_not_strict_json_is_rejected(service: ServiceProcess, body: bytes) -> None:
    """400 and no echo."""
    answer = service.request("POST", "/classify", body, {"Content-Type": "application/json"})
    assert (answer.status, answer.error) == (400, "InvalidJSONError")
    assert "CANARY" not in answer.body.decode() + service.log


def test_escaped_surrogate_pair_is_accepted(service: ServiceProcess) -> None:
    """JSON may write an emoji as two escapes."""
    body = b'{"conversation_number":"1","messages":[{"sender":"customer","text":"late \\ud83d\\ude21"}]}'
    answer = service.request("POST", "/classify", body, {"Content-Type": "application/json"})
    assert answer.json["messages"][0]["text"] == "late \U0001f621"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_other_content_types_are_rejected(service: ServiceProcess, headers: dict[str, str]) -> None:
    """Only JSON in UTF-8, and never compressed."""
    answer = service.request("POST", "/classify", json.dumps(CONVERSATION).encode(), headers)
    assert (answer.status, answer.error) == (415, "UnsupportedMediaTypeError")


@pytest.mark.parametrize("value", ["application/json; charset=UTF-8", 'Application/JSON;charset="utf-8"'])
def test_variants_of_the_json_content_type_are_accepted(service: ServiceProcess, value: str) -> None:
    """Case and parameters do not matter."""
    answer = service.request("POST", "/classify", json.dumps(CONVERSATION).encode(), {"Content-Type": value})
    assert answer.status == 200


def test_large_body_is_rejected(service: ServiceProcess) -> None:
    """413."""
    answer = service.classify(conversation("a" * 30_000))
    assert (answer.status, answer.error) == (413, "PayloadTooLargeError")


MODEL_FAULTS: list[tuple[list[dict[str, Any]], int, str]] = [
    ([{"kind": "prose"}], 200, ""),
    ([{"kind": "wrong_label", "times": 1}], 200, ""),
    ([{"kind": "wrong_label"}], 502, "ModelAnswerError"),
    ([{"kind": "empty_content"}], 502, "ModelAnswerError"),
    ([{"kind": "length"}], 502, "ModelAnswerError"),
    ([{"kind": "nan"}], 502, "ModelAnswerError"),
    ([{"kind": "reset", "times": 1}], 200, ""),
    ([{"kind": "busy_503"}], 503, "ModelUnavailableError"),
    ([{"kind": "model_not_found_404"}], 503, "ModelUnavailableError"),
    ([{"kind": "html_502"}], 503, "ModelUnavailableError"),
    ([{"kind": "overflow_400"}], 422, "ConversationTooLongError"),
]


@pytest.mark.parametrize(("faults", "status", "kind"), MODEL_FAULTS, ids=[str(case[0][0]) for case in MODEL_FAULTS])
def test_model_failure_maps_to_status(
    service: ServiceProcess, fake: FakeOllama, faults: list[dict[str, Any]], status: int, kind: str
) -> None:
    """502 for an unusable answer, 503 with Retry-After for a server that is away, 422 for what does not fit."""
    fake.configure(faults=faults)
    answer = service.classify()
    assert answer.status == status, answer.body
    assert (answer.error if status != 200 else "") == kind
    assert ("retry-after" in answer.headers) == (status == 503)


def test_reason_of_the_model_server_is_in_the_log_only(service: ServiceProcess, fake: FakeOllama) -> None:
    """The caller gets the fixed text of the contract."""
    fake.configure(faults=[{"kind": "status", "status": 422, "body": '{"error": "grammar too deep at 7"}'}])
    answer = service.classify()
    assert answer.error == "ModelAnswerError"
    assert b"grammar" not in answer.body
    service.wait_for_log("(HTTP 422); the server says: grammar too deep at 7")


def test_repeated_idempotency_key_asks_the_model_once(service: ServiceProcess, fake: FakeOllama) -> None:
    """The same body gets the same answer, written in another order too; another body is refused."""
    first = service.classify(Idempotency_Key="order-1")
    asked = fake.stats()["chat_requests"]
    swapped = dict(reversed(list(CONVERSATION.items())))
    again = service.classify(swapped, Idempotency_Key="order-1")
    assert again.status == 200
    assert again.json == first.json
    assert (first.headers.get("idempotency-replayed"), again.headers.get("idempotency-replayed")) == (None, "true")
    other = service.classify(conversation(CANARY), Idempotency_Key="order-1")
    assert (other.status, other.error) == (422, "IdempotencyError")
    assert fake.stats()["chat_requests"] == asked


def test_concurrent_requests_with_one_idempotency_key_ask_the_model_once(
    service: ServiceProcess, fake: FakeOllama
) -> None:
    """A request that comes while the first one is in flight waits for its answer."""
    asked = fake.stats()["chat_requests"]
    fake.configure(faults=[{"kind": "latency", "set_s": 0.3}])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: service.classify(Idempotency_Key="parallel-1"), range(8)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert fake.stats()["chat_requests"] == asked + 1


def test_failure_is_not_kept_for_an_idempotency_key(service: ServiceProcess, fake: FakeOllama) -> None:
    """The next request with the key asks again."""
    fake.configure(faults=[{"kind": "busy_503"}])
    assert service.classify(Idempotency_Key="flaky-1").status == 503
    fake.configure(faults=[])
    answer = service.classify(Idempotency_Key="flaky-1")
    assert answer.status == 200
    assert "idempotency-replayed" not in answer.headers


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "caf\u00e9"])
def test_malformed_idempotency_key_is_rejected(service: ServiceProcess, key: str) -> None:
    """400 without an echo."""
    answer = service.classify(Idempotency_Key=key)
    assert (answer.status, answer.error) == (400, "HeaderError")


def test_operator_routes_answer(service: ServiceProcess) -> None:
    """Alive, ready, numbers, document, page with all its parts on this machine."""
    assert service.get("/health").json == {"status": "ok"}
    assert service.get("/ready").json == {"status": "ready", "model": "llama3.2"}
    assert service.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    page = service.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.body.decode().replace("http-equiv", "")
    for part in ("/docs/start.js", "/docs/assets/swagger-ui-bundle.js", "/docs/assets/swagger-ui.css"):
        assert service.get(part).status == 200
    assert service.get("/openapi.json").json["openapi"] == "3.1.0"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/classify", 405, "MethodNotAllowedError"),
        ("PUT", "/classify", 405, "MethodNotAllowedError"),
        ("POST", "/health", 405, "MethodNotAllowedError"),
        ("GET", "/", 404, "NotFoundError"),
        ("GET", f"/{CANARY}?text={CANARY}", 404, "NotFoundError"),
        ("POST", "/classify/", 404, "NotFoundError"),
        ("GET", "/docs/assets/../../main.py", 404, "NotFoundError"),
    ],
)
def test_unknown_paths_and_methods_get_the_common_error_shape(
    service: ServiceProcess, method: str, path: str, status: int, kind: str
) -> None:
    """Also those of paths and methods that are not there."""
    answer = service.request(method, path)
    assert (answer.status, answer.error) == (status, kind)
    assert "x-request-id" in answer.headers
    assert "CANARY" not in answer.body.decode() + service.log + service.get("/metrics").body.decode()


def test_invalid_http_gets_the_common_error_shape(service: ServiceProcess) -> None:
    """uvicorn itself would answer in plain text."""
    with service.connect(b"CANARY nonsense\r\n\r\n") as sock:
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "MalformedRequestError"


def test_metrics_count_each_request(service: ServiceProcess) -> None:
    """Routes, statuses, times, tokens, reasons; each request moves them by one."""
    ok = 'triad_http_requests_total{route="/classify",status="200"}'
    refused = 'triad_rejections_total{reason="ValidationError"}'
    before = {name: service.metric(name) for name in (ok, refused, "triad_model_duration_seconds_count")}
    prompt = service.metric('triad_tokens_total{kind="prompt"}')
    service.classify()
    service.classify({})
    assert service.metric(ok) == before[ok] + 1
    assert service.metric(refused) == before[refused] + 1
    assert service.metric("triad_model_duration_seconds_count") == before["triad_model_duration_seconds_count"] + 1
    assert service.metric('triad_tokens_total{kind="prompt"}') > prompt + 100
    assert service.metric("triad_breaker_open") == 0
    assert service.metric("triad_model_found") == 1
    assert service.metric("triad_http_requests_in_flight") == 1  # the one that asks


def test_classify_conversation_returns_the_answer_of_the_service(service: ServiceProcess, fake: FakeOllama) -> None:
    """api.classify_conversation asks the model server itself."""
    settings = load_settings(None, ollama_endpoint=fake.url, ollama_model="llama3.2")
    blocking = api.classify_conversation(CONVERSATION, settings)
    assert blocking.model_dump(exclude_unset=True) == service.classify().json
    with pytest.raises(RequestError):
        api.classify_conversation(
            {"conversation_number": "1", "messages": [{"sender": "agent", "text": "a"}]}, settings
        )


@pytest.mark.parametrize(("turns", "is_complete"), [(2, True), (300, False)])
def test_classify_conversation_reports_whether_the_input_was_complete(turns: int, is_complete: bool) -> None:
    """As the service does in a header; the answer itself has the three fields and all messages, whatever was cut."""
    messages = [{"sender": "customer", "text": f"{number}: {'my parcel is late ' * 4}"} for number in range(turns)]
    sent = {"conversation_number": "123", "messages": messages}
    with FakeOllama(latency_s=0, user_message=0) as model:
        settings = load_settings(None, ollama_endpoint=model.url, ollama_model="llama3.2", ollama_num_ctx=4096)
        answer = api.classify_conversation(sent, settings)
    assert answer.input_complete is is_complete
    body = json.loads(answer.model_dump_json(exclude_unset=True))
    assert body == answer.model_dump(exclude_unset=True)
    assert list(body) == ["conversation_number", "messages", "classification"]
    assert body["messages"] == messages
    assert list(body["classification"]) == ["intent", "topic", "sentiment", "categorization"]


def test_unexpected_exception_returns_500_without_details(
    tmp_path_factory: pytest.TempPathFactory, fake: FakeOllama
) -> None:
    """500 with the request id; the log has the place in the code, and not the message, which may quote a request."""
    place = {"app": "tests.service.faulty_service:app", "OLLAMA_ENDPOINT": fake.url, "OLLAMA_MODEL": "llama3.2"}
    with serve(tmp_path_factory.mktemp("faulty"), **place) as service:
        answer = service.classify(conversation(CANARY), X_Request_ID="fault-1")
        assert (answer.status, answer.error) == (500, "InternalError")
        assert answer.headers["x-request-id"] == "fault-1"
        assert service.metric('triad_http_requests_total{route="/classify",status="500"}') == 1
        assert "CANARY" not in answer.body.decode() + service.log
        service.wait_for_log("RuntimeError at ")


def test_service_starts_without_model_server_and_finds_it_later(tmp_path_factory: pytest.TempPathFactory) -> None:
    """503 on /ready and /classify, and the model is found when it comes."""
    fake = FakeOllama(latency_s=0)
    fake.start()
    fake.stop()  # its port stays known
    with serve(tmp_path_factory.mktemp("away"), OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2") as service:
        for answer in (service.get("/ready"), service.classify()):
            assert (answer.status, answer.error) == (503, "ModelUnavailableError")
            assert int(answer.headers["retry-after"]) >= 1
        assert service.get("/health").status == 200
        # It is said before the body is there.
        head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        assert service.connect(head).recv(12) == b"HTTP/1.1 503"
        with fake:
            service.wait_for_metric("triad_model_found", 1)
            assert service.classify().status == 200
            fake.stop()
            # Five connection failures open the breaker, and then nobody waits for a connection.
            while service.metric("triad_breaker_open") == 0:
                assert service.classify().error == "ModelUnavailableError"
            assert service.classify().error == "ModelUnavailableError"
            fake.start()
            service.wait_for_metric("triad_breaker_open", 0)
            assert service.classify().status == 200


def test_embedded_service_answers_with_a_built_in_classifier(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No model server is looked for."""
    built_in = BASELINE_MODEL if missing_packages() else EMBEDDING_MODEL
    with serve(tmp_path_factory.mktemp("embedded"), API_EMBEDDED="true") as service:
        assert service.get("/ready").json == {"status": "ready", "model": built_in}
        answer = service.classify()
        assert answer.status == 200
        assert answer.headers["x-model"] == built_in
        assert answer.json["classification"]["categorization"].startswith(("Baseline: ", "Embedded: "))
