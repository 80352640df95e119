"""The routes under ``/v1``."""

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import BodyPartReader, web

from .batches import FILE_LIFE_S, TERMINAL
from .embedding_faults import spoil_embeddings
from .execution import ApiError, checked_inputs, execute
from .faults import EMBED_KINDS, Fault
from .wire import Reply, json_reply

if TYPE_CHECKING:
    from .server import FakeServer

_ROUTES = (
    ("files.create", "POST", r"/v1/files"),
    ("files.list", "GET", r"/v1/files"),
    ("files.retrieve", "GET", r"/v1/files/([^/]+)"),
    ("files.delete", "DELETE", r"/v1/files/([^/]+)"),
    ("files.content", "GET", r"/v1/files/([^/]+)/content"),
    ("batches.create", "POST", r"/v1/batches"),
    ("batches.list", "GET", r"/v1/batches"),
    ("batches.retrieve", "GET", r"/v1/batches/([^/]+)"),
    ("batches.cancel", "POST", r"/v1/batches/([^/]+)/cancel"),
    ("embeddings.create", "POST", r"/v1/embeddings"),
    ("chat.create", "POST", r"/v1/chat/completions"),
    ("models.list", "GET", r"/v1/models"),
    ("models.retrieve", "GET", r"/v1/models/(.+)"),
)
_COMPILED = tuple((name, method, re.compile(pattern)) for name, method, pattern in _ROUTES)
_ENDPOINTS = (
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
)
_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
_DEFAULT_MODELS = ("gpt-4o", "gpt-4o-mini", "gpt-4.1-mini", "text-embedding-3-small", "text-embedding-3-large")
_SHOWN_OF_FILE = (
    "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details",
)  # fmt: skip


def route_name(method: str, path: str) -> str:
    """Name of the route, like ``batches.create``; "unknown" for none."""
    for name, wanted, pattern in _COMPILED:
        if method == wanted and pattern.fullmatch(path):
            return name
    return "unknown"


def _id_in(path: str) -> str:
    return next(match[1] for _, _, pattern in _COMPILED if (match := pattern.fullmatch(path)) and match.lastindex)


