"""Evaluations from a configuration, as the command line runs them: planned once, then run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference.evaluation import evaluate as run
from inference.evaluation.plan import make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from iama.config.settings import EvaluationConfig
    from inference.evaluation.shards import Shard
    from inference.evaluation.summary import Summary


def evaluate(config: EvaluationConfig) -> Summary:
    return run.evaluate(make_plan(config))


def evaluate_shard(config: EvaluationConfig, shard: Shard) -> Path:
    return run.evaluate_shard(make_plan(config), shard)
