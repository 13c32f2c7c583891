"""Everything that `summary.json` holds, computed from what was measured."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iama import __version__
from iama.config.manifest import load_manifest
from iama.config.settings import CURVES
from inference.evaluation.rows import risks as risk_rows
from inference.evaluation.rows.examples import example_rows
from inference.evaluation.rows.kl import kl_of
from inference.evaluation.rows.sampling import missing_rows, sampling_rows
from inference.evaluation.rows.values import fill_tables, served
from inference.evaluation.summary import Question, Summary, compare_policies
from inference.statistics.bootstrap import mean_interval
from inference.statistics.break_even import read_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from iama.config.settings import EvaluationConfig
    from inference.evaluation.measured import Measured
    from inference.evaluation.plan import Plan
    from inference.evaluation.tables import Tables
    from inference.statistics.bootstrap import Estimate
    from inference.statistics.summary_rows import Costs, CurveExtras, CurveRow, RewardCostRow

    Floats = NDArray[np.float64]


def summarise(config: EvaluationConfig, plan: Plan, measured: Measured) -> tuple[Tables, Summary]:
    """The table of values and costs by prompt, and every row of the summary."""
    tables = fill_tables(config, plan, measured)
    question = Question(
        config.trained_budget,
        config.trained,
        [name for name in config.references if name in config.policies],
        config.num_bootstrap,
        config.seed,
    )
    curves = curve_rows(config, plan, measured, tables)
    results = compare_policies([tables], question)
    summary = Summary(
        **results,
        curves=curves,
        quality=risk_rows.quality_rows(config, plan, measured, tables),
        hacking=risk_rows.hacking_rows(config, tables),
        controls=risk_rows.control_rows(config, plan, measured),
        win_rates=risk_rows.win_rate_rows(config, plan, measured),
        recommendations=risk_rows.recommendation_rows(config, tables, curves),
        break_even=risk_rows.break_even_rows(config, plan, measured, tables, results["savings"]),
        sampling=sampling_rows(config, plan, measured),
        missing=missing_rows(config, plan, measured),
        costs=reward_cost_rows(plan, measured),
        examples=example_rows(config, plan, measured),
        name=config.name,
        trained=config.trained,
        references=list(question.references),
        policies=list(config.policies),
        criteria=[c.name for c in config.criteria],
        methods=list(config.methods),
        num_prompts=len(plan.rows),
        dropped_prompts=plan.dropped,
        num_samples=plan.num_samples,
        trained_budget=config.trained_budget,
        manifest=manifest_of(config),
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
    return tables, summary


def curve_rows(config: EvaluationConfig, plan: Plan, measured: Measured, tables: Tables) -> list[CurveRow]:
    """Mean proxy, gold, cost and KL: a row a (policy, criterion, method, budget), or one for a method of one point."""
    rows: list[CurveRow] = []
    for policy, criterion in served(config):
        for method in config.methods:
            budgets: Sequence[int | None] = sorted(set(config.budgets)) if method in CURVES else [None]
            kl, kind = kl_of(config, plan, measured, policy, criterion, method)
            for n in budgets:
                key = (policy, criterion.name, method)
                column = 1 if n is None else n
                proxy, gold = (
                    _estimate(config, tables.values.get((*key, metric)), column) for metric in ("proxy", "gold")
                )
                rows.append(
                    {
                        "policy": policy,
                        "criterion": criterion.name,
                        "method": method,
                        "samples": n,
                        **_costs(tables, key, column),
                        "proxy": None if proxy is None else proxy.mean,
                        "proxy_ci95": None if proxy is None else list(proxy.ci95),
                        "gold": None if gold is None else gold.mean,
                        "gold_ci95": None if gold is None else list(gold.ci95),
                        "kl": None if kl is None else float(kl[column - 1]),
                        "kl_kind": kind,
                        **_disagreement(tables, key, column),
                        "num_prompts": len(plan.rows),
                    }
                )
    return rows


def _costs(tables: Tables, key: tuple[str, str, str], column: int) -> Costs:
    return {
        "policy_tokens": tables.cost(*key, "policy_tokens", column),
        "policy_prefill_tokens": tables.cost(*key, "policy_prefill_tokens", column),
        "policy_decode_tokens": tables.cost(*key, "policy_decode_tokens", column),
        "reward_calls": tables.cost(*key, "reward_calls", column),
        "reward_tokens": tables.cost(*key, "reward_tokens", column),
        "backward_tokens": tables.cost(*key, "backward_tokens", column),
        "sequential_steps": tables.cost(*key, "sequential_steps", column),
        "flops": tables.cost(*key, "flops", column),
        "seconds": tables.cost(*key, "seconds", column),
    }


def _disagreement(tables: Tables, key: tuple[str, str, str], column: int) -> CurveExtras:
    known = (*key, "disagreement") in tables.values
    return {"disagreement": tables.mean(*key, "disagreement", column)} if known else {}


def _estimate(config: EvaluationConfig, values_PN: Floats | None, column: int) -> Estimate | None:
    """Mean over prompts with its interval."""
    if values_PN is None:
        return None
    return mean_interval(values_PN[:, column - 1], num_bootstrap=config.num_bootstrap, seed=config.seed)


def reward_cost_rows(plan: Plan, measured: Measured) -> list[RewardCostRow]:
    """What scoring the pools took, by reward: each distinct text of a prompt once, whichever policies gave it."""
    rows: list[RewardCostRow] = []
    for spec, name in plan.rewards.items():
        seen: set[tuple[str, str]] = set()
        tokens, seconds = 0, 0.0
        for (source, reward), scores in measured.scores.items():
            if reward != spec:
                continue
            new = distinct = 0
            for prompt, tokens_S in zip(measured.pools[source].prompts, scores.tokens_PS, strict=True):
                scored = prompt.samples[: len(tokens_S)]  # a stored pool may have more
                fresh = {s.text: int(t) for s, t in zip(scored, tokens_S, strict=True)}
                distinct += len(fresh)
                fresh = {text: t for text, t in fresh.items() if (prompt.prompt_id, text) not in seen}
                seen.update((prompt.prompt_id, text) for text in fresh)
                tokens += sum(fresh.values())
                new += len(fresh)
            seconds += float(scores.seconds_P.sum()) * new / distinct
        calls = len(seen) * len(spec.parts)
        rows.append({"reward": name, "reward_calls": calls, "reward_tokens": tokens, "seconds": seconds})
    return rows


def manifest_of(config: EvaluationConfig) -> dict[str, Any] | None:
    """What the trained policy was trained for: from the `iama.json` of an export, else from its training run."""
    policy = config.policies.get(config.trained)
    if policy is None:
        return None
    folder = policy.adapter or policy.path
    manifest = None if folder is None else load_manifest(Path(folder))
    if manifest is not None:
        return manifest.model_dump(mode="json")
    objectives = [read_config(Path(run)).get("objective") for run in policy.training_run]
    return objectives[0] if len(objectives) == 1 else None


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    packages = ("torch", "transformers", "peft", "numpy", "scipy")
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    return {"iama": __version__, "python": platform.python_version(), **found}
