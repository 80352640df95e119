"""A fake Ollama: a real HTTP server in its own process, for tests and benchmarks.

    with FakeOllama(slots=2, latency_s=0.05) as fake:
        fake.configure(faults=[{"kind": "busy_503", "when": {"indexes": [0, 1]}}])
        ...                                   # let the code under test talk to fake.url
        assert fake.stats()["chat_requests"] == 3

From a shell: ``python tests/fakes/fake_ollama.py --port 11434 --slots 2 --knobs '{"latency_s": 0.5}'``; it prints
one line, ``{"port": 11434, "pid": 4711}``, when it listens.

Routes: GET and HEAD ``/ /api/version /api/tags``, GET ``/api/ps /v1/models /v1/models/NAME``, POST
``/api/show /api/chat /api/generate /api/embed /v1/chat/completions``. Every generation answer has the
header ``X-Fake-User-Sha256``: the digest of the user message that the server saw and labelled by.

Labels: `expected_labels` applied to one user message (knob ``user_message``) and to the ``enum`` lists of
the schema in the request; without a schema, to the built-in ``INTENTS``, ``TOPICS``, ``SENTIMENTS``. Under a schema
the JSON has white space and blank lines between its tokens, as a grammar allows: how many depends on the same text.

Knobs (constructor and `FakeOllama.configure`)

    slots 4                  generations at once per model; embedding models have one
    era "new"                "new" (>= 0.30) or "old" (<= 0.24): version and overflow behaviour
    version None             text for /api/version, else by era
    models None              names or {"name", "capabilities", "context_length", "template_path", ...}; None
                             means the four defaults: llama3.2:latest, qwen3:8b (thinks),
                             nomic-embed-text:latest, gpt-oss:120b-cloud (remote; calls to it get 401 and
                             count in stats()["cloud_requests"])
    template_path None       "native" or "rendered" for all models: which overflow path they take
    latency_s 0.0            seconds each answer takes in its slot; 0 answers at once
    latency None             "lognormal": seconds = lognormal_latency(seed, key, mean_s, sigma)
    mean_s 1.0, sigma 0.5, seed 0
    latency_key "index"      key = sequence number of the request; "text": key = selected user message
    prompt_eval_share 0.3    part of the time in the slot that is reported as prompt_eval_duration, if no message at
                             the beginning is that of the model's prompt before; else less, down to a twentieth
    prefix_cache True        False: each prompt is read as a whole, as by models with sliding-window attention
    stream_chunks 8          content lines per stream, spread over the latency
    load_delay_s 0.0         seconds a load takes; a client that leaves aborts the load it triggered
    load_error None          text of the 500 that every load ends in
    max_queue 512            requests that may wait for a load; more get the 503. A loaded model queues
                             without bound
    max_loaded_models 3
    keep_alive_s 300.0       until an idle model is unloaded, when requests do not say
    default_num_ctx 4096
    prompt_eval_count None   number to report; None = characters of all messages / chars_per_token (4), rounded up
    most_ctx None            window that loads get at most, vram_share 1.0 of them in video memory
    ignore_truncate False    True: prompts and inputs of /api/embed are cut although the request forbids it
    user_message "longest"   which user message counts: "longest", "last", or its place among the user
                             messages from 0 (with N few-shot examples in the prompt, N is exact even for
                             short conversations and in repair turns)
    logprobs None            None: requests for log probabilities are answered without; "refuse": they get a 400;
                             {"Negative": 0.4, "*": 0.95}: the answer has some, each label with the given
                             probability among the allowed ones ("*": those not named; streams have none)
    array_noise 0.0          share of the answers that are arrays, by their text, whose first label is another one
    refuses_arrays False     True: the schema of an array gets the 400 of a grammar that does not compile
    check_host True          foreign Host headers get the empty 403
    record True              keep a record per request, at most record_limit (10000); False for benchmarks
    faults []                see below

Faults: ``{"kind": ..., "when": {...}, "times": n, ...parameters}``. The first fault in the list that
strikes a request is used; "latency" faults add up beside it. All conditions of ``when`` must hold; without
one the fault always strikes:

    indexes [..]             sequence numbers, from 0, of generation requests (all three routes count
                             together); /api/embed counts for itself
    from n, to m             the same as a range, both ends included
    probability p, seed s    reproducible: probability_hit(s, index, p), or, with by "text",
                             probability_hit(s, text, p)
    text "abc"               substring of any user message (of any input of /api/embed)
    path "/api/embed"        that route only; without it the generation routes (embed_short and embed_dims:
                             /api/embed)

The faults of the first table strike on arrival and hold no slot; ``"stage": "answer"`` makes them strike
after the latency, in the slot, and ``delay_s`` waits before they act. A connection refused is
`FakeOllama.stop`; a server that accepts and never answers is `FakeOllama.pause`.

    kind                 what happens                                          parameters
    close                connection closed without a reply
    reset                TCP RST instead of a reply
    hang                 no reply until the client leaves, slot held           hold_slot (True)
    garbage              a line that is not HTTP, then close
    status               status with Ollama's usual body, or any other         status, body, headers,
                                                                               content_type
    busy_503             503 server busy
    runner_stopped_500   500 model runner has unexpectedly stopped
    runner_eof_500       500 unexpected EOF in the middle of the answer
    load_failed_500      500 llama-server process has terminated
    token_repeat_500     500 token repeat limit reached
    model_not_found_404  404 model 'x' not found
    overflow_400         400 with llama-server's JSON inside the string        n_prompt_tokens (2 * num_ctx)
    canceled_499         499 request canceled
    embed_nan_400        400 embedding contains NaN or Inf values
    html_200, html_502   an HTML page of a proxy
    runner_crash         always in the slot: this request and all others of
                         the model get the 500 of a stopped runner, and the
                         model is unloaded

    On the wire (reset_after, truncated_body and half_json also cut streams; slow_* leave streams alone)
    reset_after          RST after n bytes of the answer                       bytes (20)
    slow_headers         the header trickles                                   bytes_per_s (10)
    slow_body            the body trickles                                     bytes_per_s (1)
    truncated_body       connection closed before Content-Length is reached    bytes (half)
    half_json            Content-Length is right, the JSON ends in the middle

    Streams (on a request with stream: false: truncated_body, done_false, runner_eof_500)
    stream_truncate      last line cut in its middle, then close
    stream_no_final      ends without the object with done: true
    stream_error_line    an error line in the middle

    In the answer; each changes a reply that would have been right
    done_false           done: false, no reason, no counters, content cut      cut (True)
    missing_done         no done key
    empty_content        content ""
    thinking_only        content "", only thinking                             done_reason ("stop")
    length               done_reason length, JSON cut                          cut (True)
    done_reason_load     done_reason load, empty content
    invalid_json         unquoted keys and values
    prose                a sentence before and after the JSON
    code_fence           the JSON in a code fence
    wrong_label          a label outside the enum                              field ("intent"), value
    missing_field        one field less                                        field ("topic")
    extra_field          one field more                                        field ("confidence"), value
    duplicate_keys       a field twice, first another value                    field ("intent"),
                                                                               first ("Other")
    nan                  NaN for a label                                       field ("intent")
    number_label         7 for a label                                         field ("intent")
    huge                 10 MB categorization                                  bytes (10000000), field
    deep_json            nested arrays for a field, or for the whole body      depth (1000), field, where
    lone_surrogate       \\ud83d at the end of the categorization               where
    nul                  \\u0000 there                                          where
    control_chars        bell, colour escape, newline, bidi override there,    where
                         as JSON escapes
    raw_control_chars    bell, newline, escape unescaped: invalid JSON
    bom                  U+FEFF before the content, or before the body         where
    padded_json          much white space between the tokens                   repeat (500)
    unconstrained        a sentence although a format was sent
    half_window          prompt_eval_count = num_ctx / 2 + 2
    no_counters          no metrics at all
    message_null         message: null
    clock_jump           created_at is off                                     seconds (-3600)
    unload               right answer, then the model is unloaded
    embed_short          one vector too few
    embed_dims           last vector one number too short

    latency              changes the time in the slot: set_s, then factor, then add_s

    ``where``: "content" (default) is inside the JSON that is the content, "outer" in the body of the reply.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a script, or imported as plain fake_ollama
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fakes.fake_ollama_server.labels import (
    INTENTS,
    SENTIMENTS,
    TOPICS,
    expected_labels,
    fake_embedding,
    lognormal_latency,
    probability_hit,
    text_sha256,
)
from tests.server_process import ServerProcess

__all__ = [
    "INTENTS",
    "SENTIMENTS",
    "TOPICS",
    "FakeOllama",
    "FakeOllamaError",
    "expected_labels",
    "fake_embedding",
    "lognormal_latency",
    "probability_hit",
    "text_sha256",
]


class FakeOllamaError(Exception):
    """The fake did not start, refused an admin request, or a waited-for state did not come."""


class FakeOllama(ServerProcess):
    """One fake server process, steered from tests that need no event loop for it.

    The process dies with the one that started it, however that ends.
    """

    error = FakeOllamaError

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, **knobs: Any) -> None:
        """Prepare; `start` or ``with`` starts it.

        Args:
            port: 0 lets the kernel choose; `restart` keeps the port.
            knobs: See the module docstring. An unknown one fails in `start`.
        """
        super().__init__(str(Path(__file__).resolve()), host, port, knobs)
        self._first_knobs, self._first_pid = dict(knobs), 0

    @property
    def url(self) -> str:
        """Base address, without a slash at its end."""
        return f"http://{self.host}:{self.port}"

    def stats(self) -> dict[str, Any]:
        """Totals since the start or `reset`.

        Counters ``chat_requests embed_requests embed_inputs cloud_requests answered failed
        client_disconnects loads reloads load_aborts unloads rejected bytes_in``; gauges ``in_flight running
        queued pending loading loaded_models connections``; maxima ``max_in_flight max_running max_queued``;
        ``simulated_s_sum`` and ``simulated_s_max`` (planned seconds of completed answers), ``busy_slot_s``
        (measured), ``cpu_s`` of the process, ``statuses``, ``faults_served`` by kind, ``calls_by_sha``
        (SHA-256 of the selected user message -> number of calls), ``internal_errors`` (bugs of the fake:
        must be 0).
        """
        return self._call("stats")  # type: ignore[no-any-return]

    def requests(self) -> list[dict[str, Any]]:
        """The records of the inference requests, oldest first; empty with ``record=False``.

        ``index path request_id start_s end_s outcome fault model user_sha256 last_sha256 longest_sha256
        message_count options format_sent stream think truncate shift keep_alive_s``; times are
        `time.monotonic` seconds, comparable with those of other processes of the machine. ``outcome`` is
        "open", the status, "dropped" (closed or reset by a fault) or "client_disconnected".
        """
        return self._call("requests")  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Back to the knobs given to the constructor, counters and records empty, no model loaded."""
        self._call("reset")

    def renew(self) -> None:
        """`reset`, when the requests of an earlier test have ended; starts a new process if the first one is not there."""
        if self._process is None or self._paused or self.pid != self._first_pid:
            self.stop()
            self._knobs = dict(self._first_knobs)
            self.start()
            self._first_pid = self.pid
            return
        self.configure(faults=[], latency_s=0)
        self.wait_for("in_flight", equals=0)
        self.reset()
        self._knobs = dict(self._first_knobs)


def main(argv: list[str] | None = None) -> int:
    """Run the server in this process until SIGTERM."""
    parser = argparse.ArgumentParser(description="A fake Ollama; see the docstring of this file for the knobs.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 lets the kernel choose")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--era", choices=("new", "old"))
    parser.add_argument("--latency-s", type=float)
    parser.add_argument("--load-delay-s", type=float)
    parser.add_argument("--knobs", type=json.loads, default={}, help="JSON object with any other knob")
    parser.add_argument("--watch-stdin", action="store_true", help="exit when standard input ends")
    args = parser.parse_args(argv)

    # Only the server process needs the server's libraries.
    from tests.fakes.fake_ollama_server.knobs import Knobs
    from tests.fakes.fake_ollama_server.process import serve

    flags = {
        "slots": args.slots,
        "era": args.era,
        "latency_s": args.latency_s,
        "load_delay_s": args.load_delay_s,
    }
    changes = args.knobs | {name: value for name, value in flags.items() if value is not None}
    try:
        knobs = Knobs().updated(changes)
    except ValueError as exc:
        parser.error(str(exc))
    serve(args.host, args.port, knobs, watch_stdin=args.watch_stdin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
