"""Files and batches at OpenAI, or at a server with the same API; the only owner of the openai package.

The package retries calls by itself, also a ``POST /batches`` whose response was lost, and sends no idempotency key
(openai 3.x, _base_client.py): that would be a second batch and a second bill. So create and upload are sent once,
and ``find_batch`` and ``find_file`` tell whether they succeeded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2
import openai

from domain.server_reason import server_reason
from error_handler import (
    ConfigurationError,
    JobConnectionError,
    JobProcessingError,
    JobValidationError,
)
from network.outgoing import certificate_problem, httpx2_client, problem_of
from openai_batch.batch_protocol import BatchState, load_json, parse_batch, request_texts
from openai_batch.job_config import BatchConfig, OpenAIConfig
from storage.files import SPACE, explained, open_private, publish

TIMEOUT_S = 120.0
UPLOAD_TIMEOUT_S = 900.0
COMPARED_BYTES = 8 * 1024 * 1024  # a reason about a larger request file is not shown
MAX_WAIT_S = 3600.0  # the longest Retry-After that is honoured
CLOCK_SKEW_S = 86_400.0  # how much the server's clock may differ from ours
UNFINISHED = ".part"  # the suffix of a file that is not complete yet


class NotThereError(JobProcessingError):
    """The server knows no such file or batch, not yet or not any more."""


class EndedError(JobConnectionError):
    """HTTP 409: the state of the file or batch does not allow the call."""


class NotNowError(JobConnectionError):
    """HTTP 429: the server did nothing. *wait_s* is its Retry-After, None if it sent none."""

    def __init__(self, message: str, wait_s: float | None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class OpenAIFiles:
    """The API for one key. Use as ``async with``."""

    def __init__(self, config: OpenAIConfig, batch: BatchConfig) -> None:
        """Create the client; nothing is sent. Raise ConfigurationError if there is no key."""
        if config.api_key is None:
            raise ConfigurationError("OPENAI_API_KEY is not set; set it, because the Batch API needs a key.")
        self._batch = batch
        key = config.api_key.get_secret_value()
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=config.base_url,
            timeout=TIMEOUT_S,
            max_retries=3,
            http_client=httpx2_client(config.base_url, {"Authorization": f"Bearer {key}"}, TIMEOUT_S),
        )
        self._once = self._client.with_options(max_retries=0)

    async def __aenter__(self) -> OpenAIFiles:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def upload(self, path: Path, name: str) -> str:
        """Upload *path* under *name*; return the id of the file.

        After a JobConnectionError the file may or may not exist; ``find_file`` tells.
        """
        with explained(f"{path} cannot be read"), path.open("rb") as file:
            upload = self._once.files.create(
                file=(name, file, "application/jsonl"), purpose="batch", timeout=UPLOAD_TIMEOUT_S
            )
            return str((await _object("upload a file", upload, path))["id"])

    async def find_file(self, name: str, since: float) -> str | None:
        """Return the id of a batch file called *name*, uploaded after *since* (unix seconds, clock skew allowed)."""
        async for file in self._entries(self._client.files, "list the files", purpose="batch", limit=1000):
            if file.get("filename") == name:
                return str(file["id"])
            if int(file.get("created_at") or 0) < since - CLOCK_SKEW_S:
                break
        return None

    async def create(self, file_id: str, metadata: Mapping[str, str], path: Path) -> BatchState:
        """Create a batch of file *file_id*, which was uploaded from *path*.

        Raises:
            NotThereError: The server does not find the file yet. No batch exists.
            NotNowError: The server asks to wait. No batch exists.
            JobValidationError: The server refuses. No batch exists.
            JobConnectionError: The batch may or may not exist; ``find_batch`` tells.
        """
        creation = self._once.batches.create(
            input_file_id=file_id,
            endpoint=self._batch.endpoint,
            completion_window=self._batch.completion_window,
            metadata=dict(metadata),
        )
        return parse_batch(await _object("create a batch", creation, path))

    async def find_batch(self, metadata: Mapping[str, str], file_id: str) -> BatchState | None:
        """Return the batch that was created with *metadata* and file *file_id*; None if the list has none.

        Stops at batches older than the file. Both times are of the server's clock, so a wrong clock here is harmless.
        """
        since = await self.uploaded_at(file_id)
        async for batch in self._entries(self._client.batches, "list the batches", limit=100):
            state = parse_batch(batch)
            if metadata.items() <= state.metadata.items():
                return state
            if since is not None and int(batch.get("created_at") or 0) < since:
                break
        return None

    async def _entries(self, resource: Any, what: str, **query: Any) -> AsyncGenerator[dict[str, Any]]:
        """Yield the entries that *resource* lists, newest first. The package's own paging fails on malformed lists."""
        while True:
            with translated(what):
                answer = await resource.with_raw_response.list(**query)
            page = load_json(answer.content)
            entries = page.get("data") if isinstance(page, dict) else None
            if not isinstance(entries, list):
                raise _malformed(what)
            for entry in entries:
                if not isinstance(entry, dict) or not entry.get("id"):
                    raise _malformed(what)
                yield entry
            if not entries or not page.get("has_more"):
                return
            query["after"] = entries[-1]["id"]

    async def uploaded_at(self, file_id: str) -> int | None:
        """Return when file *file_id* was uploaded, in the server's unix seconds; None if it knows no such file."""
        try:
            file = await _object("get a file", self._client.files.retrieve(file_id))
            return int(file.get("created_at") or 0)
        except NotThereError:
            return None

    async def get(self, batch_id: str) -> BatchState:
        """Return the state of a batch; raise NotThereError if the server knows no such batch."""
        return parse_batch(await _object("get a batch", self._client.batches.retrieve(batch_id)))

    async def cancel(self, batch_id: str) -> None:
        """Cancel a batch; answers that exist are kept and billed. A batch that has ended is left alone."""
        with suppress(JobValidationError, EndedError):
            await _object("cancel a batch", self._once.batches.cancel(batch_id))

    async def download(self, file_id: str, target: Path) -> int:
        """Stream a file to *target*, durably, complete or not at all; return its size in bytes.

        Raises NotThereError if the server does not find the file, StateDirectoryError if the disk is full.
        """
        temporary = target.with_name(f"{target.name}{UNFINISHED}")
        received = 0
        try:
            with explained(f"{target} cannot be written", SPACE), open_private(temporary) as file:
                with translated("download a file"):
                    async with self._client.files.with_streaming_response.content(file_id) as response:
                        async for chunk in response.iter_bytes(1 << 18):  # less than Content-Length is an error
                            received += len(chunk)
                            await asyncio.to_thread(file.write, chunk)
                await asyncio.to_thread(publish, file, target)
        finally:
            temporary.unlink(missing_ok=True)
        return received

    async def delete_file(self, file_id: str) -> None:
        """Delete a file at the server; a missing file is no error."""
        with suppress(NotThereError), translated("delete a file"):
            await self._client.files.delete(file_id)


