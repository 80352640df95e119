"""One chat or generate request, from its slot to its answer; and one embed request."""

import asyncio
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import orjson

from .faults import ARRIVAL_KINDS, STATUS_KINDS, STREAM_KINDS, WIRE_KINDS, Fault
from .labels import (
    answer_from_schema,
    array_properties,
    estimate_tokens,
    fake_embedding,
    lognormal_latency,
    text_digest,
)
from .logprobs import logprobs_of
from .models import ModelSpec
from .payloads import ApiError, Call, check_options
from .replies import (
    JSON_TYPE,
    NDJSON_TYPE,
    SSE_TYPE,
    V1_JSON_TYPE,
    Reply,
    error_body,
    overflow_message,
    render,
    render_piece,
    render_stream_end,
    stream_pieces,
)
from .reply_faults import apply_reply_fault
from .scheduler import Job, num_predict_of
from .wire import Exchange

if TYPE_CHECKING:
    from .server import FakeServer

_TOO_LONG_RENDERED = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt,"
    " adjust the context length in settings, or use a model with a longer context length"
)
_TOO_LONG_OLD = "the input length exceeds the context length"
_NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
_NO_LOGPROBS = "logprobs is not supported by this runner"
_LEAST_UNCACHED = 1 / 20  # of the time for a prompt, however much of it is in the prefix cache
_THINKING = "The customer's turns decide; one label of each list fits best."
_PLAIN_KINDS = {"stream_truncate": "truncated_body", "stream_no_final": "done_false"}
_CUTTING_KINDS = frozenset({"stream_truncate", "truncated_body", "half_json", "reset_after"})


