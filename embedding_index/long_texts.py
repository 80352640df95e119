"""Texts that are sent in pieces: what each waits for. No I/O; the caller lets one thread in at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from embedding_index.call_queue import Piece


class LongTexts:
    """Which long texts (content hashes) wait for which pieces; a piece may be one of several texts, or divided again."""

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._missing: dict[str, set[str]] = {}
        self._wholes: dict[str, list[str]] = defaultdict(list)

    def add(self, whole: str, pieces: Sequence[Piece], missing: Iterable[str]) -> None:
        """The text *whole* consists of *pieces*; the vectors of those *missing* (at least one) are still to come."""
        self._pieces[whole] = tuple(pieces)
        self._missing[whole] = set(missing)
        for piece in self._missing[whole]:
            self._wholes[piece].append(whole)

    def pieces(self, whole: str) -> tuple[Piece, ...]:
        """Return the pieces of *whole* in their order."""
        return self._pieces[whole]

    def arrived(self, piece: str) -> list[str]:
        """Return the texts that have all their pieces now that *piece* has its vector."""
        complete = []
        for whole in self._wholes.pop(piece, ()):
            missing = self._missing.get(whole)
            if missing is not None:
                missing.discard(piece)
                if not missing:
                    del self._missing[whole]
                    complete.append(whole)
        return complete

    def failed(self, piece: str) -> list[str]:
        """Return the texts that will have no vector because *piece* has none, each once."""
        return [whole for whole in self._wholes.pop(piece, ()) if self._missing.pop(whole, None) is not None]
