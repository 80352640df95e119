"""``cli.py review``: show conversations with the labels of the model, and store what a person says about them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pwd
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from commands.flags import Command, positive
from commands.keyboard import END, ENTER, ERASE, TAB, Keyboard, keys_of_stdin
from config import Settings, load_taxonomy
from config.review_settings import load_review_settings
from domain.conversation import SPEAKER
from domain.text import counted
from error_handler import ConfigurationError, ExitCode, ReviewConflictError, StoreError
from mongo_client import DocumentStore
from review.agreement import Agreement, agreement
from review.corrections import CorrectionStore
from review.label_keys import NOTE, QUIT, SKIP, UNDO, label_keys
from review.labels import Label, same_label
from review.queue import Options, ReviewItem, ReviewQueue
from utils.process import number_between

MAX_REVIEWER_CHARACTERS = 64
GIVE_BACK_S = 2.0  # a person waits for the prompt of the shell
STYLES = {"customer": "bold cyan", "agent": "green", "unknown": "yellow"}

share = number_between(float, 0, 1)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("review")
    group.add_argument("--reviewer", metavar="NAME", help="name stored with each decision (the login name)")
    group.add_argument("--limit", type=positive, metavar="N", help="stop after N conversations")
    group.add_argument(
        "--control",
        dest="control_share",
        type=share,
        metavar="SHARE",
        help="share of the turns that show a random conversation, 0 to 1 (REVIEW_CONTROL_SHARE; 0.2)",
    )
    group.add_argument(
        "--double",
        dest="double_share",
        type=share,
        metavar="SHARE",
        help="share of the conversations that two reviewers decide, 0 to 1 (REVIEW_DOUBLE_SHARE; 0.1)",
    )
    group.add_argument(
        "--agreement", action="store_true", help="print Cohen's kappa of each two reviewers; review nothing"
    )


async def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    names = ("control_share", "double_share")
    options = Options.of(load_review_settings(**{name: getattr(arguments, name) for name in names}))
    reviewer = (arguments.reviewer or _login_name()).strip()
    if not reviewer or len(reviewer) > MAX_REVIEWER_CHARACTERS or not reviewer.isprintable():
        raise ConfigurationError(f"--reviewer needs 1 to {MAX_REVIEWER_CHARACTERS} printable characters.")
    console = Console(soft_wrap=False, emoji=False, highlight=False)
    store = DocumentStore(settings)
    try:
        await store.check()
        if arguments.agreement:
            _print_agreement(console, await agreement(CorrectionStore(store, settings).read_all()))
            return ExitCode.DONE
        queue = ReviewQueue(store, settings, load_taxonomy(settings.taxonomy_file), options)
        await queue.open()
        with keys_of_stdin() as keyboard:
            session = Session(queue, reviewer, console, keyboard)
            try:
                await session.run(arguments.limit)
            except asyncio.CancelledError:  # Ctrl-C
                with contextlib.suppress(StoreError, TimeoutError):
                    await asyncio.wait_for(session.give_back(), GIVE_BACK_S)
                raise
    finally:
        await store.close()
    console.print(session.summary(queue.corrections.name), markup=False, soft_wrap=True)
    return ExitCode.DONE


def _login_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # containers run as a number without a name
        return f"uid-{os.getuid()}"


@dataclass
class Draft:
    """The labels that the reviewer has chosen so far for *item*, and the *place* of the marked field."""

    item: ReviewItem
    chosen: dict[str, Label] = field(default_factory=dict)
    place: int = 0
    note: str = ""

    def label(self, name: str) -> Label | None:
        """Return the label of the field *name*: the chosen one, else that of the model."""
        return self.chosen.get(name, self.item.labels.get(name))


class Session:
    """One reviewer at the keyboard."""

    def __init__(self, queue: ReviewQueue, reviewer: str, console: Console, keyboard: Keyboard) -> None:
        self._queue = queue
        self._reviewer = reviewer
        self._console = console
        self._keyboard = keyboard
        self._fields = queue.taxonomy.field_names
        self._keys = {name: label_keys(queue.taxonomy.names(name)) for name in self._fields}
        self._shown: ReviewItem | None = None
        self._saved: list[tuple[int, int]] = []  # accepted and corrected labels of each conversation

    async def run(self, limit: int | None) -> None:
        """Show one conversation after the other until the reviewer quits, *limit* are decided, or none is left."""
        if self._console.is_terminal:
            self._console.print("Looking for conversations that are worth a look ...", markup=False)
        item = self._shown = await self._queue.next(self._reviewer)
        while item is not None:
            draft = Draft(item)
            self._show(draft)
            action = await self._decide(draft)
            if action == QUIT:
                await self.give_back()
                return
            if action == UNDO:
                item = self._shown = await self._undo(item)
                continue
            await (self._save(draft) if action == ENTER else self._queue.skip(self._reviewer, item.source_id))
            if limit is not None and len(self._saved) >= limit:
                return
            item = self._shown = await self._queue.next(self._reviewer)
        self._console.print("No conversation is left to review.", markup=False)

    async def give_back(self) -> None:
        """End the lease on the conversation that is shown."""
        if self._shown is not None:
            await self._queue.skip(self._reviewer, self._shown.source_id)

    async def _decide(self, draft: Draft) -> str:
        """Read keys until *draft* is decided; return ENTER, SKIP, QUIT, or UNDO to go back to the last conversation."""
        while draft.place < len(self._fields):
            key = await self._keyboard.key()
            name = self._fields[draft.place]
            if key in (END, QUIT):
                return QUIT
            if key in (ENTER, SKIP):
                return key
            if key in (UNDO, ERASE):
                if not draft.place and not draft.chosen:
                    return UNDO
                if name not in draft.chosen:
                    draft.place = max(0, draft.place - 1)
                draft.chosen.pop(self._fields[draft.place], None)
            elif key == TAB:
                draft.place = (draft.place + 1) % len(self._fields)
            elif key == NOTE:
                self._console.print("Note, then Enter: ", end="", markup=False)
                draft.note = await self._keyboard.line()
            elif key in self._keys[name]:
                self._choose(draft, name, self._keys[name][key])
            else:
                continue
            self._show_fields(draft)
        return ENTER

    def _choose(self, draft: Draft, name: str, label: str) -> None:
        """Set the label of the field and go to the next; a field with several labels gets or loses *label* instead."""
        current = draft.label(name)
        if current is None and self._queue.taxonomy.field(name).is_multiple:
            current = []
        if isinstance(current, list):
            draft.chosen[name] = [one for one in current if one != label] + ([] if label in current else [label])
        else:
            draft.chosen[name] = label
            draft.place += 1

    async def _save(self, draft: Draft) -> None:
        labels = {name: label for name in self._fields if (label := draft.label(name)) is not None}
        try:
            await self._queue.decide(self._reviewer, draft.item.source_id, labels, draft.note)
        except ReviewConflictError as exc:
            self._console.print(f"Not saved: {exc}", style="red", markup=False)
            return
        corrected = sum(not same_label(label, draft.item.labels.get(name)) for name, label in labels.items())
        self._saved.append((len(labels) - corrected, corrected))

    async def _undo(self, shown: ReviewItem) -> ReviewItem | None:
        item = await self._queue.undo(self._reviewer)
        if item is None:
            self._console.print("Nothing to undo.", markup=False)
            return shown
        self._console.print("The last decision is removed; decide again.", markup=False)
        del self._saved[-1:]  # it may be of an earlier session
        return item

    def _show(self, draft: Draft) -> None:
        self._console.clear()
        number = draft.item.conversation.conversation_number
        self._console.rule(Text(f"conversation {number}" if number else "conversation"))
        for turn in draft.item.conversation.turns:
            speaker = Text(f"{SPEAKER[turn.sender]}: ", STYLES[turn.sender])
            self._console.print(speaker.append(turn.text, "default"))
        self._show_fields(draft)

    def _show_fields(self, draft: Draft) -> None:
        self._console.print()
        for place, name in enumerate(self._fields):
            label = draft.label(name)
            shown = ", ".join(label) if isinstance(label, list) else label or "(none)"
            line = Text("> " if place == draft.place else "  ", "bold").append(f"{name:<12}").append(shown, "bold")
            if name in draft.chosen and not same_label(draft.chosen[name], draft.item.labels.get(name)):
                line.append(" (corrected)", "yellow")
            self._console.print(line)
        if draft.place < len(self._fields):
            keys = self._keys[self._fields[draft.place]]
            labels = [Text(f"{key} {label}", "cyan") for key, label in keys.items()]
            self._console.print(Padding(Columns(labels, padding=(0, 3)), (0, 0, 0, 2)))
            actions = f"Enter accept   Tab next field   {UNDO} undo   {NOTE} note   {SKIP} skip   {QUIT} quit"
            self._console.print(Text(f"  {actions}", "dim"))
        if draft.note:
            self._console.print(Text(f"  note: {draft.note}", "dim"))

    def summary(self, collection: str) -> str:
        """Return what was done, in one line."""
        accepted, corrected = (sum(counts) for counts in zip((0, 0), *self._saved, strict=True))
        return (
            f"{counted(len(self._saved), 'conversation')} reviewed by {self._reviewer}: {counted(accepted, 'label')} accepted, "
            f"{corrected} corrected. Stored in {collection}."
        )


def _print_agreement(console: Console, found: list[Agreement]) -> None:
    if not found:
        console.print(
            "No conversation was decided by two reviewers yet; --double sets the share that is.", markup=False
        )
        return
    table = Table("field", "reviewers", "n", "agreed", "kappa", "95 % interval", box=None)
    for one in found:
        kappa = one.kappa
        value = "undefined" if kappa.value is None else f"{kappa.value:.2f}"
        interval = "-" if kappa.interval is None else f"{kappa.interval[0]:.2f} to {kappa.interval[1]:.2f}"
        names = Text(", ".join(one.reviewers))
        table.add_row(one.field, names, str(kappa.n), f"{kappa.agreed:.0%}", value, interval)
    console.print(table)


COMMAND = Command("review", "Accept or correct labels, the most doubtful first; see docs/review.md.", _add_flags, _run)
