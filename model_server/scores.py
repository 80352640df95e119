"""The reply style ``score``: reads the probabilities of the labels; the model writes no answer. No I/O.

llama.cpp's own server and vLLM offer this. Their template makes the prompt, and their tokenizer the tokens of the labels, which
are a tree for each field. A call generates one token, and its answer has the probability of each token with which the labels go
on. What all of them share is part of the prompt, so a field takes one call, and one more only if its most probable labels begin
with the same token.

The prompt and the labels found so far stay in the server's prefix cache. The answer is the array of the style ``list``.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import orjson

from domain.conversation import Message
from error_handler import LLMFormError, LLMUnavailableError
from model_server import vllm
from model_server.protocol import (
    LLAMA_CPP,
    VLLM,
    ChatReply,
    ChatTarget,
    ServerRequest,
    count,
    json_object,
    parse_chat_response,
    part,
    without_system,
)
from model_server.refusals import refuses_system_role

T = TypeVar("T")

logger = logging.getLogger(__name__)

OPENING, BETWEEN = '["', '","'
AFTER_LAST = '"] ["'  # a label before it has the end of an answer, and the next label begins with a token of its own
BIAS = 200.0  # more than the logits of two tokens ever differ by
SEEDS = 5  # llama.cpp gives no probabilities if the token that it draws is a part of a character; another seed draws another
LEAST_KNOWN = 0.5  # of the probability must be that of labels, or the server has ignored the bias
NOT_OFFERED = (404, 405, 501)
WITHOUT_THINKING = {"enable_thinking": False, "thinking": False}

# The number of a token in the model's vocabulary, and its bytes.
Token = tuple[int, bytes]
Tokens = tuple[Token, ...]
Asked = Generator[ServerRequest, tuple[int, bytes], T]


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """The tokens of an answer: those before the first label and, for each field, label -> its tokens and its separator."""

    opening: Tokens
    fields: tuple[Mapping[str, Tokens], ...]


class ScoreClient(Protocol):
    """A client whose *target* changes with what it learns; *label_tokens* are those of its model, by the answer's schema."""

    target: ChatTarget
    label_tokens: dict[bytes, LabelTokens]


def takes_scores(target: ChatTarget) -> bool:
    """Return whether the server of *target* gives the probabilities of labels, as far as is known."""
    return target.engine in (LLAMA_CPP, VLLM) and "scores" not in target.refused


def has_slots(target: ChatTarget) -> bool:
    """Return whether the server has slots with a cache each. That of vLLM is shared by all requests, and is not chosen."""
    return target.engine == LLAMA_CPP


def slots_flow(client: ScoreClient, timeout_s: float) -> Asked[int]:
    """Return how many slots the server has, at least 1: yield the request, receive status and body.

    Two conversations in one slot would take the cache from each other, and each call would read a conversation again. The
    server's own choice does that: among slots that hold the same constant prompt it takes the first one.

    Raises:
        LLMFormError, LLMError: See ``score_flow``.
    """
    reading = _Reading(client, [], timeout_s)
    reading.require_offer()
    url = f"{client.target.server_url}/props"
    found = count(reading.checked(*(yield ServerRequest("GET", url, None, timeout_s))).get("total_slots"))
    if not found:
        raise reading.refusal("it does not report its slots")
    return found


