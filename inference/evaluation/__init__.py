"""Evaluations: policies x criteria x methods x budgets, from one pool of samples a prompt and policy.

Read `evaluate.py` first, then follow a prompt: `plan.py` checks everything and renders it (`sources.py`), `measure.py`
draws, scores and answers, `rows/` computes each table, `summary.py` says what `summary.json` holds. Beside them:
`shards.py` for several devices, `describe.py` for `--dry-run`, `compare.py` and `combine.py` for savings over seeds,
`calibration.py` for `iama tune`.
"""

from inference.evaluation.combine import combine_evaluations
from inference.evaluation.evaluate import evaluate, evaluate_on_devices, evaluate_shard
from inference.evaluation.plan import Plan, make_plan
from inference.evaluation.summary import Summary, load_summary

__all__ = [
    "Plan",
    "Summary",
    "combine_evaluations",
    "evaluate",
    "evaluate_on_devices",
    "evaluate_shard",
    "load_summary",
    "make_plan",
]
