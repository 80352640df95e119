"""Embeds texts in as few calls as possible, in threads, and stores each answer before it counts.

After a crash, only texts that were sent and not yet stored are sent again. A refused text does not delay the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue

from database_docs.items import content_hash
from embedding_index.call_queue import Call, CallQueue, CallRepetition, RunOptions
from embedding_index.inputs import LongTexts, Piece, pack, split_text
from embedding_index.providers.contract import Answer, Provider, checked_vectors, weighted_mean
from embedding_index.vector_ledger import VectorLedger
from error_handler import (
    MixedIndexError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)

STORING_THREADS = 2  # read and store answers while the provider works on the next calls
PROBE = "Where is my order?"
LONGEST_COUNTED = 8  # characters per token that an input may have
WORST_ESTIMATE = 8  # token counts are assumed to be wrong by at most this factor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Embedded:
    """The outcome of one text: *problem* is None if its vector is stored, else a sentence that does not quote the text."""

    content_hash: str
    problem: str | None


@dataclass(slots=True)
class RunCounts:
    """The counts of a run so far: texts *embedded*, *reused* and *failed*, HTTP *calls*, *tokens* as billed."""

    calls: int = 0
    tokens: int = 0
    embedded: int = 0
    reused: int = 0
    failed: int = 0


class EmbeddingRun:
    """Embeds texts with one provider, one ``run`` at a time."""

    def __init__(
        self,
        provider: Provider,
        ledger: VectorLedger,
        options: RunOptions | None = None,
        stop: threading.Event | None = None,
        counts: RunCounts | None = None,
    ) -> None:
        """Once *stop* is set, no new call starts; calls in flight end and are stored. *counts* are added to."""
        self._provider = provider
        self._ledger = ledger
        self._options = options or RunOptions()
        self._stop = stop or threading.Event()
        self._lock = threading.Lock()
        self._counts = counts or RunCounts()

    @property
    def counts(self) -> RunCounts:
        """A copy of the counts as they are now."""
        with self._lock:
            return replace(self._counts)

    def run(self, texts: Mapping[str, str]) -> Generator[Embedded]:
        """Yield the outcome of each of *texts* (content hash: text), in the order in which they end.

        Before an error is raised, every paid vector is stored and its text yielded. After a stop, texts without a vector
        are not yielded. Leaving the iterator early stops the run in the same way.

        Raises:
            ProviderUnavailableError: No usable answer for *patience_s*.
            ProviderRejectedError, UnusableVectorsError: The first texts all failed; the others were not sent.
            ConfigurationError: See ``Provider.embed``.
            MixedIndexError: The vectors have another length than those stored.
            StateDirectoryError: The ledger cannot be read or written.
        """
        self._identity = self._provider.identity
        self._texts = texts
        self._results: SimpleQueue[list[Embedded] | None] = SimpleQueue()
        self._long = LongTexts()
        self._problems: dict[str, str] = {}
        self._asked: set[str] = set()
        self._dimensions = self._ledger.dimensions(self._identity)
        known = self._ledger.known(self._identity, texts)
        self._open = set(texts) - known
        self._counts.reused += len(known)
        pieces = self._planned([key for key in texts if key not in known])
        calls = pack([piece.tokens for piece in pieces], self._provider.limits, self._options.batch_size)
        slots = self._provider.max_concurrent
        self._queue = CallQueue((Call(tuple(pieces[place] for place in places)) for places in calls), slots, self._stop)
        self._repetition = CallRepetition(self._options, self._queue, self._fail, self._probe)
        with ThreadPoolExecutor(slots + STORING_THREADS, "embedding") as threads:
            workers = [threads.submit(self._work) for _ in range(slots + STORING_THREADS)]
            try:
                yield from (Embedded(key, None) for key in sorted(known))
                yield from self._ended(workers)
            finally:
                self._queue.abort()

    def _ended(self, workers: Sequence[Future[None]]) -> Iterator[Embedded]:
        """Yield the texts as they end, until all *workers* have ended; raise the error of a worker."""
        left = len(workers)
        while left:
            ended = self._results.get()
            if ended is None:
                left -= 1
            else:
                yield from ended
        for worker in workers:
            worker.result()

    # Building calls

    def _planned(self, hashes: Sequence[str]) -> list[Piece]:
        """Return the pieces to send for the texts *hashes*; texts that need no call end here."""
        planned: dict[str, Piece] = {}
        divided: dict[str, list[Piece]] = {}
        limit = self._provider.limits.input_tokens
        for key in hashes:
            text = self._texts[key]
            if not text.strip():
                self._fail(key, "its text is empty; give it a text, or leave it out")
                continue
            # Tokenizers refuse megabytes, or are slow. Splitting counts small parts.
            if len(text) <= LONGEST_COUNTED * limit and (tokens := self._provider.count_tokens(text)) <= limit:
                planned[key] = Piece(key, text, tokens)
                continue
            divided[key] = self._divided(text, limit)
            if divided[key][0].content_hash == key:  # one piece after all
                (planned[key],) = divided.pop(key)
        self._asked |= planned.keys()
        self._ledger.note_parts({key: [piece.content_hash for piece in pieces] for key, pieces in divided.items()})
        for key, pieces in divided.items():
            planned |= {piece.content_hash: piece for piece in self._awaited(key, pieces)}
        return list(planned.values())

    def _divided(self, text: str, limit_tokens: int) -> list[Piece]:
        """Return *text* in pieces of at most *limit_tokens*, without blank ones."""
        texts = split_text(text, limit_tokens, self._provider.count_tokens)
        return [Piece(content_hash(each), each, self._provider.count_tokens(each)) for each in texts if each.strip()]

    def _awaited(self, whole: str, pieces: Sequence[Piece]) -> list[Piece]:
        """Let *whole* wait for its *pieces*; return those that were not sent yet, each once."""
        hashes = {piece.content_hash for piece in pieces}
        with self._lock:
            # With the lock held, a piece that another thread stores is either known here or arrives afterwards.
            missing = hashes - self._ledger.known(self._identity, hashes)
            self._long.add(whole, pieces, missing)
            problem = next((self._problems[key] for key in missing if key in self._problems), None)
            fresh = missing - self._asked
            self._asked |= fresh
        if problem is not None:
            self._fail(whole, problem)
        elif not missing:
            self._store_mean(whole)
        return list({piece.content_hash: piece for piece in pieces if piece.content_hash in fresh}.values())

    # In the threads

    def _work(self) -> None:
        try:
            while (call := self._queue.take()) is not None:
                self._perform(call)
        finally:
            self._queue.abort()  # after an error in one thread, the others must end; else there is nothing left to do
            self._results.put(None)

    def _perform(self, call: Call) -> None:
        """Make one call and handle its outcome; *call* is settled afterwards."""
        with self._lock:
            self._counts.calls += 1
        started_s = time.monotonic()
        try:
            answer = self._provider.embed([piece.text for piece in call.pieces], lambda: self._queue.free_slot(call))
            self._queue.free_slot(call)
            self._repetition.heard(started_s)
            self._keep(call, answer)
        except ProviderBusyError as exc:
            self._repetition.after_busy(call, exc)
        except ProviderUnavailableError as exc:
            self._repetition.after_no_answer(call, exc)
        except ProviderRejectedError as exc:
            self._repetition.heard(started_s)
            if not self._divide_further(call):
                self._repetition.after_refusal(call, exc)
        except UnusableVectorsError as exc:
            self._repetition.heard(started_s)
            self._repetition.after_unusable_answer(call, exc)

    def _probe(self) -> None:
        """Ask the provider for the vector of a harmless text; if it answers, it is not away."""
        started_s = time.monotonic()
        with self._lock:
            self._counts.calls += 1
        with suppress(ProviderBusyError, ProviderUnavailableError, ProviderRejectedError, UnusableVectorsError):
            answer = self._provider.embed([PROBE], lambda: None)
            self._ledger.add(self._identity, {}, answer.tokens)
            self._repetition.heard(started_s)

    def _keep(self, call: Call, answer: Answer) -> None:
        """Store the good vectors of *answer*, end the texts that are complete, and send the others again."""
        with self._lock:
            self._counts.tokens += answer.tokens or 0
            dimensions = self._dimensions
        try:
            checked = checked_vectors(answer.vectors, len(call.pieces), dimensions)
        except (UnusableVectorsError, MixedIndexError):
            self._ledger.add(self._identity, {}, answer.tokens)  # it was billed
            raise
        good = {call.pieces[place].content_hash: vector for place, vector in checked.good.items()}
        self._ledger.add(self._identity, good, answer.tokens)
        with self._lock:
            self._dimensions = self._dimensions or checked.dimensions
        self._arrived(good)
        problems = {call.pieces[place]: problem for place, problem in checked.problems.items()}
        self._repetition.after_check(call, problems, has_good=bool(good))

    def _divide_further(self, call: Call) -> bool:
        """Send *call* in smaller pieces and return True if it is one piece that may be longer than its count says."""
        piece = call.pieces[0]
        if len(call.pieces) > 1 or piece.tokens <= self._provider.limits.input_tokens // WORST_ESTIMATE:
            return False
        pieces = self._divided(piece.text, -(-piece.tokens // 2))
        if piece in pieces:
            return False
        logger.warning("a text of about %d tokens was refused; it is sent in %d pieces", piece.tokens, len(pieces))
        self._ledger.note_parts({piece.content_hash: [each.content_hash for each in pieces]})
        missing = self._awaited(piece.content_hash, pieces)
        self._queue.settle(call, first=[Call((each,)) for each in missing])
        return True

    # Ending texts

    def _arrived(self, hashes: Iterable[str]) -> None:
        """Note that the vectors of these texts and pieces are in the ledger."""
        hashes = list(hashes)
        with self._lock:
            complete = [whole for key in hashes for whole in self._long.arrived(key)]
            self._end(Embedded(key, None) for key in hashes)
        for whole in complete:
            self._store_mean(whole)

    def _store_mean(self, whole: str) -> None:
        pieces = self._long.pieces(whole)
        vectors = self._ledger.vectors(self._identity, {piece.content_hash for piece in pieces})
        mean = weighted_mean([vectors[piece.content_hash] for piece in pieces], [piece.tokens for piece in pieces])
        if mean is None:
            self._fail(whole, "the vectors of its pieces cancel each other out; shorten its text")
            return
        self._ledger.add(self._identity, {whole: mean}, calls=0)
        self._arrived([whole])

    def _fail(self, key: str, problem: str) -> None:
        """Fail the text or piece *key*, and the long texts that contain it."""
        with self._lock:
            self._problems[key] = problem
            self._end([Embedded(key, problem)])
            wholes = self._long.failed(key)
        for whole in wholes:
            self._fail(whole, f"a piece of it failed: {problem}")

    def _end(self, endings: Iterable[Embedded]) -> None:
        """Put *endings* into the results, except pieces and texts that have ended before. The caller holds the lock."""
        ended = [ending for ending in endings if ending.content_hash in self._open]
        self._open.difference_update(ending.content_hash for ending in ended)
        failed = sum(ending.problem is not None for ending in ended)
        self._counts.failed += failed
        self._counts.embedded += len(ended) - failed
        if ended:
            self._results.put(ended)
