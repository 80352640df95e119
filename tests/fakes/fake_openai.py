"""A fake OpenAI API: a real HTTP server in its own process, for tests and demonstrations.

    with FakeOpenAI(run_s=3600, faults=[{"kind": "answer_lost", "when": {"route": "batches.create"}}]) as fake:
        client = openai.OpenAI(base_url=fake.url, api_key="sk-any")
        ...                                   # upload a file, create a batch
        fake.advance(4000)                    # virtual seconds: the batch is completed now
        assert fake.stats()["batches_created"] == 1

From a shell: ``python tests/fakes/fake_openai.py --port 8600 --knobs '{"polls_until_done": 3}'``; it prints
``{"port": 8600, "pid": 4711}`` when it listens. ``OPENAI_BASE_URL=http://127.0.0.1:8600/v1``, any key.

Routes, with the names that faults and statistics use:

    files.create     POST   /v1/files                 batches.create    POST /v1/batches
    files.list       GET    /v1/files                 batches.list      GET  /v1/batches
    files.retrieve   GET    /v1/files/ID              batches.retrieve  GET  /v1/batches/ID
    files.content    GET    /v1/files/ID/content      batches.cancel    POST /v1/batches/ID/cancel
    files.delete     DELETE /v1/files/ID              embeddings.create POST /v1/embeddings
    models.list      GET    /v1/models                chat.create       POST /v1/chat/completions
    models.retrieve  GET    /v1/models/NAME

State (files, batches, virtual time, counts) lies on disk: `FakeOpenAI.restart`, also after `FakeOpenAI.kill`, loses
nothing that was answered. Files stream: the fake stays small with 50,000 lines.

Answers are pure functions of the request body: `expected_content` and `expected_embedding` compute them in the test.

Virtual time. A batch is ``validating`` for validate_s, ``in_progress`` for run_s, ``finalizing`` for finalize_s of
virtual seconds, then ``completed``; at 24 h without end it is ``expired``, with the share of lines that fits. A
cancelled one is ``cancelling`` for cancel_s. Time stands still but for `FakeOpenAI.advance`, ``time_scale``, and
``polls_until_done``. Files expire in virtual time too (30 days, or as ``expires_after`` says). A file check or the
writing of results that takes longer than 2 real seconds goes on behind the answer: the status stays until it is done.

The input file is checked like there; the batch then turns ``failed`` with ``errors.data``: invalid_json_line,
missing_required_parameter, duplicate_custom_id, invalid_method, url_mismatch, model_mismatch, model_not_found,
empty_file, too_many_tasks, invalid_request (size, purpose), token_limit_exceeded. OpenAI publishes no list of codes:
treat them as an open set.

Knobs (constructor and `FakeOpenAI.configure`)

    api_keys None            keys that are let in; None lets every key in, but not a request without one
    models None              names that exist; None lets every name pass
    validate_s 5, run_s 600, finalize_s 10, cancel_s 60
                             virtual seconds; a batch keeps those of its creation
    time_scale 0.0           virtual seconds per real second
    polls_until_done 0       each GET of a batch moves it on by one n-th of its life (of cancel_s once it is being
                             cancelled): the n-th shows the end. 0: polls move nothing
    list_lag 0               a new file or batch is left out of the first n lists
    enqueued_token_limit None
                             prompt tokens (bytes / 4) of all batches that have not ended; over it a new one fails
                             with token_limit_exceeded
    max_lines 50000, max_file_bytes 200000000, max_embedding_inputs 50000 (per batch), max_upload_bytes 512000000
    context_length 128000    tokens of a chat request, else 400 context_length_exceeded
    reasoning False          chat requests with max_tokens or a temperature are refused, one field at a time
    reply None               content of chat answers: a text in which {text} and {digest} are replaced, or
                             "@module:function", called with the request body
    shuffle True, seed 0     order of the lines in output and error file
    latency_s 0.0            seconds that an embeddings or chat request takes in its slot
    slots 256                such requests at once; others wait
    dimensions None          native length of all embeddings, instead of 1536 and 3072
    max_inputs 2048, max_input_tokens 8192, max_request_tokens 300000
                             limits of an embeddings request
    record True              keep a record per request, at most record_limit (10000)
    faults []                see below

Faults: ``{"kind": ..., "when": {...}, "times": n, ...parameters}``. There are three families. All conditions of
``when`` must hold; without one the fault always strikes. ``times`` counts over restarts.

1. Request faults; the first that strikes is used, ``delay`` adds up beside it.

    when: route "batches.create"   name, pattern ("files.*") or list; without it every route
          indexes [..], from n, to m   number of the request to its route, from 0, over restarts
          probability p, seed s    reproducible, by that number
          text "abc"               in the body (not of uploads; first 64 KiB, embeddings: all) or in the path

    On arrival: nothing was done.
    rate_limit_429           code rate_limit_exceeded                    retry_after, retry_after_ms (none), message
    insufficient_quota_429   stop, do not retry
    server_error_500, overloaded_503, bad_gateway_502 (an HTML page), unauthorized_401, forbidden_403,
    not_found_404 (a file that is not visible yet), conflict_409, bad_request_400 (with when.text: one poisonous
    input that fails its whole call)                                     retry_after, message, code, headers
    status                   any other                                   status, body, headers, message, code
    close, reset, hang, garbage    no answer: FIN, RST, silence until the client leaves, a line that is no HTTP
    delay                    waits first                                 delay_s (1)

    On the answer: all was done.
    answer_lost              the batch or file exists, nobody is told    how "close" (default), "reset", "hang",
                                                                         "408" (of a gateway)
    truncated                right Content-Length, closed before         bytes (half)
    reset_after              RST after n bytes                           bytes (half)
    cut                      shorter, with a length that fits            bytes (half)
    slow                     trickles                                    bytes_per_s (1000)
    not_json                 an HTML page with the right status

    Of embeddings only; ``item`` says whose vector, from 0, -1 (default) for the last
    embed_short, embed_extra     a vector too few, too many
    embed_dims, embed_nan, embed_zero    one vector: a number short, NaN in it, all zeros
    embed_unordered          reverse order, each with its right index
    embed_same_index         all say index 0

2. Batch faults; drawn once, when the batch is created; all that strike act together.

    when: indexes, batches [..], from, to, probability   number of the batch, from 0
          metadata {"shard": "1"}                        pairs that the batch was created with

    fail                     failed                                      errors [{"code", "line", "message"}]
    token_limit_exceeded     failed, as if the limit were exceeded
    expire                   expired at 24 h; others: code batch_expired done (0.5): share of the lines that ran
    cancel                   somebody else cancels it                    at_s (middle of run_s), done
    status_value             shows a status that nobody knows            value ("paused"), instead_of
                                                                         ("in_progress"), polls (for ever)
    hold                     stays long                                  status ("finalizing"), polls (for ever)
    late_output              completed, both file ids null at first      polls (for ever)
    no_output_file, no_error_file    id null although there were lines
    empty_id                 "" instead of null for file ids
    empty_error_file         an error file of zero bytes on success
    counts                   request_counts is                           value (null)
    vanish                   404, and not listed                         after_polls (1)
    output_gone              content of the output file: 404
    timing                   its own                                     validate_s, run_s, finalize_s, cancel_s
    bom, blank_lines, half_last_line (bytes 40), junk_line (text), unknown_ids (count 1)    in the output file

3. Line faults; drawn when a batch ends and its files are written; the first that strikes is used.

    when: indexes, from, to  number of the line, from 1        batches [..], metadata    as above
          custom_ids [..]    exactly these                     text   anywhere in the line
          probability p, seed s    by custom_id

    line_status              not 2xx, not billed, in the error file      status (500), code, message, body, file
                                                                         ("errors"; "output")
    line_error               response null and an error, not billed      code ("request_timeout"), message, file
    missing                  ran and billed, in neither file
    duplicate                twice                                       content (the second says this), file
    null_custom_id, null_body, null_both (response and error), junk (text), no_choices, no_usage
    content                  another content                             content (""), finish_reason
    refusal                  content null, refusal says why              text
    length                   finish_reason length, content cut
    content_filter           finish_reason content_filter, content null
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # started as a script, or imported as plain fake_openai
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fakes.fake_openai_server.answers import estimate_tokens, expected_content, expected_embedding
from tests.server_process import ServerProcess

__all__ = ["FakeOpenAI", "FakeOpenAIError", "estimate_tokens", "expected_content", "expected_embedding"]

_ADVANCE_TIMEOUT_S = 600.0


class FakeOpenAIError(Exception):
    """The fake did not start, refused a control request, or a waited-for state did not come."""


class FakeOpenAI(ServerProcess):
    """One fake server process, steered from tests that need no event loop for it.

    The process dies with the one that started it, however that ends.
    """

    error = FakeOpenAIError

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, directory: Path | None = None, **knobs: Any) -> None:
        """Prepare; `start` or ``with`` starts it.

        Args:
            port: 0 lets the kernel choose; `restart` keeps the port.
            directory: Where its state lies and stays; None means a temporary one, removed by `stop`.
            knobs: See the module docstring. An unknown one fails in `start`.
        """
        super().__init__(str(Path(__file__).resolve()), host, port, knobs)
        self._given_directory = directory
        self._directory: Path | None = directory
        self._started_knobs = dict(knobs)

    @property
    def url(self) -> str:
        """Base address of the API, as for ``OPENAI_BASE_URL``: ends in ``/v1``."""
        return f"http://{self.host}:{self.port}/v1"

    def start(self) -> None:
        """Start the process and wait until it listens.

        Raises:
            FakeOpenAIError: It ended or said nothing; its reason is on standard error.
        """
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="fake_openai_"))
        try:
            super().start()
        except FakeOpenAIError:
            if self._process is None:
                self._remove_directory()
            raise
        self._started_knobs = dict(self._knobs)

    def stop(self) -> None:
        """SIGTERM, wait for the end, remove a temporary directory."""
        super().stop()
        self._remove_directory()

    def advance(self, seconds: float) -> float:
        """Let virtual time pass; returns the new unix time when all batches due by then have their files."""
        return float(self._call("advance", {"seconds": seconds}, _ADVANCE_TIMEOUT_S)["now"])

    def stats(self) -> dict[str, Any]:
        """Totals since the first start; they outlive `restart`, but for the gauges and maxima.

        Counters ``requests``, ``requests:ROUTE``, ``status:CODE``, ``faults:KIND`` (strikes), ``batches_created``,
        ``files_uploaded``, ``files_deleted``, ``bytes_uploaded``, ``answers_lost`` (counted before it hangs, too);
        ``batches:STATUS`` (how many are in it); ``lines_submitted`` (in files that passed the check),
        ``lines_billed``, ``max_billed_per_line`` (per custom_id), ``bodies_billed``, ``max_billed_per_body`` (per
        request body), ``embed_inputs_submitted``, ``embed_inputs_billed``, ``max_billed_per_embedding`` (per text);
        gauges ``in_flight sync_in_flight``; maxima ``max_in_flight max_sync_in_flight`` (embeddings and chat requests
        in a slot); ``now`` (virtual unix seconds), ``pid``, ``cpu_s``, ``internal_errors`` (bugs: must be 0).
        """
        return self._call("stats")  # type: ignore[no-any-return]

    def requests(self) -> list[dict[str, Any]]:
        """The records of the requests since the last start, oldest first; empty with ``record=False``.

        ``route index method path start_s end_s outcome fault user_agent retry_count``; times are `time.monotonic`
        seconds. ``outcome`` is "open", the status, "dropped", "answer_lost" or "client_left".
        """
        return self._call("requests")  # type: ignore[no-any-return]

    def lines(self) -> dict[str, dict[str, int]]:
        """``{custom_id: {"submitted": n, "billed": n}}``: how often each was in a valid file, and ran with success."""
        return self._call("meters", {"kind": "line"})  # type: ignore[no-any-return]

    def billed_bodies(self) -> dict[str, int]:
        """``{sha256: n}`` over the body of each line that ran: JSON with sorted keys and no spaces."""
        return {key: counts["billed"] for key, counts in self._call("meters", {"kind": "body"}).items()}

    def embedded(self) -> dict[str, dict[str, int]]:
        """``{sha256 of the text: {"submitted": n, "billed": n}}`` of the embeddings inputs within the limits."""
        return self._call("meters", {"kind": "embedding"})  # type: ignore[no-any-return]

    def batches(self) -> list[dict[str, Any]]:
        """``id number metadata input_file_id polls result status verdict``, oldest first; looking is no poll."""
        return self._call("batches", timeout_s=_ADVANCE_TIMEOUT_S)  # type: ignore[no-any-return]

    def files(self) -> list[dict[str, Any]]:
        """Rows of all files, oldest first, deleted ones too (``deleted: true``)."""
        return self._call("files")  # type: ignore[no-any-return]

    def path_of(self, file_id: str) -> Path:
        """Return the path of the bytes of a file on this machine."""
        assert self._directory is not None
        return self._directory / "files" / file_id

    def renew(self) -> None:
        """`reset`, when the requests of an earlier test have ended: they would be billed in this one."""
        self.configure(faults=[], latency_s=0)
        self.wait_for("in_flight", equals=0)
        self.reset()

    def reset(self) -> None:
        """No files, no batches, all counts at zero, the knobs of the last start."""
        self._call("reset")
        self._knobs = dict(self._started_knobs)

    def _more_arguments(self) -> list[str]:
        return ["--directory", str(self._directory), *([] if self._given_directory else ["--temporary"])]

    def _remove_directory(self) -> None:
        if self._given_directory is None and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


if __name__ == "__main__":
    # Only the server process needs the server's libraries.
    from tests.fakes.fake_openai_server.process import main

    sys.exit(main())
