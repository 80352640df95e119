"""The least number of calls for texts of given sizes. Pure: no I/O."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from embedding_index.providers.contract import RequestLimits


def pack(sizes: Sequence[int], limits: RequestLimits, batch_size: int) -> list[list[int]]:
    """Return the places of *sizes* (tokens, at least 1) in calls within *limits*, of at most *batch_size* inputs.

    No number of calls below the larger of ``inputs / inputs per call`` and ``tokens / tokens per call`` is possible;
    that many it is wherever single inputs are small beside a call. All calls have about equally many tokens, so that
    those that run at once end at once. An input that is larger than a whole call has a call of its own.
    """
    if not sizes:
        return []
    most_inputs = min(limits.inputs, batch_size)
    most_tokens = limits.request_tokens
    longest_first = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    fewest = -(-len(sizes) // most_inputs)
    if most_tokens is not None:
        fewest = max(fewest, -(-sum(sizes) // most_tokens))
    failed, step = fewest - 1, 0
    while (calls := _spread(sizes, longest_first, min(fewest + step, len(sizes)), most_inputs, most_tokens)) is None:
        failed, step = fewest + step, 2 * step + 1
    enough = len(calls)
    while enough - failed > 1:
        middle = (enough + failed) // 2
        fewer = _spread(sizes, longest_first, middle, most_inputs, most_tokens)
        if fewer is None:
            failed = middle
        else:
            calls, enough = fewer, middle
    return [sorted(call) for call in calls]


def _spread(
    sizes: Sequence[int], longest_first: Sequence[int], count: int, most_inputs: int, most_tokens: int | None
) -> list[list[int]] | None:
    """Return the places in *count* calls, each input in the emptiest one that has room; None where one has none."""
    calls: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for place in longest_first:
        if not emptiest:
            return None
        tokens, number = emptiest[0]
        call = calls[number]
        filled = tokens + sizes[place]
        if most_tokens is not None and call and filled > most_tokens:
            return None
        call.append(place)
        if len(call) == most_inputs:
            heapq.heappop(emptiest)
        else:
            heapq.heapreplace(emptiest, (filled, number))
    return calls
