"""The parameters of a request depend on what OpenAI's model takes."""

from __future__ import annotations

import pytest

from openai_batch.documents import request_body
from openai_batch.job_config import OpenAIConfig
from tests.fakes.fake_openai import FakeOpenAI
from tests.openai_batch.openai_job import Job


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt-4o-mini", {"max_tokens", "temperature"}),
        ("ft:gpt-4.1-mini:shop::x", {"max_tokens", "temperature"}),
        ("mistral-small-latest", {"max_tokens", "temperature"}),
        ("gpt-5-chat-latest", {"max_completion_tokens", "temperature"}),
        ("gpt-5-mini", {"max_completion_tokens"}),
        ("gpt-5.1-2025-11-13", {"max_completion_tokens"}),
        ("o4-mini", {"max_completion_tokens"}),
        ("o3", {"max_completion_tokens"}),
        ("ft:o4-mini-2025-04-16:shop::x", {"max_completion_tokens"}),
    ],
)
def test_reasoning_models_get_no_temperature_and_the_new_limit(model: str, names: set[str]) -> None:
    body = request_body(OpenAIConfig(model=model), [])
    assert set(body) - {"model", "messages"} == names


def test_dry_run_says_how_much_room_a_reasoning_model_needs(job: Job) -> None:
    job.documents.insert_one({"ai_status": "pending", "text": "Where is it?"})
    out = job.cli("run", "--dry-run", OPENAI_MODEL="gpt-5-mini").out
    assert '"max_completion_tokens"' in out
    assert '"temperature"' not in out
    assert "set OPENAI_MAX_TOKENS to 2000 or more" in out
    assert (
        "OPENAI_MAX_TOKENS to"
        not in job.cli("run", "--dry-run", OPENAI_MODEL="gpt-5-mini", OPENAI_MAX_TOKENS="4000").out
    )


def test_reasoning_model_behind_any_name_is_learned_from_its_refusals(job: Job, openai: FakeOpenAI) -> None:
    """Refused lines cost nothing; their documents are sent again in the same run, with the fields that it takes."""
    openai.configure(reasoning=True)
    job.fill(12)
    result = job.run()
    assert job.statuses() == {"completed": 12}
    assert openai.stats()["lines_billed"] == 12
    assert result.failed == 0


@pytest.mark.thorough
def test_refused_options_are_final_after_the_last_attempt(job: Job, openai: FakeOpenAI) -> None:
    """A server that refuses both names of the limit is not asked for ever."""
    text = "Unsupported parameter: 'max_tokens' is not supported with this model."
    openai.configure(faults=[{"kind": "line_status", "status": 400, "code": "unsupported_parameter", "message": text}])
    job.fill(3)
    job.run()
    assert job.statuses() == {"failed": 3}