class Api:
    """Answers requests that no fault kept away."""

    def __init__(self, server: "FakeServer") -> None:
        self._server = server
        self._store = server.store
        self._handlers: dict[str, Callable[[web.Request, bytes], Awaitable[Reply]]] = {
            "files.create": self._upload,
            "files.list": self._list_files,
            "files.retrieve": self._show_file,
            "files.delete": self._delete_file,
            "files.content": self._send_content,
            "batches.create": self._create_batch,
            "batches.list": self._list_batches,
            "batches.retrieve": self._show_batch,
            "batches.cancel": self._cancel_batch,
            "models.list": self._list_models,
            "models.retrieve": self._show_model,
        }

    async def handle(self, request: web.Request, route: str, body: bytes, fault: Fault | None) -> Reply:
        """The answer.

        Raises:
            ApiError: The request is refused.
        """
        if route in ("embeddings.create", "chat.create"):
            return await self._execute(request, body, fault if fault and fault.kind in EMBED_KINDS else None)
        if route not in self._handlers:
            raise ApiError(404, f"Invalid URL ({request.method} {request.path})")
        return await self._handlers[route](request, body)

    # Files

    async def _upload(self, request: web.Request, body: bytes) -> Reply:
        if not request.content_type.startswith("multipart/"):
            raise ApiError(400, "Missing required parameter: 'file'.", "missing_required_parameter", "file")
        file_id = f"file-{self._server.new_id()}"
        fields: dict[str, str] = {}
        filename: str | None = None
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                continue
            if part.name == "file":
                filename = part.filename or "file"
                await self._receive(part, file_id)
            else:
                fields[part.name or ""] = await part.text()
        try:
            life_s = _checked_upload(fields, filename)
        except ApiError:
            self._store.path(file_id).unlink(missing_ok=True)
            raise
        row = self._server.add_file(file_id, filename or "", fields["purpose"], life_s)
        self._server.counters["files_uploaded"] += 1
        self._server.counters["bytes_uploaded"] += row["bytes"]
        return json_reply(_public_file(row))

    async def _receive(self, part: BodyPartReader, file_id: str) -> None:
        size = 0
        with self._store.path(file_id).open("wb") as sink:
            while chunk := await part.read_chunk(262_144):
                size += len(chunk)
                if size <= self._server.knobs.max_upload_bytes:
                    sink.write(chunk)
        if size > self._server.knobs.max_upload_bytes:
            self._store.path(file_id).unlink()
            raise ApiError(413, f"File is larger than the limit of {self._server.knobs.max_upload_bytes} bytes.")

    def _file(self, file_id: str) -> dict[str, Any]:
        row = self._store.objects["file"].get(file_id)
        if row is None or row.get("deleted") or row["expires_at"] <= self._server.now():
            raise ApiError(404, f"No such File object: {file_id}", None, "id")
        return row

    async def _show_file(self, request: web.Request, body: bytes) -> Reply:
        return json_reply(_public_file(self._file(_id_in(request.path))))

    async def _delete_file(self, request: web.Request, body: bytes) -> Reply:
        row = self._file(_id_in(request.path))
        row["deleted"] = True
        self._store.save("file", row)
        # The bytes stay when a batch still reads them; the service works on a copy of its own, too.
        self._server.counters["files_deleted"] += 1
        return json_reply({"id": row["id"], "object": "file", "deleted": True})

    async def _send_content(self, request: web.Request, body: bytes) -> Reply:
        row = self._file(_id_in(request.path))
        path = self._store.path(row["id"])
        if not path.exists():
            raise ApiError(404, f"No such File object: {row['id']}", None, "id")
        disposition = f'attachment; filename="{row["filename"]}"'
        return Reply(200, path, "application/octet-stream", {"Content-Disposition": disposition})

    async def _list_files(self, request: web.Request, body: bytes) -> Reply:
        now, purpose = self._server.now(), request.query.get("purpose")
        rows = [
            row
            for row in self._store.objects["file"].values()
            if not row.get("deleted") and row["expires_at"] > now and purpose in (None, row["purpose"])
        ]
        newest_first = request.query.get("order", "desc") == "desc"
        page, more = self._page(request, "file", rows[::-1] if newest_first else rows, 10_000)
        return json_reply(_listing([_public_file(row) for row in page], more))

    def _page(
        self, request: web.Request, kind: str, rows: list[dict[str, Any]], default: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """One page, without what lags behind, and whether there is more."""
        most = 100 if kind == "batch" else 10_000
        limit, after = request.query.get("limit", str(default)), request.query.get("after")
        if not limit.isdecimal() or not 1 <= int(limit) <= most:
            message = f"Invalid 'limit': expected an integer between 1 and {most}, but got {limit} instead."
            raise ApiError(400, message, "invalid_value", "limit")
        visible = []
        for row in rows:
            row["lists"] += 1
            if row["lists"] > self._server.knobs.list_lag:
                visible.append(row)
        if after:
            ids = [row["id"] for row in visible]
            if after not in ids:
                raise ApiError(400, f"Invalid 'after': no such object: {after}", "invalid_value", "after")
            visible = visible[ids.index(after) + 1 :]
        return visible[: int(limit)], len(visible) > int(limit)

    # Batches

    async def _create_batch(self, request: web.Request, body: bytes) -> Reply:
        given = _json_object(body)
        _check_batch_request(given)
        self._file(given["input_file_id"])
        row = self._server.batches.create(given, self._server.now())
        return json_reply(self._server.batches.view(row))

    def _batch(self, batch_id: str) -> dict[str, Any]:
        row = self._store.objects["batch"].get(batch_id)
        if row is None or not self._server.batches.visible(row):
            raise ApiError(404, f"No batch found with id '{batch_id}'.", None, "batch_id")
        return row

    async def _show_batch(self, request: web.Request, body: bytes) -> Reply:
        row = self._batch(_id_in(request.path))
        shown = await self._server.batches.poll(row)
        self._batch(row["id"])  # it may vanish at this very poll
        return json_reply(shown)

    async def _list_batches(self, request: web.Request, body: bytes) -> Reply:
        batches = self._server.batches
        rows = [row for row in self._store.objects["batch"].values() if batches.visible(row)]
        page, more = self._page(request, "batch", rows[::-1], 20)
        for row in page:
            await batches.settle(row, 0.5)
        return json_reply(_listing([batches.view(row) for row in page], more))

    async def _cancel_batch(self, request: web.Request, body: bytes) -> Reply:
        batches, row = self._server.batches, self._batch(_id_in(request.path))
        await batches.settle(row, 2.0)
        status = batches.status(row)
        if status in TERMINAL:
            raise ApiError(409, f"Cannot cancel a batch with status '{status}'.", "invalid_batch_status")
        batches.cancel(row)
        return json_reply(batches.view(row))

    # One request at once

    async def _execute(self, request: web.Request, body: bytes, fault: Fault | None) -> Reply:
        server = self._server
        knobs, given = server.knobs, _json_object(body)
        hashes = []
        if request.path == "/v1/embeddings" and isinstance(given.get("model"), str):
            inputs = checked_inputs(given, knobs)
            hashes = [hashlib.sha256(text.encode(errors="replace")).hexdigest() for text, _ in inputs]
            self._store.meter("embedding", hashes, submitted=1)
        # The whole call takes latency_s, what the fake does for it included, from its arrival where a slot is free.
        started = request.get("arrived_s", time.monotonic())
        is_waiting = server.slots.locked()
        async with server.slots:
            started = time.monotonic() if is_waiting else started
            server.sync_in_flight += 1
            server.max_sync_in_flight = max(server.max_sync_in_flight, server.sync_in_flight)
            server.changed()
            try:
                answer = execute(request.path, given, server.new_id(), int(server.now()), knobs)
                reply = json_reply(answer) if fault is None else Reply(200, spoil_embeddings(fault, answer))
                await asyncio.sleep(max(0.0, knobs.latency_s - (time.monotonic() - started)))
            finally:
                server.sync_in_flight -= 1
        if hashes:
            self._store.meter("embedding", hashes, billed=1)
        return reply

    # Models

    def _models(self) -> list[dict[str, Any]]:
        names = self._server.knobs.models or _DEFAULT_MODELS
        return [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "system"} for name in names]

    async def _list_models(self, request: web.Request, body: bytes) -> Reply:
        return json_reply({"object": "list", "data": self._models()})

    async def _show_model(self, request: web.Request, body: bytes) -> Reply:
        wanted = _id_in(request.path)
        for model in self._models():
            if model["id"] == wanted:
                return json_reply(model)
        message = f"The model '{wanted}' does not exist or you do not have access to it."
        raise ApiError(404, message, "model_not_found", "model")


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        message = "We could not parse the JSON body of your request. The API expects a JSON payload."
        raise ApiError(400, message)
    return given


