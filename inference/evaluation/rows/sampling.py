"""What pools and guided answers look like and what they cost: lengths, variety, fluency, missing scores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from iama.cost import Cost
from inference.engine.likelihood import fluency, fluency_z
from inference.engine.responses import Pool
from inference.evaluation.likelihood import is_plain
from inference.evaluation.measurements import Evaluation, answers_name
from inference.evaluation.sources import Source
from inference.pools.held import lengths, tables
from inference.selection.kept import kept_chances
from inference.selection.rules import rule_of
from inference.statistics.summary_rows import (
    LikelihoodFigures,
    MissingRow,
    SamplingCost,
    SamplingRow,
    TextFigures,
)
from inference.statistics.texts import variety

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


def sampling_rows(evaluation: Evaluation) -> list[SamplingRow]:
    """A row a pool, and one for the answers of every guided method.

    Last, of selections that may fall back or be cut by a cap, how often they are.
    """
    pools = [_pool_row(evaluation, source) for source in evaluation.plan.sources]
    answers = [_answers_row(evaluation, *key) for key in evaluation.measured.answers]
    return [*pools, *answers, *_selection_rows(evaluation)]


def _pool_row(evaluation: Evaluation, source: Source) -> SamplingRow:
    pool = evaluation.measured.pools[source.name]
    serves_all = len(source.criteria) == len(evaluation.config.criteria)
    return {
        "policy": source.policy,
        "criterion": None if serves_all else ", ".join(source.criteria),
        "method": None,
        "engine": source.header["engine"],
        **_texts(pool, evaluation.plan.num_samples),
        **_cost(pool),
        **_likelihood(evaluation, pool, source.name),
        "fallback": None,
        "capped": None,
    }


def _answers_row(evaluation: Evaluation, policy: str, criterion: str, method: str) -> SamplingRow:
    pool = evaluation.measured.answers[policy, criterion, method].pool
    row: SamplingRow = {
        "policy": policy,
        "criterion": criterion,
        "method": method,
        "engine": evaluation.plan.source(policy, criterion).header["engine"],
        **_texts(pool, evaluation.plan.num_samples),
        **_cost(pool),
        **_likelihood(evaluation, pool, answers_name(policy, criterion, method)),
        "fallback": _forced_share(pool),
        "capped": None,
    }
    proxy = next(c for c in evaluation.config.criteria if c.name == criterion).proxy
    if any(part.judge is not None for part in proxy.parts):
        row["flops"] = None  # those of the policy alone would be no cost of the method
    if row["num_samples"] == 1:  # a single text has no variety
        row["distinct"] = None
    return row


def _selection_rows(evaluation: Evaluation) -> Iterator[SamplingRow]:
    for policy, criterion in evaluation.served:
        source = evaluation.plan.source(policy, criterion.name)
        kept = [m for m in evaluation.plan.methods if not (m.is_curve or m.is_guided or m.is_stopped)]
        for method in kept:
            rule = rule_of(evaluation.operators_of(policy, criterion, method)[0])
            share = None
            if rule.falls_back:
                proxy_PS, _ = evaluation.scores_of(policy, criterion)
                share = float(kept_chances(rule, proxy_PS, evaluation.measured.pools[source.name].texts)[1].mean())
            if rule.capped_share or rule.falls_back:
                yield {
                    "policy": policy,
                    "criterion": criterion.name,
                    "method": method.text,
                    "engine": source.header["engine"],
                    **NO_TEXTS,
                    **NO_COST,
                    **NO_LIKELIHOOD,
                    "fallback": share,
                    "capped": rule.capped_share or None,
                }


def _forced_share(pool: Pool) -> float | None:
    """Share of segments none of whose proposals was accepted; None for a method that does not tell segments."""
    segments = [segment for prompt in pool.prompts for sample in prompt.samples for segment in sample.segments]
    return float(np.mean([segment["forced"] for segment in segments])) if segments else None


def _texts(pool: Pool, num_compared: int) -> TextFigures:
    """Variety falls with the number of samples, so as many of every pool are looked at."""
    lengths_PS, known = lengths(pool), list(tables(pool))
    is_known = not any(table.num_unknown for table in known)
    distinct, of_words = variety((row[:num_compared] for row in pool.texts), (1, 2, 3))
    return {
        "num_samples": len(pool.prompts[0].samples),
        "mean_tokens": None if lengths_PS is None else float(lengths_PS.mean()),
        "truncated": sum(t.num_cut for t in known) / sum(t.size for t in known) if is_known else None,
        "distinct": distinct,
        "distinct_1": of_words[0],
        "distinct_2": of_words[1],
        "distinct_3": of_words[2],
    }


def _cost(pool: Pool) -> SamplingCost:
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


def _likelihood(evaluation: Evaluation, pool: Pool, name: str) -> LikelihoodFigures:
    """Fluency under the reference, and the log-ratio to it; the latter only of plain sampling, whose KL it is."""
    figures = NO_LIKELIHOOD.copy()
    reference = evaluation.measured.reference
    under_reference = evaluation.measured.log_probabilities.get((name, reference or ""))
    under_policy = evaluation.measured.log_probabilities.get((name, name))
    lengths_PS = lengths(pool)
    if reference is None or under_reference is None or lengths_PS is None or not np.isfinite(under_reference).all():
        return figures
    figures["fluency"] = float(np.nanmean(fluency(under_reference, lengths_PS)))
    reference_lengths = lengths(evaluation.measured.pools[reference])
    if reference_lengths is not None:
        reference_fluency = fluency(evaluation.measured.log_probabilities[reference, reference], reference_lengths)
        figures["fluency_z"] = fluency_z(fluency(under_reference, lengths_PS), reference_fluency)
    if under_policy is not None and is_plain(evaluation.config.sampling):
        figures["mean_log_ratio"] = float((under_policy - under_reference).mean())
    return figures


def missing_rows(evaluation: Evaluation) -> list[MissingRow]:
    """How many samples have no score; and of guided methods how many answers, where any has none."""
    rows: list[MissingRow] = []
    for policy, criterion in evaluation.served:
        source = evaluation.plan.source(policy, criterion.name)
        for metric, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                values_PS = evaluation.measured.scores[source.name, spec].values_PS
                rows.append(
                    {
                        "policy": policy,
                        "criterion": criterion.name,
                        "metric": metric,
                        "num_missing": int(np.isnan(values_PS).sum()),
                        "num_samples": int(values_PS.size),
                    }
                )
    for (policy, name, method), answers in evaluation.measured.answers.items():
        counts = {"proxy": int(np.isnan(answers.proxy_PA).sum())}
        counts["gold"] = 0 if answers.gold_PA is None else int(np.isnan(answers.gold_PA).sum())
        for metric, number in counts.items():
            if number:
                rows.append(
                    {
                        "policy": policy,
                        "criterion": name,
                        "metric": metric,
                        "method": method,
                        "num_missing": number,
                        "num_samples": answers.proxy_PA.size,
                    }
                )
    return rows
