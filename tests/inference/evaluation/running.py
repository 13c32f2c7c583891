"""Evaluations from a configuration, as the command line runs them: planned once, then evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference import evaluation

if TYPE_CHECKING:
    from pathlib import Path

    from iama.config.files import EvaluationConfig
    from inference.evaluation.shards import Shard
    from inference.evaluation.summary import Summary


def evaluate(config: EvaluationConfig) -> Summary:
    return evaluation.evaluate(evaluation.make_plan(config))


def evaluate_shard(config: EvaluationConfig, shard: Shard) -> Path:
    return evaluation.evaluate_shard(evaluation.make_plan(config), shard)
