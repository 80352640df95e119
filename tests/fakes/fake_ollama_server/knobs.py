"""Settings of the fake, all changeable while it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

_CHOICES: dict[str, tuple[Any, ...]] = {
    "era": ("new", "old"),
    "latency": (None, "lognormal"),
    "latency_key": ("index", "text"),
    "template_path": (None, "native", "rendered"),
}


@dataclass(frozen=True, slots=True)
class Knobs:
    """Every knob with its default; the docstring of ``tests/fakes/fake_ollama.py`` says what each does."""

    slots: int = 4
    era: str = "new"
    version: str | None = None
    models: Sequence[str | Mapping[str, Any]] | None = None
    template_path: str | None = None
    latency: str | None = None
    latency_s: float = 0.0
    mean_s: float = 1.0
    sigma: float = 0.5
    seed: int = 0
    latency_key: str = "index"
    prompt_eval_share: float = 0.3
    prefix_cache: bool = True
    stream_chunks: int = 8
    load_delay_s: float = 0.0
    load_error: str | None = None
    max_queue: int = 512
    max_loaded_models: int = 3
    keep_alive_s: float = 300.0
    default_num_ctx: int = 4096
    prompt_eval_count: int | None = None
    chars_per_token: float = 4.0
    most_ctx: int | None = None
    vram_share: float = 1.0
    ignore_truncate: bool = False
    user_message: str | int = "longest"
    logprobs: Mapping[str, float] | str | None = None
    array_noise: float = 0.0
    refuses_arrays: bool = False
    check_host: bool = True
    record: bool = True
    record_limit: int = 10_000
    faults: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def reported_version(self) -> str:
        """The answer of ``/api/version``."""
        return self.version or ("0.33.0" if self.era == "new" else "0.24.0")

    def updated(self, changes: Mapping[str, Any]) -> "Knobs":
        """A copy with *changes*.

        Raises:
            ValueError: A name is unknown or a value is not one of the allowed ones.
        """
        known = {knob.name for knob in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"unknown knob {name!r}; use one of {', '.join(sorted(known))}")
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ValueError(f"knob {name!r} must be one of {_CHOICES[name]}, not {value!r}")
        return replace(self, **changes)
