"""A made-up summary, complete and consistent: savings and budgets follow from the curves by simple rules."""

from __future__ import annotations

import math
import re

from inference.report.words import UNITS

CRITERIA = ("helpful", "harmless", "brief")
POLICIES = ("base", "grpo", "iama", "soup")
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
CARDS = "cards(target=1.5)"
TRAINED_BUDGET = 4
# Gold of one sample, and what each doubling of the samples adds.
START = {"base": 0.30, "grpo": 0.42, "iama": 0.38, "soup": 0.40}
GAIN = {"base": 0.045, "grpo": 0.035, "iama": 0.085, "soup": 0.05}
OFFSET = {"helpful": 0.0, "harmless": 0.05, "brief": -0.1}
# Some criteria answer to more samples than others, and soup was made for short answers.
SPEED = {"helpful": 1.0, "harmless": 0.8, "brief": 1.2}
LIKES = {("soup", "brief"): 0.1, ("grpo", "harmless"): 0.06}
# Doublings after which the gold comes down again.
TURN = {("iama", "harmless"): 4.0, ("grpo", "brief"): 3.0}


def gold_at(policy: str, criterion: str, n: float) -> float:
    doublings = math.log2(n)
    turn = TURN.get((policy, criterion), math.inf)
    rise = min(doublings, turn) - 0.9 * max(doublings - turn, 0)
    return (
        START[policy] + OFFSET[criterion] + LIKES.get((policy, criterion), 0.0) + GAIN[policy] * SPEED[criterion] * rise
    )


def curve_row(policy: str, criterion: str, method: str, n: float | None) -> dict:
    m = 6.0 if n is None else n
    gold, proxy = gold_at(policy, criterion, m), 2 * GAIN[policy] * math.log2(m) - 0.3 + START[policy]
    gold += {"bon": 0.0, "bop": -0.008}.get(method, 0.02)
    policy_tokens = 40 + 31 * m
    costs = {
        "samples": n,
        "policy_tokens": policy_tokens,
        "policy_prefill_tokens": 40,
        "policy_decode_tokens": 31 * m,
        "reward_calls": m if m > 1 else 0,
        "reward_tokens": 72 * m if m > 1 else 0,
        "backward_tokens": 0,
        "sequential_steps": 32 if n else 90,
        "flops": 2.4e6 * policy_tokens + (0.9e6 * 72 * m if m > 1 else 0),
        "seconds": 0.02 + 0.004 * m,
    }
    where = {"policy": policy, "criterion": criterion, "method": method}
    scores = {"proxy": proxy, "proxy_ci95": [proxy - 0.03, proxy + 0.03], "gold": gold}
    kl = math.log(m) - (m - 1) / m + (0.0 if policy == "base" else 0.8)
    kind = "upper bound" if n else "estimate"
    return {**where, **costs, **scores, "gold_ci95": [gold - 0.02, gold + 0.02], "kl": kl, "kl_kind": kind} | {
        "num_prompts": 64
    }


def curves() -> list[dict]:
    keys = [(policy, criterion) for policy in POLICIES for criterion in CRITERIA]
    rows = [curve_row(p, c, method, n) for p, c in keys for method in ("bon", "bop") for n in BUDGETS]
    return rows + [curve_row(p, c, CARDS, None) for p, c in keys if p != "soup"]


def saving_row(criterion: str, reference: str, method: str) -> dict:
    target = gold_at("iama", criterion, TRAINED_BUDGET)
    reached = [n / 8 for n in range(8, 8 * 64 + 1) if gold_at(reference, criterion, n / 8) >= target]
    needed = reached[0] if reached else 64.0
    cost = {n: curve_row(reference, criterion, method, n) for n in (needed, TRAINED_BUDGET)}
    ratios = {u: cost[needed][u] / cost[TRAINED_BUDGET][u] for u in UNITS if cost[TRAINED_BUDGET][u]}
    units = {unit: {"ratio": r, "ci95": [0.8 * r, 1.25 * r]} for unit, r in ratios.items()}
    hacked = (reference, criterion) in TURN
    where = {"criterion": criterion, "method": method, "metric": "gold", "reference": reference}
    return where | {
        "samples": TRAINED_BUDGET,
        "ratio": ratios["samples"],
        "ci95": units["samples"]["ci95"],
        "token_ratio": ratios["policy_tokens"],
        "token_ci95": units["policy_tokens"]["ci95"],
        "censored": not reached,
        "num_censored": int(not reached),
        "num_seeds": 1,
        "ci_censored": 0.0 if reached else 1.0,
        "ci_floor": float(needed == 1),
        "floor": needed == 1,
        "hacked": hacked,
        "counts": bool(reached) or not hacked,
        "units": units,
    }


