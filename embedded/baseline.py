"""A classifier from word lists and VADER, for ``--embedded`` without a model server.

``embedded.embedding_classifier`` uses its scores as features, and leaves conversations that are not English to it.
docs/baseline.md reports its accuracy and how its constants were chosen.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from config.taxonomy import Label, Taxonomy, fold_label
from domain.conversation import BASELINE_MODEL, Classification, Conversation
from error_handler import ConfigurationError

SENTIMENTS = ("positive", "neutral", "negative")  # folded; the ones that the built-in classifiers can tell

# VADER's usual limits are +-0.05. The upper one is higher here, because "Thanks" often ends a neutral request.
POSITIVE_FROM = 0.4
NEGATIVE_TO = -0.05

# Weights of turns. Customers state their problem in the first message; agents repeat its topic.
FIRST_TURN, LATER_TURN, AGENT_TURN = 2.0, 1.0, 0.5

# VADER rates words as social media use them; in support conversations these are neutral.
_NO_FEELING = (
    "accept alert cancel care careful chance credit dear free help helped helping helps hope interest join like "
    "number ok okay play playing please pls pray secure security share shared sharing support supported supporting "
    "supports sure top united want well yes"
)
_FEELING = {
    1.0: "thank thanks thx ty",
    -0.8: "hold hour hours issue issues still wait",
    -1.2: "canceled delays disconnected dropped frozen incorrect joke late outage slow unable waited waiting",
    -1.6: "crashed crashes crashing glitch glitches glitchy ignored overbooked undelivered unresolved unresponsive",
    -2.2: "nightmare overcharged stranded unhelpful unprofessional unreliable",
}

# VADER takes quadratic time in the number of words, so it gets short pieces, and a limited number of them.
_PIECE = re.compile(r"\S.{0,299}(?!\S)|\S{1,300}", re.DOTALL)
_PIECES_READ = 200

_NOT_PROSE = re.compile(r"https?://\S+|@\w+")
_WORD = re.compile(r"\w+")
_APOSTROPHES = str.maketrans("", "", "'\N{RIGHT SINGLE QUOTATION MARK}")
_IGNORED = frozenset(_WORD.findall("a an the this that these those my your our his her their"))

# Words that occur in requests of every kind carry little information.
_FUNCTION_WORD_WEIGHT = 0.25
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "about am and any anyone are at be been by can check could did didnt do does doesnt dont for from get got had "
        "has have help how i id if ill im in is isnt it its ive just know let like me need no not of on or please "
        "possible see so some tell than there they to up us very wanna want was we what whats when where wheres which "
        "who why will with would you"
    )
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The labels of one conversation and the built-in classifier that gave them.

    *confidence* maps each field to the probability of its label (0 to 1); None if that is unknown. *plan* identifies how
    the labels were made if it was not by a built-in classifier, else it is empty.
    """

    classification: Classification
    model: str
    confidence: dict[str, float] | None = None
    plan: str = ""


class BaselineClassifier:
    """Labels conversations by the phrases of the taxonomy (English as shipped) and VADER's English lexicon.

    Raises:
        ConfigurationError: The taxonomy lacks Positive, Neutral or Negative, the only sentiments VADER can tell.
    """

    model = BASELINE_MODEL

    def __init__(self, taxonomy: Taxonomy) -> None:
        # Imported late: a run with a model needs only the name of the baseline.
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415

        self._taxonomy = taxonomy
        self._indexes = {
            field.name: _PhraseIndex(field.labels) for field in taxonomy.fields if field.name != "sentiment"
        }
        names = taxonomy.names("sentiment") if "sentiment" in taxonomy.field_names else ()
        self.sentiments = {fold_label(name): name for name in names}
        missing = set(SENTIMENTS) - self.sentiments.keys()
        if names and missing:
            raise ConfigurationError(
                f"The built-in baseline needs the sentiment {min(missing).capitalize()} in the taxonomy; "
                "add it, or use a model server."
            )
        self._vader = SentimentIntensityAnalyzer()
        self._vader.lexicon.update(dict.fromkeys(_NO_FEELING.split(), 0.0))
        for valence, words in _FEELING.items():
            self._vader.lexicon.update(dict.fromkeys(words.split(), valence))
        # Emoji are replaced here, so that their names count towards the length of a piece.
        self._emoji = {ord(emoji): f" {name} " for emoji, name in self._vader.emojis.items() if len(emoji) == 1}

    def classify(self, conversation: Conversation) -> Classification:
        """Return the labels: intent and sentiment from the customer's turns, the others from all turns.

        Without a phrase, or with two equally strong labels, the label is Other (or the last of the field). Time is
        linear in the length of the texts; sentiment reads the first 60,000 characters.
        """
        scores = self.phrase_scores(conversation)
        labels: dict[str, str | list[str]] = {}
        for field in self._taxonomy.fields:
            if field.name == "sentiment":
                labels[field.name] = self._sentiment(conversation.customer_texts)
            elif field.is_multiple:
                labels[field.name] = self.labels_by_phrase(field.name, scores[field.name])
            else:
                labels[field.name] = self._indexes[field.name].strongest(scores[field.name])
        return classification(self._taxonomy, labels, "Baseline")

    def answer(self, conversation: Conversation) -> Answer:
        """Return the labels of ``classify``, without confidence."""
        return Answer(self.classify(conversation), BASELINE_MODEL)

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        """Return ``answer`` of each conversation."""
        return [self.answer(each) for each in conversations]

    def phrase_scores(self, conversation: Conversation) -> dict[str, dict[str, float]]:
        """Return the weight of the phrases found in *conversation* for each label that has any: field -> label -> weight."""
        customer: list[tuple[str, float]] = []
        others: list[tuple[str, float]] = []
        for turn in conversation.turns:
            words = _normalised(turn.text)
            if turn.sender == "customer":
                customer.append((words, LATER_TURN if customer else FIRST_TURN))
            else:
                others.append((words, AGENT_TURN))
        return {
            field: index.scores(customer if field == "intent" else customer + others)
            for field, index in self._indexes.items()
        }

    def labels_by_phrase(self, field: str, scores: Mapping[str, float]) -> list[str]:
        """Return each label of *field* with a phrase, by ``phrase_scores``; only Other (or the last label) without one."""
        return self._indexes[field].found(scores)

    def feelings(self, texts: list[str]) -> list[dict[str, float]]:
        """Return VADER's scores (``compound`` -1 to 1; ``pos``, ``neg``, ``neu`` 0 to 1) of the pieces of *texts*."""
        prose = (prose_of(text).translate(self._emoji) for text in texts)
        pieces = (match.group() for text in prose for match in _PIECE.finditer(text))
        return [self._vader.polarity_scores(piece) for piece in islice(pieces, _PIECES_READ)]

    def _sentiment(self, texts: list[str]) -> str:
        """Return the sentiment of the mean score of all pieces that show a feeling; neutral pieces do not dilute it."""
        mean = mean_feeling(self.feelings(texts))
        if mean >= POSITIVE_FROM:
            return self.sentiments["positive"]
        return self.sentiments["negative" if mean <= NEGATIVE_TO else "neutral"]