async def _object(what: str, call: Awaitable[Any], sent: Path | None = None) -> dict[str, Any]:
    """Return the object that *call* yields; the package yields the HTML page of a proxy as text."""
    with translated(what, sent):
        answer = await call
    fields = answer.model_dump() if isinstance(answer, openai.BaseModel) else {}
    if not fields.get("id"):
        raise _malformed(what)
    return fields


def _malformed(what: str) -> JobConnectionError:
    return JobConnectionError(f"the server's response is not that of the Batch API ({what}); check OPENAI_BASE_URL")


@contextmanager
def translated(what: str, sent: Path | None = None) -> Iterator[None]:
    """Raise the package's errors as ours, with the server's reason if it does not quote the file *sent*."""
    try:
        yield
    except openai.NotFoundError as exc:
        raise NotThereError(f"the server does not find it ({what}){_reason(exc, sent)}") from exc
    except (openai.AuthenticationError, openai.PermissionDeniedError) as exc:
        raise ConfigurationError(
            f"OpenAI refuses the key ({what}, HTTP {exc.status_code}); check OPENAI_API_KEY and OPENAI_BASE_URL"
            f"{_reason(exc, sent)}."
        ) from exc
    except openai.RateLimitError as exc:
        if exc.code == "insufficient_quota":
            raise JobValidationError(
                f"the OpenAI account has no quota left ({what}); add credit, then run again{_reason(exc, sent)}."
            ) from exc
        raise NotNowError(f"OpenAI asks to wait ({what}, HTTP 429){_reason(exc, sent)}", _retry_after_s(exc)) from exc
    except openai.APIStatusError as exc:
        raise _refusal(what, exc, _reason(exc, sent)) from exc
    except (openai.APIConnectionError, httpx2.HTTPError) as exc:  # the package does not wrap errors inside a stream
        url = str(exc.request.url) if isinstance(exc, openai.APIConnectionError) else ""
        if untrusted := certificate_problem(exc, url):
            raise ConfigurationError(f"{untrusted}.") from exc
        known = problem_of(exc, url, "OPENAI_BASE_URL")
        raise JobConnectionError(
            known or f"no answer from OpenAI ({what}); check the network and OPENAI_BASE_URL"
        ) from exc
    except openai.OpenAIError as exc:
        raise JobConnectionError(f"OpenAI sent a malformed response ({what}, {type(exc).__name__})") from exc


def reason_given(answer: bytes, sent: Path | None, key: str | None = None) -> str:
    """Return the reason in *answer*, ready to be put after a message, unless it may quote the request file *sent*."""
    if sent is not None and (not sent.is_file() or sent.stat().st_size > COMPARED_BYTES):
        return ""
    return server_reason(answer, request_texts(sent) if sent is not None else (), secret=key)


def _reason(exc: openai.APIStatusError, sent: Path | None) -> str:
    key = exc.request.headers.get("authorization", "").removeprefix("Bearer ")
    return reason_given(exc.response.content, sent, key)


def _refusal(
    what: str, exc: openai.APIStatusError, said: str
) -> JobConnectionError | JobValidationError | ConfigurationError:
    if exc.status_code < 400:
        return ConfigurationError(
            f"the server redirects to another address ({what}, HTTP {exc.status_code}), which is not followed because texts "
            "would go there; set OPENAI_BASE_URL to the final address."
        )
    if isinstance(exc, openai.ConflictError):
        return EndedError(f"OpenAI reports a conflict ({what}, HTTP 409){said}")
    # 408 comes from a gateway that may have passed the request on, so it tells nothing about the batch.
    if isinstance(exc, openai.InternalServerError) or exc.status_code == HTTPStatus.REQUEST_TIMEOUT:
        return JobConnectionError(f"OpenAI failed ({what}, HTTP {exc.status_code}){said}")
    code = f", {exc.code}" if exc.code else ""
    return JobValidationError(f"OpenAI refuses the request ({what}, HTTP {exc.status_code}{code}){said}")


def _retry_after_s(exc: openai.APIStatusError) -> float | None:
    """Return the seconds of ``Retry-After``, from 1 to MAX_WAIT_S; None if there are none."""
    value = exc.response.headers.get("retry-after", "")
    return min(MAX_WAIT_S, max(1.0, float(value))) if value.isdigit() else None
