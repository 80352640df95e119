"""An embedding run against a real server process that refuses, lies, is busy, or is not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from database_docs.items import content_hash
from embedding_index.embedding_run import STORING_THREADS, Embedded, EmbeddingRun, RunCounts, RunOptions
from embedding_index.inputs import split_text
from embedding_index.providers.contract import Answer, ModelIdentity, RequestLimits, Vector
from embedding_index.vector_ledger import VectorLedger
from error_handler import (
    ConfigurationError,
    MixedIndexError,
    ProviderBusyError,
    ProviderRejectedError,
    ProviderUnavailableError,
    UnusableVectorsError,
)
from tests.cases import mostly_thorough
from tests.embedding_index.embedding_site import FakeProvider, keyed, open_openai, short_texts, texts_with_long_ones
from tests.embedding_index.test_embedding_packing import OPENAI, bound
from tests.fakes.fake_openai import FakeOpenAI, estimate_tokens, expected_embedding
from tests.fakes.scripted_server import Handler, scripted_server

DIMENSIONS = 8
SMALL = RequestLimits(inputs=2048, input_tokens=100, request_tokens=300_000)
BATCH_SIZE = 10


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(dimensions=DIMENSIONS) as started:
        yield started


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[VectorLedger]:
    with VectorLedger(tmp_path / "vectors.sqlite3") as opened:
        yield opened


@dataclass(frozen=True)
class End:
    """The outcome of a text, and its stored vector, or None."""

    problem: str | None
    vector: Vector | None


class Runs:
    """Runs with one fake and one ledger."""

    def __init__(self, fake: FakeOpenAI, ledger: VectorLedger) -> None:
        self.fake = fake
        self.ledger = ledger
        self.providers: list[FakeProvider] = []

    def provider(self, **options: Any) -> FakeProvider:
        self.providers.append(FakeProvider(self.fake.url, **options))
        return self.providers[-1]

    def prepare(self, provider: Any = None, stop: Any = None, **options: Any) -> EmbeddingRun:
        chosen = RunOptions(**({"batch_size": BATCH_SIZE, "first_wait_s": 0.01} | options))
        return EmbeddingRun(provider or self.provider(), self.ledger, chosen, stop)

    def embed(
        self, texts: list[str], provider: Any = None, watch: Any = None, **options: Any
    ) -> tuple[dict[str, End], RunCounts]:
        """Return the outcome of each text, by text; *watch* gets the counts after each."""
        run = self.prepare(provider, **options)
        by_hash = keyed(texts)
        ends = []
        for end in run.run(by_hash):
            ends.append(end)
            if watch is not None:
                watch(run.counts)
        assert len({end.content_hash for end in ends}) == len(ends), "a text ended twice"
        vectors = self.ledger.vectors(run._provider.identity, by_hash)
        found = {by_hash[end.content_hash]: End(end.problem, vectors.get(end.content_hash)) for end in ends}
        return found, run.counts

    def billed(self) -> dict[str, int]:
        return {key: counts["billed"] for key, counts in self.fake.embedded().items() if counts["billed"]}


@pytest.fixture
def runs(fake: FakeOpenAI, ledger: VectorLedger) -> Iterator[Runs]:
    opened = Runs(fake, ledger)
    yield opened
    for provider in opened.providers:
        provider.close()


def right(text: str) -> Any:
    return pytest.approx(expected_embedding(text, DIMENSIONS), abs=1e-6)


def assert_right(ends: Mapping[str, End], texts: list[str]) -> None:
    """Each of *texts* has the vector that the server makes of it."""
    assert ends.keys() == set(texts)
    assert [end.problem for end in ends.values() if end.problem] == []
    expected = [expected_embedding(text, DIMENSIONS) for text in texts]
    np.testing.assert_allclose([ends[text].vector for text in texts], expected, rtol=0, atol=1e-6)


def mean_of(pieces: list[str]) -> Vector:
    vectors = np.array([expected_embedding(piece, DIMENSIONS) for piece in pieces])
    mean = np.average(vectors, axis=0, weights=[estimate_tokens(piece) for piece in pieces])
    return mean / np.linalg.norm(mean)  # type: ignore[no-any-return]


# Number of calls


@pytest.mark.thorough
def test_ten_thousand_texts_take_the_least_number_of_calls_all_slots_full(runs: Runs) -> None:
    runs.fake.configure(latency_s=0.05)
    texts = short_texts(10_000)
    ends, counts = runs.embed(texts, runs.provider(max_concurrent=4), batch_size=100)
    sizes = [estimate_tokens(text) for text in texts]
    stats = runs.fake.stats()
    assert stats["requests:embeddings.create"] == counts.calls == bound(sizes, OPENAI, 100) == 100
    assert stats["max_sync_in_flight"] == 4
    assert runs.billed() == dict.fromkeys(keyed(texts), 1)
    assert_right(ends, texts)
    assert (counts.embedded, counts.failed, counts.tokens) == (10_000, 0, sum(sizes))
    totals = runs.ledger.totals(runs.providers[0].identity)
    assert (totals.vectors, totals.calls, totals.tokens) == (10_000, 100, sum(sizes))


def test_stored_vectors_cost_nothing(runs: Runs) -> None:
    texts = texts_with_long_ones(60)
    provider = runs.provider(limits=SMALL)
    first, _ = runs.embed(texts, provider)
    before = runs.fake.stats()["requests"]
    again, counts = runs.embed(texts, provider)
    assert runs.fake.stats()["requests"] == before
    assert (counts.calls, counts.reused, counts.embedded) == (0, 60, 0)
    for text, end in again.items():
        assert end.vector is not None
        assert (end.vector == first[text].vector).all()


def test_only_changed_pieces_are_sent(runs: Runs) -> None:
    """A long text with another end shares its other pieces with what it was."""
    paragraphs = [f"Paragraph {number}. " + "word " * 60 for number in range(6)]
    text = "\n\n".join(paragraphs)
    provider = runs.provider(limits=SMALL)
    runs.embed([text], provider)
    billed = len(runs.billed())
    assert billed == 6
    runs.embed([text + " And more."], provider)
    assert len(runs.billed()) == billed + 1
    assert set(runs.billed().values()) == {1}


# Long texts


def test_a_long_text_has_the_weighted_mean_of_its_pieces(runs: Runs) -> None:
    text = "A first sentence of it. " * 40 + "The end"
    pieces = split_text(text, 100, estimate_tokens)
    ends, counts = runs.embed([text], runs.provider(limits=SMALL))
    assert len(pieces) > 2
    assert ends[text].vector == pytest.approx(mean_of(pieces), abs=1e-6)
    assert counts.embedded == 1
    assert runs.billed() == dict.fromkeys(keyed(pieces), 1)


def test_a_huge_text_is_never_counted_as_a_whole(runs: Runs) -> None:
    """Tokenizers refuse megabytes in one piece."""

    def count(text: str) -> int:
        if len(text) > 5000:
            raise ValueError("Input too long to encode safely")
        return estimate_tokens(text)

    text = " ".join(f"word{number}" for number in range(4_000))
    ends, counts = runs.embed([text], runs.provider(limits=SMALL, count=count))
    assert ends[text].problem is None
    assert counts.calls == -(-len(runs.billed()) // BATCH_SIZE)


def test_equal_pieces_are_sent_once(runs: Runs) -> None:
    paragraph = "word " * 70 + "\n\n"
    texts = [paragraph * 5, paragraph * 9, paragraph, "\n" * 1000 + paragraph]
    ends, counts = runs.embed(texts, runs.provider(limits=SMALL))
    assert not [end.problem for end in ends.values() if end.problem]
    assert set(runs.billed().values()) == {1}
    assert counts.calls == runs.ledger.totals(ModelIdentity("openai", "text-embedding-3-small")).calls == 1
    assert runs.ledger.keep_only(map(content_hash, texts)) == 0, "pieces are paid for as well"
    assert ends[paragraph * 5].vector == pytest.approx(ends[paragraph].vector, abs=1e-6)


@pytest.mark.parametrize("factor", [7, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_wrong_estimate_is_found_and_nothing_is_cut_in_silence(runs: Runs, factor: int) -> None:
    """The server counts up to seven times as many tokens; the text is sent in smaller pieces, and all of it."""
    runs.fake.configure(max_input_tokens=100)
    text = " ".join(f"word{number:04d}" for number in range(400))
    provider = runs.provider(limits=SMALL, count=lambda text: max(1, estimate_tokens(text) // factor))
    ends, _ = runs.embed([text, "short"], provider)
    assert ends[text].problem is None
    assert ends["short"].vector == right("short")
    stored = runs.ledger.known(provider.identity, runs.billed())
    assert stored == runs.billed().keys(), "a piece was billed and not stored"
    assert sum(len(piece) for piece in _texts_of(runs.billed(), text)) == len(text)
    assert runs.ledger.keep_only([content_hash(text), content_hash("short")]) == 0, "pieces of pieces as well"


def test_equal_pieces_of_refused_pieces_are_sent_once(runs: Runs) -> None:
    runs.fake.configure(max_input_tokens=100)
    text = ("word " * 70 + "\n\n") * 12
    provider = runs.provider(limits=SMALL, count=lambda text: max(1, estimate_tokens(text) // 4))
    ends, _ = runs.embed([text], provider)
    assert ends[text].problem is None
    assert set(runs.billed().values()) == {1}


class Strict:
    """Refuses calls with a text of more than *most* words, or with "bad" in it; counts words, and believes in 100."""

    identity = ModelIdentity("openai", "text-embedding-3-small")
    limits = SMALL
    is_external = False

    def __init__(self, most: int, max_concurrent: int = 1) -> None:
        self.max_concurrent = max_concurrent
        self.most = most
        self.asked: list[list[str]] = []

    def count_tokens(self, text: str) -> int:
        return max(1, len(text.split()))

    def embed(self, texts: Sequence[str], on_answer: Any = None) -> Answer:
        self.asked.append(list(texts))
        if any(self.count_tokens(text) > self.most or "bad" in text for text in texts):
            raise ProviderRejectedError("it does not like that")
        return Answer([expected_embedding(text, DIMENSIONS) for text in texts], None)

    def close(self) -> None:
        """Nothing is open."""


def test_earlier_failed_piece_fails_texts_divided_later(runs: Runs) -> None:
    """The same words were a text of their own: nobody sends them again, and nobody waits for them."""
    bad = "bad one two three four five six seven eight nine\n\n"
    long = bad + "here are ten more words that nobody would refuse today"
    provider = Strict(most=15)
    ends, counts = runs.embed([bad, long, "fine"], provider)
    assert ends["fine"].problem is None
    assert "refuses" in str(ends[bad].problem)
    assert "a piece of it failed" in str(ends[long].problem)
    assert provider.asked.count([bad]) == 1
    assert counts.failed == 2


def test_stretches_of_white_space_are_not_sent(runs: Runs) -> None:
    provider = Strict(most=1000)
    provider.limits = RequestLimits(2048, 8, None)
    ends, _ = runs.embed([" " * 1000 + "\n" * 1000 + "word " * 20], provider)
    assert [end.problem for end in ends.values()] == [None]
    assert all(text.strip() for call in provider.asked for text in call)


def test_the_next_call_is_made_while_an_answer_is_stored(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider with one slot never waits for the disk."""
    second_call, add = threading.Event(), runs.ledger.add
    stored_beside_it: list[bool] = []

    class Noted(Strict):
        def embed(self, inputs: Sequence[str], on_answer: Any = None) -> Answer:
            if self.asked:
                second_call.set()
            return super().embed(inputs)

    def slow(*arguments: Any, **named: Any) -> None:
        stored_beside_it.append(second_call.wait(timeout=10))
        add(*arguments, **named)

    monkeypatch.setattr(runs.ledger, "add", slow)
    ends, _ = runs.embed(["one", "two"], Noted(most=15), batch_size=1)
    assert not [end.problem for end in ends.values() if end.problem]
    assert stored_beside_it == [True, True]


