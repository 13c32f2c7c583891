"""A value head in the demo world: one tilted sample beside Best-of-n, on prompts of validation.

    python -m scripts.experiments.value_head [--lam 1 2 4] [--min-p 0.1] [--criterion helpful] [--seed 0]

It draws 8 samples of each of 240 prompts of training, scores them, fits a head and samples with it. It prints gold, the
share of ungrammatical answers and FLOPs a prompt, and gold of Best-of-n at as many FLOPs; what it draws is kept in
`runs/value_head`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iama.config.specs import PolicySpec, PromptsSpec, RewardSpec, Sampling
from iama.cost import Cost
from iama.models.value_head import HeadPolicy, HeadRecord
from iama.objective.operators import bon
from iama.prompts.conversations import render_prompts
from iama.prompts.data import read_prompts
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.policy import Policy, load_policy, policy_fingerprint
from inference.samplers.best_of import draw, score
from inference.samplers.serve import serve
from inference.selection.curves import curves
from scripts.demo_world import parse_answer
from trainers.value_head import HeadSettings, ScoredSamples, fit_value_head

WORLD = Path("runs/demo/world")
FOLDER = Path("runs/value_head")
SAMPLING = Sampling(max_new_tokens=48)
BATCH_SIZE = 256
NUM_PROMPTS, NUM_SAMPLES = 240, 8
"""Of training, and samples of each."""
NUM_DRAWS = 32
"""Samples a prompt behind the curve of Best-of-n."""
NUM_ANSWERS = 4
"""Tilted samples a prompt."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, sample, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lam", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--min-p", type=float, nargs="+", default=[0.1])
    parser.add_argument("--criterion", default="helpful", choices=["helpful", "harmless"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    spec = PolicySpec(path=str(WORLD / "policy"))
    policy = load_policy("base", spec, SAMPLING)
    reward = load_reward(given.criterion, RewardSpec(model=str(WORLD / f"rm-{given.criterion}")))
    gold = load_reward("gold", RewardSpec(function=f"scripts/demo_world.py:{given.criterion}"))
    head = FOLDER / f"{given.criterion}-{given.seed}"
    if not head.exists():
        record = fit(policy, spec, reward, head, given.seed)
        print(f"fit: {record.cost.seconds:.1f} s, {record.cost.flops / 1e9:.3g} GFLOPs, {record.held_out}")
    prompts = prompts_of("validation")
    seed = given.seed + 1000  # no samples of the fit
    pool = score(draw(policy, prompts, NUM_DRAWS, SAMPLING, seed=seed, batch_size=BATCH_SIZE), reward)
    proxy_PS = np.asarray([[sample.reward for sample in row] for row in pool.samples], dtype=np.float64)
    gold_PS = np.asarray([gold.score([p] * NUM_DRAWS, row, {})[0] for p, row in zip(prompts, pool.texts, strict=True)])
    budgets = list(range(1, NUM_DRAWS + 1))
    curve_N = curves(proxy_PS, gold_PS, [bon(n) for n in budgets]).mean(axis=0)
    flops_N = np.interp(budgets, (1, NUM_DRAWS), (single_flops(policy, reward, prompts), mean_flops(pool.costs)))
    for n in (1, 2, 4, 8, 16, NUM_DRAWS):
        print(f"bon({n}): gold {curve_N[n - 1]:.3f}, {flops_N[n - 1] / 1e6:.1f} MFLOPs a prompt")
    print(f"ungrammatical samples: {np.mean([wrong(row) for row in pool.texts]):.3f}")
    for min_p in given.min_p:
        for lam in given.lam:
            method = f"tilted_tokens({lam:g}, head={head}, min_p={min_p:g})"
            sampler = serve(policy, reward, method, SAMPLING)
            every = [completion for i in range(NUM_ANSWERS) for completion in sampler.sample(prompts, seed=seed + i)]
            golds = gold.score(prompts * NUM_ANSWERS, [completion.text for completion in every], {})[0]
            flops = mean_flops([completion.cost for completion in every])
            at_equal = float(np.interp(flops, flops_N, curve_N))
            print(
                f"{method}: gold {np.mean(golds):.3f} (Best-of-n at as many FLOPs {at_equal:.3f}), ungrammatical "
                f"{wrong([completion.text for completion in every]):.3f}, proxy "
                f"{np.mean([completion.reward for completion in every]):.3f}, {flops / 1e6:.1f} MFLOPs a prompt"
            )


def fit(policy: Policy, spec: PolicySpec, reward: Reward, out: Path, seed: int) -> HeadRecord:
    """A head from samples of prompts of training."""
    prompts = prompts_of("train")[:NUM_PROMPTS]
    pool = score(draw(policy, prompts, NUM_SAMPLES, SAMPLING, seed=seed, batch_size=BATCH_SIZE), reward)
    samples = ScoredSamples(
        prompts,
        render_prompts(policy.tokenizer, prompts, policy.eos_token_ids, "policy"),
        [[sample.token_ids for sample in row] for row in pool.samples],
        [[float(sample.reward or 0.0) for sample in row] for row in pool.samples],
        sum(cost.flops for cost in pool.costs),
    )
    whose = HeadPolicy(name=policy.name, path=spec.path, fingerprint=policy_fingerprint(policy.name, spec))
    drawn = {"file": "(drawn here)", "sampling": SAMPLING}
    out.parent.mkdir(parents=True, exist_ok=True)
    return fit_value_head(policy.model, samples, whose, drawn, HeadSettings(reward.name, seed=seed), out)


def prompts_of(split: str) -> list[Any]:
    """Prompts of a split of the demo world."""
    return [row["prompt"] for row in read_prompts(PromptsSpec(path=str(WORLD / f"prompts-{split}.jsonl")))]


def single_flops(policy: Policy, reward: Reward, prompts: Sequence[Any]) -> float:
    """FLOPs a prompt of one scored sample; further ones of Best-of-n all add the same, which is less by the prompt."""
    return mean_flops([c.cost for c in serve(policy, reward, "bon(1)", SAMPLING).sample(prompts, seed=0)])


def mean_flops(costs: Sequence[Cost]) -> float:
    """FLOPs a prompt."""
    return float(np.mean([cost.flops for cost in costs]))


def wrong(texts: Sequence[str]) -> float:
    """Share of answers that the grammar does not hold."""
    return float(np.mean([parse_answer(text) is None for text in texts]))


if __name__ == "__main__":
    main(sys.argv[1:])
