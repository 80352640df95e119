"""Settings of charts, for ``cli.py report`` and the page of the service."""

from __future__ import annotations

from datetime import UTC, tzinfo
from functools import partial
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import field_validator

from config.loading import PartSettings, load_part


class ReportSettings(PartSettings):
    """The time zone of reports; ``.env.example`` explains it."""

    model_config = PartSettings.model_config | {"env_prefix": "REPORT_"}

    time_zone: str = "UTC"

    @field_validator("time_zone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            if value != "UTC":  # known also where no time zones are installed
                ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
            raise ValueError(
                "must be a time zone such as Europe/Berlin (if it is one, install the time zones: tzdata)"
            ) from exc
        return value

    @property
    def zone(self) -> tzinfo:
        """The time zone as an object."""
        return UTC if self.time_zone == "UTC" else ZoneInfo(self.time_zone)


load_report_settings = partial(load_part, ReportSettings)