def test_the_next_call_is_made_while_an_answer_is_on_its_way(ledger: VectorLedger) -> None:
    """With one slot, and a server that keeps the vectors until it has been asked again."""
    asked_again: list[bool] = []

    def answer_late(handler: Handler) -> None:
        body = json.dumps({"data": [{"index": 0, "embedding": [1.0, 2.0]}]}).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:1])
        handler.wfile.flush()
        asked_again.append(handler.server_state.wait_for_requests(2))
        handler.wfile.write(body[1:])

    with (
        scripted_server(answer_late, answer_late) as server,
        closing(open_openai(f"{server.url}/v1", embedding_model="any", max_concurrent=1)) as provider,
    ):
        run = EmbeddingRun(provider, ledger, RunOptions(batch_size=1))
        ends = list(run.run(keyed(["one", "two"])))
    assert asked_again == [True, True]
    assert [end.problem for end in ends] == [None, None]


def test_a_piece_of_two_texts_that_are_divided_at_once_is_sent_once(runs: Runs) -> None:
    """It is still on its way when the second of them asks for it."""
    texts = [f"one two three four five six seven eight nine ten {which} text has these words too" for which in "ab"]
    shared, own = split_text(texts[0], 8, Strict(15).count_tokens)[0], [f"ten {which} text" for which in "ab"]
    assert all(text.startswith(shared) for text in texts)
    both_refused, both_divided = threading.Barrier(2, timeout=20), threading.Semaphore(0)

    class Together(Strict):
        def embed(self, inputs: Sequence[str], on_answer: Any = None) -> Answer:
            if len(inputs) == 1 and inputs[0] in texts:
                both_refused.wait()
            if len(inputs) == 1 and inputs[0] not in texts and any(words in inputs[0] for words in own):
                both_divided.release()
            if inputs[0] == shared:
                assert all(both_divided.acquire(timeout=5) for _ in own)
            return super().embed(inputs)

    provider = Together(most=15, max_concurrent=2)
    ends, _ = runs.embed(texts, provider)
    assert not [end.problem for end in ends.values() if end.problem]
    assert provider.asked.count([shared]) == 1


