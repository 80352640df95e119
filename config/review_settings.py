"""Settings of the review queue, for ``cli.py review`` and the page ``/review``."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from config.loading import PartSettings, load_part


class ReviewSettings(PartSettings):
    """Which conversations are reviewed, and for how long one is held; ``.env.example`` explains each."""

    model_config = PartSettings.model_config | {"env_prefix": "REVIEW_"}

    control_share: float = Field(0.2, ge=0, le=1)
    double_share: float = Field(0.1, ge=0, le=1)
    lease_s: float = Field(900.0, ge=1, le=86_400)


load_review_settings = partial(load_part, ReviewSettings)