def _checked_upload(fields: Mapping[str, str], filename: str | None) -> float:
    """Seconds until the file expires; raises `ApiError`."""
    if filename is None:
        raise ApiError(400, "Missing required parameter: 'file'.", "missing_required_parameter", "file")
    purpose = fields.get("purpose")
    if purpose is None:
        raise ApiError(400, "Missing required parameter: 'purpose'.", "missing_required_parameter", "purpose")
    if purpose not in _PURPOSES:
        supported = ", ".join(f"'{name}'" for name in _PURPOSES)
        message = f"Invalid value: '{purpose}'. Supported values are: {supported}."
        raise ApiError(400, message, "invalid_value", "purpose")
    if purpose == "batch" and not filename.endswith(".jsonl"):
        raise ApiError(400, "Invalid file format for Batch API. Must be .jsonl", None, "file")
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        return FILE_LIFE_S
    if not seconds.isdecimal() or not 3600 <= int(seconds) <= 2_592_000:
        message = f"Invalid 'expires_after.seconds': expected 3600 to 2592000, but got {seconds} instead."
        raise ApiError(400, message, "invalid_value", "expires_after.seconds")
    return float(seconds)


def _check_batch_request(given: Mapping[str, Any]) -> None:
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(given.get(name), str):
            raise ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
    for name, supported in (("endpoint", _ENDPOINTS), ("completion_window", ("24h",))):
        if given[name] not in supported:
            values = ", ".join(f"'{value}'" for value in supported)
            message = f"Invalid value: '{given[name]}'. Supported values are: {values}."
            raise ApiError(400, message, "invalid_value", name)
    _check_metadata(given.get("metadata") or {})


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise ApiError(400, "Invalid type for 'metadata': expected an object.", "invalid_type", "metadata")
    if len(metadata) > 16:
        message = (
            "Invalid 'metadata': too many properties. Expected an object with at most 16 properties, but got an"
            f" object with {len(metadata)} properties instead."
        )
        raise ApiError(400, message, "object_above_max_properties", "metadata")
    for key, value in metadata.items():
        if not isinstance(value, str):
            message = f"Invalid type for 'metadata.{key}': expected a string."
            raise ApiError(400, message, "invalid_type", f"metadata.{key}")
        if len(key) > 64 or len(value) > 512:
            message = f"Invalid 'metadata.{key[:64]}': string too long (keys 64, values 512 characters)."
            raise ApiError(400, message, "string_above_max_length", "metadata")


def _public_file(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _SHOWN_OF_FILE}


def _listing(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