def _texts_of(hashes: Mapping[str, int], text: str) -> list[str]:
    """The stretches of *text* that were sent: each begins where one ends."""
    found, start = [], 0
    while start < len(text):
        end = next(end for end in range(start + 1, len(text) + 1) if content_hash(text[start:end]) in hashes)
        found.append(text[start:end])
        start = end
    return found


# Refusals


def refusing(text: str, **more: Any) -> dict[str, Any]:
    return {"kind": "bad_request_400", "when": {"route": "embeddings.create", "text": text}, "times": 10_000} | more


def test_one_bad_text_of_256_is_named_and_the_others_are_kept(runs: Runs) -> None:
    texts = short_texts(256)
    bad = texts[123]
    runs.fake.configure(faults=[refusing("Conversation 000123", message="Invalid input")])
    ends, counts = runs.embed(texts, batch_size=256)
    assert "Invalid input" in str(ends[bad].problem)
    assert "card" not in str(ends[bad].problem)
    del ends[bad]
    assert_right(ends, [text for text in texts if text != bad])
    assert counts.calls == 1 + 2 * 8, "more halves than it takes"
    assert (counts.failed, counts.embedded) == (1, 255)
    assert set(runs.billed().values()) == {1}


def test_a_call_over_the_token_limit_is_sent_in_halves(runs: Runs) -> None:
    runs.fake.configure(max_request_tokens=30_000)
    texts = [f"{number:04d} " + "x" * 796 for number in range(200)]  # 201 tokens, counted as 100
    ends, counts = runs.embed(texts, runs.provider(count=lambda text: estimate_tokens(text) // 2), batch_size=2048)
    assert_right(ends, texts)
    assert counts.calls == 3
    assert set(runs.billed().values()) == {1}


def test_a_bad_piece_fails_its_text_and_no_other(runs: Runs) -> None:
    texts = texts_with_long_ones(30)
    bad = texts[10]
    pieces = split_text(bad, 100, estimate_tokens)
    mark = "Conversation 000010"
    runs.fake.configure(faults=[refusing(mark)])
    ends, _ = runs.embed(texts, runs.provider(limits=SMALL), max_retries=0)
    assert "piece" in str(ends[bad].problem)
    assert [text for text, end in ends.items() if end.problem] == [bad]
    assert sum(mark in piece for piece in pieces) >= 1


def test_run_stops_if_every_text_is_refused(runs: Runs) -> None:
    runs.fake.configure(faults=[refusing("Conversation", message="no embeddings for you")])
    with pytest.raises(ProviderRejectedError, match=r"none of the first 8 texts.*no embeddings for you"):
        runs.embed(short_texts(500))
    assert runs.fake.stats()["requests:embeddings.create"] < 100


def test_a_few_refused_texts_just_fail(runs: Runs) -> None:
    runs.fake.configure(faults=[refusing("Conversation")])
    ends, _ = runs.embed(short_texts(7))
    assert all("refuses" in str(end.problem) for end in ends.values())


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_text_fails_without_a_call(runs: Runs, text: str) -> None:
    ends, counts = runs.embed([text, "good"])
    assert "empty" in str(ends[text].problem)
    assert ends["good"].vector == right("good")
    assert (counts.calls, counts.failed, counts.embedded) == (1, 1, 1)


# Answers that are not what was asked for


@pytest.mark.parametrize(
    "kind", mostly_thorough(["nan", "zero", "dims", "short", "extra", "same_index", "unordered"], 2)
)
def test_a_wrong_answer_is_found_and_asked_for_again(runs: Runs, kind: str) -> None:
    texts = short_texts(3 * BATCH_SIZE)
    runs.fake.configure(faults=[{"kind": f"embed_{kind}", "when": {"route": "embeddings.create"}, "times": 1}])
    ends, counts = runs.embed(texts)
    assert_right(ends, texts)
    assert counts.calls == {"nan": 4, "zero": 4, "dims": 4, "unordered": 3}.get(kind, 5)
    twice = [key for key, times in runs.billed().items() if times == 2]
    assert len(twice) == {"nan": 1, "zero": 1, "dims": 1, "unordered": 0}.get(kind, BATCH_SIZE), (
        "more than what was distrusted"
    )


@pytest.mark.parametrize("kind", mostly_thorough(["nan", "zero", "dims", "short", "extra"], 3))
@pytest.mark.parametrize("max_retries", [2, pytest.param(0, marks=pytest.mark.thorough)])
def test_a_text_that_never_gets_a_vector_is_named(runs: Runs, kind: str, max_retries: int) -> None:
    texts = short_texts(10)
    bad = texts[7]
    faults = [{"kind": f"embed_{kind}", "when": {"route": "embeddings.create", "text": "000007"}, "times": 1000}]
    runs.fake.configure(faults=faults)
    ends, counts = runs.embed([*texts[:7], *texts[8:], bad], max_retries=max_retries, batch_size=1)
    assert [text for text, end in ends.items() if end.problem] == [bad]
    assert "card" not in str(ends[bad].problem)
    assert f"{max_retries + 1} attempts" in str(ends[bad].problem)
    assert counts.calls == 10 + max_retries
    del ends[bad]
    assert_right(ends, [text for text in texts if text != bad])


def test_run_stops_if_no_vector_is_usable(runs: Runs) -> None:
    runs.fake.configure(faults=[{"kind": "embed_nan", "when": {"route": "embeddings.create"}, "times": 10**6}])
    with pytest.raises(UnusableVectorsError, match=r"none of the first 8 texts.*NaN"):
        runs.embed(short_texts(100), batch_size=1, max_retries=1)
    assert runs.fake.stats()["requests:embeddings.create"] < 50


def test_another_dimension_than_the_stored_one_ends_the_run(runs: Runs) -> None:
    runs.embed(short_texts(5))
    runs.fake.configure(dimensions=16)
    with pytest.raises(MixedIndexError, match=r"16 dimensions, and the stored ones have 8"):
        runs.embed(short_texts(50))
    assert runs.ledger.totals(runs.providers[0].identity).vectors == 5


def test_tokens_of_refused_answers_are_counted(runs: Runs) -> None:
    runs.fake.configure(faults=[{"kind": "embed_short", "when": {"route": "embeddings.create"}, "times": 1}])
    texts = short_texts(10)
    _, counts = runs.embed(texts)
    paid = 2 * sum(map(estimate_tokens, texts))
    assert counts.tokens == paid
    assert runs.ledger.totals(runs.providers[0].identity).tokens == paid


# Servers that are busy, broken or away


def test_rate_limit_delays_all_calls_and_uses_no_attempt(runs: Runs) -> None:
    fault = {"kind": "rate_limit_429", "when": {"route": "embeddings.create", "indexes": [4]}, "retry_after": 1}
    runs.fake.configure(latency_s=0.05, faults=[fault])
    texts = short_texts(200)
    ends, counts = runs.embed(texts, max_retries=0)
    assert_right(ends, texts)
    records = [record for record in runs.fake.requests() if record["route"] == "embeddings.create"]
    (told,) = [record["end_s"] for record in records if record["fault"]]
    # Requests that were on their way when the answer came are not held back by it.
    early = [record for record in records if told + 0.3 < record["start_s"] < told + 0.95]
    assert not early
    assert sum(record["start_s"] >= told + 0.95 for record in records) > 10
    assert counts.calls == 21


def test_a_wait_beyond_the_patience_ends_the_run(runs: Runs) -> None:
    fault = {"kind": "rate_limit_429", "when": {"route": "embeddings.create", "from": 4}, "retry_after": 3600}
    runs.fake.configure(latency_s=0.02, faults=[fault])
    texts = short_texts(200)
    ends: list[Embedded] = []
    with pytest.raises(ProviderBusyError, match=r"wait 3600 s, beyond the 300 s.*same command"):
        ends.extend(runs.prepare().run(keyed(texts)))
    assert len(ends) == 0 or all(end.problem is None for end in ends)
    runs.fake.configure(faults=[])
    runs.embed(texts)
    assert set(runs.billed().values()) == {1}, "what was stored before the end was paid for again"


def test_a_busy_server_that_names_no_time_is_asked_more_and_more_slowly(runs: Runs) -> None:
    fault = {"kind": "rate_limit_429", "when": {"route": "embeddings.create"}, "times": 6}
    runs.fake.configure(faults=[fault])
    texts = short_texts(30)
    ends, counts = runs.embed(texts, max_retries=0, first_wait_s=0.05)
    assert_right(ends, texts)
    assert counts.calls == 3 + 6


@pytest.mark.parametrize(
    "kind", mostly_thorough(["server_error_500", "close", "reset", "garbage", "bad_gateway_502", "answer_lost"], 5)
)
def test_failed_calls_are_repeated(runs: Runs, kind: str) -> None:
    fault = {"kind": kind, "when": {"route": "embeddings.create", "indexes": [0, 2, 5]}}
    runs.fake.configure(faults=[fault])
    texts = short_texts(50)
    ends, counts = runs.embed(texts)
    assert_right(ends, texts)
    assert counts.calls == 5 + 3


@pytest.mark.parametrize("concurrency", [4, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_text_that_breaks_the_server_is_found(runs: Runs, concurrency: int) -> None:
    """HTTP 500 for one text, again and again: the others get their vectors, also those of its call."""
    fault = {"kind": "server_error_500", "when": {"route": "embeddings.create", "text": "000025"}, "times": 10_000}
    runs.fake.configure(faults=[fault])
    texts = short_texts(31)
    bad = texts[25]
    ends, _ = runs.embed(texts, runs.provider(max_concurrent=concurrency), max_retries=1)
    assert "answers for others" in str(ends[bad].problem)
    del ends[bad]
    assert_right(ends, [text for text in texts if text != bad])


def test_a_dead_server_ends_the_run_and_what_was_stored_is_kept(runs: Runs) -> None:
    texts = short_texts(1000)
    fault = {"kind": "close", "when": {"route": "embeddings.create", "from": 5}, "times": 10_000}
    runs.fake.configure(faults=[fault])
    with pytest.raises(ProviderUnavailableError, match=r"no usable answer for 1 s.*same command"):
        runs.embed(texts, batch_size=100, patience_s=1.0, max_retries=2)
    asked = runs.fake.stats()["requests:embeddings.create"]
    assert asked < 400, "an outage is no reason to send everything in pieces"
    assert len(runs.billed()) == 500
    runs.fake.configure(faults=[])
    ends, counts = runs.embed(texts, batch_size=100)
    assert_right(ends, texts)
    assert (counts.reused, counts.embedded) == (500, 500)
    assert set(runs.billed().values()) == {1}


@pytest.mark.slow
def test_a_server_that_comes_back_is_waited_for(runs: Runs) -> None:
    runs.fake.configure(latency_s=0.02)
    texts = short_texts(150)
    restarted = threading.Event()

    def restart() -> None:
        runs.fake.restart()
        restarted.set()

    def watch(counts: RunCounts) -> None:
        if counts.calls >= 6 and not threads:
            threads.append(threading.Thread(target=restart))
            threads[0].start()

    threads: list[threading.Thread] = []
    ends, _ = runs.embed(texts, watch=watch, patience_s=60.0, max_retries=1)
    threads[0].join()
    assert restarted.is_set()
    assert_right(ends, texts)


@pytest.mark.thorough
def test_a_wrong_key_ends_the_run_at_once(runs: Runs) -> None:
    runs.fake.configure(faults=[{"kind": "unauthorized_401", "when": {"route": "embeddings.create"}, "times": 1000}])
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        runs.embed(short_texts(5000))
    assert runs.fake.stats()["requests:embeddings.create"] <= 4 + STORING_THREADS


# Ends before the end


def test_after_a_stop_calls_in_flight_are_stored_and_no_other_is_made(runs: Runs) -> None:
    runs.fake.configure(latency_s=0.05)
    stop = threading.Event()
    texts = short_texts(300)

    def stop_after_some(counts: RunCounts) -> None:
        if counts.calls >= 8:
            stop.set()

    ends, counts = runs.embed(texts, stop=stop, watch=stop_after_some)
    assert 8 <= counts.calls <= 8 + 2 * 4
    assert len(ends) == counts.embedded == len(runs.billed()) == BATCH_SIZE * counts.calls
    stop.clear()
    again, counts = runs.embed(texts, stop=stop)
    assert_right(again, texts)
    assert set(runs.billed().values()) == {1}


def test_answers_are_stored_however_slowly_the_results_are_taken(runs: Runs) -> None:
    texts = short_texts(300)
    results = runs.prepare().run(keyed(texts))
    next(results)
    runs.fake.wait_for("requests:embeddings.create", equals=30)
    while len(runs.ledger.known(runs.providers[0].identity, keyed(texts))) < 300:
        threading.Event().wait(0.01)
    assert len(list(results)) == 299


def test_closed_iterator_still_stores_calls_in_flight(runs: Runs) -> None:
    runs.fake.configure(latency_s=0.1)
    texts = short_texts(300)
    results = runs.prepare().run(keyed(texts))
    next(results)
    results.close()  # type: ignore[attr-defined]
    calls = runs.fake.stats()["requests:embeddings.create"]
    assert calls < 30
    assert len(runs.ledger.known(runs.providers[0].identity, keyed(texts))) == BATCH_SIZE * calls


class BrokenProvider:
    """A programming error in the third call."""

    def __init__(self, provider: FakeProvider) -> None:
        self.identity, self.limits, self.max_concurrent = provider.identity, provider.limits, provider.max_concurrent
        self.count_tokens, self.close = provider.count_tokens, provider.close
        self._provider = provider
        self._calls = 0

    def embed(self, texts: Any, on_answer: Any = None) -> Answer:
        self._calls += 1
        if self._calls == 3:
            raise KeyError("a mistake")
        return self._provider.embed(texts)


@pytest.mark.timeout(30)
def test_a_mistake_in_a_thread_ends_the_run_and_never_hangs_it(runs: Runs) -> None:
    with pytest.raises(KeyError, match="a mistake"):
        runs.embed(short_texts(300), BrokenProvider(runs.provider()))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("embedding")]
