"""The choice of the cases of a test that ``make test`` has; ``make torture`` has the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def mostly_thorough(cases: Iterable[Any], every: int, *, first: int = 0) -> list[Any]:
    """Return *cases* for ``parametrize``; each *every*-th from place *first* on is usual, the others are thorough.

    A case that is a tuple holds the values of several parameters.
    """
    chosen = []
    for place, case in enumerate(cases):
        values = case.values if isinstance(case, ParameterSet) else case if isinstance(case, tuple) else (case,)
        name = case.id if isinstance(case, ParameterSet) else None
        marks = () if place % every == first else pytest.mark.thorough
        chosen.append(pytest.param(*values, id=name, marks=marks))
    return chosen
