"""Under load and at the end: bounded model calls, 503 for the rest, free places, a stop that ends in time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.fake_ollama import FakeOllama
from tests.service.service_process import CONVERSATION, ServiceProcess, conversation, serve
from tests.service.test_hostile_callers import HEAD, SLOW

BODY = json.dumps(CONVERSATION).encode()
REQUEST = HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


async def ask_at_once(service: ServiceProcess, count: int) -> list[tuple[int, str | None]]:
    """Send *count* requests together and return status and Retry-After of each."""
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> tuple[int, str | None]:
            async with session.post(f"{service.url}/classify", data=BODY, headers=headers) as response:
                await response.read()
                return response.status, response.headers.get("Retry-After")

        return await asyncio.gather(*(ask() for _ in range(count)))


@pytest.mark.slow
async def test_thousand_concurrent_requests_get_200_or_503_within_the_model_limit(tmp_path: Path) -> None:
    """Four places and a queue of twenty; the others are turned away at once, to come back at different times."""
    with FakeOllama(slots=4, latency_s=0.2, user_message=0) as fake:
        settings = {"API_MAX_CONCURRENT": "4", "API_QUEUE_SIZE": "20"}
        with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **settings) as service:
            answers = await ask_at_once(service, 1000)
            statuses = Counter(status for status, _ in answers)
            assert set(statuses) == {200, 503}
            assert statuses[200] >= 24
            waits = [int(wait or 0) for status, wait in answers if status == 503]
            assert min(waits) >= 1
            assert max(waits) <= 60
            assert len(set(waits)) > 5
            assert fake.stats()["max_in_flight"] == 4
            assert fake.stats()["answered"] == statuses[200]
            assert service.metric("triad_queue_length") == 0
            assert service.metric("triad_model_calls_in_flight") == 0
            assert service.metric('triad_rejections_total{reason="QueueFullError"}') == statuses[503]


def test_disconnected_caller_frees_its_slot_and_cancels_its_call(tmp_path: Path) -> None:
    """Running or waiting; who shares an answer through a key keeps it alive until the last one leaves."""
    with FakeOllama(slots=4, latency_s=30, user_message=0) as fake:
        settings = {"API_MAX_CONCURRENT": "1", "API_QUEUE_SIZE": "5", "API_REQUEST_TIMEOUT_S": "25"}
        with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **settings) as service:
            running = service.connect(REQUEST)
            fake.wait_for("in_flight", 1)
            waiting = service.connect(REQUEST)
            service.wait_for_metric("triad_queue_length", 1)
            waiting.close()
            service.wait_for_metric("triad_queue_length", 0)
            running.close()
            fake.wait_for("client_disconnects", 1)
            service.wait_for_metric("triad_model_calls_in_flight", 0)
            service.wait_for_metric('triad_http_requests_total{route="/classify",status="499"}', 2)

            keyed = REQUEST.replace(b"\r\n\r\n", b"\r\nIdempotency-Key: shared\r\n\r\n", 1)
            first, second = service.connect(keyed), service.connect(keyed)
            fake.wait_for("in_flight", 1)
            service.wait_for_metric("triad_http_requests_in_flight", 3)
            first.close()
            service.wait_for_metric("triad_http_requests_in_flight", 2)
            assert service.metric("triad_model_calls_in_flight") == 1
            second.close()
            fake.wait_for("client_disconnects", 2)
            service.wait_for_metric("triad_model_calls_in_flight", 0)
            assert fake.stats()["chat_requests"] == 2
            fake.configure(latency_s=0)
            assert service.classify().status == 200


def test_deadline_covers_queue_and_call(tmp_path: Path) -> None:
    """A caller that waited too long for a slot gets 504 and frees the slot; the breaker stays closed, because the server works."""
    with FakeOllama(slots=4, latency_s=1, user_message=0) as fake:
        settings = {"API_MAX_CONCURRENT": "1", "API_QUEUE_SIZE": "5", "API_REQUEST_TIMEOUT_S": "1.6"}
        with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **settings) as service:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: service.classify(), range(4)))
            assert sorted(answer.status for answer in answers) == [200, 504, 504, 504]
            assert {answer.error for answer in answers if answer.status == 504} == {"DeadlineError"}
            service.wait_for_metric("triad_model_calls_in_flight", 0)
            fake.wait_for("in_flight", equals=0)
            assert service.metric("triad_breaker_open") == 0


def test_stop_finishes_running_requests_and_ignores_slow_clients(tmp_path: Path) -> None:
    """Running and waiting requests get their answer; slow and idle clients do not keep the process."""
    with FakeOllama(slots=4, latency_s=1, user_message=0) as fake:
        waits = {"API_HEADER_TIMEOUT_S": "300", "API_BODY_TIMEOUT_S": "300"}
        settings = {"API_MAX_CONCURRENT": "2", "SHUTDOWN_GRACE_S": "90", **waits}
        with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **settings) as service:
            for sent, _ in list(SLOW.values()) * 5:
                service.connect(sent)
            idle = service.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(65_536)
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                answers = [pool.submit(service.classify) for _ in range(4)]
                service.wait_for_metric("triad_queue_length", 2)
                start = time.monotonic()
                service.terminate(60)
                assert [answer.result().status for answer in answers] == [200] * 4
            assert time.monotonic() - start < 60
            assert "Traceback" not in service.log
            assert "Cancel" not in service.log


def test_stop_answers_503_after_the_grace_period(tmp_path: Path) -> None:
    """A request that does not finish in time gets 503; uvicorn alone would answer 500, or wait."""
    with FakeOllama(slots=4, latency_s=60, user_message=0) as fake:
        settings = {"SHUTDOWN_GRACE_S": "1"}
        with serve(tmp_path, OLLAMA_ENDPOINT=fake.url, OLLAMA_MODEL="llama3.2", **settings) as service:
            service.connect(SLOW["half a body"][0])
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                answers = [
                    pool.submit(service.classify, conversation(), **extra) for extra in ({}, {"Idempotency_Key": "a"})
                ]
                fake.wait_for("in_flight", 2)
                service.terminate(10)
                for answer in answers:
                    assert (answer.result().status, answer.result().error) == (503, "ShuttingDownError")
                    assert "retry-after" in answer.result().headers
            assert "Traceback" not in service.log
