"""Asks one of several identical conversations, and lets the others have its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from utils.asked_before import AskedBefore
from utils.batch_work import WorkItem
from utils.classification import Outcome
from utils.conversation import Conversation
from utils.fingerprints import input_sha256


@dataclass(slots=True)
class Asking:
    """A document whose answer is wanted, and those with the same text that wait for it.

    *input_hash* is empty where it is asked for itself, whatever others were told.
    """

    item: WorkItem
    conversation: Conversation
    input_hash: str
    followers: list[Asking] = field(default_factory=list)
    since_s: float = field(default_factory=time.monotonic)


Copy = tuple[Asking, Outcome]


class Identical:
    """Decides who is asked; *asked* None: everybody.

    Memory is bounded by the documents in work: those who wait are among them, the rest is in *asked*. Retry rounds are
    asked themselves, with another seed.
    """

    def __init__(self, asked: AskedBefore | None) -> None:
        self._asked = asked
        self._leaders: dict[str, Asking] = {}  # in flight, by input_sha256
        self._carried: dict[bytes, list[Asking]] = {}  # by id_key of the one who is to ask next: who waits for it

    def asking(self, item: WorkItem, conversation: Conversation) -> Asking:
        """Return *item* as somebody who wants an answer, with those who wait for it already."""
        is_shared = self._asked is not None and item.rounds == 0
        input_hash = input_sha256(conversation) if is_shared else ""
        return Asking(item, conversation, input_hash, self._carried.pop(item.key, []))

    def known(self, asking: Asking) -> list[Copy]:
        """Return copies of an answer that is known, for *asking* and for who waits for it; none where it is not known."""
        found = self._asked.find(asking.input_hash) if self._asked is not None and asking.input_hash else None
        if found is None or found[0] == asking.item.document_id:
            return []
        return [(one, _copy(found[1], found[0], one)) for one in (asking, *asking.followers)]

    def waits(self, asking: Asking) -> bool:
        """Whether another one with the same text is in flight: then ``answered`` or ``gave_up`` of that one decides."""
        if not asking.input_hash:
            return False
        leader = self._leaders.setdefault(asking.input_hash, asking)
        if leader is asking:
            return False
        leader.followers += [asking, *asking.followers]
        asking.followers = []
        return True

    def answered(self, asking: Asking, outcome: Outcome) -> list[Copy]:
        """Keep the *outcome* of *asking*; return who waited for it, each with its own copy."""
        if self._asked is not None and asking.input_hash:
            del self._leaders[asking.input_hash]
            self._asked.add(asking.item.document_id, outcome)
        return [(one, _copy(outcome, asking.item.document_id, one)) for one in asking.followers]

    def gave_up(self, asking: Asking) -> list[WorkItem]:
        """Note that *asking* got no answer; return who has to be asked now: the first of those who waited, or nobody."""
        if asking.input_hash:
            del self._leaders[asking.input_hash]
        return self._hand_on(asking.followers)

    def dropped(self, item: WorkItem) -> list[WorkItem]:
        """Note that *item* is not asked after all; return as ``gave_up`` does."""
        return self._hand_on(self._carried.pop(item.key, []))

    def rejected(self, result: dict[str, Any]) -> None:
        """Note that *result* cannot be stored: no further copy shall name its document."""
        made = result["processing_metadata"]
        if self._asked is not None and "copied_from" not in made and "input_sha256" in made:
            self._asked.forget(made["input_sha256"])

    def close(self, *, is_finished: bool) -> None:
        """Give back the file; it goes with a run that *is_finished*, and waits for the one that goes on."""
        if self._asked is not None:
            if is_finished:
                self._asked.remove()
            else:
                self._asked.close()

    def _hand_on(self, waiting: list[Asking]) -> list[WorkItem]:
        if not waiting:
            return []
        heir, *others = waiting
        if others:
            self._carried[heir.item.key] = others
        return [heir.item]


def _copy(outcome: Outcome, source_id: Any, asking: Asking) -> Outcome:
    """Return *outcome* as that of a document that was not asked itself."""
    duration_ms = round((time.monotonic() - asking.since_s) * 1000)
    return replace(
        outcome, attempts=0, duration_ms=duration_ms, prompt_tokens=None, reply_tokens=None, copied_from=(source_id,)
    )
