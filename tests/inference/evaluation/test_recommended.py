"""Advice names what a user writes, whichever way of serving is best."""

from __future__ import annotations

import numpy as np
import pytest

from iama.config.files import EvaluationConfig
from inference.evaluation.rows.risks import recommendation_rows
from inference.evaluation.tables import Tables

POINT = "cards(quantile=0.5)"
STOPPED = "bon(8, stop=target(0.9))"
WAYS = [
    ("bon", 4),
    ("bop", 4),
    ("stop", 4),
    (POINT, None),
    ("bon(tuned)", None),
    (STOPPED, None),
    ("itp(8, 0.1)", None),
]
WRITTEN = {
    "bon": "bon(4)",
    "bop": "bop(3)",
    "stop": "bon(8, stop=pandora(0.1))",
    POINT: POINT,
    "bon(tuned)": "bon(7)",
    STOPPED: STOPPED,
    "itp(8, 0.1)": "itp(8, 0.1)",
}


def curve(method, samples, cost):
    row = {"policy": "base", "criterion": "c", "method": method, "samples": samples, "policy_tokens": cost, "gold": 1.0}
    row |= {"flops": cost, "seconds": cost}
    if method == "stop":
        row["draws"] = 2.5
    if method == POINT:
        row |= {"dial": "cards", "value": "0.5"}
    if method in ("bon(tuned)", STOPPED):
        row["written"] = "bon(7)" if method == "bon(tuned)" else "bon(8, stop=a) and bon(8, stop=b)"
    return row


@pytest.mark.parametrize("best", [method for method, _ in WAYS])
def test_the_best_way_is_named_as_it_is_written(best):
    config = EvaluationConfig.model_validate(
        {"name": "n", "output_dir": "o", "policies": {"base": {"pool": "p"}}, "trained": "base", "references": ["base"]}
        | {"criteria": [{"name": "c", "proxy": {"column": "c"}}], "num_bootstrap": 100}
    )
    tables, rows = Tables(), [curve(method, samples, 10.0) for method, samples in WAYS]
    for method, samples in WAYS:
        tables.values["base", "c", method, "gold"] = np.full((8, samples or 1), 2.0 if method == best else 1.0)
    settings = {"policy": "base", "criterion": "c", "draws": 2.5, "proxy": 0.0}
    stops = [settings | {"samples": n, "method": f"bon({2 * n}, stop=pandora(0.1))"} for n in (2, 4)]
    found = recommendation_rows(config, tables, rows, stops)
    (row,) = [r for r in found if r["unit"] == "policy_tokens"]
    assert (row["method"], row["written"]) == (best, WRITTEN[best])
    assert row["runner_up"]["method"] != best
    in_samples = {r["budget"]: r["method"] for r in found if r["unit"] == "samples"}
    assert set(in_samples) == {2.5, 4}  # stopping is counted by the draws it makes
    assert in_samples[2.5] == "stop"
