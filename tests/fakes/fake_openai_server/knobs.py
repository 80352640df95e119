"""Settings of the fake, all changeable while it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Knobs:
    """Every knob with its default; the docstring of ``tests/fakes/fake_openai.py`` says what each does."""

    api_keys: Sequence[str] | None = None
    models: Sequence[str] | None = None
    validate_s: float = 5.0
    run_s: float = 600.0
    finalize_s: float = 10.0
    cancel_s: float = 60.0
    time_scale: float = 0.0
    polls_until_done: int = 0
    list_lag: int = 0
    enqueued_token_limit: int | None = None
    max_lines: int = 50_000
    max_file_bytes: int = 200_000_000
    max_upload_bytes: int = 512_000_000
    max_embedding_inputs: int = 50_000
    context_length: int = 128_000
    reasoning: bool = False
    reply: str | None = None
    shuffle: bool = True
    seed: int = 0
    latency_s: float = 0.0
    slots: int = 256
    dimensions: int | None = None
    max_inputs: int = 2_048
    max_input_tokens: int = 8_192
    max_request_tokens: int = 300_000
    record: bool = True
    record_limit: int = 10_000
    faults: Sequence[Mapping[str, Any]] = field(default=())

    def updated(self, changes: Mapping[str, Any]) -> "Knobs":
        """A copy with *changes*.

        Raises:
            ValueError: A name is unknown.
        """
        known = {knob.name for knob in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"unknown knob {unknown[0]!r}; use one of {', '.join(sorted(known))}")
        return replace(self, **changes)
