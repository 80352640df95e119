"""Reads the error text of a model server: a prompt that is too long, a role or a field that it does not know. No I/O.

Servers share no codes for these, so their wording decides. The samples are from vLLM, SGLang, TGI, llama.cpp,
llama-cpp-python, LM Studio, Ollama, OpenAI and their proxies; tests/model_server/test_refusals.py holds them.
"""

from __future__ import annotations

import re

from error_handler import LLMContextError

_SIGNS = ("exceed_context_size", "context_length_exceeded", "context length", "context size", "context window")
_SIZE_WORDS = re.compile(r"token|length|context")
_NUMBER = r"(\d[\d,_]{0,10})(?!\w|\.\d)"
# The size of the window follows a word for a limit, without "exceeded" or the end of a sentence between them.
_WINDOW = (
    re.compile(rf'n_ctx\\*"?\s*[:=]\s*{_NUMBER}'),
    re.compile(
        rf'(?:context|maximum|\bmax\b|window|limit|less than|<=|>)(?:(?!exceed|\bby\b)[^.;"\d]){{0,60}}?\b{_NUMBER}'
    ),
    re.compile(rf"\b{_NUMBER}(?:\s+tokens?)?\s+(?:maximum|max|limit|context)"),
)
_COUNT = re.compile(rf"(?<![\w.]){_NUMBER}")
_SYSTEM_ROLE = re.compile(
    r"(?:system|developer) (?:role|message|prompt|instruction)s?\b[^.]{0,40}(?:not |n't |unsupported|unexpected)"
    r"|(?:not|n't) support[^.]{0,20} system (?:role|message|prompt)|only user(?:,| and| or)[^.]{0,30}assistant"
    r"|roles must alternate|(?:unsupported|unknown|invalid|unexpected)[^.]{0,20} role\b"
    r"|role(?:(?!system).){0,60}'user'(?:,| or| and) ?'assistant'(?!.{0,20}'system')"
)
_UNKNOWN_FIELD = re.compile(
    r"extra|unrecognized|unrecognised|unknown|unexpected|unsupported|not permitted|not supported"
)
_FIELD_SIGNS = {
    "chat_template_kwargs": re.compile(r"chat[ _]?template"),
    "reasoning_effort": re.compile(r"reasoning|think"),
}

# OpenAI's reasoning models, whatever a deployment calls them: "Unsupported parameter: 'max_tokens' ... Use
# 'max_completion_tokens' instead", "'temperature' does not support 0 with this model".
_REASONING_SIGNS = {
    "max_tokens": re.compile(r"max_completion_tokens.{0,20}instead|unsupported parameter\W{1,6}max_tokens"),
    "temperature": re.compile(r"unsupported (?:parameter|value)\W{1,6}temperature|temperature\W{1,4}does not support"),
}

# OpenAI: "schema must be a JSON Schema of 'type: "object"', got 'type: "array"'"; llama.cpp: "failed to parse grammar",
# "Unrecognized schema"; vLLM: "The provided JSON schema contains features not supported by xgrammar", "Failed to
# convert the grammar"; Ollama up to 0.24: "invalid JSON schema in format".
_SCHEMA_SIGNS = re.compile(
    r"schema must be|(?:invalid|unrecognized|unsupported|provided|supported) (?:json )?schema|schema (?:is )?not supported"
    r"|prefixitems|(?:parse|compile|convert|initialize|unsupported|invalid)[^.]{0,30}\b(?:grammar|samplers?)\b"
)


def context_refusal(text: str, answer_tokens: int) -> LLMContextError | None:
    """Return the error if *text* refuses a prompt for its length: it says so, or names two token counts.

    *answer_tokens* were requested for the answer, which some servers count in.
    """
    lowered = text.lower()
    if "rate limit" in lowered or "per minute" in lowered:
        return None
    numbers = [_value(found) for found in _COUNT.findall(lowered)]
    window = next((_value(found[1]) for pattern in _WINDOW if (found := pattern.search(lowered))), None)
    prompt = None
    if window is not None and _SIZE_WORDS.search(lowered):
        prompt = _prompt_tokens(numbers, window, answer_tokens)
        if prompt is not None and prompt + answer_tokens <= window:  # such a prompt fits, so the order is the other one
            prompt, window = window, prompt
    if prompt is None and not any(sign in lowered for sign in _SIGNS):
        return None
    return LLMContextError(
        "the conversation is longer than the model's context window; raise OLLAMA_NUM_CTX",
        prompt_tokens=prompt,
        window_tokens=window,
    )


def _prompt_tokens(numbers: list[int], window: int, answer_tokens: int) -> int | None:
    """Return the size of the prompt among the *numbers* of a refusal, which may also name the answer and sums with it."""
    others = set(numbers) - {window, window - answer_tokens, answer_tokens}
    parts = {number for number in others if number - answer_tokens not in others}
    # Smaller numbers are codes and versions: such a prompt would not be refused.
    return max((number for number in parts if number > window - answer_tokens), default=_only(parts, window))


def _only(numbers: set[int], window: int) -> int | None:
    """Return the one number of at least a tenth of *window*, which then is the limit; None if there is another number."""
    large = [number for number in numbers if number * 10 >= window]
    return large[0] if len(large) == 1 else None


def _value(digits: str) -> int:
    return int(digits.replace(",", "").replace("_", ""))


def refuses_system_role(text: str) -> bool:
    """Return whether *text* says that the model's chat template has no system role."""
    return _SYSTEM_ROLE.search(text.lower()) is not None


def refuses_schema(text: str) -> bool:
    """Return whether *text* refuses the JSON schema of the request, whatever its reason."""
    return _SCHEMA_SIGNS.search(text.lower()) is not None


def refused_fields(text: str, sent: set[str]) -> set[str]:
    """Return which of the optional fields *sent* the server refuses in *text*; all of them if it names none."""
    lowered = text.lower()
    named = {name for name in sent if _FIELD_SIGNS[name].search(lowered)}
    return named or (sent if _UNKNOWN_FIELD.search(lowered) else set())


def refused_options(text: str) -> set[str]:
    """Return which of ``max_tokens`` and ``temperature`` the server refuses in *text*, as reasoning models do."""
    lowered = text.lower()
    return {name for name, sign in _REASONING_SIGNS.items() if sign.search(lowered)}