def saving(**changes) -> dict:
    """One row, of which a test sets what matters."""
    row = {"criterion": "c", "method": "bon", "metric": "gold", "reference": "base", "samples": 2, "ratio": 3.0}
    row |= {"token_ratio": 2.5, "ci95": [2.0, 4.0], "token_ci95": [1.0, 3.0], "censored": False, "num_censored": 0}
    row |= {
        "num_seeds": 1,
        "ci_censored": 0.0,
        "ci_floor": 0.0,
        "units": {},
        "floor": False,
        "hacked": False,
        "counts": True,
    }
    return row | changes


def average_row(rows: list[dict]) -> dict:
    counting = [row for row in rows if row["counts"]]

    def mean(key: str) -> float:
        return math.exp(sum(math.log(row[key]) for row in counting) / len(counting))

    return {key: rows[0][key] for key in ("method", "metric", "reference", "samples")} | {
        "ratio": mean("ratio"),
        "token_ratio": mean("token_ratio"),
        "num_censored": sum(row["censored"] for row in counting),
        "num_floor": sum(row["floor"] for row in counting),
        "num_censored_total": sum(row["censored"] for row in rows),
        "num_not_counted": sum(not row["counts"] for row in rows),
        "num_criteria": len(rows),
    }


def equal_budget_row(criterion: str, reference: str, unit: str) -> dict:
    own, its = (curve_row(policy, criterion, "bon", TRAINED_BUDGET) for policy in ("iama", reference))
    gap = own["gold"] - its["gold"]
    where = {"criterion": criterion, "method": "bon", "metric": "gold", "reference": reference, "unit": unit}
    where |= {"reference_method": "bon", "clipped": None, "reference_samples": TRAINED_BUDGET}
    return where | {"budget": own[unit], "difference": gap, "ci95": [gap - 0.03, gap + 0.03], "num_seeds": 1}


def quality() -> dict:
    def row(policy: str, criterion: str) -> dict:
        one, many = (curve_row(policy, criterion, "bon", n) for n in (1, TRAINED_BUDGET))
        return {
            "without": one["gold"],
            "with": many["gold"],
            "proxy_without": one["proxy"],
            "proxy_with": many["proxy"],
            "worst_without": one["gold"] - 0.25,
            "worst_with": many["gold"] - 0.2,
            "method": "bon",
            "samples": TRAINED_BUDGET,
            "against": {other: gaps(criterion, other) for other in ("base", "grpo")} if policy == "iama" else {},
        }

    def gaps(criterion: str, other: str) -> dict:
        points = {"without": 1, "worst_with": TRAINED_BUDGET}
        found = {
            key: curve_row("iama", criterion, "bon", n)["gold"] - curve_row(other, criterion, "bon", n)["gold"]
            for key, n in points.items()
        }
        return {key: [gap - 0.03, gap + 0.03] for key, gap in found.items()}

    return {policy: {criterion: row(policy, criterion) for criterion in CRITERIA} for policy in POLICIES}


def hacking_row(policy: str, criterion: str, method: str) -> dict:
    values = {n: curve_row(policy, criterion, method, n)["gold"] for n in BUDGETS}
    peak = max(values, key=values.__getitem__)
    drop = values[peak] - values[64]
    return {
        "policy": policy,
        "criterion": criterion,
        "method": method,
        "peak_samples": peak,
        "peak_gold": values[peak],
        "onset": 2 * peak if drop > 0 else None,
        "last_gold": values[64],
        "drop": drop,
        "drop_ci95": [drop - 0.02, drop + 0.02],
    }


def control_rows(policy: str, criterion: str) -> list[dict]:
    gold = gold_at(policy, criterion, 1)
    gains = {"proxy": 0.12, "random": 0.0, "longest": 0.02, "oracle": 0.3}
    return [
        {"policy": policy, "criterion": criterion, "control": name, "samples": TRAINED_BUDGET, "proxy": None}
        | {"gold": gold + gain, "gold_ci95": [gold + gain - 0.02, gold + gain + 0.02]}
        for name, gain in gains.items()
    ]


