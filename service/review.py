"""The review queue behind the page ``/review``: its page, and the bodies of its requests and responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from config import Settings, Taxonomy, load_taxonomy
from config.review_settings import load_review_settings
from domain.conversation import Sender
from error_handler import ConfigurationError, RequestError, ReviewConflictError, ReviewLabelError, StoreError
from mongo_client import DocumentStore
from review.label_keys import NOTE, SKIP, UNDO, label_keys
from review.queue import Options, ReviewItem, ReviewQueue
from service import errors
from service.admission import Deadlines
from storage import extended_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
Label = str | list[str]

PAGE_FOLDER = Path(__file__).with_name("review_page")
MAX_NOTE_CHARACTERS = 2000
MAX_ID_CHARACTERS = 4000
MONGODB_ATTEMPTS, MONGODB_TIMEOUT_MS = 2, 5000

_EXAMPLE_LABELS = {"intent": "Order Status", "topic": "Shipping/Delivery", "sentiment": "Negative"}
_EXAMPLE_ID = '{"$oid": "65f1c0ffee65f1c0ffee65f1"}'


class ReviewTurn(BaseModel):
    """One message of the conversation."""

    sender: Sender = Field(description="who wrote it")
    text: str = Field(description="what was written, without invisible characters")


class ReviewConversation(BaseModel):
    """A conversation that the caller holds until it is decided, or the lease expires (``REVIEW_LEASE_S``)."""

    source_id: str = Field(description="its `_id` in MongoDB as Extended JSON, which keeps the type")
    conversation_number: str | None = Field(description="the help desk's own number; null if it has none")
    turns: list[ReviewTurn] = Field(description="the messages, in order")
    labels: dict[str, Label] = Field(
        description="the labels of the model by field; a list if the field can have several", examples=[_EXAMPLE_LABELS]
    )


class ReviewState(BaseModel):
    """The conversation that the caller reviews now."""

    reviewer: str = Field(description="the name of the caller's key, which is stored with each decision")
    conversation: ReviewConversation | None = Field(description="null if nothing is left to review")


class ReviewUndone(ReviewState):
    """The conversation whose decision was removed, to be decided again."""

    undone: bool = Field(description="false if the caller has no decision")


class ReviewSkip(BaseModel):
    """The conversation to give back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source_id: str = Field(max_length=MAX_ID_CHARACTERS, description="as in the conversation", examples=[_EXAMPLE_ID])


class ReviewDecision(ReviewSkip):
    """The labels that the caller finds right. A label equal to the model's is stored as accepted."""

    labels: dict[str, Label] = Field(min_length=1, description="by field", examples=[_EXAMPLE_LABELS])
    note: str = Field("", max_length=MAX_NOTE_CHARACTERS, description="stored with the decision")


class ReviewSaved(BaseModel):
    """The decision is stored durably."""

    saved: bool = True


@dataclass(frozen=True, slots=True)
class ReviewPage:
    """The files of the page. *tab* is its content for the dashboard, as HTML."""

    html: bytes
    tab: str
    script: bytes
    style: bytes


