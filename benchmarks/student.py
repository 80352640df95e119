"""Try a student on simulated corpora and on labelled conversations: ``python -m benchmarks student [DIR]``.

The simulated corpora are those of the tests. DIR holds JSONL files as for ``benchmarks.baseline_accuracy``, whose gold labels stand
in for the model's. Each corpus is split at random many times: one part is learned, one is for the certificate, and the rest shows
what the certificate is worth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks import student_simulation
from benchmarks.baseline_accuracy import Example, directory_examples
from embedded.conversation_vectors import vectors_of
from embedded.minilm import open_encoder
from error_handler import ConfigurationError
from student.audit import Audit
from student.certificate import Certificate, certify

PROMISES = (0.90, 0.95)
SPLITS = 20
STREAM = 500  # conversations of a drift

# The trials: the files, the fields that must all agree, the conversations that are learned and those of the certificate.
CORPORA = (
    ("airline", ("airline",), ("sentiment",), 250, 250),
    ("airline", ("airline",), ("sentiment",), 300, 400),
    ("bitext", ("bitext",), ("intent", "topic"), 100, 120),
    ("multidogo", ("multidogo",), ("intent", "topic"), 100, 120),
    ("airline, three fields", ("airline",), ("intent", "topic", "sentiment"), 150, 250),
    ("mixed", ("bitext", "multidogo", "star", "queries_c"), ("intent", "topic"), 400, 400),
)
# Students of one corpus that meet another one.
DRIFTS = (("airline", ("airline",), ("sentiment",), ("xlmt", "queries_c")),)
FILES = {name for _, files, *_ in CORPORA for name in files} | {name for *_, others in DRIFTS for name in others}

Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Corpus:
    """Features and labels of the conversations of some files; *labels* has a column for each field."""

    features: Numbers
    labels: NDArray[np.str_]


@dataclass(frozen=True)
class Judged:
    """The joint confidence of a student for each conversation, and whether all of its labels are right."""

    scores: NDArray[np.float64]
    agreed: NDArray[np.bool_]

    def certified(self, promise: float) -> Certificate:
        """The certificate of these conversations."""
        return certify(self.scores.tolist(), self.agreed.tolist(), promise)


def main(arguments: Sequence[str]) -> int:
    """Print the tables; those of the labelled conversations are skipped if DIR has none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks student", description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, nargs="?")
    directory = parser.parse_args(arguments).directory
    print("\n".join(student_simulation.table()), flush=True)
    if directory is None:
        return 0
    if not (directory / "label_map.json").exists():
        print(f"{directory} has no label_map.json; skipped", file=sys.stderr)
        return 0
    with threadpool_limits(1):
        try:
            read = embedded([each for each in directory_examples(directory) if each[0] in FILES])
        except ConfigurationError as exc:
            print(exc, file=sys.stderr)
            return 2
        print("\n".join(["", *table_of_promises(read), "", *table_of_drifts(read)]))
    return 0


def embedded(examples: Sequence[tuple[str, Example]]) -> list[tuple[str, Example, Numbers]]:
    """Return *examples* with their features: the vector of the request, then that of all turns."""
    encoder = open_encoder()
    found = []
    for name, example in track(examples, "embedding", transient=True):
        vectors = vectors_of(encoder, example.conversation)
        found.append((name, example, np.concatenate([vectors.request, vectors.all_turns])))
    return found


def corpus_of(
    read: Sequence[tuple[str, Example, Numbers]], files: Sequence[str], fields: Sequence[str]
) -> Corpus | None:
    """Return the conversations of *files* (any language but another one in their name) that have all *fields*."""
    rows = [
        (features, [str(example.gold[field]) for field in fields])
        for name, example, features in read
        if name in files and all(example.gold.get(field) is not None for field in fields)
    ]
    return Corpus(np.stack([row for row, _ in rows]), np.array([labels for _, labels in rows])) if rows else None


def judged(corpus: Corpus, learned: NDArray[np.int64], other: Corpus) -> Judged:
    """Return what a student of the conversations *learned* says about *other*."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]  # noqa: PLC0415 - slow to import

    scores, agreed = np.ones(len(other.labels)), np.ones(len(other.labels), bool)
    for field in range(corpus.labels.shape[1]):
        labels = corpus.labels[learned, field]
        if len(set(labels)) == 1:
            agreed &= other.labels[:, field] == labels[0]
            continue
        head = LogisticRegression(C=10, max_iter=300)
        head.fit(corpus.features[learned], labels)
        probabilities = head.predict_proba(other.features)
        scores *= probabilities.max(axis=1)
        agreed &= head.classes_[probabilities.argmax(axis=1)] == other.labels[:, field]
    return Judged(scores, agreed)


def splits(size: int, learned: int, certificate: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Yield the places that are learned, those of the certificate, and the rest."""
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(size)
        yield order[:learned], order[learned : learned + certificate], order[learned + certificate :]


