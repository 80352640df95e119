"""The meaning of the error texts of model servers."""

from __future__ import annotations

import pytest

from model_server.protocol import NUM_PREDICT
from model_server.refusals import context_refusal, refused_fields, refuses_system_role

MAXIMUM = "This model's maximum context length is 4096 tokens."


@pytest.mark.parametrize(
    ("text", "prompt_tokens", "window_tokens"),
    [
        pytest.param(
            f"{MAXIMUM} However, you requested 5200 tokens (4500 in the messages, 700 in the completion).",
            *(4500, 4096),
            id="vLLM",
        ),
        pytest.param(f"{MAXIMUM} However, your request has 4500 input tokens.", 4500, 4096, id="vLLM 0.9"),
        pytest.param(
            f"'max_tokens' is too large: 700. {MAXIMUM[:-1]} and your request has 3500 input tokens (700 > 4096 - 3500).",
            *(3500, 4096),
            id="vLLM, no room for the answer",
        ),
        pytest.param(
            "You passed 9000 input tokens and requested 700 output tokens. However, the model's context length is only "
            "4096 tokens, resulting in a maximum input length of 3396 tokens.",
            *(9000, 4096),
            id="A7a",
        ),
        pytest.param(
            "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with context "
            "length of only 4096 tokens",
            *(9000, 4096),
            id="A7c, LM Studio",
        ),
        pytest.param(
            "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens and 700 `max_new_tokens`",
            *(5000, 4096),
            id="TGI",
        ),
        pytest.param("Requested tokens (5000) exceed context window of 4096", 5000, 4096, id="llama-cpp-python"),
        pytest.param(
            "The input (5000 tokens) is longer than the model's context length (4096 tokens).", 5000, 4096, id="SGLang"
        ),
        pytest.param(
            "Prompt contains 5000 tokens and 0 draft tokens, too large for model with 4096 maximum context length",
            *(5000, 4096),
            id="Mistral",
        ),
        pytest.param("prompt is too long: 9000 tokens > 4096 maximum", 9000, 4096, id="greater than"),
        pytest.param(
            "Input tokens exceed the configured limit of 272,000 tokens. Your messages resulted in 300,123 tokens.",
            *(300_123, 272_000),
            id="OpenAI",
        ),
        pytest.param("Prompt length (5000) exceeds maximum input length (4096).", 5000, 4096, id="TensorRT"),
        pytest.param("Context window exceeded: 5000 > 4096 tokens", 5000, 4096, id="the prompt first"),
        pytest.param(MAXIMUM, None, 4096, id="the window only"),
        pytest.param("exceeded the max context length by 904 tokens", None, None, id="the difference"),
    ],
)
def test_refusal_of_a_long_prompt_is_recognised_by_its_numbers(
    text: str, prompt_tokens: int | None, window_tokens: int | None
) -> None:
    """Whatever the wording: the numbers of the answer, and sums with it, are left out."""
    problem = context_refusal(text, NUM_PREDICT)
    assert problem is not None
    assert (problem.prompt_tokens, problem.window_tokens) == (prompt_tokens, window_tokens)


@pytest.mark.parametrize(
    "text",
    [
        "top_logprobs must be between 0 and 20",
        "model requires more system memory (9 GiB) than is available (4 GiB)",
        "max_tokens is too large: 700. This model supports at most 512 completion tokens",
        "Rate limit reached: limit 6000 tokens per minute, requested 9000",
        "invalid temperature 3: maximum is 2",
        "model 'llama-3.1-8b' not found",
    ],
)
def test_other_refusals_with_numbers_are_not_about_the_window(text: str) -> None:
    """A shorter prompt would not help."""
    assert context_refusal(text, NUM_PREDICT) is None


@pytest.mark.parametrize(
    "text",
    [
        "System role not supported",
        "Only user and assistant roles are supported!",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Unsupported role: system",
        "messages[0].role: unexpected value; permitted: 'user', 'assistant'",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
    ],
)
def test_template_without_a_system_role_is_recognised(text: str) -> None:
    """Gemma, Mistral and others."""
    assert refuses_system_role(text)
    assert not refuses_system_role("not enough system memory")


def test_refused_fields_are_those_that_are_named_else_all() -> None:
    """Nothing is dropped because of an unrelated refusal."""
    sent = {"chat_template_kwargs", "reasoning_effort"}
    assert refused_fields("chat_template is not supported for Mistral tokenizers", sent) == {"chat_template_kwargs"}
    assert refused_fields("reasoning_effort: Input should be 'low', 'medium' or 'high'", sent) == {"reasoning_effort"}
    assert refused_fields("Extra inputs are not permitted", sent) == sent
    assert refused_fields("invalid surrogate in the text", sent) == set()
