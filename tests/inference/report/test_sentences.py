from __future__ import annotations

import pytest
from report_summary import make_summary, saving

from inference.evaluation.summary import complete
from inference.report.sentences import alone_words, paired_quality, saving_sentences


def in_figures(summary: dict) -> str:
    return " ".join([*saving_sentences(summary), *alone_words(summary)])


def average(reference, ratio, censored=0, not_counted=0, **more):
    row = {"method": "bon", "metric": "gold", "reference": reference, "samples": 2, "ratio": ratio}
    counts = {"num_censored": censored - not_counted, "num_censored_total": censored, "num_floor": 0}
    counts |= {"num_not_counted": not_counted, "num_criteria": 2}
    return row | counts | {"token_ratio": ratio} | more


def test_both_savings_and_what_the_base_is_worth_alone_in_figures():
    changed = complete(make_summary()) | {"savings": [saving(criterion="helpful", method="bon", ratio=9.0)]}
    changed["averages"] = [average("base", 11.0, censored=1), average("grpo", 0.8)]
    against = {"base": {"without": [0.05, 0.15]}, "grpo": {"without": [-0.15, -0.05]}}
    changed["quality"] = {
        p: {"helpful": {"without": value, "against": against}}
        for p, value in (("base", 0.4), ("grpo", 0.6), ("iama", 0.5))
    }
    words = in_figures(changed)
    assert "With Best-of-4, iama reaches" in words
    assert "the untrained base needs > 11.00x the samples" in words
    assert words.count("of 2 criteria censored") == 2  # beside every average
    assert "linear GRPO needs 0.80x" in words
    assert "95 % intervals against the untrained base: helpful 9.00x [2.00, 4.00]." in words
    assert "not surely worse on any criterion than the untrained base (0.5 against 0.4)" in words
    assert "worse on helpful than linear GRPO (0.5 against 0.6)" in words
    changed["averages"] = [average("base", 11.0, censored=1, not_counted=1, ci95=[8.0, 13.5])]
    wanted = "needs 11.00x [8.00, 13.50] the samples for (11.00x the tokens; 1 of 2 criteria censored, 1 left out)"
    assert wanted in in_figures(changed)
    assert "intervals against" not in in_figures(changed)
    changed["averages"] = [average("base", None, censored=2, not_counted=2)]
    assert "no valid figure" in in_figures(changed)
    changed["averages"] = []
    assert in_figures(changed).startswith("No savings were measured")
    renamed = make_summary() | {"trained": "ours", "references": ["sft"]}
    renamed["averages"] = [average("sft", 2.0)]
    assert "ours reaches a mean gold reward that sft needs 2.00x" in in_figures(renamed)


@pytest.mark.parametrize(
    ("ci95", "is_worse"), [([-0.2, -0.01], True), ([-0.2, 0.01], False), ([-1e-17, -1e-18], False), (None, False)]
)
def test_worse_is_what_the_interval_says(ci95, is_worse):
    """Neither a lower mean alone nor what rounding leaves of two equal policies."""
    summary = complete(make_summary()) | {"references": ["grpo"]}
    rows = {"grpo": {"without": 0.6, "against": {}}, "iama": {"without": 0.5, "against": {"grpo": {"without": ci95}}}}
    summary["quality"] = {policy: {"helpful": row} for policy, row in rows.items()}
    (sentence,) = alone_words(summary)
    assert ("is worse on helpful than" in sentence) == is_worse
    assert ("not surely worse on any criterion" in sentence) != is_worse
    assert paired_quality(summary["quality"], "iama", "grpo", "without")["helpful"].is_worse == is_worse


def test_why_there_are_no_savings_or_those_of_settings():
    summary = complete(make_summary()) | {"averages": [], "savings": [], "differences": [], "headroom": None}
    assert "no prompt has values of iama and of a reference" in in_figures(summary)
    assert "they need bon or bop among the methods" in in_figures(summary | {"methods": ["bon(8, stop=target(0.9))"]})
    assert "a policy named ours and one named base" in in_figures(summary | {"trained": "ours", "references": ["base"]})
    seeds = summary | {"references": [], "differences": [{"num_seeds": 2}]}
    assert "each seed's own report does" in in_figures(seeds)
    point = average("base", 1.25) | {
        "method": "cards(quantile=0.5)",
        "reference_method": "cards",
        "unit": "policy_tokens",
    }
    by_curve = point | {"reference_method": "bon", "ratio": 9.0}
    curve = summary["curves"][0] | {"method": "cards(quantile=0.5)", "samples": None, "dial": "cards", "value": "0.5"}
    words = in_figures(summary | {"averages": [point, by_curve], "methods": ["cards"], "curves": [curve]})
    assert "For iama's mean gold reward by cards at 0.5, base by cards needs 1.25x the policy tokens." in words
