"""The numbers of a summary against a slow computation of their definitions, from the pool files and scores alone."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from iama.config.files import EvaluationConfig
from inference.evaluation.plan import make_plan
from inference.pools.file import prompt_ids
from inference.pools.score import reward_key
from inference.report import write_report
from inference.statistics.bootstrap import prompt_weights
from tests.inference.evaluation.running import evaluate

NUM_SAMPLES, BUDGETS, TRAINED = 12, (1, 2, 3), 2
POLICIES, CRITERIA = ("base", "grpo", "iama"), ("vowels", "brief")


def vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / (1 + len(text))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny, adapter_dir, gold_file) -> EvaluationConfig:
    plain = {"path": str(tiny.policy)}
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = tiny.prompts.read_text().splitlines()
    prompts.write_text("\n".join([*lines, lines[0]]) + "\n")  # one of them twice
    return EvaluationConfig.model_validate(
        {
            "name": "recomputed",
            "output_dir": str(tmp_path_factory.mktemp("recomputed") / "evaluation"),
            "policies": {
                "base": plain,
                "grpo": plain | {"system_prompt": "bake"},
                "iama": plain | {"adapter": str(adapter_dir)},
            },
            "prompts": str(prompts),
            "criteria": [
                {
                    "name": "vowels",
                    "proxy": {"model": str(tiny.reward)},
                    "gold": {"function": f"{gold_file}:vowels"},
                },
                {
                    "name": "brief",
                    "proxy": {"function": f"{gold_file}:brief"},
                    "gold": {"model": str(tiny.other_reward)},
                },
            ],
            "budgets": list(BUDGETS),
            "num_samples": NUM_SAMPLES,
            "trained_budget": TRAINED,
            "sampling": {"max_new_tokens": 12},
            "num_bootstrap": 100,
        }
    )


@pytest.fixture(scope="module")
def summary(config):
    return evaluate(config)


@pytest.fixture(scope="module")
def blocks(config, summary) -> dict[str, list[dict]]:
    """By policy, prompt by prompt: the prompt, its samples and their scores by (criterion, metric)."""
    folder = Path(config.output_dir)
    found = {}
    for policy in POLICIES:
        (path,) = (folder / "pools").glob(f"{policy}-*.jsonl")
        _, *lines = map(json.loads, path.read_text().splitlines())
        prompts = [line | {"samples": []} for line in lines if "text" not in line]
        by_id = {prompt["prompt_id"]: prompt for prompt in prompts}
        for line in lines:
            if "text" in line:
                by_id[line["prompt_id"]]["samples"].append(line)
        journals = {c.name: c.proxy if c.proxy.model else c.gold for c in config.criteria}
        stored = {
            name: read_scores(folder / "scores" / f"{path.stem}.{reward_key(spec)[:12]}.jsonl")
            for name, spec in journals.items()
        }
        for prompt in prompts:
            texts = [sample["text"] for sample in prompt["samples"]]
            distinct = list(dict.fromkeys(texts))
            model = {name: dict(zip(distinct, stored[name][prompt["prompt_id"]], strict=True)) for name in stored}
            prompt["scores"] = {
                ("vowels", "proxy"): [model["vowels"][text] for text in texts],
                ("vowels", "gold"): [vowels(text) for text in texts],
                ("brief", "proxy"): [-float(len(text)) for text in texts],
                ("brief", "gold"): [model["brief"][text] for text in texts],
            }
        found[policy] = prompts
    return found


def read_scores(path: Path) -> dict[str, list[float]]:
    return {line["prompt_id"]: line["values"] for line in map(json.loads, path.read_text().splitlines())}


def chances(proxy: list[float], n: int) -> list[float]:
    """How often each answer is the best of n drawn without replacement; ties by chance."""
    kept = [0.0] * len(proxy)
    subsets = list(combinations(range(len(proxy)), n))
    for subset in subsets:
        top = max(proxy[i] for i in subset)
        best = [i for i in subset if proxy[i] == top]
        for i in best:
            kept[i] += 1 / len(best) / len(subsets)
    return kept


def best_of(prompts: list[dict], criterion: str, metric: str, n: int) -> list[float]:
    """By prompt the mean score of the best of n by proxy."""
    return [
        sum(
            chance * score
            for chance, score in zip(
                chances(p["scores"][criterion, "proxy"], n), p["scores"][criterion, metric], strict=True
            )
        )
        for p in prompts
    ]


def tokens(prompt: dict, n: int) -> float:
    """The prompt once, and of every answer all tokens but the last."""
    return prompt["cost"]["policy_prefill_tokens"] + n * mean(len(s["token_ids"]) - 1 for s in prompt["samples"])


def steps(prompt: dict, n: int) -> float:
    longest = [max(len(s["token_ids"]) for s in subset) for subset in combinations(prompt["samples"], n)]
    return mean(longest) + 1  # the reward reads all n at once


def test_curves(summary, blocks):
    rows = {(r["policy"], r["criterion"], r["samples"]): r for r in summary["curves"]}
    assert len(rows) == len(summary["curves"]) == 3 * 2 * 3
    for (policy, criterion, n), row in rows.items():
        for metric in ("proxy", "gold"):
            assert row[metric] == pytest.approx(mean(best_of(blocks[policy], criterion, metric, n)), abs=1e-9)
        assert row["policy_tokens"] == pytest.approx(mean(tokens(p, n) for p in blocks[policy]))
        assert row["sequential_steps"] == pytest.approx(mean(steps(p, n) for p in blocks[policy]))
        assert (row["reward_calls"], row["backward_tokens"], row["num_prompts"]) == (n, 0, 5)
        assert row["seconds"] == pytest.approx(n * rows[policy, criterion, 1]["seconds"])


def test_prompts_cost_what_their_tokens_are(blocks, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    for policy, system in (("base", []), ("grpo", [{"role": "system", "content": "bake"}]), ("iama", [])):
        for prompt in blocks[policy]:
            ids = tokenizer.apply_chat_template([*system, *prompt["prompt"]], add_generation_prompt=True)["input_ids"]
            assert prompt["cost"]["policy_prefill_tokens"] == len(ids)


def needed(curve: list[float], target: float) -> tuple[float, bool]:
    """Samples at which a curve first reaches the target, linear in log n; and whether it never does."""
    for i, value in enumerate(curve):
        if value >= target:
            if i == 0:
                return 1.0, False
            share = (target - curve[i - 1]) / (value - curve[i - 1])
            return math.exp(math.log(i) + share * (math.log(i + 1) - math.log(i))), False
    return float(len(curve)), True


def at(line: list[float], n: float) -> float:
    low = min(int(n), len(line) - 1)
    return line[low - 1] + (n - low) * (line[low] - line[low - 1])


def test_savings(summary, blocks):
    assert len(summary["savings"]) == 2 * 2 * 2
    for row in summary["savings"]:
        reference, metric, criterion = blocks[row["reference"]], row["metric"], row["criterion"]
        curve = [mean(best_of(reference, criterion, metric, n)) for n in BUDGETS]
        target = mean(best_of(blocks["iama"], criterion, metric, TRAINED))
        samples, censored = needed(curve, target)
        assert row["ratio"] == pytest.approx(samples / TRAINED)
        assert (row["censored"], row["floor"]) == (censored, curve[0] >= target)
        spent = at([mean(tokens(p, n) for p in reference) for n in BUDGETS], samples)
        assert row["token_ratio"] == pytest.approx(spent / mean(tokens(p, TRAINED) for p in blocks["iama"]))
        assert row["units"]["policy_tokens"]["ratio"] == row["token_ratio"]
    assert len({row["ratio"] for row in summary["savings"]}) > 2  # they are not all at their bounds


def test_differences(summary, blocks):
    assert len(summary["differences"]) == 2 * 2
    for row in summary["differences"]:
        own, other = (
            sum(mean(best_of(blocks[policy], c, row["metric"], TRAINED)) for c in CRITERIA)
            for policy in ("iama", row["reference"])
        )
        assert row["mean"] == pytest.approx(own - other)


def test_equal_budget(summary, blocks):
    rows = [row for row in summary["equal_budget"] if row["unit"] == "policy_tokens"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        reference = blocks[row["reference"]]
        own = mean(tokens(p, TRAINED) for p in blocks["iama"])
        costs = [mean(tokens(p, n) for p in reference) for n in BUDGETS]
        curve = [mean(best_of(reference, row["criterion"], row["metric"], n)) for n in BUDGETS]
        rate = (costs[1] - costs[0]) or 1
        n = min(max(1 + (own - costs[0]) / rate, 1), len(BUDGETS))
        low = min(int(n), len(BUDGETS) - 1)
        share = math.log(n / low) / math.log((low + 1) / low)
        value = curve[low - 1] + share * (curve[low] - curve[low - 1])
        trained = mean(best_of(blocks["iama"], row["criterion"], row["metric"], TRAINED))
        assert row["budget"] == pytest.approx(own)
        assert row["difference"] == pytest.approx(trained - value)


def test_win_rates(summary, blocks):
    assert len(summary["win_rates"]) == 2 * (1 + 2 + 2)  # of base itself only with more samples
    for row in summary["win_rates"]:
        assert (row["baseline_policy"], row["baseline_samples"], row["metric"]) == ("base", 1, "gold")
        rates = []
        for own, other in zip(blocks[row["policy"]], blocks["base"], strict=True):
            halves = slice(0, None, 2), slice(1, None, 2)  # all pools were drawn with one seed
            sides = [
                (
                    chances(block["scores"][row["criterion"], "proxy"][half], n),
                    block["scores"][row["criterion"], "gold"][half],
                )
                for block, half, n in zip((own, other), halves, (row["samples"], 1), strict=True)
            ]
            (p, x), (q, y) = sides
            rates.append(
                sum(
                    p[i] * q[j] * (1.0 if x[i] > y[j] else 0.5 if x[i] == y[j] else 0.0)
                    for i in range(len(x))
                    for j in range(len(y))
                )
            )
        assert row["win_rate"] == pytest.approx(mean(rates))


def worst(prompts: list[dict], criterion: str, n: int) -> float:
    """Mean gold of the worst 5 % of the answers."""
    law = [
        (gold, chance / len(prompts))
        for p in prompts
        for gold, chance in zip(
            p["scores"][criterion, "gold"], chances(p["scores"][criterion, "proxy"], n), strict=True
        )
    ]
    left, total = 0.05, 0.0
    for gold, chance in sorted(law):
        taken = min(chance, left)
        total, left = total + taken * gold, left - taken
    return total / 0.05


def test_quality(summary, blocks):
    for policy in POLICIES:
        for criterion in CRITERIA:
            row = summary["quality"][policy][criterion]
            for name, metric, n in (
                ("without", "gold", 1),
                ("with", "gold", TRAINED),
                ("proxy_without", "proxy", 1),
                ("proxy_with", "proxy", TRAINED),
            ):
                assert row[name] == pytest.approx(mean(best_of(blocks[policy], criterion, metric, n)))
            assert row["worst_without"] == pytest.approx(worst(blocks[policy], criterion, 1))
            assert row["worst_with"] == pytest.approx(worst(blocks[policy], criterion, TRAINED))


def test_intervals_of_quality(config, summary, blocks):
    """Both policies on the same resampled prompts, which have the evaluation's order."""
    ids = prompt_ids(make_plan(config).rows)
    blocks = {
        policy: sorted(prompts, key=lambda prompt: ids.index(prompt["prompt_id"])) for policy, prompts in blocks.items()
    }
    for policy in ("base", "grpo"):
        assert all(row["against"] == {} for row in summary["quality"][policy].values())
    weights_BP = prompt_weights(len(blocks["base"]), config.num_bootstrap, config.seed)
    for criterion in CRITERIA:
        for reference, told in summary["quality"]["iama"][criterion]["against"].items():
            singles = [np.asarray(best_of(blocks[p], criterion, "gold", 1)) for p in ("iama", reference)]
            replicates = weights_BP @ (singles[0] - singles[1])
            tails = []
            for weights_P in weights_BP:
                drawn = [
                    [
                        prompt
                        for prompt, w in zip(blocks[p], weights_P, strict=True)
                        for _ in range(round(w * len(weights_P)))
                    ]
                    for p in ("iama", reference)
                ]
                tails.append(worst(drawn[0], criterion, TRAINED) - worst(drawn[1], criterion, TRAINED))
            assert told["without"] == pytest.approx(np.percentile(replicates, [2.5, 97.5]))
            assert told["worst_with"] == pytest.approx(np.percentile(tails, [2.5, 97.5]))
    assert set(summary["quality"]["iama"][CRITERIA[0]]["against"]) == {"base", "grpo"}


