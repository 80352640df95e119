"""The running audit of a student."""

from __future__ import annotations

import orjson

from student.audit import AUDIT_SHARE, Audit


def test_state_survives_json() -> None:
    """A stored audit goes on where it was."""
    audit = Audit(0.95)
    for agreed in (True, False, False, True):
        audit.record(agreed)
    again = Audit.from_state(orjson.loads(orjson.dumps(audit.state())))
    assert again == audit


def test_disagreement_sends_everything_to_the_model_until_it_is_outweighed() -> None:
    """One disagreement raises the share to 1; agreement lowers it again."""
    audit = Audit(0.95)
    assert audit.share == AUDIT_SHARE
    audit.record(False)
    assert audit.share == 1
    for _ in range(20):
        audit.record(True)
    assert audit.share == AUDIT_SHARE
