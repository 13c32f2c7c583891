from __future__ import annotations

import numpy as np
import pytest

from inference.statistics.recommend import key_of, recommend


def row(policy, samples, cost, *, method="bon", criterion="helpful"):
    return {
        "policy": policy,
        "criterion": criterion,
        "method": method,
        "samples": samples,
        "samples_": samples,
        "flops": cost,
    }


def find(rows, gold, **options):
    return recommend(rows, gold, ["flops"], num_bootstrap=100, seed=0, **options)


def constant(rows, values, num_prompts=8):
    return {key_of(r): np.full(num_prompts, v) for r, v in zip(rows, values, strict=True)}


def test_best_that_fits_the_budget():
    rows = [row("base", 1, 10.0), row("base", 4, 40.0), row("iama", 1, 20.0), row("iama", 4, 80.0)]
    found = find(rows, constant(rows, [1.0, 2.0, 3.0, 2.5]))
    assert [r["budget"] for r in found] == [10.0, 20.0, 40.0, 80.0]
    assert [(r["policy"], r["samples"], r["gold"]) for r in found] == [("base", 1, 1.0), *[("iama", 1, 3.0)] * 3]
    assert found[0]["runner_up"] is None
    assert found[1]["runner_up"] == {"policy": "base", "method": "bon", "samples": 1, "gold": 1.0, "written": "bon(1)"}
    assert found[2]["runner_up"] == {"policy": "base", "method": "bon", "samples": 4, "gold": 2.0, "written": "bon(4)"}
    assert found[3]["ci95"] == [3.0, 3.0]


def test_another_method_of_the_same_policy_is_a_runner_up():
    rows = [row("iama", 4, 1.0), row("iama", 2, 0.5), row("iama", None, 1.0, method="cards(target=1.5)")]
    (_, found) = find(rows, constant(rows, [3.0, 2.0, 1.0]))
    assert (found["samples"], found["runner_up"]["method"], found["runner_up"]["samples"]) == (
        4,
        "cards(target=1.5)",
        None,
    )


def test_criteria_are_apart_and_rows_without_gold_or_cost_are_left_out():
    rows = [row("base", 1, 1.0), row("base", 1, 1.0, criterion="safe"), row("iama", 1, 1.0), row("iama", 2, None)]
    gold = constant(rows, [1.0, 5.0, 9.0, 9.0])
    del gold["iama", "helpful", "bon", 1]
    found = find(rows, gold)
    assert [(r["criterion"], r["policy"], r["gold"]) for r in found] == [
        ("helpful", "base", 1.0),
        ("safe", "base", 5.0),
    ]


def test_budgets_are_thinned_and_keep_their_ends():
    rows = [row("base", n, float(n)) for n in range(1, 101)]
    found = find(rows, constant(rows, np.arange(100.0)), num_budgets=5)
    assert [r["budget"] for r in found] == [1.0, 26.0, 51.0, 75.0, 100.0] or [r["budget"] for r in found] == [
        1.0,
        26.0,
        50.0,
        75.0,
        100.0,
    ]
    assert all(r["samples"] == r["budget"] for r in found)


def test_gold_of_the_choice_on_halves_is_free_of_the_winners_curse():
    """Thirty equal rows: the best mean on the same prompts is above the truth, that of the halves is not."""
    rng = np.random.default_rng(0)
    rows = [row(f"policy {i}", 1, 1.0) for i in range(30)]
    reported, naive, covered = [], [], []
    for seed in range(150):
        gold = {key_of(r): rng.normal(size=20) for r in rows}
        (found,) = recommend(rows, gold, ["flops"], num_bootstrap=200, seed=seed)
        reported.append(found["halves_gold"])
        naive.append(found["gold"])
        covered.append(found["halves_ci95"][0] <= 0 <= found["halves_ci95"][1])
        assert gold[found["policy"], "helpful", "bon", 1].mean() == max(map(np.mean, gold.values())) == naive[-1]
    assert np.mean(naive) > 0.4
    assert abs(np.mean(reported)) < 0.06
    assert np.mean(covered) > 0.85


def test_each_prompt_is_judged_by_what_the_other_half_chose():
    """Four rows, each best on a prompt of its own: a choice never sees the prompt it is judged on."""
    rows = [row(name, 1, 1.0) for name in "abcd"]
    gold = {key_of(r): values for r, values in zip(rows, np.eye(4), strict=True)}
    (found,) = find(rows, gold)
    assert (found["gold"], found["halves_gold"], found["policy"]) == (0.25, 0.0, "a")