def score_flow(
    client: ScoreClient, messages: list[Message], schema_json: bytes, timeout_s: float, slot: int | None = None
) -> Asked[ChatReply]:
    """Ask for the probabilities of the labels: yield each request, receive status and body, return the answer.

    *schema_json* is that of the style ``score``. *slot* is where the server shall work, from 0; None lets it choose, which
    is right for one conversation at a time. The answer has ``scores`` if the target asks for log probabilities. Its
    ``reply_tokens`` are the calls, each of which generates one token.

    Raises:
        LLMFormError: The server does not offer it, or a field may have several labels. The target notes that.
        LLMError: See model_server.protocol.parse_chat_response.
    """
    kind = _VllmReading if client.target.engine == VLLM else _Reading
    reading = kind(client, messages, timeout_s, slot)
    fields = orjson.loads(schema_json)["prefixItems"]
    if not all("enum" in field for field in fields):
        raise reading.refusal("a field may have several labels")
    reading.require_offer()
    prompt = yield from reading.prompt()
    if (known := client.label_tokens.get(schema_json)) is None:
        known = client.label_tokens[schema_json] = yield from reading.label_tokens([field["enum"] for field in fields])
    found: list[tuple[str, float]] = []
    before = [*prompt, *_numbers(known.opening)]
    try:
        reading.require_same(known)
        for labels in known.fields:
            found.append((yield from reading.best(before, labels)))
            before += _numbers(labels[found[-1][0]])
    except LookupError:
        client.label_tokens.pop(schema_json, None)
        raise LLMUnavailableError("the model server has another model than before; its tokens are read again") from None
    text = json.dumps([label for label, _ in found], ensure_ascii=False, separators=(",", ":"))
    scores = tuple(score for _, score in found) if client.target.logprobs else ()
    return ChatReply(text, reading.prompt_tokens, reading.calls, scores=scores)


