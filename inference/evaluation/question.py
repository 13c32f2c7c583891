"""What an evaluation compares, and how its tables are asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from iama.config.methods import AT_EVERY_BUDGET
from inference.evaluation.tables import Tables
from inference.statistics.savings import Comparison, on_common_prompts

TRAINED = "iama"
REFERENCES = ("base", "grpo")
METRICS = ("gold", "proxy")


class Bootstrap(TypedDict):
    """How estimates are resampled (`inference.statistics.bootstrap.resample`)."""

    num_bootstrap: int
    seed: int
    same_prompts: bool


@dataclass(frozen=True)
class Question:
    """What is compared: the trained policy at `budget` samples with each reference, and how sure that is.

    `dials`: the points of each method with a dial, which are methods of their own. `same_prompts`: whether all seeds
    answered the same prompts.
    """

    budget: int
    trained: str = TRAINED
    references: Sequence[str] = REFERENCES
    num_bootstrap: int = 1000
    seed: int = 0
    dials: Mapping[str, Sequence[str]] = field(default_factory=dict)
    same_prompts: bool = False

    @property
    def bootstrap(self) -> Bootstrap:
        """Keyword arguments of the estimates."""
        return {"num_bootstrap": self.num_bootstrap, "seed": self.seed, "same_prompts": self.same_prompts}


def axis(tables: Tables, position: int) -> list[str]:
    """Distinct names along one axis of the keys (policy, criterion, method, metric), in their order."""
    return list(dict.fromkeys(key[position] for key in tables.values))


def curve_methods_of(tables: Tables) -> list[str]:
    """Methods that are measured at every budget."""
    return [method for method in axis(tables, 2) if method in AT_EVERY_BUDGET]


def of_all(results: Sequence[Comparison | None], question: Question) -> list[Comparison]:
    """The comparisons of all seeds, on common prompts where these are the same; none where a seed lacks its own."""
    comparisons = [comparison for comparison in results if comparison is not None]
    if len(comparisons) < len(results):
        return []
    return on_common_prompts(comparisons) if question.same_prompts else comparisons
