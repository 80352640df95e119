"""Measures the CPU time of the built-in classifier: ``python -m benchmarks.embedded_speed DIR``.

DIR holds the files of docs/baseline.md. CPU time of the process counts, because other programs may use the machine; they
make it longer all the same if two threads share a core.
"""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_packages

    require_packages()

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.baseline_accuracy import read_conversations
from config.taxonomy import load_taxonomy
from domain.conversation import Conversation
from embedded.baseline import Answer
from embedded.choice import open_classifier

FILES = ("bitext", "airline", "twcs_conversations")
COUNT, ROUNDS = 64, 3
SIZES = (1, 16)  # conversations labelled together


def milliseconds(
    answers: Callable[[Sequence[Conversation]], list[Answer]], asked: Sequence[Conversation], size: int
) -> float:
    """Return the CPU time for one of *asked*, *size* at once: the median of ROUNDS."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for place in range(0, len(asked), size):
            answers(asked[place : place + size])
        times.append(1000 * (time.process_time() - start) / len(asked))
    return median(times)


def main() -> int:
    """Measure and print; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_speed", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory with the labelled files")
    directory = parser.parse_args().directory
    classifier = open_classifier(load_taxonomy())
    print(
        "| conversations | characters on average | one at a time, CPU ms | 16 at once, CPU ms | 16 at once, per CPU second |"
    )
    print("|---|---:|---:|---:|---:|")
    for name in FILES:
        asked = read_conversations(directory / f"{name}.public.jsonl")[:COUNT]
        classifier.answers(asked[:4])
        one, many = (milliseconds(classifier.answers, asked, size) for size in SIZES)
        length = mean(sum(len(turn.text) for turn in each.turns) for each in asked)
        print(f"| {name} | {length:.0f} | {one:.1f} | {many:.1f} | {1000 / many:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