class _Reading:
    """The requests about one conversation, for llama.cpp. *calls* counts those that the model worked on.

    *spelled* are tokens of the prompt, as far as the server shows them.
    """

    def __init__(self, client: ScoreClient, messages: list[Message], timeout_s: float, slot: int | None = None) -> None:
        self._client, self._messages, self._timeout_s, self._slot = client, messages, timeout_s, slot
        self.calls = 0
        self.prompt_tokens: int | None = None
        self.spelled: dict[int, bytes] = {}

    def require_offer(self) -> None:
        """Raise LLMFormError if the server is known not to give the probabilities of labels."""
        if not takes_scores(self._client.target):
            raise self.refusal("only llama.cpp's own server and vLLM give them")

    def require_same(self, known: LabelTokens) -> None:
        """Raise LookupError if the prompt shows that the tokens *known* are those of another model."""
        tokens = itertools.chain(known.opening, *(one for labels in known.fields for one in labels.values()))
        if any(self.spelled.get(number, piece) != piece for number, piece in tokens):
            raise LookupError("the same number is another token")

    def prompt(self) -> Asked[list[str | int]]:
        """Return the prompt that the server makes of the messages, up to where the answer begins."""
        while True:
            target = self._client.target
            messages = without_system(self._messages) if target.merges_system else self._messages
            status, answer = yield self._prompt_request(messages)
            if (
                status != 200
                and not target.merges_system
                and refuses_system_role(answer[:4000].decode("utf-8", "replace"))
            ):
                self._client.target = replace(target, merges_system=True)
            elif prompt := self._prompt(self.checked(status, answer)):
                return prompt
            else:
                raise self.refusal("it makes no prompt of messages")

    def label_tokens(self, fields: Sequence[Sequence[str]]) -> Asked[LabelTokens]:
        """Return the tokens of the labels of each of *fields*, as the server cuts an array of them."""
        read = []
        for number, names in enumerate(fields, 1):
            separator = BETWEEN if number < len(fields) else AFTER_LAST
            quoted = [json.dumps(name, ensure_ascii=False)[1:-1] for name in names]
            text = OPENING + separator.join([*quoted, quoted[0]])
            answer = self.checked(*(yield self._tokens_request(text)))
            starts = itertools.accumulate((len(f"{one}{separator}".encode()) for one in quoted), initial=len(OPENING))
            try:
                read.append(_slices(*self._tokens(answer), text.encode(), list(starts)))
            except (LookupError, TypeError, ValueError):
                raise self.refusal("a label does not begin with a token of its own") from None
        return LabelTokens(
            read[0][0], tuple(dict(zip(names, one[1:], strict=True)) for names, one in zip(fields, read, strict=True))
        )

    def best(self, before: list[str | int], labels: Mapping[str, Tokens]) -> Asked[tuple[str, float]]:
        """Return the most probable of *labels*, the next ones after *before*, and its probability among them (0 to 1).

        Raises:
            LookupError: The tokens are those of another model.
        """
        open_groups = [(-1.0, [*labels])]
        while True:
            # The most probable group first: when that is one label, no label of another group is more probable.
            probability, names = heapq.heappop(open_groups)
            if len(names) == 1:
                return names[0], round(-probability, 4)
            shared = _shared([labels[name] for name in names])
            groups: dict[Token, list[str]] = {}
            for name in names:
                groups.setdefault(labels[name][len(shared)], []).append(name)
            shares = yield from self._shares([*before, *_numbers(shared)], dict(groups))
            for token, group in groups.items():
                heapq.heappush(open_groups, (probability * shares[token], group))

    def _prompt_request(self, messages: list[Message]) -> ServerRequest:
        return self._request("/apply-template", {"messages": messages, "chat_template_kwargs": WITHOUT_THINKING})

    def _prompt(self, answer: dict[str, Any]) -> list[str | int]:
        """Return the prompt in an answer, as the server takes it; empty if there is none."""
        prompt = part(answer, "prompt", str)
        return [prompt] if prompt else []

    def _tokens_request(self, text: str) -> ServerRequest:
        return self._request("/tokenize", {"content": text, "add_special": False, "with_pieces": True})

    def _tokens(self, answer: dict[str, Any]) -> tuple[list[Token], list[list[bytes]]]:
        """Return the tokens in an answer, and what they may spell: the piece of each, in each way to read them."""
        tokens = [(int(entry["id"]), _bytes(entry["piece"])) for entry in answer["tokens"]]
        return tokens, [[piece for _, piece in tokens]]

    def _shares(self, before: list[str | int], tokens: Mapping[Token, Any]) -> Asked[dict[Token, float]]:
        """Return the probability of each of *tokens* after *before*; they sum to 1."""
        body: dict[str, Any] = {
            "prompt": before,
            "n_predict": 1,
            "n_probs": len(tokens),
            "post_sampling_probs": True,
            "logit_bias": [[number, BIAS] for number, _ in tokens],
            "samplers": ["temperature"],  # the others would take tokens away
            "temperature": 1.0,
            "cache_prompt": True,
        }
        if self._slot is not None:
            body["id_slot"] = self._slot
        for seed in range(SEEDS):
            answer = self.checked(*(yield self._request("/completion", {**body, "seed": seed})))
            self.calls += 1
            if answer.get("completion_probabilities"):
                break
        if self.prompt_tokens is None and (read := count(answer.get("tokens_evaluated"))) is not None:
            self.prompt_tokens = read - len(before) + 1
        try:
            [place] = answer["completion_probabilities"]
            listed = {(int(entry["id"]), bytes(entry["bytes"])): float(entry["prob"]) for entry in place["top_probs"]}
        except (LookupError, TypeError, ValueError):
            raise self.refusal("its answer has no probabilities") from None
        shares = {token: listed.get(token, 0.0) for token in tokens}
        pieces = dict([*tokens])
        if any(pieces.get(number, piece) != piece for number, piece in listed):
            raise LookupError("the same number is another token")
        if (known := sum(shares.values())) < LEAST_KNOWN:
            raise self.refusal("it ignores the bias of tokens")
        return {token: share / known for token, share in shares.items()}

    def refusal(self, why: str) -> LLMFormError:
        """Return the error for a server that cannot be asked this way, and note it in the target."""
        target = self._client.target
        problem = (
            f"{target.model} at {target.address} gives no probabilities of labels ({why}); the reply style is now list"
        )
        if "scores" not in target.refused:
            self._client.target = replace(target, refused=target.refused | {"scores"})
            logger.warning("%s. To avoid this, set REPLY_STYLE=list", problem)
        return LLMFormError(problem)

    def _request(self, path: str, fields: dict[str, Any]) -> ServerRequest:
        target = self._client.target
        body = orjson.dumps({"model": target.model, **fields})
        return ServerRequest("POST", f"{target.server_url}{path}", body, self._timeout_s)

    def checked(self, status: int, body: bytes) -> dict[str, Any]:
        """Return the fields of a response; raise LLMError if it is not an answer."""
        if status in NOT_OFFERED:
            raise self.refusal(f"HTTP {status}")
        if status != 200:
            parse_chat_response(self._client.target, status, body, self._messages)
        return json_object(body)


