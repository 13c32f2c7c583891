"""The one sentence: true in every case, and in words that need no glossary."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_summary import break_even_row, make_summary, saving

from inference.evaluation.summary import complete
from inference.report.facts import _pays_back
from inference.report.findings import first_findings
from inference.report.headlines import gain_headline, headline
from inference.report.words import at_least, plain
from inference.statistics.break_even import NOT_KNOWN

JARGON = re.compile(r"censored|proxy|\bgold\b|Best-of|nats|\[|>|<|\d/\d")


def told(*rows: dict, **more) -> str:
    """The headline of these rows against the base, served with two samples."""
    summary = make_summary() | {"savings": list(rows), "trained_budget": 2, "averages": []} | more
    return headline(complete(summary))


def units(ratio: float, low: float) -> dict:
    return {"flops": {"ratio": ratio, "ci95": [low, ratio + 1]}}


SAVES = saving(criterion="helpful", ratio=4.0, ci95=[3.0, 5.0], units=units(3.0, 2.5))
NEVER = saving(
    criterion="harmless", ratio=16.0, ci95=[16.0, 16.0], censored=True, ci_censored=1.0, units=units(9.0, 8.77)
)
COSTS = saving(criterion="brief", ratio=0.5, ci95=[0.5, 0.8], floor=True, ci_floor=0.3)
UNSURE = saving(criterion="calm", ratio=1.2, ci95=[0.8, 2.04])
FALLS = saving(criterion="odd", ratio=16.0, ci95=[16.0, 16.0], censored=True, hacked=True, counts=False)
UNJUDGED = saving(criterion="dark", metric="proxy", ratio=4.0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [SAVES],
            "With 2 samples, the trained model is as good on helpful as the untrained base with "
            "about 8: about 4 times fewer samples (at least 3) and at least 2.5 times less "
            "computing.",
        ),
        (
            [NEVER],
            "With 2 samples, the trained model is as good on harmless as the untrained base with "
            "more than 32: at least 16 times fewer samples and 8.7 times less computing.",
        ),
        (
            [SAVES, NEVER],
            "With 2 samples, the trained model is as good as the untrained base with about 8 on "
            "helpful and more than 32 on harmless: at least 3 times fewer samples and 2.5 times "
            "less computing on each.",
        ),
        (
            [NEVER, COSTS],
            "Mixed: with 2 samples, the trained model is as good on harmless as the untrained base "
            "with more than 32, at least 16 times fewer samples and 8.7 times less computing; but "
            "it is only as good on brief as the untrained base with 1.",
        ),
        (
            [COSTS],
            "No saving: with 2 samples, the trained model is only as good on brief as the untrained base with 1.",
        ),
        (
            [UNSURE],
            "No saving is certain: for what the trained model reaches with 2 samples, the untrained"
            " base needs 0.8 to 2 times as many on calm.",
        ),
        (
            [COSTS, UNSURE],
            "No saving was shown: with 2 samples, the trained model is only as good on brief as the"
            " untrained base with 1; on calm no saving is certain.",
        ),
        (
            [FALLS],
            "No saving was shown: on odd none can be told, since the untrained base gets worse with more samples.",
        ),
        (
            [saving(criterion="same", constant_gold=True)],
            "No saving was shown: on same none can be told, since the reward that judges is the same for all answers.",
        ),
        (
            [UNJUDGED],
            "It is not known whether training saves anything: only the reward that selects the answers judged them.",
        ),
        (
            [SAVES, UNJUDGED],
            "Mixed: with 2 samples, the trained model is as good on helpful as the untrained base "
            "with about 8, about 4 times fewer samples (at least 3) and at least 2.5 times less "
            "computing; but on dark only the reward that selects was measured.",
        ),
    ],
)
def test_every_case_has_its_sentence(rows, words):
    assert told(*rows) == words
    assert not JARGON.search(words)


def test_more_samples_without_less_computing_are_said_to_be_so():
    dear = saving(ratio=4.0, ci95=[3.0, 5.0], units=units(1.2, 0.9))
    assert told(dear).endswith("about 4 times fewer samples (at least 3), though not surely less computing.")


def test_many_criteria_are_counted():
    rows = [saving(criterion=f"c{i}", ratio=2.0 + i, ci95=[1.5 + i, 3.0 + i]) for i in range(5)]
    wanted = (
        "as good on 5 criteria as the untrained base with 4 to 12 or more: at least 1.5 times fewer samples on each."
    )
    assert told(*rows).endswith(wanted)


def test_where_nothing_was_compared_it_says_why():
    assert told(num_prompts=3, num_distinct_prompts=3) == (
        "No verdict, interval or advice: 3 prompts are too few, at least 4 are needed."
    )
    assert told(headroom=None).startswith("No savings were measured: ")


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (
            "train",
            "Training can pay: the best of 64 answers of the untrained base is clearly better than the best of 4 on",
        ),
        (
            "nothing",
            "There is nothing to gain by training: the best of 64 answers of the untrained base is hardly better",
        ),
        (
            "draw more",
            "Draw more samples instead of training: the best of 8 answers of the untrained base is nearly as",
        ),
        ("adapter each", "Train an adapter for each criterion: a and b exclude each other too much for one model."),
    ],
)
def test_one_policy_alone_tells_whether_to_train(verdict, words):
    row = {"criterion": "a", "metric": "gold", "level": "some"}
    found = {
        "policy": "base",
        "samples": 4,
        "far": 64,
        "verdict": verdict,
        "conflicting": ["a", "b"],
        "criteria": [row],
    }
    assert gain_headline(found).startswith(words)
    by_proxy = found | {"criteria": [row | {"metric": "proxy"}]}
    assert gain_headline(by_proxy).startswith("Measured by the selecting reward alone: ")


def test_a_method_of_one_setting_is_told_by_its_cost():
    row = saving(criterion="a", method="cards(quantile=0.5)", samples=None, ratio=3.0, ci95=[2.0, 4.0])
    row |= {"reference_method": "cards", "unit": "policy_tokens"}
    words = "By cards(quantile=0.5), the trained model needs at least 2 times fewer policy tokens than base by cards"
    assert told(row, methods=["cards"]).startswith(words)
    assert told(row | {"ratio": 0.5, "ci95": [0.4, 0.9]}, methods=["cards"]).startswith("No saving: by cards")
    assert told(row | {"ratio": 1.0, "ci95": [0.4, 1.9]}, methods=["cards"]).startswith("No saving is certain: by")
    assert told(row | {"metric": "proxy"}, methods=["cards"]).startswith("It is not known")


WHOLE = complete(make_summary() | {"trained_budget": 2, "averages": []})
ENDS = st.lists(st.floats(0.02, 500.0), min_size=3, max_size=3).map(sorted)


@settings(max_examples=40)
@given(st.lists(st.tuples(ENDS, st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_it_never_claims_more_than_the_intervals_leave(drawn):
    """Whatever the rows: no saving is told unless an interval lies above 1, and none that is above its lower end."""
    rows = [
        saving(
            criterion=f"c{i}", ratio=middle, ci95=[low, high], censored=never, ci_censored=float(never), counts=counts
        )
        for i, ((low, middle, high), never, counts) in enumerate(drawn)
    ]
    words = headline(WHOLE | {"savings": rows})
    sure = [row["ci95"][0] for row in rows if row["counts"] and row["ci95"][0] > 1 + 1e-6]
    claims = [float(text.replace(",", "")) for text in re.findall(r"at least ([\d.,]*\d) times fewer samples", words)]
    claims += [float(text.replace(",", "")) for text in re.findall(r"fewer samples .at least ([\d.,]*\d)", words)]
    assert bool(claims) == bool(sure)
    assert all(claim <= min(sure) + 1e-5 for claim in claims)
    assert words.startswith(("With", "Mixed")) == bool(sure)
    assert {finding.level for finding in first_findings(WHOLE | {"savings": rows})}


def test_numbers_of_a_sentence():
    assert [plain(v) for v in (0.04, 0.5, 1, 2.333, 9.96, 31.6, 1234.5)] == [
        *("0.04", "0.5", "1", "2.3", "10", "32", "1,234"),
    ]
    assert [at_least(v) for v in (7.9999999999, 4.99, 10.9, 1.09)] == ["8", "4.9", "10", "1"]


@pytest.mark.parametrize("bound", [{"floor": True}, {"ci_floor": 0.4}, {"floor": True, "ci_floor": 1.0}])
def test_what_is_bounded_from_above_saves_nothing_for_sure(bound):
    """The cheapest setting of the reference is good enough: a cheaper one might do."""
    row = saving(criterion="helpful", ratio=2.5, ci95=[2.5, 2.5], **bound)
    (found,) = first_findings(complete(make_summary() | {"savings": [row], "trained_budget": 2}))
    assert found.level == "unsure"
    assert "at least 2.5" not in told(row)


def test_when_training_pays_is_never_where_nothing_is_saved_and_else_not_known():
    never, unknown = "nothing is saved", f"a single sample of the reference is already better: {NOT_KNOWN}"

    def paid(*notes: str, queries: float | None = None) -> str:
        rows = [break_even_row("base", "helpful") | {"queries": queries}] if queries else []
        rows += [break_even_row("base", "helpful") | {"queries": None, "note": note} for note in notes]
        return _pays_back(complete(make_summary() | {"break_even": rows}))

    assert paid() == ""
    assert paid(never) == "never in 1 case"
    assert paid(unknown) == "not known in 1 case"
    assert paid(never, unknown) == "never in 1 case; not known in 1 case"
    assert paid(unknown, unknown, queries=10) == "after 10 queries, by reference and criterion; not known in 2 cases"
    assert paid(never, unknown, queries=10).endswith("; never in 1 case; not known in 1 case")
