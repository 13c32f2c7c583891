"""Reward ensembles: aggregates, scales, disagreement, costs, and every place that takes a reward."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.config.files import TrainingConfig
from iama.config.schema import load_config, validate
from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError, RewardError
from iama.models.flops import forward_flops, size_of
from iama.prompts.data import load_prompts
from iama.rewards.ensemble import aggregate, described, disagreement, member_name
from iama.rewards.load import check_reward, load_reward
from inference.evaluation.from_pools import config_from_pools
from inference.pools.file import read_pool
from inference.pools.score import score_pool
from inference.samplers.sea import Sea, SeaSettings
from inference.samplers.serve import serve

TEXTS = ["bake red bread", "no thanks", "mix flour then water then flour please", "be careful"]
HOWS = ("mean", "median", "min", "mean_minus_std")
FUNCTIONS = """
def texts(completions):
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]

def brief(prompts, completions, **columns):
    return [-float(len(t)) for t in texts(completions)]

def picky(prompts, completions, **columns):
    return [None if "bread" in t else 1.0 for t in texts(completions)]
"""

scores_MR = arrays(
    np.float64,
    st.tuples(st.integers(2, 6), st.integers(1, 5)),
    elements=st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)),
)


@pytest.fixture
def prompts(tiny):
    return [row["prompt"] for row in load_prompts(tiny.prompts)]


@pytest.fixture
def raw(tiny):
    """An ensemble of two classifiers with scales of their own."""
    return {
        "ensemble": {
            "members": [
                {"model": str(tiny.reward), "scale": {"mean": 0.5, "std": 2.0}},
                {"model": str(tiny.other_reward), "scale": {"mean": -1.0, "std": 0.25}},
            ],
            "aggregate": "min",
        }
    }


def members_MR(raw, prompts, texts=TEXTS):
    """Scores of each member on the common scale, by itself."""
    specs = [RewardSpec(**member) for member in raw["ensemble"]["members"]]
    return np.asarray([load_reward(f"m{i}", spec).score(prompts, texts, {})[0] for i, spec in enumerate(specs)])


# Aggregates. --------------------------------------------------------------------------------------------


@given(scores_MR, st.sampled_from(HOWS), st.floats(0, 3))
def test_aggregates_equal_numpys_column_by_column(scores, how, coefficient):
    found = aggregate(scores, how, coefficient)
    spread = disagreement(scores)
    for r in range(scores.shape[1]):
        column = scores[:, r]
        if np.isnan(column).any():
            assert math.isnan(found[r])
            assert math.isnan(spread[r])
            continue
        expected = {"mean": np.mean, "median": np.median, "min": np.min}.get(how)
        value = column.mean() - coefficient * column.std() if expected is None else expected(column)
        assert found[r] == pytest.approx(value, abs=1e-9)
        assert spread[r] == pytest.approx(column.std(), abs=1e-9)


@given(arrays(np.float64, st.integers(1, 5), elements=st.floats(-1e3, 1e3)), st.integers(2, 5))
def test_members_that_agree_change_nothing(scores, num_members):
    same = np.tile(scores, (num_members, 1))
    assert (disagreement(same) == 0).all()
    for how in HOWS:
        np.testing.assert_allclose(aggregate(same, how, 2.0), scores, rtol=1e-12)


@given(scores_MR)
def test_caution_lowers_the_score(scores):
    """min <= median, and mean - c std falls with c from the mean."""
    known = scores[:, ~np.isnan(scores).any(axis=0)]
    assert (aggregate(known, "min") <= aggregate(known, "median") + 1e-9).all()
    by_coefficient = [aggregate(known, "mean_minus_std", c) for c in (0.0, 0.5, 2.0)]
    np.testing.assert_allclose(by_coefficient[0], aggregate(known, "mean"), atol=1e-9)
    assert (np.diff(by_coefficient, axis=0) <= 1e-9).all()


# As a reward. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_scores_are_the_members_on_their_scales(raw, prompts, how):
    raw["ensemble"]["aggregate"] = how
    raw["scale"] = {"mean": 0.25, "std": 4.0}
    reward = load_reward("helpful", RewardSpec(**raw))
    scores, _ = reward.score(prompts, TEXTS, {})
    members = members_MR(raw, prompts)
    assert scores == pytest.approx((aggregate(members, how) - 0.25) / 4.0, abs=1e-5)
    assert reward.disagreement(prompts, TEXTS, {}) == pytest.approx(members.std(axis=0), abs=1e-5)
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert reward(prompts=prompts, completions=completions, topic=["x"] * 4, trainer_state=object()) == scores
    assert (reward.__name__, reward.classifier, reward.num_calls, len(reward.classifiers)) == ("helpful", None, 2, 2)


def test_costs_of_all_members_add_up(raw, prompts):
    reward = load_reward("helpful", RewardSpec(**raw))
    _, cost = reward.score(prompts, TEXTS, {})
    lone = [load_reward("m", RewardSpec(**member)) for member in raw["ensemble"]["members"]]
    costs = [member.score(prompts, TEXTS, {})[1] for member in lone]
    assert cost.reward_tokens == sum(own.reward_tokens for own in costs) > 0
    assert cost.flops == sum(own.flops for own in costs) > 0
    assert cost.flops == sum(
        forward_flops(size_of(c.model), 0, len(row)) for c in reward.classifiers for row in c.render(prompts, TEXTS)
    )
    assert (cost.reward_calls, cost.sequential_steps) == (8, 1)


def test_disagreement_is_remembered_and_else_read_again(raw, prompts, monkeypatch):
    reward = load_reward("helpful", RewardSpec(**raw))
    reward.score(prompts, TEXTS, {"topic": list("abcd")})
    calls = []
    score = type(reward.scorer).score
    monkeypatch.setattr(type(reward.scorer), "score", lambda self, *args: calls.append(1) or score(self, *args))
    monkeypatch.setattr("iama.rewards.ensemble.NUM_KEPT", 2)
    first = reward.disagreement(prompts, TEXTS, {"topic": list("abcd")})
    assert not calls
    assert reward.disagreement(prompts[:1], TEXTS[:1], {"topic": ["z"]})[0] == pytest.approx(first[0])
    assert len(calls) == 1  # another column may be another score
    assert reward.disagreement(prompts, TEXTS, {"topic": list("abcd")}) == pytest.approx(first)
    assert len(calls) == 2  # the oldest were forgotten
    with pytest.raises(RewardError, match="'m' is no ensemble"):
        load_reward("m", RewardSpec(**raw["ensemble"]["members"][0])).disagreement(prompts, TEXTS, {})


def test_a_missing_score_of_a_member_is_one_of_the_ensemble(tmp_path, raw, prompts):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    raw["ensemble"]["members"].append({"function": f"{tmp_path}/f.py:picky", "scale": {"mean": 0, "std": 1}})
    spec = RewardSpec(**raw)
    scores, _ = load_reward("r", spec, missing_ok=True).score(prompts, TEXTS, {})
    assert [math.isnan(score) for score in scores] == [True, False, False, False]
    with pytest.raises(RewardError, match=r"reward 'r.members.2' returned nan .* 'bake red bread'"):
        load_reward("r", spec).score(prompts, TEXTS, {})


# What is refused. ---------------------------------------------------------------------------------------


def test_a_member_without_a_scale_is_one_line_that_names_the_command(raw, prompts):
    del raw["ensemble"]["members"][1]["scale"]
    for use in (lambda spec: load_reward("helpful", spec), lambda spec: check_reward("helpful", spec, prompts[0])):
        with pytest.raises(RewardError, match=r"reward 'helpful': member 1 .*other_reward.*`iama standardise") as error:
            use(RewardSpec(**raw))
        assert "\n" not in str(error.value)
    raw["ensemble"]["same_scale"] = True
    members = members_MR(raw, prompts)
    assert load_reward("helpful", RewardSpec(**raw)).score(prompts, TEXTS, {})[0] == pytest.approx(
        members.min(axis=0), abs=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": {"members": [{"model": "a"}]}}, "at least 2 members, got 1"),
        (
            {"ensemble": {"members": [{"model": "a"}, {"ensemble": {"members": [{"model": "b"}, {"model": "c"}]}}]}},
            "members.1: the source ensemble is none for a member; list its members here",
        ),
        ({"ensemble": {"members": [{"column": "a"}, {"model": "b"}]}}, "members.0: the source column is none"),
        ({"ensemble": {"members": [{"model": "a"}] * 2, "coefficient": 1.0}}, "belongs to aggregate: mean_minus_std"),
        ({"ensemble": {"members": [{"model": "a"}] * 2, "aggregate": "max"}}, "ensemble.aggregate"),
        (
            {"ensemble": {"members": [{"model": "a"}, {"modle": "b"}]}},
            "'ensemble.members.1.modle'; did you mean",
        ),
        ({"ensemble": {"members": [{"model": "a"}] * 2}, "sign": -1}, "`sign` belongs to the members"),
        ({"ensemble": {"members": [{"model": "a"}] * 2}, "dtype": "bfloat16"}, "`dtype` belongs to the members"),
        ({"ensemble": {"members": [{"model": "a"}] * 2}, "model": "c"}, "give exactly one of"),
    ],
)
def test_specifications_that_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        validate(changes, RewardSpec, "reward.yaml")
    assert "\n" not in str(error.value)


def test_a_specification_is_hashable_survives_json_and_is_placed_with_its_members(raw):
    spec = RewardSpec(**raw)
    assert hash(spec) == hash(RewardSpec.model_validate_json(spec.model_dump_json()))
    assert spec == RewardSpec.model_validate_json(spec.model_dump_json())
    placed = spec.placed(device="cpu", dtype="bfloat16")
    assert [(part.device, part.dtype) for part in placed.parts] == [("cpu", "bfloat16")] * 2
    assert placed == RewardSpec.model_validate_json(placed.model_dump_json())
    assert [part.model for part in spec.parts] == [member["model"] for member in raw["ensemble"]["members"]]


# Where rewards go. --------------------------------------------------------------------------------------


@pytest.fixture
def policy(tiny):
    from iama.config.specs import PolicySpec
    from inference.engine.policy import load_policy

    return load_policy("base", PolicySpec(path=str(tiny.policy)))


def test_best_of_n_keeps_what_the_ensemble_likes_and_counts_all_members(policy, raw, prompts):
    reward = load_reward("helpful", RewardSpec(**raw))
    (completion,) = serve(policy, reward, "bon(4)", Sampling(max_new_tokens=5)).sample(prompts[:1], seed=0)
    texts = [candidate.text for candidate in completion.candidates]
    expected = members_MR(raw, prompts[:1] * 4, texts).min(axis=0)
    assert completion.reward == pytest.approx(expected.max(), abs=1e-5)
    assert completion.cost.reward_calls == 8


def test_a_prompt_that_a_member_cannot_read_is_refused_before_anything_is_drawn(policy, raw, prompts, monkeypatch):
    reward = load_reward("helpful", RewardSpec(**raw))
    sampler = serve(policy, reward, "bon(4)", Sampling(max_new_tokens=5))
    first, second = reward.classifiers
    object.__setattr__(second, "context_length", 4)
    monkeypatch.setattr("inference.samplers.best_of.draw", None)
    with pytest.raises(RewardError, match=r"reward 'helpful.members.1': .* reads at most 4"):
        sampler.sample(prompts[:1], seed=0)
    assert first.context_length == 128


def test_cards_reads_an_ensemble_whole(policy, raw, prompts):
    reward = load_reward("helpful", RewardSpec(**raw))
    method = "cards(target=-100, max_segment=4)"
    (completion,) = serve(policy, reward, method, Sampling(max_new_tokens=6)).sample(prompts[:1], seed=0)
    assert completion.reward == pytest.approx(members_MR(raw, prompts[:1], [completion.text]).min(), abs=1e-5)
    assert completion.cost.reward_calls % 2 == 0
    assert completion.cost.flops > 0


def test_what_needs_one_classifiers_gradient_refuses_an_ensemble(policy, raw):
    reward = load_reward("helpful", RewardSpec(**raw))
    with pytest.raises(ConfigError, match="sea needs the gradient of a reward, and 'helpful' is an ensemble"):
        Sea(policy, reward, SeaSettings(), Sampling())


# A random tiny policy rarely ends its answers.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")
def test_training_takes_an_ensemble_as_proxy(tiny, raw, tmp_path):
    from rich.console import Console

    from trainers.run.build import build_trainer, save_final
    from trainers.run.plan import make_plan
    from trainers.run.train import manifest

    config = validate(
        {
            "name": "tiny",
            "output_dir": str(tmp_path / "run"),
            "policy": {"path": str(tiny.policy)},
            "prompts": str(tiny.prompts),
            "objective": {"criteria": [{"name": "helpful", "proxy": raw, "operator": "bon(2)"}]},
            "sampling": {"max_new_tokens": 6},
            "trainer": {
                "max_steps": 2,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "beta": 0.1,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "save_strategy": "no",
            },
            "lora": {"r": 4},
        },
        TrainingConfig,
        "test.yaml",
    )
    plan = make_plan(config, "test.yaml")
    trainer = build_trainer(plan, Console(quiet=True))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if n in before)
    save_final(trainer, tmp_path / "run" / "adapter", manifest(plan))
    stored = json.loads((tmp_path / "run" / "adapter" / "iama.json").read_text())
    assert RewardSpec(**stored["criteria"][0]["reward"]) == RewardSpec(**raw)


# On the command line. -----------------------------------------------------------------------------------


def test_generate_prints_the_disagreement_at_the_answer(run, tiny, raw, tmp_path, prompts):
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump(raw))
    asked = ["generate", "--policy", tiny.policy, "--prompt", "how to bake bread", "--spec", file]
    code, out, err = run(*asked, "--method", "bon", "--n", 4, "--max-new-tokens", 5)
    assert code == 0, err
    (told,) = [line for line in out.splitlines() if line.startswith("disagreement of the members at the answer: ")]
    spread = members_MR(raw, prompts[:1], [out.splitlines()[-1]]).std()
    assert float(told.split(": ")[1].split()[0]) == pytest.approx(spread, rel=1e-2)
    assert "8 reward calls" in out
    code, _, err = run(*asked, "--reward", tiny.reward, "--method", "bon", "--n", 4)
    assert (code, "both say which reward selects" in err) == (2, True)


def test_iama_json_with_a_function_in_an_ensemble_is_not_run_unasked(run, tiny, raw, tmp_path):
    folder = shutil.copytree(tiny.policy, tmp_path / "exported")
    raw["ensemble"]["members"].append({"function": "evil.py:f", "scale": {"mean": 0, "std": 1}})
    criterion = {"name": "c", "operator": "bon(3)", "weight": 1.0, "reward": raw}
    manifest = {"base_model": "b", "criteria": [criterion], "estimator": "loo", "seed": 0, "versions": {}}
    (folder / "iama.json").write_text(json.dumps(manifest | {"sampling": {"max_new_tokens": 4}}))
    code, _, err = run("generate", "--policy", folder, "--prompt", "fix a bike")
    assert code == 2
    assert "names the function 'evil.py:f'" in err
    assert "--spec FILE" in err


@pytest.fixture
def pool(tmp_path, prompts):
    """A pool of three prompts with four answers each."""
    path = tmp_path / "pool.jsonl"
    lines = [{"iama_pool": 1, "policy": {"name": "base"}}]
    lines += [{"prompt": p, "text": f"{text} {i}" if i else text} for i, p in enumerate(prompts[:3]) for text in TEXTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_score_writes_the_disagreement_beside_the_column(run, raw, tmp_path, pool, tiny):
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump(raw))
    code, _, err = run("score", pool, "--spec", file, "--column", "helpful")
    assert code == 0, err
    read = read_pool(pool)
    for prompt in read.prompts:
        members = members_MR(raw, [prompt.prompt] * 4, [sample.text for sample in prompt.samples])
        columns = {name: [sample.scores[name] for sample in prompt.samples] for name in prompt.samples[0].scores}
        assert columns["helpful"] == pytest.approx(members.min(axis=0), abs=1e-5)
        assert columns["helpful/disagreement"] == pytest.approx(members.std(axis=0), abs=1e-5)
    criteria = config_from_pools({"base": pool}, [], None, str(tmp_path / "out"))["criteria"]
    assert criteria == [{"name": "helpful", "proxy": {"column": "helpful"}}]
    assert run("score", pool, "--spec", file, "--column", "helpful")[0] == 2
    code, _, err = run("score", pool, "--reward", tiny.reward, "--column", "helpful", "--replace")
    assert code == 0, err
    assert set(read_pool(pool).prompts[0].samples[0].scores) == {"helpful"}  # nothing disagrees any more


def test_scores_of_a_pool_carry_operations_and_disagreement_through_the_journal(raw, tmp_path, pool):
    spec = RewardSpec(**raw)
    reward, read = load_reward("helpful", spec), read_pool(pool)
    first = score_pool(read, reward, spec, tmp_path / "journal.jsonl", None, lambda _: None)
    again = score_pool(read, reward, spec, tmp_path / "journal.jsonl", None, lambda _: None)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3
    for name in ("values_PS", "tokens_PS", "flops_PS", "disagreement_PS"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    texts = [sample.text for sample in read.prompts[0].samples]
    _, cost = reward.score([read.prompts[0].prompt] * 4, texts, {})
    assert first.flops_PS[0].sum() == pytest.approx(cost.flops)
    assert first.tokens_PS[0].sum() == cost.reward_tokens
    assert first.calls_per_text == 2


def test_standardise_measures_the_members_on_the_same_samples(run, raw, tmp_path, pool):
    for member in raw["ensemble"]["members"]:
        del member["scale"]
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump(raw))
    code, out, err = run("standardise", "--pool", pool, "--spec", file)
    assert code == 0, err
    spec = RewardSpec(**yaml.safe_load(out))
    read = read_pool(pool)
    prompts = [prompt.prompt for prompt in read.prompts for _ in prompt.samples]
    texts = [text for row in read.texts for text in row]
    scaled = np.asarray([load_reward("m", part).score(prompts, texts, {})[0] for part in spec.parts])
    np.testing.assert_allclose(scaled.mean(axis=1), 0, atol=1e-4)
    within_MP = scaled.reshape(len(spec.parts), len(read.prompts), -1).var(axis=2)
    np.testing.assert_allclose(within_MP.mean(axis=1), 1, atol=1e-4)
    whole = load_reward("r", spec).score(prompts, texts, {})[0]
    assert np.mean(whole) == pytest.approx(0, abs=1e-4)
    assert np.mean(np.var(np.reshape(whole, (len(read.prompts), -1)), axis=1)) == pytest.approx(1, abs=1e-4)
    assert [code for code, _, _ in (run("standardise", "--pool", pool), run("standardise"))] == [2, 2]


def test_standardise_refuses_a_member_that_tells_no_answers_apart(run, raw, tmp_path, pool):
    """It differs between prompts only, which would give it a scale and no say."""
    (tmp_path / "f.py").write_text(
        "def asked(prompts, completions, **columns):\n    return [sum(map(ord, str(p))) / 1e3 for p in prompts]\n"
    )
    raw["ensemble"]["members"][1] = {"function": f"{tmp_path}/f.py:asked"}
    (tmp_path / "ensemble.yaml").write_text(yaml.safe_dump(raw))
    code, _, err = run("standardise", "--pool", pool, "--spec", tmp_path / "ensemble.yaml")
    assert code == 2
    assert "reward '--spec.members.1' scores no two samples of a prompt differently" in err
    assert "Traceback" not in err


def test_standardise_prints_overrides_for_every_member(run, raw, tiny, tmp_path):
    for member in raw["ensemble"]["members"]:
        del member["scale"]
    config = {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "policy": {"path": str(tiny.policy)},
        "prompts": str(tiny.prompts),
        "objective": {"criteria": [{"name": "c", "proxy": raw}]},
        "sampling": {"max_new_tokens": 6},
    }
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(config))
    code, out, err = run("standardise", "--config", file, "--num-prompts", 4, "--num-samples", 4)
    assert code == 0, err
    overrides = [shlex.split(line)[1] for line in out.splitlines() if line.startswith("--set")]
    proxy = load_config(file, TrainingConfig, overrides).objective.criteria[0].proxy
    assert len(overrides) == 3
    assert proxy.scale is not None
    assert all(part.scale is not None for part in proxy.parts)
    assert proxy.parts[0].scale != proxy.parts[1].scale
    load_reward("c", proxy)


def test_an_evaluation_takes_an_ensemble_and_tells_its_disagreement(raw, tmp_path, pool):
    from iama.config.files import EvaluationConfig
    from tests.inference.evaluation.running import evaluate

    (tmp_path / "f.py").write_text(FUNCTIONS)
    config = validate(
        {
            "name": "e",
            "output_dir": str(tmp_path / "out"),
            "policies": {"base": {"pool": str(pool)}},
            "trained": "base",
            "references": [],
            "criteria": [{"name": "helpful", "proxy": raw, "gold": {"function": f"{tmp_path}/f.py:brief"}}],
            "methods": ["bon"],
            "budgets": [1],
            "num_samples": 4,
            "trained_budget": 1,
            "log_probabilities": False,
        },
        EvaluationConfig,
        "test.yaml",
    )
    summary = evaluate(config)
    (row,) = summary["curves"]
    read = read_pool(pool)
    spreads = [
        members_MR(raw, [prompt.prompt] * 4, [sample.text for sample in prompt.samples]).std(axis=0).mean()
        for prompt in read.prompts
    ]
    assert row["disagreement"] == pytest.approx(np.mean(spreads), abs=1e-5)
    assert row["reward_calls"] == 2
    (cost,) = [row for row in summary["costs"] if row["reward"] == "helpful (proxy)"]
    assert cost["reward_calls"] == 2 * 12
    assert (tmp_path / "out" / "summary.json").is_file()


def test_names_of_members_and_of_ensembles():
    assert member_name("helpful", 1) == "helpful.members.1"
    spec = RewardSpec(ensemble={"members": [{"model": "a/b"}, {"verifier": "math"}], "aggregate": "median"})
    assert described(spec) == "median of a/b, math"
    assert [described(part) for part in spec.parts] == ["a/b", "math"]
