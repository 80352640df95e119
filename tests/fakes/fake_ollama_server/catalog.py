"""The routes that tell about the server and its models."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from .models import MODIFIED_AT_UNIX, full_name
from .payloads import ApiError, check_name, load_json
from .replies import JSON_TYPE, TEXT_TYPE, V1_JSON_TYPE
from .scheduler import Runner
from .wire import Exchange

if TYPE_CHECKING:
    from .server import FakeServer

Handler = Callable[[Exchange], None]
Routes = dict[bytes, Handler]


def body_of(exchange: Exchange) -> bytes:
    """The request body.

    Raises:
        ApiError: 400, there is none.
    """
    if not exchange.body:
        raise ApiError(400, "missing request body")
    return exchange.body


class Catalog:
    """Answers from the models table and the loaded runners."""

    def __init__(self, server: "FakeServer") -> None:
        self._server = server

    def routes(self) -> dict[str, Routes]:
        """Path -> method -> handler."""
        both: dict[str, Handler] = {
            "/": lambda exchange: exchange.send(200, b"Ollama is running", TEXT_TYPE),
            "/api/version": self._version,
            "/api/tags": self._tags,
        }
        return {path: {b"GET": handler, b"HEAD": handler} for path, handler in both.items()} | {
            "/api/ps": {b"GET": self._ps},
            "/api/show": {b"POST": self._show},
            "/v1/models": {b"GET": self._v1_models},
        }

    def v1_model(self, exchange: Exchange, name: str) -> None:
        """``GET /v1/models/NAME``."""
        if self._server.spec_of(name) is None:
            self._server.send_error(exchange, 404, f"model '{name}' not found")
        else:
            exchange.send(200, orjson.dumps(_v1_entry(name)) + b"\n", V1_JSON_TYPE)

    def _version(self, exchange: Exchange) -> None:
        _send_json(exchange, {"version": self._server.knobs.reported_version})

    def _tags(self, exchange: Exchange) -> None:
        _send_json(exchange, {"models": [spec.tags_entry() for spec in self._server.models.values()]})

    def _ps(self, exchange: Exchange) -> None:
        runners = sorted(self._server.scheduler.loaded.values(), key=lambda runner: -int(runner.expires_at))
        _send_json(exchange, {"models": [_ps_entry(runner, self._server.knobs.vram_share) for runner in runners]})

    def _show(self, exchange: Exchange) -> None:
        try:
            fields = load_json(body_of(exchange), "ShowRequest")
            name = fields.get("model") or fields.get("name") or ""
            if not name:
                raise ApiError(400, "model is required")
            check_name(name)
            spec = self._server.spec_of(name)
            if spec is None:
                raise ApiError(404, f"model '{full_name(name)}' not found")  # the whole name, unlike the other routes
        except ApiError as exc:
            self._server.send_error(exchange, exc.status, exc.message)
            return
        _send_json(exchange, spec.show_response())

    def _v1_models(self, exchange: Exchange) -> None:
        entries = [_v1_entry(spec.name) for spec in self._server.models.values()]
        exchange.send(200, orjson.dumps({"object": "list", "data": entries}) + b"\n", V1_JSON_TYPE)


def _send_json(exchange: Exchange, body: object) -> None:
    exchange.send(200, orjson.dumps(body), JSON_TYPE)


def _v1_entry(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": MODIFIED_AT_UNIX, "owned_by": "library"}


def _ps_entry(runner: Runner, vram_share: float) -> dict[str, Any]:
    spec = runner.spec
    second, nanosecond = divmod(int(runner.expires_at * 1e9), 1_000_000_000)
    # The cache of keys and values is taken for the whole window of every slot when the model is loaded.
    size = spec.size_bytes + spec.kv_bytes_per_token * runner.num_ctx * runner.slots
    return {
        "name": spec.name,
        "model": spec.name,
        "size": size,
        "digest": spec.digest,
        "details": spec.details(),
        "expires_at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)) + f".{nanosecond:09d}Z",
        "size_vram": int(size * vram_share) if spec.vram_bytes is None else spec.vram_bytes,
        "context_length": runner.num_ctx,
    }
