"""What pools and guided answers look like and what they cost: lengths, variety, fluency, missing scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.config.settings import CURVES
from iama.cost import Cost
from inference.engine.likelihood import fluency, fluency_z
from inference.evaluation.likelihood import is_plain
from inference.evaluation.plan import is_guided
from inference.evaluation.rows.values import operators_of, scores_of, served
from inference.selection.kept import kept_chances
from inference.selection.rules import rule_of
from inference.statistics.costs import lengths
from inference.statistics.texts import distinct_n, distinct_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from iama.config.settings import EvaluationConfig
    from inference.evaluation.measured import Measured
    from inference.evaluation.plan import Plan
    from inference.pools.file import PoolFile
    from inference.statistics.summary_rows import (
        LikelihoodFigures,
        MissingRow,
        SamplingCost,
        SamplingRow,
        TextFigures,
    )

    Floats = NDArray[np.float64]

NO_TEXTS: TextFigures = {
    "num_samples": None,
    "mean_tokens": None,
    "truncated": None,
    "distinct": None,
    "distinct_1": None,
    "distinct_2": None,
    "distinct_3": None,
}
NO_COST: SamplingCost = {
    "prefill_tokens": None,
    "decode_tokens": None,
    "flops": None,
    "seconds": None,
    "peak_memory": None,
    "estimated": None,
}
NO_LIKELIHOOD: LikelihoodFigures = {"fluency": None, "fluency_z": None, "mean_log_ratio": None}


def sampling_rows(config: EvaluationConfig, plan: Plan, measured: Measured) -> list[SamplingRow]:
    """A row a pool, and one for the answers of every guided method, a single one a prompt.

    Last, of selections that may fall back or be cut by a cap, how often they are.
    """
    rows: list[SamplingRow] = []
    for source in plan.sources:
        pool = measured.pools[source.name]
        rows.append(
            {
                "policy": source.policy,
                "criterion": None if len(source.criteria) == len(config.criteria) else ", ".join(source.criteria),
                "method": None,
                "engine": source.header["engine"],
                **_texts(pool, plan.num_samples),
                **_cost(pool),
                **_likelihood(config, measured, pool, source.name),
                "fallback": None,
                "capped": None,
            }
        )
    for (policy, criterion, method), (_, pool, _) in measured.answers.items():
        row: SamplingRow = {
            "policy": policy,
            "criterion": criterion,
            "method": method,
            "engine": plan.source(policy, criterion).header["engine"],
            **_texts(pool, plan.num_samples),
            **_cost(pool),
            **_likelihood(config, measured, pool, answers_name(policy, criterion, method)),
            "fallback": _forced_share(pool),
            "capped": None,
        }
        proxy = next(c for c in config.criteria if c.name == criterion).proxy
        if any(part.judge is not None for part in proxy.parts):
            row["flops"] = None  # those of the policy alone would be no cost of the method
        row["distinct"] = None  # a single text has no variety
        rows.append(row)
    return [*rows, *_selection_rows(config, plan, measured)]


def _selection_rows(config: EvaluationConfig, plan: Plan, measured: Measured) -> Iterator[SamplingRow]:
    for policy, criterion in served(config):
        source = plan.source(policy, criterion.name)
        for method in (m for m in config.methods if m not in CURVES and not is_guided(m)):
            rule = rule_of(operators_of(plan.written(policy, criterion.name, method), 1)[0])
            share = None
            if rule.falls_back:
                proxy_PS, _ = scores_of(plan, measured, policy, criterion)
                share = float(kept_chances(rule, proxy_PS, measured.pools[source.name].texts)[1].mean())
            if rule.capped_share or rule.falls_back:
                yield {
                    "policy": policy,
                    "criterion": criterion.name,
                    "method": method,
                    "engine": source.header["engine"],
                    **NO_TEXTS,
                    **NO_COST,
                    **NO_LIKELIHOOD,
                    "fallback": share,
                    "capped": rule.capped_share or None,
                }


def answers_name(policy: str, criterion: str, method: str) -> str:
    """What guided answers are called where pools are called by their source."""
    return f"{policy} {criterion} {method}"


def _forced_share(pool: PoolFile) -> float | None:
    """Share of segments none of whose proposals was accepted; None for a method that does not tell segments."""
    segments = [segment for prompt in pool.prompts for sample in prompt.samples for segment in sample.segments]
    return float(np.mean([segment["forced"] for segment in segments])) if segments else None


def _texts(pool: PoolFile, num_compared: int) -> TextFigures:
    """Variety falls with the number of samples, so as many of every pool are looked at."""
    texts = [row[:num_compared] for row in pool.texts]
    lengths_PS = lengths(pool)
    reasons = [sample.finish_reason for prompt in pool.prompts for sample in prompt.samples]
    return {
        "num_samples": len(pool.prompts[0].samples),
        "mean_tokens": None if lengths_PS is None else float(lengths_PS.mean()),
        "truncated": None if "unknown" in reasons else reasons.count("length") / len(reasons),
        "distinct": distinct_texts(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "distinct_3": distinct_n(texts, 3),
    }


def _cost(pool: PoolFile) -> SamplingCost:
    """What sampling took; None for what a pool from elsewhere does not tell."""
    cost = sum((prompt.cost for prompt in pool.prompts), Cost())
    return {
        "prefill_tokens": cost.policy_prefill_tokens or None,
        "decode_tokens": None if lengths(pool) is None else cost.policy_decode_tokens,
        "flops": cost.flops or None,
        "seconds": cost.seconds or None,
        "peak_memory": cost.peak_memory or None,
        "estimated": any(prompt.estimated for prompt in pool.prompts),
    }


def _likelihood(config: EvaluationConfig, measured: Measured, pool: PoolFile, name: str) -> LikelihoodFigures:
    """Fluency under the reference, and the log-ratio to it; the latter only of plain sampling, whose KL it is."""
    figures = NO_LIKELIHOOD.copy()
    reference = measured.reference
    under = measured.log_probabilities.get((name, reference or ""))
    own = measured.log_probabilities.get((name, name))
    lengths_PS = lengths(pool)
    if reference is None or under is None or lengths_PS is None or not np.isfinite(under).all():
        return figures
    figures["fluency"] = float(np.nanmean(fluency(under, lengths_PS)))
    reference_lengths = lengths(measured.pools[reference])
    if reference_lengths is not None:
        theirs = fluency(measured.log_probabilities[reference, reference], reference_lengths)
        figures["fluency_z"] = fluency_z(fluency(under, lengths_PS), theirs)
    if own is not None and is_plain(config.sampling):
        figures["mean_log_ratio"] = float((own - under).mean())
    return figures


def missing_rows(config: EvaluationConfig, plan: Plan, measured: Measured) -> list[MissingRow]:
    """How many samples have no score; and of guided methods how many answers, where any has none."""
    rows: list[MissingRow] = []
    for policy, criterion in served(config):
        source = plan.source(policy, criterion.name)
        for metric, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                values_PS = measured.scores[source.name, spec].values_PS
                rows.append(
                    {
                        "policy": policy,
                        "criterion": criterion.name,
                        "metric": metric,
                        "num_missing": int(np.isnan(values_PS).sum()),
                        "num_samples": int(values_PS.size),
                    }
                )
    for (policy, name, method), (_, pool, gold_P1) in measured.answers.items():
        proxies = [prompt.samples[0].scores["proxy"] for prompt in pool.prompts]
        counts = {"proxy": int(np.isnan(np.asarray(proxies, dtype=np.float64)).sum())}
        counts["gold"] = 0 if gold_P1 is None else int(np.isnan(gold_P1).sum())
        for metric, number in counts.items():
            if number:
                rows.append(
                    {
                        "policy": policy,
                        "criterion": name,
                        "metric": metric,
                        "method": method,
                        "num_missing": number,
                        "num_samples": len(plan.rows),
                    }
                )
    return rows
