"""The figures of one field: accuracy, F1, confusions, calibration, share of Other. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from config.taxonomy import fold_label
from evaluation.intervals import bootstrap, f1_score, macro_f1, proportion
from evaluation.values import Estimate, Pair, Row, shown

IDS_SHOWN = 10  # of one confusion
BINS = 10


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """Precision, recall and F1 of one label; *gold* and *model* count how often each of them has it."""

    label: str
    gold: int
    model: int
    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True, slots=True)
class Confusion:
    """*n* conversations with the label *gold* that the model gave *model*; *ids* are the first IDS_SHOWN of them.

    In a multi-valued field, one of the two is a dash: the label is missing or superfluous.
    """

    gold: str
    model: str
    n: int
    ids: list[str]


@dataclass(frozen=True, slots=True)
class Bin:
    """The conversations whose confidence is from *low* to below *high*: its mean, and the share that is right."""

    low: float
    high: float
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence compared with accuracy; *ece* is the expected calibration error, 0 to 1."""

    n: int
    ece: float
    bins: list[Bin]


@dataclass(frozen=True, slots=True)
class OtherShare:
    """The shares of *label*, the one for everything that fits no other, in gold and in the model's labels."""

    label: str
    gold: Estimate
    model: Estimate


@dataclass(frozen=True, slots=True)
class FieldFigures:
    """The figures of one field over the conversations that have a gold label and a result.

    *accuracy* counts exact matches, of all labels in a multi-valued field. *majority* is the accuracy of always
    answering the most frequent gold label. *matrix* holds the counts by gold label and model label, in the order of
    *matrix_labels*; it is empty for a multi-valued field. *calibration* is None without confidence.
    """

    field: str
    n: int
    is_multi: bool
    accuracy: Estimate
    macro_f1: Estimate
    majority: float | None
    labels: list[LabelFigures]
    confusions: list[Confusion]
    matrix_labels: list[str]
    matrix: list[list[int]]
    calibration: Calibration | None
    other: OtherShare | None


def field_figures(name: str, rows: Sequence[Row], known: Sequence[str]) -> FieldFigures:
    """Return the figures of the field *name*, whose labels in the taxonomy are *known*."""
    used = [row for row in rows if name in row.gold and name in row.labelled.labels]
    pairs = [(row.gold[name], row.labelled.labels[name]) for row in used]
    counts = Counter(pairs)
    is_multi = any(len(labels) != 1 for pair in counts for labels in pair)
    hits = sum(count for (gold, model), count in counts.items() if gold == model)
    sets = [(frozenset(gold), frozenset(model)) for gold, model in counts]
    occurring = {label for pair in counts for labels in pair for label in labels}
    names = [label for label in known if label in occurring] + sorted(occurring - set(known))
    most = Counter(gold for gold, _ in pairs).most_common(1)
    return FieldFigures(
        name,
        len(used),
        is_multi,
        proportion(hits, len(used)),
        bootstrap(list(counts.values()), macro_f1(sets)) if used else proportion(0, 0),
        most[0][1] / len(used) if most else None,
        [_label_figures(label, counts) for label in names],
        _confusions(name, used),
        [] if is_multi else names,
        [] if is_multi else [[counts[(gold,), (model,)] for model in names] for gold in names],
        _calibration(name, used),
        _other(known, counts),
    )


def _label_figures(label: str, counts: Counter[Pair]) -> LabelFigures:
    both = sum(count for (gold, model), count in counts.items() if label in gold and label in model)
    in_gold = sum(count for (gold, _), count in counts.items() if label in gold)
    in_model = sum(count for (_, model), count in counts.items() if label in model)
    return LabelFigures(
        label,
        in_gold,
        in_model,
        proportion(both, in_model),
        proportion(both, in_gold),
        f1_score(both, in_model - both, in_gold - both, in_gold),
    )


def confused(pair: Pair) -> list[tuple[str, str]]:
    """Return what is wrong in *pair* as (gold, model); a label without a counterpart has a dash."""
    missing, surplus = sorted(set(pair[0]) - set(pair[1])), sorted(set(pair[1]) - set(pair[0]))
    if len(pair[0]) == len(pair[1]) == 1 and missing:
        return [(missing[0], surplus[0])]
    return [(label, shown(())) for label in missing] + [(shown(()), label) for label in surplus]


def _confusions(name: str, rows: Sequence[Row]) -> list[Confusion]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for pair in confused((row.gold[name], row.labelled.labels[name])):
            found.setdefault(pair, []).append(row.labelled.name)
    in_order = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Confusion(gold, model, len(ids), ids[:IDS_SHOWN]) for (gold, model), ids in in_order]


def _calibration(name: str, rows: Sequence[Row]) -> Calibration | None:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        if name in row.labelled.confidence:
            confidence = row.labelled.confidence[name]
            is_right = row.gold[name] == row.labelled.labels[name]
            bins.setdefault(min(BINS - 1, max(0, int(confidence * BINS))), []).append((confidence, is_right))
    n = sum(map(len, bins.values()))
    if not n:
        return None
    table = []
    for number, members in sorted(bins.items()):
        mean = sum(confidence for confidence, _ in members) / len(members)
        accuracy = proportion(sum(is_right for _, is_right in members), len(members))
        table.append(Bin(number / BINS, (number + 1) / BINS, mean, accuracy))
    ece = sum(each.accuracy.n / n * abs((each.accuracy.value or 0.0) - each.confidence) for each in table)
    return Calibration(n, ece, table)


def _other(known: Sequence[str], counts: Counter[Pair]) -> OtherShare | None:
    label = next((name for name in known if fold_label(name) == "other"), None)
    n = counts.total()
    if label is None or not n:
        return None

    def share(side: int) -> Estimate:
        return proportion(sum(count for pair, count in counts.items() if label in pair[side]), n)

    return OtherShare(label, share(0), share(1))
