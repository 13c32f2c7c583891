"""What the files of units say: scores as arrays by prompt and sample, units by pair and policy, and what is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.objective.estimators import group_value
from iama.objective.operators import bon
from inference.selection.curves import curves
from inference.statistics.savings import Comparison, Savings, estimate_savings
from scripts.real.unit import BUDGET, ENGINE, METHODS, SAME_PROXY, SPEED, Unit, read

NUM_BOOTSTRAP = 1000


class Measured:
    """What a unit's file says, as arrays by prompt and sample."""

    def __init__(self, unit: Unit, record: dict[str, Any] | None = None) -> None:
        self.unit = unit
        self.record = read(unit) if record is None else record

    def proxy(self, criterion: str) -> Floats:
        """Scores of what selects, `[P, S]`."""
        return np.asarray(self.record["scores"][criterion], dtype=np.float64)

    def gold(self, criterion: str) -> Floats:
        """Scores of what judges, `[P, S]`; of the lengths both are one."""
        scores = self.record["scores"]
        return np.asarray(scores.get(f"{criterion}/gold", scores[criterion]), dtype=np.float64)

    def array(self, name: str) -> Floats:
        """Another figure, `[P, S]`."""
        return np.asarray(self.record[name], dtype=np.float64)

    @cached_property
    def num_samples(self) -> int:
        """Samples a prompt."""
        return len(self.record["tokens"][0])

    @cached_property
    def budgets(self) -> list[int]:
        """Numbers of samples of a curve: to a quarter of the pool."""
        return list(range(1, max(BUDGET, self.num_samples // 4) + 1))

    def curve(self, criterion: str, by: str = "gold") -> Floats:
        """Value of Best-of-n, `[P, N]`."""
        score_PS = self.gold(criterion) if by == "gold" else self.proxy(criterion)
        return curves(self.proxy(criterion), score_PS, [bon(n) for n in self.budgets])

    def kept(self, criterion: str, name: str, budget: int = BUDGET) -> Floats:
        """Mean of another figure over what Best-of-n keeps of the samples that have it, `[P]`."""
        values_PS = self.array(name)
        return group_value(bon(budget), self.proxy(criterion)[:, : values_PS.shape[1]], values_PS)

    def costs(self, budgets: Sequence[int]) -> dict[str, Floats]:
        """What Best-of-n spends on each prompt, `[P, N]`, the prompt read once; a proxy's reading is in none."""
        n_1N = np.asarray(budgets, dtype=np.float64)[None]
        once_P1 = np.asarray(self.record["prefill_tokens"], dtype=np.float64)[:, None]
        each_P1 = self.array("tokens").mean(axis=1)[:, None]
        whole_P1, prefill_P1 = (
            np.asarray(self.record[k], dtype=np.float64)[:, None] for k in ("flops", "prefill_flops")
        )
        return {
            "tokens": once_P1 + n_1N * each_P1,
            "flops": prefill_P1 + n_1N * (whole_P1 - prefill_P1) / self.num_samples,
        }


class Study:
    """The units that are there, by pair, policy and split."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        there = [unit for unit in units if unit.is_done()]
        self.done = [Measured(unit) for unit in there if unit.policy not in (METHODS, SPEED, ENGINE)]
        self.methods = {unit.pair: read(unit) for unit in there if unit.policy == METHODS}
        self.speed = {unit.pair: read(unit)["rows"] for unit in there if unit.policy == SPEED}
        self.engine = next((read(unit) for unit in there if unit.policy == ENGINE), None)
        self.missing = [unit for unit in units if not unit.is_done()]

    def all(self, pair: str, policy: str, split: str = "test") -> list[Measured]:
        """A policy's units, a seed each."""
        return [m for m in self.done if (m.unit.pair, m.unit.policy, m.unit.split) == (pair, policy, split)]

    def one(self, pair: str, policy: str, split: str = "test") -> Measured | None:
        """The first seed's, if it is there."""
        return next(iter(self.all(pair, policy, split)), None)

    @property
    def pairs(self) -> list[str]:
        """Pairs with any unit."""
        return list(dict.fromkeys(m.unit.pair for m in self.done))

    def policies(self, pair: str) -> list[str]:
        """Policies of a pair that are there, in the order of the units."""
        return list(dict.fromkeys(m.unit.policy for m in self.done if m.unit.pair == pair and m.unit.split == "test"))


def mean_curve(units: Sequence[Measured], criterion: str) -> Floats:
    """Gold of Best-of-n by n, mean over seeds and prompts."""
    mean_N: Floats = np.mean([unit.curve(criterion).mean(axis=0) for unit in units], axis=0)
    return mean_N


def single_words(study: Study, policy: str) -> Floats:
    """Words of all single samples of a policy of the length pair."""
    return np.concatenate([unit.array("words").ravel() for unit in study.all("length", policy)])


def saved(
    trained: Sequence[Measured],
    references: Sequence[Measured],
    criterion: str,
    by: str = "gold",
    speed: Sequence[Mapping[str, Any]] = (),
) -> Savings:
    """What references need for what trained policies reach with `BUDGET` samples; a seed each, or one for all.

    In seconds too, where `speed` has both policies' (`scripts.real.speed`).
    """
    comparisons = []
    for number, one in enumerate(trained):
        other = references[min(number, len(references) - 1)]
        refuse_mixed(one, other)
        own = {unit: cost[:, 0] for unit, cost in one.costs([BUDGET]).items()}
        theirs = other.costs(other.budgets)
        costs = {unit: (theirs[unit], own[unit]) for unit in own}
        mine_s, their_s = (seconds(speed, m.unit.policy, len(one.record["prompts"]), m.budgets) for m in (one, other))
        if mine_s is not None and their_s is not None:
            costs["seconds"] = (their_s, mine_s[:, BUDGET - 1])
        value_PS = one.gold(criterion) if by == "gold" else one.proxy(criterion)
        comparisons.append(
            Comparison(
                reference_PN=other.curve(criterion, by),
                gold_PN=other.curve(criterion),
                trained_P=group_value(bon(BUDGET), one.proxy(criterion), value_PS),
                budget=BUDGET,
                costs=costs,
            )
        )
    return estimate_savings(comparisons, num_bootstrap=NUM_BOOTSTRAP, seed=0, same_prompts=True)


def seconds(speed: Sequence[Mapping[str, Any]], policy: str, num_prompts: int, budgets: Sequence[int]) -> Floats | None:
    """Seconds a prompt at every budget, `[P, N]`, linear between those that were timed; None of one that was not."""
    found = [(row["samples"], row["seconds"]) for row in speed if row["policy"] == policy]
    return np.tile(np.interp(budgets, *np.transpose(found)), (num_prompts, 1)) if found else None


def differing(first: Measured, second: Measured) -> list[str]:
    """What two units do not share of models, prompts, proxies and precision; a probe may differ by `SAME_PROXY`."""
    theirs = [
        [score for name in sorted(m.record["proxies"]) for score in m.record["proxies"][name]] for m in (first, second)
    ]
    same = {key: first.record.get(key) == second.record.get(key) for key in ("weights_sha256", "prompts", "dtype")}
    same["proxies"] = len(theirs[0]) == len(theirs[1]) and bool(np.allclose(theirs[0], theirs[1], 0, SAME_PROXY))
    return [key for key, is_same in same.items() if not is_same]


def refuse_mixed(first: Measured, second: Measured) -> None:
    """End where two units were made from other models, prompts, proxies or in another precision."""
    for key in differing(first, second):
        raise SystemExit(
            f"error: {first.unit.path} and {second.unit.path} differ in {key!r}, so they cannot be compared; "
            "delete those of one machine and run the study again"
        )
