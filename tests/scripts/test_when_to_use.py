"""When to use IAMA: crossovers by hand, the page's words, and every part of the measurement on tiny models."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from iama.models.flops import forward_flops, size_from_folder
from iama.objective.estimators import group_value
from iama.objective.operators import bon
from scripts.build_demo_models import Parameters
from scripts.demo_corpus import make_world, sample_pairs
from scripts.experiments import common, when_to_use_page, when_to_use_plot, when_to_use_values
from scripts.experiments import when_to_use as study
from scripts.experiments.common import CRITERIA
from scripts.experiments.pools import Scores

NUM_PROMPTS = 6
BASE_GOLD = 0.1 * np.log2(np.arange(1, study.MAX_BASE + 1))  # 0 with one sample, 0.6 with 64
IAMA, SECOND = "iama-w50", "specialist4-helpful"


def rows(curve_N):
    """The same curve for every prompt, `[P, N]`."""
    return np.tile(np.asarray(curve_N, dtype=float), (NUM_PROMPTS, 1))


def seed_of(iama=0.4, specialist1=0.4, specialist4_lift=0.1, per_sample=10.0):
    """A seed whose every figure is known: `per_sample` operations a sample, 1000 a training, 50 for reading a reward.

    IAMA's Best-of-4 gold is `iama`; N = 1 specialists have `specialist1` with any number of samples; N = 4 ones stand
    `specialist4_lift` above IAMA's curve.
    """
    n = np.arange(1, study.MAX_TRAINED + 1)
    shape = 0.1 * np.log2(n / 4)
    own = {IAMA: iama + shape, "grpo-w50": iama - 1 + shape}
    own |= {f"specialist1-{c}": np.full(len(n), specialist1) for c in CRITERIA}
    own |= {f"specialist4-{c}": iama + specialist4_lift + shape for c in CRITERIA}
    names = [*CRITERIA, *(c + study.REPLACED for c in CRITERIA), study.UNTRAINED]
    gold = {(policy, name): rows(found) for policy, found in own.items() for name in names}
    gold |= {("base", name): rows(BASE_GOLD) for name in names}
    flops = {policy: rows(per_sample * n) for policy in own}
    flops["base"] = rows(per_sample * np.arange(1, study.MAX_BASE + 1))
    costs = study.Costs(dict.fromkeys(own, 1000.0), dict.fromkeys(own, 20.0), 50.0, 5, 20)
    agreement = {c: {"proxies": 0.9, "first": 0.8, "second": 0.7} for c in CRITERIA}
    return study.Measured(gold, flops, costs, agreement)


def test_break_even_by_hand():
    """The base needs 16 samples for 0.4, IAMA 4: 120 operations a query pay 1000 back after 8.33 queries."""
    seeds = [seed_of(), seed_of()]
    found = when_to_use_values.pays_over_base(seeds, "iama", CRITERIA)
    assert (found.queries, *found.ci95, *found.seeds) == pytest.approx([1000 / 120] * 5)
    assert not found.bound
    two = when_to_use_values.pays_over_base(seeds, "specialists1", CRITERIA)  # 15 samples saved, two trainings
    assert two.queries == pytest.approx(2000 / 150)
    alone = when_to_use_values.pays_over_base(seeds, "specialists1", ["helpful"])
    assert alone.queries == pytest.approx(1000 / 150)


def test_a_base_that_never_gets_there_gives_an_upper_bound_and_is_counted_with_all_its_samples():
    found = when_to_use_values.pays_over_base([seed_of(iama=0.7, specialist1=0.7)], "iama", CRITERIA)
    assert found.queries == pytest.approx(1000 / (10 * (study.MAX_BASE - 4)))
    assert found.bound
    assert when_to_use_page.show(found).startswith("at most ")


@pytest.mark.parametrize(("num_criteria", "more"), [(2, 1000.0), (3, 2000.0 - 50), (10, 9000.0 - 8 * 50)])
def test_specialists_overtake_after_their_further_trainings_are_saved(num_criteria, more):
    """One sample instead of four saves 30 a query; with K criteria IAMA's training reads K - 2 further rewards."""
    found = when_to_use_values.overtakes_iama([seed_of()], "specialists1", num_criteria)
    assert found.queries == pytest.approx(more / 30)
    better = when_to_use_values.overtakes_iama([seed_of()], "specialists4", num_criteria)  # 0.1 above: half the samples
    assert better.queries == pytest.approx(more / 20)