class _PhraseIndex:
    """The phrases of one group of labels, searched in one pass."""

    def __init__(self, labels: tuple[Label, ...]) -> None:
        self._names = [label.name for label in labels]
        self._other = _other_of(self._names)
        self._labels: defaultdict[str, set[str]] = defaultdict(set)
        for label in labels:
            for phrase in label.phrases:
                if words := _normalised(phrase):
                    self._labels[words].add(label.name)
        # Longest first, so that "refund policy" does not match "refund".
        phrases = sorted(self._labels, key=len, reverse=True)
        self._regex = re.compile(rf"\b(?:{'|'.join(map(re.escape, phrases))})\b") if phrases else None

    def scores(self, texts: Iterable[tuple[str, float]]) -> dict[str, float]:
        """Return the weight of each label with a phrase in *texts* (normalised text, weight).

        A phrase counts once, with its highest weight, so that repetition has no effect.
        """
        if self._regex is None:
            return {}
        found: dict[str, float] = {}
        for text, weight in texts:
            for phrase in set(self._regex.findall(text)):
                found[phrase] = max(found.get(phrase, 0.0), weight)
        scores: defaultdict[str, float] = defaultdict(float)
        for phrase, weight in found.items():
            for name in self._labels[phrase]:
                scores[name] += weight * _specificity(phrase)
        return dict(scores)

    def strongest(self, scores: Mapping[str, float]) -> str:
        """Return the label with the most weight in *scores*; see ``classify`` for ties."""
        best = max(scores.values(), default=0.0)
        names = [name for name, score in scores.items() if score == best]
        return names[0] if len(names) == 1 else self._other

    def found(self, scores: Mapping[str, float]) -> list[str]:
        """Return the labels in *scores* in the order of the taxonomy; only Other (or the last label) without one."""
        return [name for name in self._names if name in scores] or [self._other]


def _other_of(names: list[str]) -> str:
    """Return the label of *names* for everything else: Other, or the last one."""
    return next((name for name in names if fold_label(name) == "other"), names[-1])


def classification(taxonomy: Taxonomy, labels: Mapping[str, str | list[str]], maker: str) -> Classification:
    """Return *labels* by field with a categorization, if *taxonomy* has one, that begins with *maker*."""
    if not taxonomy.has_categorization:
        return Classification(categorization=None, **labels)
    named = [labels[field] for field in ("intent", "topic") if field in labels] or [*labels.values()][:1]
    summary = " about ".join(label if isinstance(label, str) else ", ".join(label) for label in named)
    return Classification(categorization=f"{maker}: {summary}", **labels)


def mean_feeling(scores: list[dict[str, float]]) -> float:
    """Return the mean compound of the *scores* that are not 0; 0 without any."""
    felt = [score["compound"] for score in scores if score["compound"]]
    return sum(felt) / len(felt) if felt else 0.0


def prose_of(text: str) -> str:
    """Return *text* with a space instead of each link and handle."""
    return _NOT_PROSE.sub(" ", text)


def _specificity(phrase: str) -> float:
    return sum(_FUNCTION_WORD_WEIGHT if word in _FUNCTION_WORDS else 1.0 for word in phrase.split())


def _normalised(text: str) -> str:
    """Return the words of *text* in lower case, without links, handles, articles and possessives."""
    prose = unicodedata.normalize("NFC", prose_of(text).casefold())  # a combining accent would split a word
    words = _WORD.findall(prose.translate(_APOSTROPHES))
    return " ".join(word for word in words if word not in _IGNORED)
