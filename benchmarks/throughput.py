"""The overhead of the product's safeguards, with a model that answers immediately."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from benchmarks.documents import conversations
from benchmarks.stage import Run, Side, Stage, open_stage, require_same_prompts
from benchmarks.table import Row, figure, spread

CONCURRENCY = 32
MIN_SPEED, MAX_CPU = 0.8, 1.3  # relative to the floor
RUN_LIMIT_S = 300.0


def measure(*, quick: bool) -> list[Row]:
    """Alternate both sides; return the medians of the figures and of the ratios of adjacent runs."""
    documents, pairs = (400, 2) if quick else (2000, 7)
    product: list[Run] = []
    floor: list[Run] = []
    asyncio_floor: list[Run] = []
    with open_stage(slots=2 * CONCURRENCY) as stage:
        for side in ("product", "floor"):  # warm-up; not counted
            _run(stage, side, documents // 4)
        for pair in range(pairs):
            product.append(_run(stage, "product", documents))
            floor.append(_run(stage, "floor", documents))
            require_same_prompts(product[-1], floor[-1])
            if pair % 3 == 0:
                asyncio_floor.append(_run(stage, "floor on asyncio", documents))
    return _rows(product, floor, asyncio_floor)


def _run(stage: Stage, side: Side, documents: int) -> Run:
    stage.fill(conversations(documents))
    return stage.measure(side, documents, CONCURRENCY, RUN_LIMIT_S)


def _rows(product: list[Run], floor: list[Run], asyncio_floor: list[Run]) -> list[Row]:
    def row(name: str, take: Callable[[Run], float], *, least: float = 0.0, most: float = 0.0) -> Row:
        ratios = [take(one) / take(other) for one, other in zip(product, floor, strict=True)]
        target = f">= {least:.2f}" if least else f"<= {most:.2f}" if most else ""
        met = median(ratios) >= least if least else median(ratios) <= most if most else None
        cells = [figure(median(map(take, runs))) for runs in (product, floor)]
        return Row(name, cells[0], cells[1], spread(ratios), target, met)

    count = product[0].documents
    where = f"{count} documents, {CONCURRENCY} concurrent calls"
    return [
        row(f"{where}: documents/s, first call to last write", lambda run: count / run.window_s, least=MIN_SPEED),
        row("  CPU ms/document from the first call on", lambda run: run.cpu_from_first_s / count * 1000, most=MAX_CPU),
        row("  CPU ms/document of the whole process", lambda run: run.cpu_s / count * 1000, most=MAX_CPU),
        row("  documents/s of the whole process", lambda run: count / run.wall_s),
        row("  start to first call, s", lambda run: run.first_call_s),
        Row(
            "  minimal loop on asyncio's event loop: documents/s; CPU ms/document",
            "",
            f"{figure(median(count / run.window_s for run in asyncio_floor))}; "
            f"{figure(median(run.cpu_from_first_s for run in asyncio_floor) / count * 1000)}",
        ),
    ]