def test_specialists_that_need_as_many_samples_never_overtake():
    seeds = [seed_of(specialist4_lift=0.0), seed_of(specialist4_lift=-0.1)]
    found = when_to_use_values.overtakes_iama(seeds, "specialists4", 2)
    assert (found.queries, *found.ci95, *found.seeds) == (math.inf,) * 5
    assert when_to_use_page.show(found) == "never (never to never)"


def test_seeds_are_averaged_by_what_a_query_pays_back_and_the_interval_spans_them():
    seeds = [seed_of(per_sample=10.0), seed_of(per_sample=30.0)]
    found = when_to_use_values.pays_over_base(seeds, "iama", CRITERIA)
    assert found.seeds == pytest.approx((1000 / 120, 1000 / 360))
    assert found.queries == pytest.approx(1000 / 240)
    assert found.ci95 == pytest.approx((1000 / 360, 1000 / 120))


def test_savings_and_gold_with_the_same_samples():
    seeds = [seed_of()]
    assert when_to_use_values.savings(seeds, IAMA, study.UNTRAINED).ratio == pytest.approx(4.0)
    below = when_to_use_values.savings(seeds, "grpo-w50", study.UNTRAINED)
    assert (below.ratio, below.floor) == (pytest.approx(0.25), True)
    assert (when_to_use_page.ratio(below), when_to_use_page.side(below)) == ("< 0.25", "needs more samples")
    gap = when_to_use_values.gold(seeds, "specialists4", CRITERIA, 4, minus="iama")
    assert (gap.mean, *gap.ci95) == pytest.approx([0.2] * 3)
    assert when_to_use_values.gold(seeds, "iama", CRITERIA, 1).mean == pytest.approx(0.4)
    own, lead = when_to_use_values.lead_over_base(seeds, SECOND, "helpful")
    assert (own.mean, lead.mean) == pytest.approx((0.5, 0.3))
    assert when_to_use_values.moved(seeds, IAMA, "helpful").mean == 0.0


def test_numbers_of_the_page():
    assert [when_to_use_page.number(q) for q in (8.333, 12345.6, 99.96, math.inf)] == ["8.33", "12,300", "100", "never"]
    assert when_to_use_page.label(IAMA) == "IAMA"
    assert when_to_use_page.label(SECOND) == "specialist of N = 4 for helpful"


