"""Vectors of conversations: each turn is embedded once, with those of other conversations if there are any."""

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
    """Vectors of length 1: *request* weighs the customer's first turn more, *customer* has their turns, *all_turns* all.

    *replies* has the turns of others; it is 0 without any.
    """

    request: Numbers
    customer: Numbers
    all_turns: Numbers
    replies: Numbers


@dataclass(frozen=True, slots=True)
class _Read:
    """The text of one conversation that is read: the tokens of its pieces, and whether the customer said each."""

    pieces: list[list[int]]
    is_customer: NDArray[np.bool_]


def vectors_of(encoder: Encoder, conversation: Conversation) -> ConversationVectors:
    """Return the vectors of the first READ_TOKENS tokens of *conversation*, links and handles left out."""
    return vectors_of_each(encoder, [conversation])[0]


def vectors_of_each(encoder: Encoder, conversations: Sequence[Conversation]) -> list[ConversationVectors]:
    """Return ``vectors_of`` of each conversation; several at once take less time than one after the other.

    Pieces that occur in several places are embedded once. Beside other pieces a vector may differ in the last bits.
    """
    read = [_read(encoder, each) for each in conversations]
    places: dict[tuple[int, ...], int] = {}
    rows = [[places.setdefault(tuple(piece), len(places)) for piece in each.pieces] for each in read]
    vectors = embedded_ids(encoder, list(places))
    return [_pooled(vectors[row], each) for row, each in zip(rows, read, strict=True)]


def _read(encoder: Encoder, conversation: Conversation) -> _Read:
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
    pieces, owners = _pieces(encoder.token_ids(texts))
    said = np.array(is_customer)[owners]
    said[0] = True  # a conversation without a customer is judged by its first turn
    return _Read(pieces, said)


def _pooled(vectors: Numbers, read: _Read) -> ConversationVectors:
    weights = np.array([len(piece) for piece in read.pieces], np.float32)
    said = read.is_customer
    customer = _mean(vectors[said], weights[said])
    request = _mean(np.stack([vectors[said][0], customer]), np.ones(2, np.float32))
    replies = np.zeros_like(customer) if said.all() else _mean(vectors[~said], weights[~said])
    return ConversationVectors(request, customer, _mean(vectors, weights), replies)


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
