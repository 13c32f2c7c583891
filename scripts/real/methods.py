"""A unit of another kind: every method that serves, on the base and on IAMA, by `iama evaluate` on the learned proxies.

Thresholds of entropy are the 0.9 quantile of each policy's own tokens, since nats of one model say nothing of another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from iama.files import write_atomically
from inference.evaluation.summary import load_summary
from scripts import launch
from scripts.real import proxies
from scripts.real.unit import BUDGET, Unit

METHODS = {
    "bon": "bon",
    "bop": "bop",
    "soft_bon": "soft_bon(8, temperature=0.1, ranks=1)",
    "stopping": "bon(16, stop=pandora(0.05))",
    "CARDS": "cards(quantile=0.9, entropy_threshold=quantile(0.9))",
    "GGRO": "ggro(num_candidates=4, entropy_threshold=quantile(0.9))",
    "blockwise": "blockwise(4)",
    "blockwise, tilted": "blockwise(4, first=tilted, min_p=0.02)",
    "SEA": "sea(num_steps=5)",
}
NUM_PROMPTS, NUM_SAMPLES = 16, 64
KEPT = ("policy", "criterion", "method", "samples", "proxy", "gold", "gold_ci95")
COSTS = ("policy_tokens", "reward_tokens", "backward_tokens", "sequential_steps", "flops", "seconds")


def measure(unit: Unit, file: Path) -> dict[str, Any]:
    """Gold and cost of every method, a row each; of IAMA where its adapter of this pair is on this machine."""
    folder = proxies.FOLDER / "methods" / unit.name
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(configuration(unit, file, folder), sort_keys=False))
    launch.iama("evaluate", "--config", str(path))
    return record_of(folder)


def record_of(folder: Path) -> dict[str, Any]:
    """What is kept of a finished evaluation."""
    summary = load_summary(folder)
    rows = [{key: row[key] for key in (*KEPT, *COSTS)} for row in map(dict, summary["curves"]) if _is_kept(row)]
    return {"rows": rows, "policies": summary["policies"], "methods": METHODS}


def configuration(unit: Unit, file: Path, folder: Path) -> dict[str, Any]:
    """What `iama evaluate` is given."""
    base = {"path": str(proxies.POLICY), "dtype": proxies.dtype()}
    adapter = Unit(unit.pair, "iama", unit.seed, unit.scale).run / "adapter"
    specs = {name: (proxies.proxy_of(name), proxies.gold_of(name)) for name in unit.criteria}
    return {
        "name": unit.name,
        "output_dir": str(folder),
        "policies": {"base": base} | ({"iama": {**base, "adapter": str(adapter)}} if adapter.is_dir() else {}),
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
