"""An evaluation of completions that exist already, without a configuration file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iama.errors import ConfigError, IamaWarning
from iama.nearest import meant, nearest
from inference.engine.responses import Pool
from inference.pools.file import read_pool
from inference.pools.held import tables
from inference.pools.score import DISAGREEMENT

GOLD = "/gold"
"""What a gold column's name adds to its criterion's by convention."""
BUDGET = 4


def config_from_pools(
    files: Mapping[str, Path],
    criteria: Sequence[str],
    trained: str | None,
    output_dir: str,
    read: Mapping[str, Pool] | None = None,
) -> dict[str, Any]:
    """An `EvaluationConfig` as it would stand in YAML, from pool files by policy name.

    `criteria` are `NAME=PROXY_COLUMN` or `NAME=PROXY_COLUMN,GOLD_COLUMN`; without any, every score column is a
    criterion, judged by the column `NAME/gold` where there is one, but for `NAME/disagreement` beside a column `NAME`.
    An `IamaWarning` names columns that some pools lack. `read` are pools by file that were read already. Raises
    `ConfigError`, and what `read_pool` raises.
    """
    pools = {name: (read or {}).get(str(path)) or read_pool(path) for name, path in files.items()}
    columns = _common_columns(pools)
    chosen = [_criterion(text, columns) for text in criteria] or _conventional(columns)
    if not chosen:
        raise ConfigError(
            f"the pools {', '.join(files)} have no score column in common; add one to each with "
            "`iama score POOL --reward DIR --column NAME`"
        )
    if not criteria:
        _warn_of_lacking(pools, files, columns)
    size = min(len(pool.prompts[0].samples) for pool in pools.values())
    if size < 4:
        raise ConfigError(
            f"the pools have {size} samples a prompt; at least 4 are needed, and 4 times the largest budget"
        )
    largest = size // 4
    names = list(files)
    subject = trained if trained is not None else "iama" if "iama" in names else names[-1]
    if subject not in names:
        raise ConfigError(f"--trained {subject!r} is none of the pools; {nearest(subject, names, 'pools')}")
    return {
        "name": " and ".join(names),
        "output_dir": output_dir,
        "policies": {name: {"pool": str(path)} for name, path in files.items()},
        "trained": subject,
        "references": [name for name in names if name != subject],
        "criteria": chosen,
        "budgets": [2**i for i in range(largest.bit_length()) if 2**i <= largest],
        "trained_budget": max(1, min(BUDGET, largest // 4)),  # so that a saving of 4 times can show
        "num_samples": size,
    }


def _common_columns(pools: Mapping[str, Pool]) -> list[str]:
    """Score columns that every sample of every pool has."""
    found = [table for pool in pools.values() for table in tables(pool)]
    return [name for name in found[0].scores if all(name in table.columns for table in found)]


def _warn_of_lacking(pools: Mapping[str, Pool], files: Mapping[str, Path], common: Sequence[str]) -> None:
    """Warn of each column that some pools have and others lack: a criterion without its gold is told by its proxy."""
    whole = {name: _common_columns({name: pool}) for name, pool in pools.items()}
    for column in dict.fromkeys(column for columns in whole.values() for column in columns):
        if column in common or column.endswith(DISAGREEMENT):
            continue
        having = [name for name, columns in whole.items() if column in columns]
        lacking = next(name for name in pools if name not in having)
        told = f"column {column!r} is in {' and '.join(having)} and not in every sample of {lacking}, so it is not used"
        remedy = f"iama score {files[lacking]} --column {column}"
        warnings.warn(f"{told}; `{remedy}` with its --reward adds it", IamaWarning, stacklevel=3)


def _conventional(columns: Sequence[str]) -> list[dict[str, Any]]:
    beside = {name + suffix for name in columns for suffix in (GOLD, DISAGREEMENT)}
    return [
        {"name": name, "proxy": {"column": name}}
        | ({"gold": {"column": name + GOLD}} if name + GOLD in columns else {})
        for name in columns
        if name not in beside
    ]


def _criterion(text: str, columns: Sequence[str]) -> dict[str, Any]:
    name, _, written = text.partition("=")
    parts = [part.strip() for part in written.split(",")]
    if not name or not 1 <= len(parts) <= 2 or not all(parts):
        raise ConfigError(
            f"--criterion {text!r}: write NAME=PROXY_COLUMN,GOLD_COLUMN (the gold column may be left out)"
        )
    unknown = [part for part in parts if part not in columns]
    if unknown:
        raise ConfigError(
            f"--criterion {text!r}: not every sample has the score column {unknown[0]!r}; "
            f"{meant(unknown[0], columns)}the pools have {', '.join(columns) or 'none in common'}"
        )
    return {"name": name, "proxy": {"column": parts[0]}} | ({"gold": {"column": parts[1]}} if len(parts) == 2 else {})
