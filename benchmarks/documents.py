"""Synthetic support conversations, computed from their number, so equal on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId

START = datetime(2017, 10, 31, 22, 10, tzinfo=UTC)
TWEETS = (2, 3, 3, 4, 4, 4, 5, 6, 7, 8)  # equally likely; mean 4.6
# The tenths of 340 real threads with 76 brands (Customer Support on Twitter), the median of each, in mixed order; mean 3.6.
REAL_TWEETS = (2, 3, 2, 6, 2, 4, 2, 9, 2, 4)

_OPENINGS = (
    "my parcel for order {order} was marked delivered yesterday but nothing has arrived and nobody answers the phone",
    "I was charged twice for order {order} this month, can someone please look at it and send the money back?",
    "the app has crashed every morning since the last update, it never even gets to the login page. ref {order}",
    "hi! what time does your shop in the centre close on sundays, and can I pick up {order} there?",
    "still waiting for the refund on {order}. three weeks now. this is getting ridiculous 😡",
    "is there any way to change the delivery address of {order} before it ships? I moved last week",
    "just wanted to say that the person who helped me with {order} was brilliant, thank you so much",
    "flight delayed again, booking {order}, and the staff at the gate knew nothing at all",
    "I can’t get into my account any more, the reset link for {order} has expired each time I open it",
    "somebody used my card for {order} and it wasn’t me, please block it now",
)
_ANSWERS = (
    "We’re sorry to hear that! Could you send us a direct message with your e-mail address so that we can look into it?",
    "Thanks for reaching out. Our team has checked this and you should see a change within two working days.",
    "That is not the experience we want you to have. Which version of the app and which phone are you using?",
    "I have passed this on to my colleagues at the depot and they will call you back this afternoon.",
    "You can change that on your profile page under settings. Let us know if it does not work for you!",
    "We understand the frustration. May I have your postcode so that I can find the nearest store?",
)
_REPLIES = (
    "I did that already, twice. is there anybody who can actually help?",
    "ok, sent you a message with the details just now",
    "it is the newest one, I updated it last night as your colleague told me to",
    "thanks, that was quick! I will let you know if it works",
    "no. nobody has called and the website says the same thing as this morning",
    "great, it works now. appreciate the help",
)


def conversations(count: int, lengths: Sequence[int] = ()) -> Iterator[dict[str, Any]]:
    """Yield *count* conversations, no two with the same text.

    They have 2 to 8 tweets and about 430 characters each; with *lengths*, as many tweets as those say in turn.
    """
    chance = random.Random(20_171_031)
    tweet_id = 0
    for number in range(count):
        at = START + timedelta(seconds=7 * number)
        author = str(115_712 + number)
        texts = [f"@northwind {chance.choice(_OPENINGS).format(order=f'NW-{number:07d}')}"]
        for turn in range(1, lengths[number % len(lengths)] if lengths else chance.choice(TWEETS)):
            texts.append(
                f"@{author} {chance.choice(_ANSWERS)}" if turn % 2 else f"@northwind {chance.choice(_REPLIES)}"
            )
        tweets = []
        for turn, text in enumerate(texts):
            tweet_id += 1
            at += timedelta(seconds=chance.randint(20, 900))
            tweets.append(_tweet(tweet_id, "northwind" if turn % 2 else author, turn % 2 == 0, at, text))
        yield _document(number, tweets)


def short_conversations(count: int) -> Iterator[dict[str, Any]]:
    """Yield *count* conversations of two short tweets, for collections with many documents."""
    for number in range(count):
        at = START + timedelta(seconds=number)
        question = _tweet(2 * number, str(number), True, at, f"where is order NW-{number:07d}?")
        answer = _tweet(2 * number + 1, "northwind", False, at + timedelta(minutes=1), "It will be with you on Friday.")
        yield _document(number, [question, answer])


def _document(number: int, tweets: list[dict[str, Any]]) -> dict[str, Any]:
    made = int(START.timestamp()) + number // 50
    return {
        "_id": ObjectId(f"{made:08x}{0x62656E6368:010x}{number:06x}"),
        "conversation_number": str(number + 1),
        "tweets": tweets,
        "status": "pending",
    }


def _tweet(tweet_id: int, author: str, inbound: bool, at: datetime, text: str) -> dict[str, Any]:
    created_at = at.strftime("%a %b %d %H:%M:%S +0000 %Y")
    return {"tweet_id": tweet_id, "author_id": author, "inbound": inbound, "created_at": created_at, "text": text}
