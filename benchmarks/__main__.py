"""``python -m benchmarks``: measure, print one table, and exit with 1 if a target is missed.

``python -m benchmarks throughput``, ``latency``, ``memory``, ``service``, ``concurrency``, ``openai``, ``index``,
``search``, ``walk``, ``injection``, ``examples``, ``export``, ``counts``, ``two_users``, ``prompt``, ``model``, ``servers``
or ``ray`` runs only that benchmark. ``--quick`` uses few documents, without targets. See docs/performance.md.
``python -m benchmarks student DIR`` tries a student on labelled files (docs/student.md).
"""

from __future__ import annotations

if __name__ == "__main__":
    from utils.interpreter import require_development_packages

    require_development_packages()

import argparse
import os
import platform
import sys
import time
from dataclasses import replace

import psutil

from benchmarks import (
    concurrency,
    counts,
    document_jobs,
    embedding,
    export,
    injection,
    latency,
    memory,
    model,
    prompt,
    prompt_examples,
    ray_scaling,
    search_quality,
    servers,
    service,
    student,
    throughput,
    two_users,
    walk,
)
from benchmarks.table import text
from benchmarks.worker_process import WorkerFailedError

MEASURES = {
    "throughput": throughput.measure,
    "latency": latency.measure,
    "memory": memory.measure,
    "service": service.measure,
    "concurrency": concurrency.measure,
    "openai": document_jobs.measure,
    "index": embedding.measure,
    "search": search_quality.measure,
    "walk": walk.measure,
    "injection": injection.measure,
    "examples": prompt_examples.measure,
    "export": export.measure,
    "counts": counts.measure,
    "two_users": two_users.measure,
    "prompt": prompt.measure,
    "model": model.measure,
    "servers": servers.measure,
    "ray": ray_scaling.measure,
}


def main() -> int:
    """Run the benchmarks in *argv* and return the exit code."""
    if sys.argv[1:2] == ["student"]:
        return student.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the batch worker, the service, document jobs and the embedding index.",
    )
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"{', '.join(MEASURES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="use few documents and check no targets")
    arguments = parser.parse_args()
    if unknown := set(arguments.measures) - set(MEASURES):
        parser.error(f"there is no measure {min(unknown)}; choose from {', '.join(MEASURES)}")
    rows = []
    for name in arguments.measures or MEASURES:
        load, start = os.getloadavg()[0], time.monotonic()
        psutil.cpu_times_percent()  # the next call gives the shares since this one
        try:
            rows += MEASURES[name](quick=arguments.quick)
        except WorkerFailedError as exc:
            print(f"benchmarks: {name}: {exc}", file=sys.stderr)
            return 2
        # On a virtual machine, other guests of the host take processor time, which lengthens latencies.
        stolen = getattr(psutil.cpu_times_percent(), "steal", 0.0)
        took = f"{name}: {time.monotonic() - start:.0f} s, load average before {load:.2f}"
        print(f"{took}, {stolen:.1f} % of the processors' time taken by other guests", file=sys.stderr)
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors, {platform.system()}\n")
    if arguments.quick:
        rows = [replace(row, met=None) for row in rows]
    print(text(rows))
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
