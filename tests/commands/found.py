"""Looks into the findings of a diagnosis."""

from __future__ import annotations

from commands.diagnosis.findings import Finding


def the_one(found: list[Finding], words: str) -> Finding:
    """Return the one finding that has *words*."""
    matching = [finding for finding in found if words in finding.sentence]
    assert len(matching) == 1, found
    return matching[0]
