"""The queue of calls: who waits, and until when."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from embedding_index.call_queue import SHORTEST_WAIT_S, Call, CallQueue, CallRepetition, Piece, RunOptions
from error_handler import ProviderBusyError

FIRST, SECOND = (Call((Piece(name, name, 1),)) for name in ("first", "second"))


def test_the_run_is_not_over_while_a_call_is_worked_on() -> None:
    """The end of a call may put another call at the front of the queue."""
    queue = CallQueue([FIRST], 2, threading.Event())
    assert queue.take() is FIRST
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(queue.take)
        assert not waiting.done()
        queue.settle(FIRST, first=[SECOND])
        assert waiting.result(timeout=20) is SECOND
        waiting = thread.submit(queue.take)
        queue.settle(SECOND)
        assert waiting.result(timeout=20) is None


def test_a_shorter_wait_does_not_open_the_gate_earlier() -> None:
    queue = CallQueue([FIRST], 1, threading.Event())
    queue.close_gate(1000.0)
    opens_at_s = queue._gate_s
    queue.close_gate(0.0)
    assert queue._gate_s == opens_at_s


def test_an_answer_ends_the_silence_and_no_wait_is_too_short() -> None:
    """The patience counts from the last answer, whatever it was; a server that asks for no wait at all gets one."""
    queue = CallQueue([FIRST], 1, threading.Event())
    repetition = CallRepetition(RunOptions(patience_s=10.0), queue, lambda piece, problem: None)
    repetition._silent_since_s = time.monotonic() - 1000.0
    repetition._busy_in_a_row = 5
    repetition.heard(time.monotonic())
    call = queue.take()
    assert call is FIRST
    before_s = time.monotonic()
    repetition.after_busy(call, ProviderBusyError("busy", 0.0))
    assert repetition._busy_in_a_row == 1
    assert queue._gate_s >= before_s + SHORTEST_WAIT_S