class _VllmReading(_Reading):
    """The same requests for vLLM. A token's text here is its spelling in the vocabulary."""

    def _prompt_request(self, messages: list[Message]) -> ServerRequest:
        return self._request("/tokenize", vllm.prompt_body(messages, WITHOUT_THINKING))

    def _prompt(self, answer: dict[str, Any]) -> list[str | int]:
        try:
            tokens = vllm.read_tokens(answer)
        except (LookupError, TypeError, ValueError):
            return []
        self.prompt_tokens = len(tokens)
        self.spelled = {number: name.encode() for number, name in tokens}
        return [number for number, _ in tokens]

    def _tokens_request(self, text: str) -> ServerRequest:
        return self._request("/tokenize", vllm.text_body(text))

    def _tokens(self, answer: dict[str, Any]) -> tuple[list[Token], list[list[bytes]]]:
        tokens = vllm.read_tokens(answer)
        return [(number, name.encode()) for number, name in tokens], vllm.pieces_of([name for _, name in tokens])

    def _shares(self, before: list[str | int], tokens: Mapping[Token, Any]) -> Asked[dict[Token, float]]:
        """Return the probability of each of *tokens* after *before*; they sum to 1. More than vLLM takes are asked in parts."""
        found: dict[int, float] = {}
        numbers = _numbers([*tokens])
        for start in range(0, len(numbers), vllm.MOST_IDS):
            body = vllm.probability_body(before, numbers[start : start + vllm.MOST_IDS])
            status, answer = yield self._request("/v1/completions", body)
            if vllm.refuses_probabilities(status, answer):
                raise self.refusal("it refuses logprob_token_ids")
            fields = self.checked(status, answer)
            self.calls += 1
            try:
                found |= vllm.read_logprobs(fields)
            except (LookupError, TypeError, ValueError, AttributeError):
                raise self.refusal("its answer has no probabilities") from None
        if not found.keys() >= {*numbers}:
            raise self.refusal("it ignores logprob_token_ids")
        highest = max(found[number] for number in numbers)
        weights = {token: math.exp(found[token[0]] - highest) for token in tokens}
        total = sum(weights.values())
        return {token: weight / total for token, weight in weights.items()}


def _slices(tokens: list[Token], readings: list[list[bytes]], text: bytes, starts: list[int]) -> list[Tokens]:
    """Return *tokens* cut before each of *starts* (bytes of *text*, which one of *readings* spells); without what follows the last one.

    Raises:
        ValueError: None spells it, or no token begins at a start.
    """
    for pieces in readings:
        joined = b"".join(pieces)
        if joined.endswith(text):  # some tokenizers put a space first
            edges = list(itertools.accumulate(map(len, pieces), initial=len(text) - len(joined)))
            cuts = [0, *(edges.index(start) for start in starts)]
            return [tuple(tokens[one:other]) for one, other in itertools.pairwise(cuts)]
    raise ValueError("the tokens do not spell the text")


def _shared(sequences: Sequence[Tokens]) -> Tokens:
    """Return the tokens with which all *sequences* begin."""
    columns = zip(*sequences, strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _bytes(piece: str | list[int]) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(piece)


def _numbers(tokens: Sequence[Token]) -> list[int]:
    return [number for number, _ in tokens]
