"""Per-prompt curves of an evaluation: the one table from which every published number is computed.

Kept beside the summary as `prompt_values.npz`, so that evaluations of several seeds can be combined.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iama.errors import RunError
from iama.files import temporary_name
from inference.curves import curves, operator_at
from inference.savings import Comparison

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from inference.pools import SampledPool

    Floats = NDArray[np.float64]

FILE_NAME = "prompt_values.npz"


@dataclass(frozen=True)
class Tables:
    """Values by (policy, criterion, method, metric), `[P, N]` for n = 1..N samples; tokens by policy, `[P]`."""

    values: dict[tuple[str, str, str, str], Floats]
    prefill: dict[str, Floats]
    decode: dict[str, Floats]

    def mean(self, policy: str, criterion: str, method: str, metric: str, n: int) -> float | None:
        """Mean over prompts with `n` samples; None for a gold reward that was not given."""
        values = self.values.get((policy, criterion, method, metric))
        return None if values is None else float(values[:, n - 1].mean())

    def tokens(self, policy: str, n: int) -> float:
        """Mean policy tokens a prompt: the prompt once, and `n` samples."""
        return float((self.prefill[policy] + n * self.decode[policy]).mean())

    def compare(
        self, trained: str, reference: str, criterion: str, method: str, metric: str, budget: int
    ) -> Comparison | None:
        """The trained policy at `budget` against the reference; None where one or the metric is missing."""
        key = (reference, criterion, method, metric)
        if key not in self.values or (trained, criterion, method, metric) not in self.values:
            return None
        return Comparison(
            reference_PN=self.values[key],
            gold_PN=self.values.get((reference, criterion, method, "gold")),
            trained_P=self.values[trained, criterion, method, metric][:, budget - 1],
            budget=budget,
            reference_prefill_P=self.prefill[reference],
            reference_decode_P=self.decode[reference],
            trained_prefill_P=self.prefill[trained],
            trained_decode_P=self.decode[trained],
        )


def make_tables(
    pools: dict[str, SampledPool],
    scores: dict[tuple[str, str], tuple[Floats, Floats | None]],
    methods: list[str],
) -> Tables:
    """Curves up to a quarter of the pool from scores (proxy, gold), `[P, S]`, by (policy, criterion)."""
    values = {}
    for (policy, criterion), (proxy_PS, gold_PS) in scores.items():
        for method in methods:
            operators = [operator_at(method, n) for n in range(1, proxy_PS.shape[1] // 4 + 1)]
            for metric, score_PS in (("proxy", proxy_PS), ("gold", gold_PS)):
                if score_PS is not None:
                    values[policy, criterion, method, metric] = curves(proxy_PS, score_PS, operators)
    return Tables(
        values,
        {name: pool.prefill_tokens for name, pool in pools.items()},
        {name: pool.decode_tokens for name, pool in pools.items()},
    )


def save_tables(folder: Path, tables: Tables) -> None:
    """Write `prompt_values.npz` atomically."""
    arrays: dict[str, Any] = {json.dumps(["values", *key]): array for key, array in tables.values.items()}
    arrays |= {json.dumps(["prefill", name]): array for name, array in tables.prefill.items()}
    arrays |= {json.dumps(["decode", name]): array for name, array in tables.decode.items()}
    path = folder / FILE_NAME
    with temporary_name(path).open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary_name(path).replace(path)


def load_tables(folder: Path) -> Tables:
    """Read what `save_tables` wrote; raises `RunError` if it is missing or damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise RunError(f"{str(folder)!r} holds no {FILE_NAME}; run `iama evaluate` into it first")
    tables = Tables({}, {}, {})
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, *key = json.loads(name)
                target: dict[Any, Floats] = getattr(tables, kind)
                target[tuple(key) if kind == "values" else key[0]] = arrays[name]
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); run `iama evaluate` again") from error
    return tables