def test_controls(summary, blocks):
    rows = {(r["policy"], r["criterion"], r["control"]): r for r in summary["controls"] if r["samples"] == TRAINED}
    for policy in POLICIES:
        for criterion in CRITERIA:
            choosers = {
                "proxy": [p["scores"][criterion, "proxy"] for p in blocks[policy]],
                "random": [[0.0] * NUM_SAMPLES for _ in blocks[policy]],
                "longest": [[float(len(s["token_ids"])) for s in p["samples"]] for p in blocks[policy]],
                "oracle": [p["scores"][criterion, "gold"] for p in blocks[policy]],
            }
            for control, by in choosers.items():
                for metric in ("proxy", "gold"):
                    kept = [
                        sum(c * s for c, s in zip(chances(row, TRAINED), p["scores"][criterion, metric], strict=True))
                        for row, p in zip(by, blocks[policy], strict=True)
                    ]
                    assert rows[policy, criterion, control][metric] == pytest.approx(mean(kept))


def test_sampling(summary, blocks):
    assert [row["policy"] for row in summary["sampling"]] == list(POLICIES)
    for row in summary["sampling"]:
        prompts = blocks[row["policy"]]
        samples = [s for p in prompts for s in p["samples"]]
        assert row["truncated"] == mean(s["finish_reason"] == "length" for s in samples)
        assert row["mean_tokens"] == pytest.approx(mean(len(s["token_ids"]) for s in samples))
        assert row["prefill_tokens"] == sum(p["cost"]["policy_prefill_tokens"] for p in prompts)
        assert row["decode_tokens"] == sum(len(s["token_ids"]) - 1 for s in samples)
        for n in (1, 2, 3):
            shares = []
            for p in prompts:
                grams = [
                    tuple(words[i : i + n])
                    for words in (s["text"].split() for s in p["samples"])
                    for i in range(len(words) - n + 1)
                ]
                shares.append(len(set(grams)) / len(grams))
            assert row[f"distinct_{n}"] == pytest.approx(mean(shares))
    assert all(row["num_missing"] == 0 for row in summary["missing"])


def test_the_report_draws_these_numbers(config, summary):
    page = write_report(Path(config.output_dir)).read_text(encoding="utf-8")
    (embedded,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(embedded)
    shown = {(r["policy"], r["criterion"], r["samples"]): r for r in data["curves"]}
    for row in summary["curves"]:
        drawn = shown[row["policy"], row["criterion"], row["samples"]]
        for name in ("proxy", "gold", "policy_tokens", "sequential_steps"):
            assert drawn[name] == pytest.approx(row[name], rel=1e-4)
