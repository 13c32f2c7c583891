"""Per-prompt values and costs of an evaluation: the one table from which every published number is computed.

Kept beside the summary as `prompt_values.npz`, so that evaluations of several seeds can be combined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.errors import RunError
from iama.files import lacks, replacing
from iama.reading import reason
from inference.statistics.costs import UNITS
from inference.statistics.savings import SAMPLES, Comparison

Key = tuple[str, str, str, str]

FILE_NAME = "prompt_values.npz"


@dataclass(frozen=True)
class Tables:
    """By (policy, criterion, method, metric) values, and by (policy, criterion, method, unit) costs.

    `[P, N]` for n = 1..N samples; a method that is one point has N = 1. A unit that is not known is absent. The unit
    `samples` stands where a method selects from draws whose number is not its n, and has the draws that were made.
    """

    values: dict[Key, Floats] = field(default_factory=dict)
    costs: dict[Key, Floats] = field(default_factory=dict)

    def mean(self, policy: str, criterion: str, method: str, metric: str, n: int) -> float | None:
        """Mean over prompts with `n` samples; None for a gold reward that was not given."""
        values = self.values.get((policy, criterion, method, metric))
        return None if values is None else float(values[:, n - 1].mean())

    def cost(self, policy: str, criterion: str, method: str, unit: str, n: int) -> float | None:
        """Mean cost over prompts of `n` samples; None where it is not known."""
        costs = self.costs.get((policy, criterion, method, unit))
        return None if costs is None else float(costs[:, n - 1].mean())

    def compare(
        self, trained: str, reference: str, criterion: str, method: str, metric: str, budget: int
    ) -> Comparison | None:
        """The trained policy at `budget` samples against the reference; None where one or the metric is missing."""
        return self.against((trained, criterion, method), reference, method, metric, budget, float(budget))

    def against(
        self,
        trained: tuple[str, str, str],
        reference: str,
        reference_method: str,
        metric: str,
        column: int,
        budget: float,
    ) -> Comparison | None:
        """A (policy, criterion, method) at its `column`-th budget against a reference's curve by another method."""
        other = (reference, trained[1], reference_method)
        if (*other, metric) not in self.values or (*trained, metric) not in self.values:
            return None
        reference_PN, trained_PN = self.values[*other, metric], self.values[*trained, metric]
        costs = self._both_costs(trained, other, self.costs)
        if (*other, SAMPLES) in self.costs or (*trained, SAMPLES) in self.costs:
            n_PN = np.broadcast_to(np.arange(1.0, reference_PN.shape[1] + 1), reference_PN.shape)
            budget_PN = np.full_like(trained_PN, budget)
            costs[SAMPLES] = self.costs.get((*other, SAMPLES), n_PN), self.costs.get((*trained, SAMPLES), budget_PN)
        gold_PN = self.values.get((*other, "gold"))
        return _comparison(reference_PN, gold_PN, trained_PN, costs, column, budget)

    def against_dial(
        self, trained: tuple[str, str, str], reference: str, points: Sequence[str], metric: str, unit: str
    ) -> Comparison | None:
        """A (policy, criterion, method) of one point against a reference by a dial, whose points are methods.

        The points are in the order of their mean cost in `unit`, which is what the ratio is told in.
        """
        others = [(reference, trained[1], point) for point in points]
        if any((*key, metric) not in self.values for key in (trained, *others)):
            return None
        if any((*key, unit) not in self.costs for key in (trained, *others)):
            return None
        others.sort(key=lambda key: float(self.costs[*key, unit].mean()))
        together: dict[Key, Floats] = {
            (*trained, u): np.concatenate([self.costs[*key, u] for key in others], axis=1)
            for u in UNITS
            if all((*key, u) in self.costs for key in others)
        }
        golds = [self.values.get((*key, "gold")) for key in others]
        gold = [gold_P1 for gold_P1 in golds if gold_P1 is not None]
        comparison = _comparison(
            np.concatenate([self.values[*key, metric] for key in others], axis=1),
            np.concatenate(gold, axis=1) if len(gold) == len(others) else None,
            self.values[*trained, metric],
            self._both_costs(trained, trained, together),
            column=1,
            budget=1.0,
        )
        return None if comparison is None else replace(comparison, unit=unit, is_dial=True)

    def _both_costs(
        self, trained: tuple[str, str, str], other: tuple[str, str, str], reference: Mapping[Key, Floats]
    ) -> dict[str, tuple[Floats, Floats]]:
        """By unit that both sides have, the reference's costs and the trained policy's; `[P, N]` each."""
        return {
            unit: (reference[*other, unit], self.costs[*trained, unit])
            for unit in UNITS
            if (*other, unit) in reference and (*trained, unit) in self.costs
        }


def _comparison(
    reference_PN: Floats,
    gold_PN: Floats | None,
    trained_PN: Floats,
    costs: Mapping[str, tuple[Floats, Floats]],
    column: int,
    budget: float,
) -> Comparison | None:
    """On the prompts of which both sides have values; None without any. A guided answer may lack its score."""
    known_P = np.isfinite(trained_PN[:, column - 1]) & np.isfinite(reference_PN).all(axis=1)
    if gold_PN is not None:
        known_P &= np.isfinite(gold_PN).all(axis=1)
    if not known_P.any():
        return None
    return Comparison(
        reference_PN=reference_PN[known_P],
        gold_PN=None if gold_PN is None else gold_PN[known_P],
        trained_P=trained_PN[known_P, column - 1],
        budget=budget,
        costs={unit: (other_PN[known_P], own_PN[known_P, column - 1]) for unit, (other_PN, own_PN) in costs.items()},
        known_P=known_P,
    )


def save_tables(folder: Path, tables: Tables) -> None:
    """Write `prompt_values.npz` atomically."""
    arrays: dict[str, Any] = {json.dumps(["values", *key]): array for key, array in tables.values.items()}
    arrays |= {json.dumps(["costs", *key]): array for key, array in tables.costs.items()}
    with replacing(folder / FILE_NAME) as file:
        np.savez_compressed(file, **arrays)


def load_tables(folder: Path) -> Tables:
    """Read what `save_tables` wrote; raises `RunError` if it is missing or damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise RunError(f"{lacks(folder, FILE_NAME)}; run `iama evaluate` into it first")
    tables = Tables()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, *key = json.loads(name)
                target: dict[Any, Floats] = getattr(tables, kind)
                target[tuple(key)] = arrays[name]
    except Exception as error:  # of many classes: of zip archives, of numpy's headers, of JSON
        raise RunError(f"{path} is damaged ({reason(error)}); run `iama evaluate` again") from error
    return tables
