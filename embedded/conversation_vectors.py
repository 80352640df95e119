"""Vectors of conversations: each turn is embedded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from domain.conversation import Conversation
from embedded.baseline import prose_of
from embedded.minilm import DIMENSIONS, INPUT_TOKENS, Encoder, chunks_of

READ_TOKENS = 1000  # of one conversation
READ_CHARACTERS = 8000  # the tokenizer takes long for very long texts
NO_WORDS = "-"

Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ConversationVectors:
    """Vectors of length 1: *request* weighs the customer's first turn more, *customer* has their turns, *all_turns* all."""

    request: Numbers
    customer: Numbers
    all_turns: Numbers


def vectors_of(encoder: Encoder, conversation: Conversation) -> ConversationVectors:
    """Return the vectors of the first READ_TOKENS tokens of *conversation*, links and handles left out."""
    return vectors_of_each(encoder, [conversation])[0]


def vectors_of_each(encoder: Encoder, conversations: Sequence[Conversation]) -> list[ConversationVectors]:
    """Return what ``vectors_of`` does for each of *conversations*; together, turns of similar length are computed at once."""
    pieces: list[list[int]] = []
    owners: list[NDArray[np.bool_]] = []
    for conversation in conversations:
        texts, is_customer = _texts(conversation)
        own, places = _pieces(encoder.token_ids(texts))
        pieces += own
        said = np.array(is_customer)[places]
        said[0] = True  # a conversation without a customer is judged by its first turn
        owners.append(said)
    vectors = embedded_ids(encoder, pieces)
    weights = np.array([len(piece) for piece in pieces], np.float32)
    found, start = [], 0
    for said in owners:
        mine = slice(start, start + len(said))
        found.append(_joined(vectors[mine], weights[mine], said))
        start += len(said)
    return found


def _texts(conversation: Conversation) -> tuple[list[str], list[bool]]:
    """Return the texts to embed, the customer's first turn first, and whether the customer wrote each."""
    first = next((place for place, turn in enumerate(conversation.turns) if turn.sender == "customer"), 0)
    turns = [*conversation.turns[first : first + 1], *conversation.turns[:first], *conversation.turns[first + 1 :]]
    left, texts, is_customer = READ_CHARACTERS, [], []
    for turn in turns:
        if left <= 0:
            break
        text = " ".join(prose_of(turn.text[:left]).split())
        texts.append(text or NO_WORDS)
        is_customer.append(turn.sender == "customer")
        left -= len(texts[-1])
    return texts, is_customer


def _joined(vectors: Numbers, weights: Numbers, said: NDArray[np.bool_]) -> ConversationVectors:
    customer = _mean(vectors[said], weights[said])
    request = _mean(np.stack([vectors[said][0], customer]), np.ones(2, np.float32))
    return ConversationVectors(request, customer, _mean(vectors, weights))


def _pieces(texts: Sequence[Sequence[int]]) -> tuple[list[list[int]], NDArray[np.int64]]:
    """Return the tokens of *texts* in pieces that fit the encoder, and the place of the text of each."""
    pieces: list[list[int]] = []
    owners: list[int] = []
    left = READ_TOKENS
    for place, (first, *inner, last) in enumerate(texts):
        size = INPUT_TOKENS - 2
        for start in range(0, max(len(inner), 1), size):
            if left <= 0 and pieces:
                break
            pieces.append([first, *inner[start : start + min(size, max(left, 1))], last])
            owners.append(place)
            left -= len(pieces[-1]) - 2
    return pieces, np.array(owners)


def embedded_texts(encoder: Encoder, texts: Sequence[str]) -> Numbers:
    """Return the vectors of short *texts*; longer ones are truncated to what the encoder takes."""
    return embedded_ids(encoder, [ids[:INPUT_TOKENS] for ids in encoder.token_ids(texts)])


def embedded_ids(encoder: Encoder, ids: Sequence[Sequence[int]]) -> Numbers:
    """Return the vectors of *ids*, tokens of the encoder."""
    vectors = np.empty((len(ids), DIMENSIONS), np.float32)
    for places in chunks_of([len(one) for one in ids]):
        vectors[places] = encoder.forward([ids[place] for place in places])
    return vectors


def _mean(vectors: Numbers, weights: Numbers) -> Numbers:
    mean = weights @ vectors
    unit: Numbers = mean / np.linalg.norm(mean)
    return unit
