"""A unit of another kind: every method that serves, on the base and on IAMA, by `iama evaluate` on the learned proxies.

Thresholds of entropy are the 0.9 quantile of each policy's own tokens, since nats of one model say nothing of another.
The other settings of guided methods are those that the study of them chose by proxy on the validation prompts of its
real-text task (docs/results/data/guided-settings.json), before this model was served by any.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from iama.files import write_atomically
from inference.evaluation.summary import load_summary
from inference.evaluation.tables import Tables, load_tables
from inference.statistics.equal_cost import difference_at_equal_cost
from scripts import launch
from scripts.real import proxies
from scripts.real.unit import BUDGET, Unit, adapter_of

METHODS = {
    "bon": "bon",
    "bop": "bop",
    "soft_bon": "soft_bon(8, temperature=0.1, ranks=1)",
    "stopping": "bon(16, stop=pandora(0.05))",
    "CARDS": "cards(quantile=0.9, entropy_threshold=quantile(0.9))",
    "GGRO, 2": "ggro(num_candidates=2, nudge_min_p=0, entropy_threshold=quantile(0.9))",
    "GGRO, 4": "ggro(num_candidates=4, nudge_min_p=0, entropy_threshold=quantile(0.9))",
    "GGRO, 8": "ggro(num_candidates=8, nudge_min_p=0, entropy_threshold=quantile(0.9))",
    "blockwise, policy": "blockwise(4, first=policy)",
    "blockwise, distinct": "blockwise(4, first=distinct, min_p=0)",
    "blockwise, tilted": "blockwise(4, first=tilted, tau=0.5, min_p=0.1)",
    "SEA": "sea(num_steps=5)",
}
NUM_PROMPTS, NUM_SAMPLES = 16, 64
KEPT = ("policy", "criterion", "method", "samples", "proxy", "gold", "gold_ci95")
COSTS = ("policy_tokens", "reward_tokens", "backward_tokens", "sequential_steps", "flops", "seconds")


def measure(unit: Unit, file: Path) -> dict[str, Any]:
    """Gold and cost of every method, a row each, on the base and on the pair's IAMA."""
    folder = proxies.FOLDER / "methods" / unit.name
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(configuration(unit, file, folder), sort_keys=False))
    launch.iama("evaluate", "--config", str(path))
    return record_of(folder)


def record_of(folder: Path) -> dict[str, Any]:
    """What is kept of a finished evaluation."""
    summary, tables = load_summary(folder), load_tables(folder)
    rows = [
        {key: row[key] for key in (*KEPT, *COSTS)} | _against_bon(tables, row)
        for row in map(dict, summary["curves"])
        if _is_kept(row)
    ]
    return {"rows": rows, "policies": summary["policies"], "methods": METHODS}


def _against_bon(tables: Tables, row: Mapping[str, Any]) -> dict[str, Any]:
    """Gold of a method of one point minus that of Best-of-n on the same policy with as many operations."""
    if row["samples"] is not None:
        return {}
    served = (row["policy"], row["criterion"], row["method"])
    comparison = tables.against(served, row["policy"], "bon", "gold", 1, 1.0)
    assert comparison is not None, f"no gold of {served}"
    return {"against_bon": difference_at_equal_cost([comparison], "flops", num_bootstrap=1000, seed=0).as_dict()}


def configuration(unit: Unit, file: Path, folder: Path) -> dict[str, Any]:
    """What `iama evaluate` is given."""
    base = {"path": str(proxies.POLICY), "dtype": proxies.dtype()}
    specs = {name: (proxies.proxy_of(name), proxies.gold_of(name)) for name in unit.criteria}
    return {
        "name": unit.name,
        "output_dir": str(folder),
        "policies": {"base": base, "iama": {**base, "adapter": str(adapter_of(unit))}},
        "prompts": {"path": str(file), "max_prompts": min(NUM_PROMPTS, unit.scale.prompts)},
        "criteria": [
            {
                "name": name,
                "proxy": proxy.model_dump(mode="json", exclude_unset=True),
                "gold": judge.model_dump(mode="json", exclude_unset=True),
            }
            for name, (proxy, judge) in specs.items()
        ],
        "methods": list(METHODS.values()),
        "budgets": [1, 2, 4, 8, 16],
        "num_samples": NUM_SAMPLES,
        "trained_budget": BUDGET,
        "sampling": proxies.SAMPLING.model_dump(exclude_defaults=True),
        "log_probabilities": False,
        "seed": unit.seed,
    }


def _is_kept(row: Any) -> bool:
    return row["samples"] is None or row["method"] in ("bon", "bop")