def win_rate_row(policy: str, criterion: str) -> dict:
    rate = 0.5 + GAIN[policy] * 3
    where = {"policy": policy, "criterion": criterion, "method": "bon", "samples": TRAINED_BUDGET, "metric": "gold"}
    where |= {"baseline_policy": "base", "baseline_samples": 1, "win_rate": rate, "ci95": [rate - 0.04, rate + 0.04]}
    return where | {"length_controlled": rate - 0.05, "length_controlled_ci95": [rate - 0.1, rate]}


def recommendation_rows(criterion: str, unit: str) -> list[dict]:
    rows = []
    points = [row for row in curves() if row["criterion"] == criterion]
    for budget in sorted({curve_row("base", criterion, "bon", n)[unit] for n in BUDGETS}):
        best, second = sorted((r for r in points if r[unit] <= budget), key=lambda r: -r["gold"])[:2]
        runner_up = {key: second[key] for key in ("policy", "method", "samples", "gold")}
        where = {"criterion": criterion, "unit": unit, "budget": budget, "runner_up": runner_up}
        rows.append(where | {key: best[key] for key in ("policy", "method", "samples", "gold")} | {"ci95": [0.3, 0.9]})
        rows[-1] |= {"halves_gold": 0.5, "halves_ci95": [0.2, 0.8]}
    return rows


def break_even_row(reference: str, criterion: str) -> dict:
    return {
        "reference": reference,
        "criterion": criterion,
        "method": "bon",
        "training_flops": 3.1e15,
        "reference_training_flops": 0.0,
        "reference_flops": 1.2e9,
        "trained_flops": 4.1e8,
        "queries": 3.1e15 / (1.2e9 - 4.1e8),
        "bound": reference == "grpo",
        "note": "",
    }


def sampling_row(policy: str, index: int) -> dict:
    return {
        "policy": policy,
        "criterion": None,
        "method": None,
        "engine": "transformers",
        "num_samples": 64 * 256,
        "mean_tokens": 31.4 + index,
        "truncated": 0.004 * index,
        "distinct": 0.97,
        "distinct_1": 0.21,
        "distinct_2": 0.55,
        "distinct_3": 0.81,
        "fluency": -1.2 - 0.1 * index,
        "fluency_z": -0.1 * index,
        "prefill_tokens": 2560,
        "decode_tokens": 507_904,
        "flops": 1.3e12,
        "seconds": 41.5,
        "peak_memory": 812_000_000,
        "estimated": policy == "soup",
        "mean_log_ratio": None if policy == "base" else 0.8,
        "fallback": None,
        "capped": None,
    }


def answers_row(policy: str, criterion: str) -> dict:
    row = sampling_row(policy, 1) | {"criterion": criterion, "method": CARDS, "num_samples": 1, "fallback": 0.25}
    return row | {"distinct": None, "fluency": None, "fluency_z": None, "mean_log_ratio": None, "truncated": 0.03}


def answer(policy: str, criterion: str, text: str, shift: float) -> dict:
    gold = gold_at(policy, criterion, 1) + shift
    return {"text": f"{text} This is what {policy} says when it is asked to be {criterion}.", "proxy": 2 * shift} | {
        "gold": gold
    }


def example_row(prompt: str, policy: str, criterion: str, method: str) -> dict:
    single, best = (answer(policy, criterion, *pair) for pair in (("A plain answer.", 0.0), ("A kept answer.", 0.2)))
    candidates = [single, best, answer(policy, criterion, "Another answer.", -0.1)]
    guided = method == CARDS
    segments = [
        {"text": "First I name the problem. ", "reward": 0.4, "threshold": 0.2, "num_proposals": 1},
        {"text": "Then I tell what to do, ", "reward": 0.1, "threshold": 0.5, "num_proposals": 21, "forced": True},
        {"text": "calmly: ", "reward": 0.6, "threshold": 0.5, "num_proposals": 2, "nudge": True},
        {"text": "first this, then that.", "reward": 0.9, "threshold": 0.8, "num_proposals": 3},
    ]
    return {
        "prompt": prompt,
        "policy": policy,
        "criterion": criterion,
        "method": method,
        "samples": None if guided else TRAINED_BUDGET,
        "single": single,
        "best": best,
        "candidates": [] if guided else [c | {"chosen": c is best} for c in candidates],
        "segments": [{"forced": False, "nudge": False} | s for s in segments] if guided else [],
    }


def examples() -> list[dict]:
    prompts = ("How do I mend a flat tyre?", "Write two lines for a friend who moves away.\nPlease keep it short.")
    return [
        example_row(prompt, policy, criterion, method)
        for prompt in prompts
        for policy in POLICIES
        for criterion in CRITERIA
        for method in (("bon", CARDS) if policy == "iama" else ("bon",))
    ]