class ReviewService:
    """The queue for the callers of the service, within the deadlines of their requests."""

    def __init__(self, queue: ReviewQueue, page: ReviewPage, deadlines: Deadlines) -> None:
        self.page = page
        self._queue = queue
        self._deadlines = deadlines

    async def next(self, reviewer: str, deadline: float) -> ReviewState:
        """Return the conversation that *reviewer* holds, or the next one."""
        item = await self._within(deadline, self._queue.next(reviewer))
        return ReviewState(reviewer=reviewer, conversation=_shown(item))

    async def decide(self, reviewer: str, decision: ReviewDecision, deadline: float) -> None:
        """Store *decision*.

        Raises:
            RequestError: NOT_HELD, INVALID if a field or label is not in the taxonomy, STORE_AWAY, TOO_SLOW.
        """
        work = self._queue.decide(reviewer, _source_id(decision), decision.labels, decision.note)
        await self._within(deadline, work)

    async def skip(self, reviewer: str, skipped: ReviewSkip, deadline: float) -> None:
        """Give the conversation back."""
        await self._within(deadline, self._queue.skip(reviewer, _source_id(skipped)))

    async def undo(self, reviewer: str, deadline: float) -> ReviewUndone:
        """Remove the last decision of *reviewer*; without one, return the conversation that is held."""
        item = await self._within(deadline, self._queue.undo(reviewer))
        if item is not None:
            return ReviewUndone(reviewer=reviewer, conversation=_shown(item), undone=True)
        state = await self.next(reviewer, deadline)
        return ReviewUndone(reviewer=reviewer, conversation=state.conversation, undone=False)

    async def _within(self, deadline: float, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await self._deadlines.until(deadline, work)
        except ReviewConflictError as exc:
            raise RequestError(errors.NOT_HELD) from exc
        except ReviewLabelError as exc:
            raise RequestError(errors.INVALID, str(exc)) from exc
        except (StoreError, ConfigurationError) as exc:
            logger.warning("review: %s", exc)
            raise errors.unavailable(errors.STORE_AWAY) from exc


def with_little_patience(settings: Settings) -> Settings:
    """Return *settings* with limits on retries and timeouts of MongoDB, for pages: a person is waiting."""
    limits = {
        "mongodb_max_retries": min(settings.mongodb_max_retries, MONGODB_ATTEMPTS),
        "mongodb_timeout_ms": min(settings.mongodb_timeout_ms, MONGODB_TIMEOUT_MS),
    }
    return settings.model_copy(update=limits)


async def open_review(settings: Settings, deadlines: Deadlines, stack: AsyncExitStack) -> ReviewService:
    """Return the review service, which connects at its first request; *stack* closes it.

    Raises:
        ConfigurationError: MONGODB_URI, the taxonomy or a REVIEW_* setting is wrong.
    """
    options = Options.of(load_review_settings())
    taxonomy = load_taxonomy(settings.taxonomy_file)
    impatient = with_little_patience(settings)
    store = DocumentStore(impatient)
    stack.push_async_callback(store.close)
    page = await asyncio.to_thread(render_page, taxonomy)
    return ReviewService(ReviewQueue(store, impatient, taxonomy, options), page, deadlines)


def render_page(taxonomy: Taxonomy) -> ReviewPage:
    """Return the page with a button for each label of *taxonomy*."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(PAGE_FOLDER))
    fields = []
    for name in taxonomy.field_names:
        keys = {label: key for key, label in label_keys(taxonomy.names(name)).items()}
        labels = [(label.name, label.definition, keys.get(label.name, "")) for label in taxonomy.labels(name)]
        fields.append((name, labels, taxonomy.field(name).is_multiple))
    actions = {"note": NOTE, "skip": SKIP, "undo": UNDO}
    shown = {"fields": fields, "actions": actions, "note_limit": MAX_NOTE_CHARACTERS}
    html = environment.get_template("page.html").render(shown, routes="review/", heading="h1")
    tab = environment.get_template("review.html").render(shown, routes="../review/", heading="h2")
    script, style = ((PAGE_FOLDER / name).read_bytes() for name in ("page.js", "page.css"))
    return ReviewPage(html.encode(), tab, script, style)


def _shown(item: ReviewItem | None) -> ReviewConversation | None:
    if item is None:
        return None
    return ReviewConversation(
        source_id=extended_json.canonical(item.source_id),
        conversation_number=item.conversation.conversation_number,
        turns=[ReviewTurn(sender=turn.sender, text=turn.text) for turn in item.conversation.turns],
        labels=item.labels,
    )


def _source_id(sent: ReviewSkip) -> Any:
    try:
        return extended_json.loads(sent.source_id)
    except ValueError as exc:  # nobody can hold it
        raise RequestError(errors.NOT_HELD) from exc