def test_the_page_starts_with_decisions_that_have_their_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(when_to_use_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(when_to_use_plot, "PLOT", tmp_path / "plot.svg")
    monkeypatch.setattr(when_to_use_values, "NUM_BOOTSTRAP", 20)
    when_to_use_page.write({1: seed_of(), 2: seed_of()})
    text = (tmp_path / "page.md").read_text()
    first = text.index("**Use IAMA when**")
    assert first < text.index("**Keep K adapters when**") < text.index("**Do not train when**") < text.index("![")
    words = re.sub(r"\s+", " ", text)
    assert "8.33 queries or more will come" in words
    assert "up to 33.3 queries for K = 2 criteria (measured); up to 287 queries for K = 10 criteria (extrap" in words
    assert "specialists of N = 4 overtake IAMA after 50 (50 to 50)" in words
    assert "linear GRPO, one adapter < 0.25 (needs more samples)" in words
    assert "million-parameter models in a synthetic language" in text
    assert all(len(line) <= 120 or line.startswith(("|", "Summed")) for line in text.splitlines())
    assert (tmp_path / "plot.svg").stat().st_size > 1000


# On tiny models. ----------------------------------------------------------------------------------------


@pytest.fixture
def finished_run(tiny, tmp_path):
    """What a run's folder holds that its cost is read from: 2 steps of 4 roll-outs, 15 tokens each on average."""
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (run / "adapter" / name).write_bytes((tiny.policy / name).read_bytes())
    save_file({"a": np.zeros((3, 9), dtype=np.float32)}, run / "adapter" / "adapter_model.safetensors")
    trainer = {"per_device_train_batch_size": 4, "beta": 0.1, "gradient_checkpointing": False}
    config = {"policy": {"path": "x"}, "prompts": str(tiny.prompts), "world_size": 1, "trainer": trainer}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text('{"step": 1, "mean_length": 10}\n{"step": 2, "mean_length": 20}\n')
    return run


def test_a_run_costs_its_passes_and_the_rewards_that_it_reads(small_world, finished_run):
    policy = size_from_folder(str(small_world / "policy"), "test")
    reward = study.reward_size(common.criteria(3, gold=False)[0])
    costs = study.training_costs(small_world, dict.fromkeys(study.LANE_OF, finished_run), (policy, reward))
    assert costs.num_rollouts[IAMA] == 8
    prompt = study.mean_prompt_tokens(finished_run)
    tokens = round(prompt + 15)
    read = 8 * (prompt + 15) * forward_flops(reward, 0, tokens) / tokens
    assert costs.per_reward == pytest.approx(read)
    assert costs.training[IAMA] - costs.training["specialist1-helpful"] == pytest.approx(read)
    assert costs.adapter_bytes == (finished_run / "adapter" / "adapter_model.safetensors").stat().st_size


def test_a_query_costs_its_prompt_once_and_no_reward_for_a_single_sample(small_world, monkeypatch):
    monkeypatch.setattr(study, "BASE_SAMPLES", 4)
    monkeypatch.setattr(study, "MAX_BASE", 2)
    scores = common.pools(
        3, {"base": None}, num_samples=4, criteria=common.criteria(3, gold=False), max_prompts=2, gold=False
    )
    policy = size_from_folder(str(small_world / "policy"), "test")
    reward = study.reward_size(common.criteria(3, gold=False)[0])
    flops_PN = study.query_flops(3, "base", None, (policy, reward), 2)
    assert flops_PN.shape == (2, 2)
    from scripts.experiments import pools

    files = list((common.FOLDER / "pools").rglob("base-*.jsonl"))
    assert len(files) == 1, "the pool is the one that was scored"
    prompt = pools.load_prompts(small_world / "prompts-test.jsonl", 2)[0]["prompt"]
    from iama.prompts.render import render_prompt
    from inference.engine.policy import load_policy

    num_prompt = len(render_prompt(load_policy("base", pools.policy_spec(3, None)).tokenizer, prompt))
    block = [json.loads(line) for line in files[0].read_text().splitlines()]
    answers = [row["num_tokens"] for row in block if row.get("sample") is not None][:4]
    decode = np.mean([forward_flops(policy, num_prompt, n - 1) for n in answers])
    read = np.mean([forward_flops(reward, num_prompt, n) for n in answers])
    assert flops_PN[0, 0] == pytest.approx(forward_flops(policy, 0, num_prompt) + decode)
    both = forward_flops(policy, 0, num_prompt) + forward_flops(reward, 0, num_prompt) + 2 * (decode + read)
    assert flops_PN[0, 1] == pytest.approx(both)
    assert scores["base", "helpful"].proxy_PS.shape == (2, 4)


def test_a_curve_is_unbiased_best_of_n_selected_by_proxy():
    rng = np.random.default_rng(0)
    scores = Scores(rng.normal(size=(3, 32)), rng.normal(size=(3, 32)), [])
    found_PN = study.curve(IAMA, scores)
    assert found_PN.shape == (3, study.MAX_TRAINED)
    assert found_PN[:, 3] == pytest.approx(group_value(bon(4), scores.proxy_PS, scores.gold))
    told = study.agreement(scores, Scores(2 * scores.proxy_PS + 1, scores.gold, []))
    assert told["proxies"] == pytest.approx(1.0)
    assert told["first"] == pytest.approx(told["second"])


def test_the_reward_that_replaces_learns_from_other_pairs_on_the_same_prompts(small_world, tmp_path):
    world = make_world(3)
    folder = tmp_path / "replaced" / "rm-helpful-3"
    study.fit_one(small_world, Parameters(seed=3, num_pairs=16), "helpful", folder)
    criterion = study.criteria(3, {"helpful": folder, "harmless": small_world / "rm-harmless"})[2]
    assert criterion.name == "helpful-replaced"
    assert criterion.gold == common.criteria(3, gold=True)[0].gold
    reward = study.load_reward(criterion.name, criterion.proxy)
    assert np.isfinite(reward(["bake bread"], ["mix flour."])).all()
    assert study._is_current(folder, small_world)
    (small_world / "stamp.json").write_text("{}")
    assert not study._is_current(folder, small_world)
    first, second = (sample_pairs(study.replace(world, seed=s), "helpful", 50, 0.1, 0.04) for s in (3, 3 + study.OTHER))
    assert not set(first) & set(second)
    prompts = {prompt for _, prompt in world.splits["train"]}
    assert {pair[0] for pair in second} <= prompts
