"""Idle time of the model's slots, with log-normal answer times as a model has."""

from __future__ import annotations

from benchmarks.documents import conversations
from benchmarks.stage import Run, Side, open_stage, require_same_prompts
from benchmarks.table import Row

SLOTS = 8
MEAN_S, SIGMA, SEED = 0.2, 0.8, 1
MOST = 1.03  # times the duration of the answers alone
RUN_LIMIT_S = 600.0


def measure(*, quick: bool) -> list[Row]:
    """Run both sides once; answer times depend on the prompts, so both sides wait equally."""
    documents = 240 if quick else 2000
    runs: dict[Side, Run] = {}
    knobs = {"latency": "lognormal", "latency_key": "text", "mean_s": MEAN_S, "sigma": SIGMA, "seed": SEED}
    with open_stage(slots=SLOTS, **knobs) as stage:
        sides: tuple[Side, ...] = ("product", "floor")
        for side in sides:
            stage.fill(conversations(documents))
            runs[side] = stage.measure(side, documents, SLOTS, RUN_LIMIT_S)
    product, floor = runs["product"], runs["floor"]
    require_same_prompts(product, floor)
    bound_s = product.simulated_s / SLOTS + product.longest_s
    name = f"{documents} answers of {product.simulated_s / documents:.3f} s on average, {SLOTS} slots"
    return [
        Row(
            f"{name}: s from the first call to the last write",
            f"{product.window_s:.2f}",
            f"{floor.window_s:.2f}",
            f"{product.window_s / floor.window_s:.3f}",
        ),
        Row(
            "  compared with (sum of answer times / slots) + longest answer time, s",
            f"{product.window_s:.2f}",
            f"{bound_s:.2f}",
            f"{product.window_s / bound_s:.3f}",
            f"<= {MOST:.2f}",
            product.window_s <= MOST * bound_s,
        ),
        Row(
            "  whole process compared with the same bound, s",
            f"{product.wall_s:.2f}",
            f"{bound_s:.2f}",
            f"{product.wall_s / bound_s:.3f}",
            f"<= {MOST:.2f}",
            product.wall_s <= MOST * bound_s,
        ),
        Row("  share of the slots' time in use", _use(product), _use(floor)),
    ]


def _use(run: Run) -> str:
    return f"{100 * run.simulated_s / SLOTS / run.window_s:.1f} %"
