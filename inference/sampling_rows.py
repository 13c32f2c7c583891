"""What every pool looks like and what it cost: lengths, variety, fluency, missing scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.cost import Cost
from inference.budgets import lengths
from inference.fill_tables import served
from inference.log_ratios import fluency, fluency_z
from inference.pool_log_probabilities import is_plain
from inference.text_statistics import distinct_n, distinct_texts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from iama.config import EvaluationConfig
    from inference.evaluation_plan import Plan, Source
    from inference.measured import Measured
    from inference.pool_file import PoolFile
    from inference.summary import Row

    Floats = NDArray[np.float64]


def sampling_rows(config: EvaluationConfig, plan: Plan, measured: Measured) -> list[Row]:
    """A row a pool."""
    return [
        {
            "policy": source.policy,
            "criterion": None if len(source.criteria) == len(config.criteria) else ", ".join(source.criteria),
            "engine": source.header["engine"],
            **_texts(measured.pools[source.name], plan.num_samples),
            **_cost(measured.pools[source.name]),
            **_likelihood(config, measured, source),
        }
        for source in plan.sources
    ]


def _texts(pool: PoolFile, num_compared: int) -> Row:
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


def _cost(pool: PoolFile) -> Row:
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


def _likelihood(config: EvaluationConfig, measured: Measured, source: Source) -> Row:
    """Fluency under the reference, and the log-ratio to it; the latter only of plain sampling, whose KL it is."""
    found: Row = {"fluency": None, "fluency_z": None, "mean_log_ratio": None}
    reference = measured.reference
    under = measured.log_probabilities.get((source.name, reference or ""))
    own = measured.log_probabilities.get((source.name, source.name))
    lengths_PS = lengths(measured.pools[source.name])
    if reference is None or under is None or lengths_PS is None or not np.isfinite(under).all():
        return found
    found["fluency"] = float(np.nanmean(fluency(under, lengths_PS)))
    reference_lengths = lengths(measured.pools[reference])
    if reference_lengths is not None:
        theirs = fluency(measured.log_probabilities[reference, reference], reference_lengths)
        found["fluency_z"] = fluency_z(fluency(under, lengths_PS), theirs)
    if own is not None and is_plain(config.sampling):
        found["mean_log_ratio"] = float((own - under).mean())
    return found


def missing_rows(config: EvaluationConfig, plan: Plan, measured: Measured) -> list[Row]:
    """How many samples have no score, and of guided methods how many answers have no gold, where any has none."""
    rows: list[Row] = []
    for policy, criterion in served(config):
        source = plan.source(policy, criterion.name)
        for metric, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                values_PS = measured.scores[source.name, spec].values_PS
                where = {"policy": policy, "criterion": criterion.name, "metric": metric}
                number = int(np.isnan(values_PS).sum())
                rows.append({**where, "num_missing": number, "num_samples": int(values_PS.size)})
    for (policy, name, method), (_, _, gold_P1) in measured.answers.items():
        number = 0 if gold_P1 is None else int(np.isnan(gold_P1).sum())
        if number:
            where = {"policy": policy, "criterion": name, "metric": "gold", "method": method}
            rows.append({**where, "num_missing": number, "num_samples": len(plan.rows)})
    return rows