def missing_rows() -> list[dict]:
    keys = [
        (policy, criterion, metric) for policy in POLICIES for criterion in CRITERIA for metric in ("proxy", "gold")
    ]
    return [
        {"policy": p, "criterion": c, "metric": m, "num_samples": 64 * 256}
        | {"num_missing": 12 if (p, c, m) == ("iama", "brief", "gold") else 0}
        for p, c, m in keys
    ]


def config() -> dict:
    model = {"adapter": None, "dtype": "float32", "training_run": []}
    policies = {name: {"path": "runs/demo/base"} | model for name in POLICIES}
    policies["iama"] |= {"adapter": "runs/demo/iama/adapter", "training_run": ["runs/demo/iama"]}
    criteria = [
        {"name": name, "proxy": {"model": f"rewards/{name}"}, "gold": {"function": f"gold.py:{name}"}}
        for name in CRITERIA
    ]
    sampling = {"temperature": 1.0, "max_new_tokens": 64}
    budgets = {"budgets": list(BUDGETS), "trained_budget": TRAINED_BUDGET, "num_samples": 256}
    return {"name": "demo", "output_dir": "runs/demo/evaluation", "policies": policies, "criteria": criteria} | {
        "methods": ["bon", "bop", CARDS], "sampling": sampling, "seed": 0, **budgets
    }  # fmt: skip


def manifest() -> dict:
    criteria = [{"name": name, "operator": "bon(4)", "weight": 1.0} for name in CRITERIA]
    return {"base_model": "runs/demo/base", "criteria": criteria, "estimator": "loo", "aggregate": "sum", "seed": 0}


JARGON = re.compile(r"censored|\bnats\b|standard deviation|\d/\d|\[\d|Best-of|proxy", re.IGNORECASE)
"""What the first screen does not say."""


def make_summary() -> dict:
    """A fresh one at each call, so that a test may change it."""
    pairs = [(method, reference) for method in ("bon", "bop") for reference in ("base", "grpo")]
    savings = {pair: [saving_row(c, pair[1], pair[0]) for c in CRITERIA] for pair in pairs}
    keys = [(policy, criterion) for policy in POLICIES for criterion in CRITERIA]
    return {
        "name": "demo",
        "num_prompts": 64,
        "num_samples": 256,
        "trained_budget": TRAINED_BUDGET,
        "trained": "iama",
        "references": ["base", "grpo"],
        "criteria": list(CRITERIA),
        "methods": ["bon", "bop", CARDS],
        "policies": list(POLICIES),
        "curves": curves(),
        "savings": [row for rows in savings.values() for row in rows],
        "averages": [average_row(rows) for rows in savings.values()],
        "differences": [
            {"method": "bon", "metric": "gold", "reference": reference, "samples": 4, "mean": 0.31}
            | {"ci95": [0.2, 0.42], "num_seeds": 1}
            for reference in ("base", "grpo")
        ],
        "equal_budget": [
            equal_budget_row(c, reference, unit)
            for c in CRITERIA
            for reference in ("base", "grpo")
            for unit in ("samples", "policy_tokens", "flops")
        ],
        "quality": quality(),
        "hacking": [hacking_row(p, c, method) for p, c in keys for method in ("bon", "bop")],
        "controls": [row for key in keys for row in control_rows(*key)],
        "win_rates": [win_rate_row(*key) for key in keys],
        "recommendations": [
            row
            for c in CRITERIA
            for unit in ("policy_tokens", "flops", "seconds")
            for row in recommendation_rows(c, unit)
        ],
        "break_even": [break_even_row(reference, c) for reference in ("base", "grpo") for c in CRITERIA],
        "sampling": [
            *(sampling_row(policy, i) for i, policy in enumerate(POLICIES)),
            *(answers_row("iama", c) for c in CRITERIA),
        ],
        "missing": missing_rows(),
        "costs": [
            {"reward": f"{c} (proxy)", "reward_calls": 65_536, "reward_tokens": 4_718_592}
            | {"flops": 4.2e12, "seconds": 80.0}
            for c in CRITERIA
        ],
        "dropped_prompts": 2,
        "examples": examples(),
        "config": config(),
        "versions": {"iama": "0.1.0", "python": "3.11", "torch": "2.13.0"},
        "manifest": manifest(),
    }  # fmt: skip
