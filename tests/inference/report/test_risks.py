from __future__ import annotations

import pytest
from report_summary import JARGON, make_summary

from inference.evaluation.summary import complete
from inference.report.risks import find_risks, first_risks

SPACE = "\N{NO-BREAK SPACE}"


def test_risks_are_told_where_they_are_and_only_there():
    risks = {risk.subject: risk for risk in find_risks(make_summary())}
    hacking = risks["Reward hacking"]
    assert hacking.level == "seen"
    assert "iama's gold falls on harmless with Best-of-N from 32 samples on" in hacking.words
    assert "It is also seen for grpo." in hacking.words
    assert risks["Without a sampler"].level == "seen"
    assert f"iama 0.8{SPACE}%" in risks["Cut answers"].words
    assert "gold of iama on brief 12 of 16,384" in risks["Missing scores"].words
    assert "0.8 nats a response" in risks["KL"].words
    assert "1.44 nats for helpful (upper bound)" in risks["KL"].words
    good = make_summary() | {"dropped_prompts": 0}
    good["hacking"] = [row | {"onset": None} for row in good["hacking"] if row["criterion"] != "brief"]
    good["sampling"] = [row | {"truncated": 0.0} for row in good["sampling"]]
    good["missing"] = [row | {"num_missing": 0} for row in good["missing"]]
    risks = {risk.subject: risk for risk in find_risks(good)}
    assert (risks["Reward hacking"].level, risks["Cut answers"].level) == ("none", "none")
    assert "none seen for iama up to 64 samples. Not measured on brief." in risks["Reward hacking"].words
    assert (risks["Missing scores"].level, risks["Dropped prompts"].level) == ("none", "none")
    assert "Few prompts" not in risks
    assert "Few prompts" in {risk.subject for risk in find_risks(make_summary() | {"num_prompts": 29})}


def test_prompts_that_all_seeds_answered_are_not_shared_out_among_them():
    summary = make_summary() | {"num_seeds": 2, "num_prompts": 80, "num_distinct_prompts": 40, "prompts_digest": "a"}
    assert not {"Few prompts", "Repeated prompts"} & {risk.subject for risk in find_risks(complete(summary))}


def test_the_worst_answers_are_compared_with_the_references():
    summary = make_summary()
    for policy, worst in (("base", 0.1), ("grpo", 0.2), ("iama", 0.15)):
        gaps = {"base": [0.02, 0.08], "grpo": [-0.08, -0.02]} if policy == "iama" else {}
        for row in summary["quality"][policy].values():
            row["worst_with"] = worst
            row["against"] = {name: {"without": None, "worst_with": gap} for name, gap in gaps.items()}
    (risk,) = [risk for risk in find_risks(summary) if risk.subject.startswith("Worst")]
    assert risk.level == "seen"
    assert "on helpful below linear GRPO's (0.15 against 0.2)" in risk.words
    assert "untrained base" not in risk.words


def briefs(summary: dict) -> list[str]:
    return [risk.brief for risk in first_risks(complete(summary))]


def good() -> dict:
    """Nothing is wrong with it."""
    summary = make_summary() | {"dropped_prompts": 0, "references": ["base"]}
    summary["hacking"] = [row | {"onset": None} for row in summary["hacking"]]
    summary["missing"] = [row | {"num_missing": 0} for row in summary["missing"]]
    summary["sampling"] = [
        row | {"truncated": 0.0, "estimated": False, "mean_log_ratio": 0.5} for row in summary["sampling"]
    ]
    return summary


def test_where_nothing_was_found_it_says_what_was_looked_for():
    (words,) = briefs(good())
    assert words.startswith(
        "No risk was seen of an over-optimised reward, a criterion that loses without the sampler, "
    )
    assert words.endswith(" or dropped prompts.")


def test_the_gravest_three_come_first():
    assert briefs(make_summary()) == [
        "Against linear GRPO, it needs more samples on harmless.",
        "Without its sampler, the trained model is worse on harmless than linear GRPO (0.43 against 0.53).",
        "Beyond 16 samples, answers get worse on harmless: the reward that selects is over-optimised.",
    ]
    assert len(find_risks(complete(make_summary()))) > 3


