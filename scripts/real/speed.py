"""A unit of another kind: seconds of Best-of-n on the base and on IAMA, side by side on one machine.

Seconds of one machine say nothing of another, nor of the same one when it is busy. So policies take turns, and each
time is the least of `NUM_ROUNDS`. A trained policy's answers are shorter or longer than the base's: seconds and samples
are not saved alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iama.config.specs import PolicySpec
from iama.progress import progress_bar
from iama.prompts.data import load_prompts
from inference.pools.engines import Draw, transformers_draw
from scripts.real import proxies
from scripts.real.unit import BUDGET, Unit, adapter_of

BUDGETS, NUM_PROMPTS, NUM_ROUNDS = (1, 2, BUDGET, 8, 16, 32), 8, 2


def measure(unit: Unit, file: Path) -> dict[str, Any]:
    """Seconds that each policy takes to draw n samples for each of the first prompts, all prompts together."""
    rows = load_prompts(file, min(NUM_PROMPTS, unit.scale.prompts))
    specs = {
        name: PolicySpec(path=str(proxies.POLICY), adapter=path, dtype=proxies.dtype())
        for name, path in (("base", None), ("iama", str(adapter_of(unit))))
    }
    seconds: dict[str, dict[int, list[float]]] = {name: {n: [] for n in BUDGETS} for name in specs}
    with progress_bar(f"{unit.name}: seconds", "draws", NUM_ROUNDS * len(BUDGETS) * len(specs)) as advance:
        draws = {
            (name, n): transformers_draw(name, spec, None, n, proxies.SAMPLING, unit.seed, proxies.BATCH_SIZE)
            for name, spec in specs.items()
            for n in BUDGETS
        }
        for draw in draws.values():  # the policy is loaded and warm
            _seconds(draw, rows[:1])
        for _ in range(NUM_ROUNDS):
            for n in BUDGETS:
                for name in specs:
                    seconds[name][n].append(_seconds(draws[name, n], rows))
                    advance(1)
    return {
        "rows": [
            {"policy": name, "samples": n, "seconds": round(min(seconds[name][n]) / len(rows), 4)}
            for name in specs
            for n in BUDGETS
        ]
    }


def _seconds(draw: Draw, rows: list[dict[str, Any]]) -> float:
    return sum(cost.seconds for _, _, cost, _ in draw(rows, range(len(rows))))