def test_repeats_of_a_prompt_stand_in_one_half():
    """Four rows, each best on a prompt of its own that is asked three times: no choice sees what it is judged on."""
    rows = [row(name, 1, 1.0) for name in "abcd"]
    gold = {key_of(r): np.tile(values, 3) for r, values in zip(rows, np.eye(4), strict=True)}
    for seed in range(5):
        (found,) = recommend(rows, gold, ["flops"], num_bootstrap=100, seed=seed, prompts=list("abcd" * 3))
        assert (found["gold"], found["halves_gold"]) == (0.25, 0.0)


def test_missing_values():
    rows = [row("a", 1, 1.0), row("b", 1, 1.0)]
    gold = {key_of(rows[0]): np.full(6, np.nan), key_of(rows[1]): np.array([1.0, np.nan, 1, 1, 1, 1])}
    (found,) = find(rows, gold)
    assert (found["policy"], found["gold"], found["runner_up"]) == ("b", 1.0, None)


def test_rows_are_compared_on_the_prompts_that_have_gold_of_all_of_them():
    """The second lacks gold on the harder half, where it is worse, too."""
    rows = [row("a", 1, 1.0), row("b", 1, 1.0)]
    easy_and_hard = np.repeat([1.0, 0.0], 8)
    gold = {
        key_of(rows[0]): easy_and_hard + 0.1,
        key_of(rows[1]): np.where(easy_and_hard > 0, easy_and_hard, np.nan),
    }
    (found,) = find(rows, gold)
    assert (found["policy"], found["gold"]) == ("a", pytest.approx(1.1))
    assert found["runner_up"]["gold"] == pytest.approx(1.0)
    assert found["halves_gold"] == pytest.approx(1.1)


def test_gold_is_that_of_what_is_named_and_never_falls_with_the_budget():
    rng = np.random.default_rng(3)
    rows = [row(policy, n, float(n)) for policy in ("base", "iama") for n in (1, 2, 4, 8)]
    gold = {key_of(r): rng.normal(size=8) for r in rows}
    found = find(rows, gold)
    for r in found:
        assert r["gold"] == gold[r["policy"], "helpful", r["method"], r["samples"]].mean()
        assert r["runner_up"] is None or r["runner_up"]["gold"] <= r["gold"]
    golds = [r["gold"] for r in found]
    assert golds == sorted(golds)
    assert any(r["halves_gold"] < r["gold"] for r in found)


def test_the_runner_up_is_written_otherwise():
    rows = [row("a", 8, 8.0), row("a", 8, 8.0, method="stop"), row("a", None, 8.0, method="bon(tuned)")]
    rows += [row("a", None, 8.0, method=text) for text in ("itp(16, tuned)", "itp(16, 0.1)")] + [row("a", 4, 4.0)]
    for r, text in zip(rows[1:4], ("bon(8)", "bon(7)", "itp(16, 0.1)"), strict=True):
        r["written"] = text
    found = find(rows, constant(rows, [3.0, 3.0, 2.9, 2.0, 2.0, 1.0]))[-1]
    assert (found["written"], found["runner_up"]["written"]) == ("bon(8)", "itp(16, 0.1)")
    found = find(rows[3:], constant(rows[3:], [2.0, 2.0, 1.0]))[-1]
    assert (found["written"], found["runner_up"]["written"]) == ("itp(16, 0.1)", "bon(4)")


def test_the_cheapest_of_equals_is_named():
    rows = [row("a", n, float(n)) for n in (4, 2, 1)]
    assert {r["samples"] for r in find(rows, constant(rows, [0.1, 0.1 + 1e-17, 0.3 - 0.2]))} == {1}


def test_budgets_are_what_curves_cost_and_others_only_where_they_are_apart():
    costs = {"bon": [1.0, 2, 4, 8], "stop": [1.0, 1.96, 2.08, 3.94, 4.14, 5, 5.2, 7.8]}
    rows = [row("a", i, cost, method=m) for m, values in costs.items() for i, cost in enumerate(values, 1)]
    gold = constant(rows, np.arange(12.0))
    assert [r["budget"] for r in find(rows, gold)] == [1, 2, 4, 5, 8]
    assert [r["budget"] for r in find(rows, gold, num_budgets=4)] == [1, 2, 4, 8]
    for dearest, budgets in ((8.2, [1, 2, 4, 5, 8]), (9.0, [1, 2, 4, 5, 8, 9])):
        more = [*rows, last := row("a", 9, dearest, method="stop")]
        found = find(more, gold | {key_of(last): np.full(8, 12.0)})
        assert ([r["budget"] for r in found], found[-1]["gold"]) == (budgets, 12.0)