def _few(summary):
    summary["num_prompts"] = 8


def _within(summary):
    for row in summary["hacking"]:
        if (row["policy"], row["criterion"], row["method"]) == ("iama", "helpful", "bon"):
            row |= {"onset": 4, "peak_samples": 1}


def _repeating(summary):
    summary["sampling"] = [row | {"distinct": 0.3} if row["policy"] == "iama" else row for row in summary["sampling"]]


def _strange(summary):
    summary["sampling"] = [row | {"fluency_z": -4.0} if row["policy"] == "iama" else row for row in summary["sampling"]]


def _cut(summary):
    summary["sampling"] = [
        row | {"truncated": 0.25} if row["policy"] == "iama" and row["method"] is None else row
        for row in summary["sampling"]
    ]


def _alone(summary):
    row = summary["quality"]["iama"]["brief"]
    row |= {"without": 0.1, "against": {"base": {"without": [-0.13, -0.07], "worst_with": None}}}


def _far(summary):
    for row in summary["sampling"]:
        row["mean_log_ratio"] = 12.0


def _no_gold(summary):
    summary["hacking"] = []
    for row in summary["curves"]:
        row["gold"] = None


def _wide(summary):
    for row in summary["savings"]:
        row |= {"ratio": 3.0, "ci95": [1.5, 9.0], "censored": False, "ci_censored": 0.0}


def _constant(summary):
    row = {"policy": "iama", "criterion": "brief", "metric": "proxy", "value": 0.5}
    summary["constant"] = [row]


def _missing(summary):
    row = {"policy": "iama", "criterion": "brief", "metric": "proxy", "num_missing": 90, "num_samples": 100}
    summary["missing"] = [row]


def test_nothing_is_worse_by_a_mean_alone():
    summary = good()
    for row in summary["quality"]["iama"].values():
        row |= {"without": -1.0, "worst_with": -2.0}
        row["against"] = {name: {"without": [-2.0, 0.1], "worst_with": [-3.0, 0.1]} for name in ("base", "grpo")}
    found = {risk.subject: risk for risk in find_risks(complete(summary))}
    for subject in ("Without a sampler", "Worst 5 % of answers"):
        assert found[subject].level == "none"
        assert "not surely worse" in found[subject].words
    for row in summary["quality"]["iama"].values():
        row.pop("against")  # as in an older file
    found = {risk.subject: risk for risk in find_risks(complete(summary))}
    for subject in ("Without a sampler", "Worst 5 % of answers"):
        assert found[subject].level == "unknown"
        assert "without intervals; run `iama evaluate` again" in found[subject].words


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_few, "Only 8 prompts were tried"),
        (_within, "Beyond the first sample, within what will be served, answers get worse on helpful"),
        (_repeating, f"30.0{SPACE}% of the trained model's samples are different texts."),
        (_strange, "The trained model's answers read unlike the reference's."),
        (_cut, f"25.0{SPACE}% of the trained model's answers are cut at the token limit."),
        (_alone, "Without its sampler, the trained model is worse on brief than the untrained base (0.1 against 0.2)."),
        (_far, "The trained model has moved far from where it began: try what was not measured."),
        (_no_gold, "Independent of the reward that selects, nothing judged the answers"),
        (_wide, "How much is saved on helpful is uncertain: 1.5 to 9 times."),
        (_missing, "Scores are missing: the reward that selects on brief gave none for 90 of 100 answers of iama."),
        (_constant, "On brief, the reward that selects cannot tell answers of iama apart: it selects by chance."),
    ],
)
def test_each_risk_has_its_sentence(spoil, words):
    summary = good()
    spoil(summary)
    first = first_risks(complete(summary))
    assert first[0].brief.startswith(words)
    assert first[0].severity > 0.3
    assert len(first[0].brief.split()) <= 25
    assert not [risk.brief for risk in find_risks(complete(summary)) if JARGON.search(risk.brief)]