class TimedJob(Job):
    """A job that holds its slot for a simulated time, and may be struck by faults."""

    __slots__ = ("exchange", "fault", "index", "latency_s", "server", "slower", "timer")

    def __init__(self, server: "FakeServer", exchange: Exchange, call: Call, spec: ModelSpec, index: int) -> None:
        super().__init__(call, spec, time.monotonic_ns())
        self.server = server
        self.exchange = exchange
        self.index = index
        self.fault: Fault | None = None
        self.slower: list[Fault] = []
        self.latency_s = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def run(self) -> None:
        """Part of `Job`: hold the slot for the simulated time."""
        try:
            self.prepare()
        except ApiError as exc:
            self.fail(exc.status, exc.message)
            self.server.scheduler.release(self)
            return
        if self.fault is not None and self.fault.kind == "hang":
            self.server.changed()
            return  # the slot is freed when the client leaves
        self.latency_s = self._planned_latency_s()
        if self.latency_s > 0:
            self.server.changed()
            self.begin_waiting()
        else:
            self.complete()

    def prepare(self) -> None:
        """Check what can only be checked with the model loaded; raises `ApiError`."""

    def begin_waiting(self) -> None:
        """Arrange for `complete` to be called after the latency."""
        self.timer = self.server.loop.call_later(self.latency_s, self.complete)

    def complete(self) -> None:
        """Answer and free the slot."""
        self.timer = None
        fault = self.fault
        self.server.totals.add_simulated(self.latency_s)
        if fault is not None and fault.kind == "runner_crash" and self.runner is not None:
            status, message = STATUS_KINDS["runner_stopped_500"]
            for job in self.server.scheduler.crash(self.runner):
                job.fail(status, message or "")
            return
        if fault is not None and fault.kind in ARRIVAL_KINDS:
            self.server.strike(self.exchange, fault, self.call)
        else:
            self.answer()
        if fault is not None and fault.kind == "unload":
            self.server.scheduler.expire(self.spec.name)
        self.server.scheduler.release(self)

    def answer(self) -> None:
        """Send the answer."""
        raise NotImplementedError

    def fail(self, status: int, message: str) -> None:
        """Part of `Job`; in the middle of a stream the error is its last line."""
        self.cancel_timer()
        self.exchange.job = None
        if self.exchange.streaming:
            self.exchange.send_chunk(error_body(message) + b"\n")
            self.exchange.end_stream()
        else:
            self.server.send_error(self.exchange, status, message)

    def cancel_timer(self) -> None:
        """Make sure that nothing more happens by itself."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _planned_latency_s(self) -> float:
        knobs = self.server.knobs
        seconds = knobs.latency_s
        if knobs.latency == "lognormal":
            key: int | bytes = self.index if knobs.latency_key == "index" else self.call.digest
            seconds = lognormal_latency(knobs.seed, key, knobs.mean_s, knobs.sigma)
        for fault in self.slower:
            params = fault.params
            seconds = params.get("set_s", seconds) * params.get("factor", 1.0) + params.get("add_s", 0.0)
        return seconds


class Generation(TimedJob):
    """A request to /api/chat, /api/generate or /v1/chat/completions that has messages."""

    __slots__ = ("num_ctx", "pieces", "prompt_tokens", "reply", "uncached_share")

    def __init__(self, server: "FakeServer", exchange: Exchange, call: Call, spec: ModelSpec, index: int) -> None:
        super().__init__(server, exchange, call, spec, index)
        self.num_ctx = 0
        self.prompt_tokens = 0
        self.reply: Reply | None = None
        self.pieces: list[tuple[str, str]] = []
        self.uncached_share = 1.0

    def prepare(self) -> None:
        """Part of `TimedJob`: the format must be usable and the prompt must fit."""
        call = self.call
        call.check_format()
        if self.server.knobs.refuses_arrays and call.schema is not None and array_properties(call.schema):
            raise ApiError(400, "Failed to initialize samplers: failed to parse grammar")
        if call.logprobs and self.server.knobs.logprobs == "refuse":
            raise ApiError(400, _NO_LOGPROBS)
        self.num_ctx = self.runner.num_ctx if self.runner is not None else 0
        self.prompt_tokens = self._tokens(call.chars)
        if self.prompt_tokens >= self.num_ctx:
            self._fit_prompt()
        if self.runner is not None and self.server.knobs.prefix_cache:
            self.uncached_share = max(_LEAST_UNCACHED, self.runner.see_prompt(call.messages))
        if self.server.knobs.prompt_eval_count is not None:
            self.prompt_tokens = self.server.knobs.prompt_eval_count

    def begin_waiting(self) -> None:
        """Part of `TimedJob`: a stream spreads its pieces over the latency."""
        if not self.call.stream:
            super().begin_waiting()
            return
        self.reply = self._build_reply()
        self.pieces = stream_pieces(self.reply, self.server.knobs.stream_chunks)
        pause_s = self.latency_s / (len(self.pieces) + 1)
        self.timer = self.server.loop.call_later(pause_s, self._send_next_piece, pause_s)

    def answer(self) -> None:
        """Part of `TimedJob`."""
        reply = self.reply or self._build_reply()
        now_ns = time.monotonic_ns()
        running_ns = now_ns - self.slot_ns
        reply.total_ns = now_ns - self.start_ns
        reply.load_ns = self.loaded_ns - self.start_ns
        reply.prompt_eval_ns = int(running_ns * self.server.knobs.prompt_eval_share * self.uncached_share)
        reply.eval_ns = running_ns - reply.prompt_eval_ns
        call = self.call
        if call.stream:
            if self.reply is None:
                self.reply = reply
                self.pieces = stream_pieces(reply, self.server.knobs.stream_chunks)
            self._end_stream(reply)
            return
        if self.fault is not None:
            if self.fault.kind == "stream_error_line":
                status, message = STATUS_KINDS["runner_eof_500"]
                self.server.send_error(self.exchange, status, message or "")
                return
            if self.fault.kind in WIRE_KINDS or self.fault.kind == "stream_truncate":
                self.exchange.wire_fault = self.fault
        body = render(call, reply, self.server.clock.created_at(reply.created_shift_s))
        if reply.rewrite is not None:
            body = reply.rewrite(body)
        self.exchange.send(200, body, V1_JSON_TYPE if call.api == "openai" else JSON_TYPE)

    def _build_reply(self) -> Reply:
        call = self.call
        thinks = "thinking" in self.spec.capabilities and call.think is not False
        thinking = _THINKING if thinks else ""
        layout = call.digest[16] if call.schema is not None else 0
        fields = answer_from_schema(call.schema, call.digest, self.server.knobs.array_noise)
        is_array = call.schema is not None and bool(array_properties(call.schema))
        reply = Reply(fields, thinking, self.prompt_tokens, layout, is_array=is_array)
        num_predict = num_predict_of(call.options)
        room = self.num_ctx - self.prompt_tokens if call.shift is False else None
        reply.limit(num_predict, room)
        fault = self.fault
        if fault is not None:
            kind = _PLAIN_KINDS.get(fault.kind, fault.kind) if not call.stream else fault.kind
            apply_reply_fault(kind, reply, fault.params, self.num_ctx)
            if kind == "length" and num_predict > 0:
                reply.reply_tokens = num_predict
        probabilities = self.server.knobs.logprobs
        if call.logprobs and isinstance(probabilities, Mapping):
            reply.logprobs = logprobs_of(reply.content, call.schema, probabilities, call.top_logprobs)
        return reply

    def _fit_prompt(self) -> None:
        """Do what the server does to a prompt that is longer than the window; raises `ApiError`."""
        call, num_ctx = self.call, self.num_ctx
        obeys = not self.server.knobs.ignore_truncate
        truncates = call.truncate is not False or not obeys
        if self.server.knobs.era == "old":
            if not truncates:
                raise ApiError(400, _TOO_LONG_OLD)
            self._keep_tail(num_ctx)
            return
        if truncates:
            self._drop_oldest_messages()
            if self.prompt_tokens < num_ctx:
                return
        if not truncates or self._template_path() == "native":
            raise ApiError(400, overflow_message(self.prompt_tokens, num_ctx))
        if call.shift is False and obeys:
            raise ApiError(400, _TOO_LONG_RENDERED)
        keep = int(call.options.get("num_keep") or 4)
        self._keep_tail(num_ctx - max((num_ctx - keep) // 2, 1))

    def _tokens(self, chars: int) -> int:
        return math.ceil(chars / self.server.knobs.chars_per_token)

    def _template_path(self) -> str:
        return self.server.knobs.template_path or self.spec.template_path

    def _drop_oldest_messages(self) -> None:
        messages = self.call.messages
        for first in range(len(messages)):
            kept = [message for message in messages[:first] if message["role"] == "system"] + messages[first:]
            tokens = self._tokens(sum(len(message["content"]) for message in kept))
            if tokens < self.num_ctx or first == len(messages) - 1:
                self.call.messages = kept
                self.call.select_text(self.server.knobs.user_message)
                self.prompt_tokens = tokens
                break
        self.exchange.user_sha = self.call.digest.hex()

    def _keep_tail(self, kept_tokens: int) -> None:
        """Label by what is left: the end of the text."""
        self.prompt_tokens = kept_tokens
        self.call.text = self.call.text[-int(kept_tokens * self.server.knobs.chars_per_token) :]
        self.call.digest = text_digest(self.call.text)
        self.exchange.user_sha = self.call.digest.hex()

    def _send_next_piece(self, pause_s: float) -> None:
        self._send_piece()
        next_step = self._send_next_piece if self.pieces else None
        if self._is_broken_off():
            self.complete()
        elif next_step is not None:
            self.timer = self.server.loop.call_later(pause_s, next_step, pause_s)
        else:
            self.timer = self.server.loop.call_later(pause_s, self.complete)

    def _send_piece(self) -> None:
        exchange = self.exchange
        if not exchange.streaming:
            exchange.start_stream(SSE_TYPE if self.call.api == "openai" else NDJSON_TYPE)
        thinking, content = self.pieces.pop(0)
        shift_s = self.reply.created_shift_s if self.reply is not None else 0.0
        exchange.send_chunk(render_piece(self.call, thinking, content, self.server.clock.created_at(shift_s)))

    def _is_broken_off(self) -> bool:
        """Return whether a fault ends the stream here, in its middle."""
        return self.fault is not None and self.fault.kind in ("stream_error_line", "reset_after")

    def _end_stream(self, reply: Reply) -> None:
        exchange = self.exchange
        kind = self.fault.kind if self.fault is not None else ""
        while self.pieces:
            self._send_piece()
            if self._is_broken_off():
                break
        if kind == "reset_after":
            exchange.timer = self.server.loop.call_later(0.02, exchange.reset)
            return
        if kind == "stream_error_line":
            exchange.send_chunk(error_body(STATUS_KINDS["runner_eof_500"][1] or "") + b"\n")
            exchange.end_stream()
            return
        line = render_stream_end(self.call, reply, self.server.clock.created_at(reply.created_shift_s))
        if kind in _CUTTING_KINDS:
            exchange.write_raw(b"%x\r\n" % len(line) + line[: len(line) // 2])
            exchange.close()
            return
        if reply.done is not False and kind not in STREAM_KINDS:
            exchange.send_chunk(line)
        exchange.end_stream()


class LoadRequest(TimedJob):
    """A request without messages: it only loads the model."""

    __slots__ = ()

    def complete(self) -> None:
        """Part of `TimedJob`."""
        call = self.call
        body: dict[str, object] = {"model": call.model, "created_at": self.server.clock.created_at()}
        if call.api == "generate":
            body["response"] = ""
        else:
            body["message"] = {"role": "assistant", "content": ""}
        body |= {"done": True, "done_reason": "load"}
        self.exchange.send(200, orjson.dumps(body), JSON_TYPE)
        self.server.scheduler.release(self)
        self.server.changed()

    def _planned_latency_s(self) -> float:
        return 0.0


class Embedding(TimedJob):
    """A request to /api/embed."""

    __slots__ = ("prompt_tokens", "texts")

    def __init__(self, server: "FakeServer", exchange: Exchange, call: Call, spec: ModelSpec, index: int) -> None:
        super().__init__(server, exchange, call, spec, index)
        self.texts: list[str] = []
        self.prompt_tokens = 0

    def prepare(self) -> None:
        """Part of `TimedJob`: every text must fit, or be allowed to be cut."""
        check_options(self.call.options)
        if self.texts and "embedding" not in self.spec.capabilities and self.server.knobs.era == "new":
            raise ApiError(501, _NO_EMBEDDINGS)  # llama-server's answer, once the model is loaded
        limit = self.runner.num_ctx if self.runner is not None else 0
        for place, text in enumerate(self.texts):
            tokens = estimate_tokens(len(text))
            if tokens > limit:
                if self.call.truncate is False and not self.server.knobs.ignore_truncate:
                    raise ApiError(400, _TOO_LONG_OLD)
                self.texts[place] = text[: limit * 4]
                tokens = limit
            self.prompt_tokens += tokens

    def answer(self) -> None:
        """Part of `TimedJob`."""
        body: dict[str, object] = {"model": self.call.model, "embeddings": []}
        if self.texts:
            body["embeddings"] = self._vectors()
            body["total_duration"] = time.monotonic_ns() - self.start_ns
            body["load_duration"] = self.loaded_ns - self.start_ns
            body["prompt_eval_count"] = self.prompt_tokens
        if self.fault is not None and self.fault.kind in WIRE_KINDS:
            self.exchange.wire_fault = self.fault
        self.exchange.send(200, orjson.dumps({name: value for name, value in body.items() if value != 0}), JSON_TYPE)

    def _vectors(self) -> list[list[float]]:
        size = self.spec.embedding_length
        wanted = self.call.dimensions
        if 0 < wanted < size:
            size = wanted
        vectors = [fake_embedding(text, size) for text in self.texts]
        if self.fault is not None and self.fault.kind == "embed_short":
            vectors.pop()
        if self.fault is not None and self.fault.kind == "embed_dims":
            vectors[-1] = vectors[-1][:-1]
        return vectors