def table_of_promises(read: Sequence[tuple[str, Example, Numbers]]) -> list[str]:
    """Return a Markdown table: for each corpus, what is taken and how often it agrees."""
    lines = [
        "| corpus | learned + certificate | rest | student on all |"
        + "".join(f" promise {promise:.2f}: certified | taken/agreed | broken |" for promise in PROMISES),
        "|---|---:|---:|---:|" + "---:|---|---:|" * len(PROMISES),
    ]
    for title, files, fields, learned, certificate in CORPORA:
        corpus = corpus_of(read, files, fields)
        if corpus is None or len(corpus.labels) <= learned + certificate:
            print(f"too few conversations of {title}; skipped", file=sys.stderr)
            continue
        runs = []
        for part, held_out, rest in splits(len(corpus.labels), learned, certificate):
            all_of_it = judged(corpus, part, corpus)
            known, unseen = (Judged(all_of_it.scores[place], all_of_it.agreed[place]) for place in (held_out, rest))
            runs.append((known, unseen))
        size = len(corpus.labels) - learned - certificate
        overall = np.mean([unseen.agreed.mean() for _, unseen in runs])
        cells = "".join(cell_of(runs, promise) for promise in PROMISES)
        lines.append(f"| {title} ({' + '.join(fields)}) | {learned} + {certificate} | {size} | {overall:.3f} |{cells}")
    return lines


def cell_of(runs: Sequence[tuple[Judged, Judged]], promise: float) -> str:
    """Return how many splits are certified, what those take on average, how much of it agrees, and how many promises broke."""
    taken = [
        unseen.agreed[unseen.scores >= threshold]
        for known, unseen in runs
        if (threshold := known.certified(promise).threshold) is not None
    ]
    if not taken:
        return f" 0 of {len(runs)} | – | – |"
    share = np.mean([len(one) / len(unseen.agreed) for one, (_, unseen) in zip(taken, runs, strict=False)])
    broken = sum(len(one) > 0 and one.mean() < promise for one in taken)
    return f" {len(taken)} of {len(runs)} | {share:.2f}/{np.concatenate(taken).mean():.3f} | {broken} |"


def table_of_drifts(read: Sequence[tuple[str, Example, Numbers]]) -> list[str]:
    """Return a Markdown table: what the audit does with students that meet STREAM conversations of another corpus."""
    lines = [
        f"| student of | meets | sure/agreed | withdrawn within {STREAM} conversations | median | taken until then | wrong |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for title, files, fields, others in DRIFTS:
        corpus = corpus_of(read, files, fields)
        for name in others:
            other = corpus_of(read, (name,), fields)
            if corpus is None or other is None:
                continue
            runs, shares, agreement = [], [], []
            for seed, (part, held_out, _) in enumerate(splits(len(corpus.labels), 300, 400)):
                known = judged(corpus, part, Corpus(corpus.features[held_out], corpus.labels[held_out]))
                found = known.certified(PROMISES[0])
                if found.threshold is None:
                    continue
                met = judged(corpus, part, other)
                sure = met.scores >= found.threshold
                shares.append(sure.mean())
                agreement += met.agreed[sure].tolist()
                audit = Audit(PROMISES[0], found.taken, found.taken - found.agreed)
                runs.append(met_by(audit, sure, met.agreed, np.random.default_rng(seed)))
            delays = [count for count, *_ in runs if count is not None]
            if runs:
                lines.append(
                    f"| {title} ({', '.join(fields)}), promise {PROMISES[0]:.2f} | {name} "
                    f"| {np.mean(shares):.2f}/{np.mean(agreement):.3f} | {len(delays)} of {len(runs)} "
                    f"| {np.median(delays):.0f} | {np.mean([taken for _, taken, _ in runs]):.0f} "
                    f"| {np.mean([wrong for *_, wrong in runs]):.0f} |"
                )
    return lines


def met_by(
    audit: Audit, sure: NDArray[np.bool_], agreed: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[int | None, int, int]:
    """Return after how many conversations, drawn at random, the student withdraws, what it took and how much of that is wrong.

    The first is None if it does not withdraw within STREAM conversations.
    """
    taken = wrong = 0
    for count, place in enumerate(rng.integers(len(sure), size=STREAM), 1):
        if not sure[place]:
            continue
        if rng.random() < audit.share:
            audit.record(bool(agreed[place]))
        else:
            taken += 1
            wrong += not agreed[place]
        if audit.is_broken:
            return count, taken, wrong
    return None, taken, wrong
