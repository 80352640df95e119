"""The audit on disk: one row for each conversation, and a running test that is their replay."""

from __future__ import annotations

import hashlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from error_handler import StateDirectoryError
from student.audit import Audit
from student.audit_log import AuditLog

HASHES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(2000)]


def test_comparison_counts_once_in_the_file_and_in_the_running_test(tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    with AuditLog(path, "student-0", Audit(0.9)) as log:
        for number, key in enumerate(HASHES[:6]):
            log.record(key, 0.2, agreed=number != 3)
            log.record(key, 0.2, agreed=True)  # the same conversation again
    assert (log.audit.audited, log.audit.disagreed) == (6, 1)
    with AuditLog(path, "student-0", Audit(0.9)) as again:
        assert again.audit == log.audit
    for student, promise in (("student-1", 0.9), ("student-0", 0.95)):
        with AuditLog(path, student, Audit(promise)) as log:
            assert log.audit.audited == 0


def test_one_comparison_breaks_the_promise(tmp_path: Path) -> None:
    """Calls in flight are compared at the same time, and the withdrawal is told once."""
    with AuditLog(tmp_path / "audit.sqlite", "student-0", Audit(0.9)) as log, ThreadPoolExecutor(4) as threads:
        broken = list(threads.map(lambda key: log.record(key, 1.0, agreed=False), HASHES[:40]))
    assert broken.count(True) == 1


def test_comparison_keeps_the_share_with_which_it_was_drawn(tmp_path: Path) -> None:
    """One that was drawn under suspicion and ends later stands for no conversation that was taken; the replay is the same."""
    path = tmp_path / "audit.sqlite"
    with AuditLog(path, "student-0", Audit(0.9)) as log:
        log.record(HASHES[0], 0.2, agreed=True)
        log.record(HASHES[1], 1.0, agreed=True)
        assert log.audit.taken == pytest.approx(4)
    with AuditLog(path, "student-0", Audit(0.9)) as log:
        assert log.audit.taken == pytest.approx(4)


def test_audit_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its comparisons count, but stand for no conversation that was taken."""
    path = tmp_path / "audit.sqlite"
    with AuditLog(path, "student-0", Audit(0.9)) as log:
        log.record(HASHES[0], 0.2, agreed=False)
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE comparisons DROP COLUMN share")
        db.execute("PRAGMA user_version=1")
    with AuditLog(path, "student-0", Audit(0.9)) as log:
        assert (log.audit.audited, log.audit.disagreed, log.audit.taken) == (1, 1, 0)
        log.record(HASHES[1], 0.5, agreed=True)


def test_hash_draws_about_the_share_and_the_same_ones_again(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.sqlite", "student-0", Audit(0.9)) as log:
        drawn = [key for key in HASHES if log.drawn(key)]
        assert drawn == [key for key in HASHES if log.drawn(key)]
        assert abs(len(drawn) / len(HASHES) - log.audit.share) < 0.03
        for key in HASHES[:50]:
            log.record(key, 0.2, agreed=False)
        assert log.audit.is_broken
        assert all(map(log.drawn, HASHES))
    with AuditLog(tmp_path / "audit.sqlite", "student-1", Audit(0.9)) as other:
        assert [key for key in HASHES if other.drawn(key)] != drawn


def test_text_that_comes_each_day_is_drawn_at_last(tmp_path: Path) -> None:
    """And its comparison counts once a day."""
    days = [f"day {number}" for number in range(120)]
    current = [""]
    with AuditLog(tmp_path / "audit.sqlite", "student-0", Audit(0.9), today=lambda: current[0]) as log:
        drawn = 0
        for current[0] in days:
            drawn += log.drawn(HASHES[0]) is not None
        assert 0 < drawn < 40
        for current[0] in days[:2]:
            log.record(HASHES[0], 0.2, agreed=True)
            log.record(HASHES[0], 0.2, agreed=True)
        assert log.audit.audited == 2


def test_training_again_does_not_undo_a_withdrawal(tmp_path: Path) -> None:
    """The next student takes nothing until it is cleared, however often one trains, and what broke the promise withdraws it sooner."""
    path = tmp_path / "audit.sqlite"
    with AuditLog(path, "student-0", Audit(0.9)) as log:
        needed = next(number for number, key in enumerate(HASHES, 1) if log.record(key, 1.0, agreed=False))
    for name in ("student-1", "student-2"):
        with AuditLog(path, name, Audit(0.9)) as log:
            assert not log.audit.is_broken
            assert log.audit.share == 1
            assert "disagreements of the student before" in log.audit.sentence()
            log.record(HASHES[0], 1.0, agreed=True)
    with AuditLog(path, "student-3", Audit(0.9)) as log:
        again = next(number for number, key in enumerate(HASHES, 1) if log.record(key, 1.0, agreed=False))
    assert again < needed
    with AuditLog(path, "student-4", Audit(0.9)) as log:
        cleared = next(
            number for number, key in enumerate(HASHES, 1) if log.record(key, 1.0, agreed=True) or log.audit.share < 1
        )
    assert 40 < cleared < 70
    for name, is_broken in (("student-4", False), ("student-5", False), ("student-0", True), ("student-3", True)):
        with AuditLog(path, name, Audit(0.9)) as log:
            assert log.audit.is_broken == is_broken
            assert not log.audit.is_suspicious
    with AuditLog(path, "student-4", Audit(0.95)) as log:
        assert not log.audit.is_suspicious


def test_damaged_audit_is_refused(tmp_path: Path) -> None:
    """Without it nobody knows whether the promise holds."""
    path = tmp_path / "audit.sqlite"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(StateDirectoryError, match="train the student again"):
        AuditLog(path, "student-0", Audit(0.9))
