"""What pools and guided answers look like and what they cost: lengths, variety, fluency, missing scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.cost import Cost
from inference.engine.likelihood import fluency, fluency_z
from inference.evaluation.likelihood import is_plain
from inference.evaluation.measured import answers_name
from inference.selection.kept import kept_chances
from inference.selection.rules import rule_of
from inference.statistics.costs import lengths
from inference.statistics.texts import distinct_n, distinct_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from inference.engine.responses import Pool
    from inference.evaluation.measured import Evaluation
    from inference.evaluation.summary import Row


def sampling_rows(evaluation: Evaluation) -> list[Row]:
    """A row a pool, and one for the answers of every guided method.

    Last, of selections that may fall back or be cut by a cap, how often they are.
    """
    rows = [
        {
            "policy": source.policy,
            "criterion": None
            if len(source.criteria) == len(evaluation.config.criteria)
            else ", ".join(source.criteria),
            "method": None,
            **_row(evaluation, source.header["engine"], evaluation.measured.pools[source.name], source.name),
            "fallback": None,
            "capped": None,
        }
        for source in evaluation.plan.sources
    ]
    for (policy, criterion, method), (_, pool, _) in evaluation.measured.answers.items():
        engine, name = (
            evaluation.plan.source(policy, criterion).header["engine"],
            answers_name(policy, criterion, method),
        )
        where: Row = {"policy": policy, "criterion": criterion, "method": method}
        row = where | _row(evaluation, engine, pool, name)
        proxy = next(c for c in evaluation.config.criteria if c.name == criterion).proxy
        if any(part.judge is not None for part in proxy.parts):
            row["flops"] = None  # those of the policy alone would be no cost of the method
        if row["num_samples"] == 1:  # a single text has no variety
            row["distinct"] = None
        row |= {"fallback": _forced_share(pool), "capped": None}
        rows.append(row)
    return [*rows, *_selection_rows(evaluation, dict.fromkeys(rows[0]))]


def _selection_rows(evaluation: Evaluation, empty: Row) -> Iterator[Row]:
    for policy, criterion in evaluation.served:
        source = evaluation.plan.source(policy, criterion.name)
        for method in (m for m in evaluation.plan.methods if not m.is_curve and not m.is_guided):
            rule = rule_of(evaluation.operators_of(policy, criterion, method)[0])
            share = None
            if rule.falls_back:
                proxy_PS, _ = evaluation.scores_of(policy, criterion)
                share = float(kept_chances(rule, proxy_PS, evaluation.measured.pools[source.name].texts)[1].mean())
            if rule.capped_share or rule.falls_back:
                where = {"policy": policy, "criterion": criterion.name, "method": method.text}
                told = {"engine": source.header["engine"], "fallback": share, "capped": rule.capped_share or None}
                yield empty | where | told


def _row(evaluation: Evaluation, engine: str, pool: Pool, name: str) -> Row:
    told = {"engine": engine, **_texts(pool, evaluation.plan.num_samples), **_cost(pool)}
    return told | _likelihood(evaluation, pool, name)


def _forced_share(pool: Pool) -> float | None:
    """Share of segments none of whose proposals was accepted; None for a method that does not tell segments."""
    segments = [segment for prompt in pool.prompts for sample in prompt.samples for segment in sample.segments]
    return float(np.mean([segment["forced"] for segment in segments])) if segments else None


def _texts(pool: Pool, num_compared: int) -> Row:
    """Variety falls with the number of samples, so as many of every pool are looked at."""
    texts = [row[:num_compared] for row in pool.texts]
    lengths_PS = lengths(pool)
    reasons = [sample.finish_reason for prompt in pool.prompts for sample in prompt.samples]
    return {
        "num_samples": len(pool.prompts[0].samples),
        "mean_tokens": None if lengths_PS is None else float(lengths_PS.mean()),
        "truncated": None if "unknown" in reasons else reasons.count("length") / len(reasons),
        "distinct": distinct_texts(texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
    }


def _cost(pool: Pool) -> Row:
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


def _likelihood(evaluation: Evaluation, pool: Pool, name: str) -> Row:
    """Fluency under the reference, and the log-ratio to it; the latter only of plain sampling, whose KL it is."""
    found: Row = {"fluency": None, "fluency_z": None, "mean_log_ratio": None}
    reference = evaluation.measured.reference
    under = evaluation.measured.log_probabilities.get((name, reference or ""))
    own = evaluation.measured.log_probabilities.get((name, name))
    lengths_PS = lengths(pool)
    if reference is None or under is None or lengths_PS is None or not np.isfinite(under).all():
        return found
    found["fluency"] = float(np.nanmean(fluency(under, lengths_PS)))
    reference_lengths = lengths(evaluation.measured.pools[reference])
    if reference_lengths is not None:
        theirs = fluency(evaluation.measured.log_probabilities[reference, reference], reference_lengths)
        found["fluency_z"] = fluency_z(fluency(under, lengths_PS), theirs)
    if own is not None and is_plain(evaluation.config.sampling):
        found["mean_log_ratio"] = float((own - under).mean())
    return found


def missing_rows(evaluation: Evaluation) -> list[Row]:
    """How many samples have no score; and of guided methods how many answers, where any has none."""
    rows: list[Row] = []
    for policy, criterion in evaluation.served:
        source = evaluation.plan.source(policy, criterion.name)
        for metric, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                values_PS = evaluation.measured.scores[source.name, spec].values_PS
                where = {"policy": policy, "criterion": criterion.name, "metric": metric}
                number = int(np.isnan(values_PS).sum())
                rows.append({**where, "num_missing": number, "num_samples": int(values_PS.size)})
    for (policy, name, method), answers in evaluation.measured.answers.items():
        counts = {"proxy": int(np.isnan(answers.proxy_PA).sum())}
        counts["gold"] = 0 if answers.gold_PA is None else int(np.isnan(answers.gold_PA).sum())
        for metric, number in counts.items():
            if number:
                where = {"policy": policy, "criterion": name, "metric": metric, "method": method}
                rows.append({**where, "num_missing": number, "num_samples": answers.proxy_PA.size})
    return rows
