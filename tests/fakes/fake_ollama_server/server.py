"""The routes of the fake and the life of a request between the wire and the scheduler."""

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Callable, Sequence

import orjson

from .admin import Admin
from .catalog import Catalog, Routes, body_of
from .faults import STATUS_KINDS, STATUS_TEXTS, Fault, FaultPlan
from .generation import Embedding, Generation, LoadRequest, TimedJob
from .knobs import Knobs
from .models import ModelSpec, full_name, is_cloud_name, models_table
from .payloads import (
    ApiError,
    Call,
    check_name,
    check_options,
    parse_chat,
    parse_embed,
    parse_generate,
    parse_openai,
)
from .records import RequestRecord, Totals
from .replies import JSON_TYPE, TEXT_TYPE, V1_JSON_TYPE, Clock, error_body, overflow_message, v1_error_body
from .scheduler import Scheduler
from .wire import Connection, Exchange

_HTML_TYPE = b"text/html"
_HTML_PAGE = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n"
    b"<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
_PARSERS: dict[str, Callable[[bytes], Call]] = {
    "/api/chat": parse_chat,
    "/api/generate": parse_generate,
    "/v1/chat/completions": parse_openai,
}


class FakeServer:
    """All state of one fake: knobs, models, scheduler, totals, connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop, knobs: Knobs) -> None:
        self.loop = loop
        self.clock = Clock()
        self.connections: set[Connection] = set()
        self.bytes_in = 0
        self.internal_errors = 0
        self.started_knobs = knobs
        self.totals = Totals()
        self.admin = Admin(self)
        self.scheduler = Scheduler(loop, knobs, self.changed)
        self.configure(knobs)
        self._allowed_hosts: dict[bytes, bool] = {}
        handle_inference: Routes = {b"POST": self._generate}
        catalog = Catalog(self)
        self._routes: dict[str, Routes] = {
            **catalog.routes(),
            "/api/chat": handle_inference,
            "/api/generate": handle_inference,
            "/v1/chat/completions": handle_inference,
            "/api/embed": {b"POST": self._embed},
        }
        self._v1_model = catalog.v1_model

    def configure(self, knobs: Knobs) -> None:
        """Use *knobs* from now on; requests that already hold a slot keep their plan.

        Raises:
            ValueError: A fault is malformed; then nothing has changed.
        """
        plan = FaultPlan(knobs.faults)
        models = models_table(knobs.models)
        self.knobs = self.scheduler.knobs = knobs
        self.plan = plan
        self.models = models
        for name, runner in list(self.scheduler.loaded.items()):
            runner.slots = 1 if runner.spec.is_embedding_only else knobs.slots
            if name not in models:
                self.scheduler.expire(name)

    def changed(self) -> None:
        """Tell those who wait for a gauge that one may have changed."""
        if self.admin.waiting:
            self.admin.check_waiting()

    # Requests

    def handle(self, exchange: Exchange) -> None:
        """Answer *exchange*, now or later."""
        routes = self._routes.get(exchange.path)
        if exchange.path.startswith("/__fake__/"):
            self.admin.handle(exchange)
        elif self.knobs.check_host and not self._host_allowed(exchange.host):
            exchange.send(403, b"", TEXT_TYPE)
        elif routes is None:
            self._handle_unknown(exchange)
        elif exchange.method in routes:
            routes[exchange.method](exchange)
        else:
            allowed = b", ".join(routes)
            exchange.send(405, b"405 method not allowed", b"text/plain", b"Allow: %b\r\n" % allowed)

    def _handle_unknown(self, exchange: Exchange) -> None:
        path = exchange.path
        if path.startswith("/v1/models/") and exchange.method == b"GET":
            self._v1_model(exchange, path.removeprefix("/v1/models/"))
        elif path.endswith("/") and exchange.method in self._routes.get(path[:-1], {}):
            status = 301 if exchange.method == b"GET" else 307
            exchange.send(status, b"", TEXT_TYPE, b"Location: %b\r\n" % path[:-1].encode("latin-1"))
        else:
            exchange.send(404, b"404 page not found", b"text/plain")

    def exchange_ended(self, exchange: Exchange) -> None:
        """Called by the wire when the whole answer is written."""
        exchange.job = None
        if not exchange.counted:
            return
        totals = self.totals
        totals.in_flight -= 1
        totals.statuses[exchange.status] += 1
        if exchange.status == 200:
            totals.answered += 1
        else:
            totals.failed += 1
        self._close_record(exchange, str(exchange.status) if exchange.status else "dropped")

    def client_left(self, exchange: Exchange) -> None:
        """Called by the wire when the client is gone before its answer."""
        job = exchange.job
        exchange.job = None
        if isinstance(job, TimedJob):
            job.cancel_timer()
            self.scheduler.cancel(job)
        if exchange.counted:
            self.totals.in_flight -= 1
            self.totals.client_disconnects += 1
            self._close_record(exchange, "client_disconnected")

    def _close_record(self, exchange: Exchange, outcome: str) -> None:
        exchange.counted = False
        record = exchange.record
        if record is not None:
            record.end_s = time.monotonic()
            record.outcome = outcome
        self.changed()

    def send_error(self, exchange: Exchange, status: int, message: str) -> None:
        """Answer with an error in the shape of the route."""
        if exchange.path.startswith("/v1/"):
            exchange.send(status, v1_error_body(status, message), V1_JSON_TYPE)
        else:
            exchange.send(status, error_body(message), JSON_TYPE)

    # Inference

    def _begin(self, exchange: Exchange, group: str) -> int:
        totals = self.totals
        index = totals.indexes[group]
        totals.indexes[group] = index + 1
        totals.in_flight += 1
        totals.max_in_flight = max(totals.max_in_flight, totals.in_flight)
        exchange.counted = True
        if self.knobs.record:
            record = RequestRecord(index, exchange.path, exchange.request_id)
            exchange.record = record
            totals.records.append(record)
            if len(totals.records) > self.knobs.record_limit:
                totals.records.popleft()
        return index

    def _load_only(self, exchange: Exchange) -> bool:
        """Take a request that asks nothing and only loads the model: counted apart, spared by faults, not recorded."""
        if exchange.path != "/api/chat":
            return False
        try:
            call = parse_chat(body_of(exchange))
            if call.messages or call.keep_alive_s == 0:
                return False
            spec = self._model_for(call)
        except ApiError:
            return False  # the usual way says what is wrong
        self.totals.load_requests += 1
        self._submit(LoadRequest(self, exchange, call, spec, -1), None, [])
        return True

    def _generate(self, exchange: Exchange) -> None:
        if self._load_only(exchange):
            return
        index = self._begin(exchange, "generation")
        self.totals.chat_requests += 1
        try:
            call = _PARSERS[exchange.path](body_of(exchange))
            call.select_text(self.knobs.user_message)
        except ApiError as exc:
            self.send_error(exchange, exc.status, exc.message)
            return
        exchange.body = b""
        exchange.user_sha = call.digest.hex()
        self.totals.count_text(call.digest)
        if exchange.record is not None:
            exchange.record.seen(call)
        fault, slower = self._pick_fault(exchange, index, call.user_texts, call.digest)
        if fault is not None and fault.at_arrival:
            self.strike(exchange, fault, call)
            return
        try:
            spec = self._model_for(call)
        except ApiError as exc:
            self.send_error(exchange, exc.status, exc.message)
            return
        if not call.messages and call.keep_alive_s == 0:
            self._unload(exchange, call, spec)
            return
        kind = Generation if call.messages else LoadRequest
        self._submit(kind(self, exchange, call, spec, index), fault, slower)

    def _embed(self, exchange: Exchange) -> None:
        index = self._begin(exchange, "/api/embed")
        self.totals.embed_requests += 1
        try:
            call, texts = parse_embed(body_of(exchange))
            self.totals.embed_inputs += len(texts)
            fault, slower = self._pick_fault(exchange, index, texts, call.digest)
            if fault is not None and fault.at_arrival:
                self.strike(exchange, fault, call)
                return
            check_name(call.model)
            spec = self.spec_of(call.model)
            if spec is None:
                raise ApiError(404, f'model "{call.model}" not found, try pulling it first')
        except ApiError as exc:
            self.send_error(exchange, exc.status, exc.message)
            return
        job = Embedding(self, exchange, call, spec, index)
        job.texts = texts
        self._submit(job, fault, slower)

    def _submit(self, job: TimedJob, fault: Fault | None, slower: list[Fault]) -> None:
        job.fault, job.slower = fault, slower
        job.exchange.job = job
        self.scheduler.submit(job)
        self.changed()

    def _pick_fault(
        self, exchange: Exchange, index: int, texts: Sequence[str], digest: bytes
    ) -> tuple[Fault | None, list[Fault]]:
        if not self.plan.faults:
            return None, []
        fault, slower = self.plan.pick(exchange.path, index, texts, digest)
        if exchange.record is not None and fault is not None:
            exchange.record.fault = fault.kind
        return fault, slower

    def spec_of(self, name: str) -> ModelSpec | None:
        """The model with this name, tag or no tag."""
        return self.models.get(full_name(name))

    def _model_for(self, call: Call) -> ModelSpec:
        """The model of *call*, with the checks of the handler in their order; raises `ApiError`."""
        if not call.model:
            if call.api == "generate":
                raise ApiError(404, "model '' not found")
            raise ApiError(400, "model is required")
        check_name(call.model)
        spec = self.spec_of(call.model)
        if is_cloud_name(call.model) or (spec is not None and spec.remote_host):
            self.totals.cloud_requests += 1
            raise ApiError(401, "unauthorized")
        if spec is None:
            raise ApiError(404, f"model '{call.model}' not found")
        if call.think and "thinking" not in spec.capabilities:
            raise ApiError(400, f'"{call.model}" does not support thinking')
        if spec.is_embedding_only:
            verb = "generate" if call.api == "generate" else "chat"
            raise ApiError(400, f'"{call.model}" does not support {verb}')
        check_options(call.options)
        return spec

    def _unload(self, exchange: Exchange, call: Call, spec: ModelSpec) -> None:
        self.scheduler.expire(spec.name)
        body: dict[str, object] = {"model": call.model, "created_at": self.clock.created_at()}
        body |= {"response": ""} if call.api == "generate" else {"message": {"role": "assistant", "content": ""}}
        exchange.send(200, orjson.dumps(body | {"done": True, "done_reason": "unload"}), JSON_TYPE)

    def strike(self, exchange: Exchange, fault: Fault, call: Call) -> None:
        """Answer, or refuse to answer, as a fault of `ARRIVAL_KINDS` says."""
        kind, params = fault.kind, fault.params
        if kind == "hang":
            return
        delay_s = params.get("delay_s", 0.0)
        if delay_s:
            exchange.timer = self.loop.call_later(delay_s, self._strike_now, exchange, fault, call)
        else:
            self._strike_now(exchange, fault, call)

    def _strike_now(self, exchange: Exchange, fault: Fault, call: Call) -> None:
        kind, params = fault.kind, fault.params
        if kind == "close":
            exchange.close()
        elif kind == "reset":
            exchange.reset()
        elif kind == "garbage":
            exchange.write_raw(b"SSH-2.0-OpenSSH_9.2p1\r\n")
            exchange.close()
        elif kind in ("html_200", "html_502"):
            exchange.send(int(kind[-3:]), _HTML_PAGE, _HTML_TYPE)
        elif kind == "status":
            self._send_status(exchange, fault)
        else:
            status, message = STATUS_KINDS[kind]
            if kind == "model_not_found_404":
                message = f"model '{call.model}' not found"
            elif kind == "overflow_400":
                num_ctx = int(call.options.get("num_ctx") or self.knobs.default_num_ctx)
                message = overflow_message(params.get("n_prompt_tokens", num_ctx * 2), num_ctx)
            self.send_error(exchange, status, message or "")

    def _send_status(self, exchange: Exchange, fault: Fault) -> None:
        params = fault.params
        status = int(params["status"])
        headers = b"".join(f"{name}: {value}\r\n".encode() for name, value in params.get("headers", {}).items())
        body = params.get("body")
        if body is None:
            self.send_error(exchange, status, STATUS_TEXTS.get(status, "error"))
            return
        raw = body.encode() if isinstance(body, str) else orjson.dumps(body)
        exchange.send(status, raw, params.get("content_type", JSON_TYPE.decode()).encode(), headers)

    def _host_allowed(self, raw: bytes) -> bool:
        allowed = self._allowed_hosts.get(raw)
        if allowed is None:
            allowed = self._allowed_hosts[raw] = _is_local_host(raw.decode("latin-1"))
        return allowed


def _is_local_host(value: str) -> bool:
    """Return whether the allowedHostsMiddleware of Ollama lets *value* through on a server bound to loopback."""
    host = re.sub(r":\d*$", "", value).strip("[]").lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        names = ("", "localhost", socket.gethostname().lower())
        return host in names or host.endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or address.is_private or address.is_unspecified
