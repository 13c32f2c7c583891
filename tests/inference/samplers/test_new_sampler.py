"""What somebody adds is one file, or one entry: a sampler, a rule of selection, an operator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import Field

from iama.config.schema import Strict
from iama.config.specs import Sampling
from iama.objective.operators import OPERATORS, RankOperator, bon, parse_operator, series
from iama.rewards.load import load_reward
from inference import serve
from inference.evaluation.summary import load_summary
from inference.samplers.serve import RULES, SAMPLERS, GuidedEntry, RuleEntry
from inference.selection.rules import Rule
from tests.inference.samplers.drafts import Drafts, DraftsSettings

FILE = Path(__file__).with_name("drafts.py")
PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water")]
SAMPLING = Sampling(max_new_tokens=8)


class WorstSettings(Strict):
    n: int = Field(ge=1)


def worst_rule(settings: WorstSettings) -> Rule:
    """The worst of n, as a control would have it."""

    def weigh(rewards_RS, _utility):
        return (rewards_RS == rewards_RS.min(axis=1, keepdims=True)).astype(float)

    return Rule(name=f"worst({settings.n})", budget=float(settings.n), weigh=weigh)


def half(n: int) -> RankOperator:
    """One sample, or with the same probability the best of n."""
    return replace(series(0.5, *[0.0] * (n - 2), 0.5), name=f"half({n})", method="half")


@pytest.fixture
def additions(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "drafts", GuidedEntry(DraftsSettings, Drafts, "num_drafts=4"))
    monkeypatch.setitem(RULES, "worst", RuleEntry(WorstSettings, worst_rule, "4"))
    monkeypatch.setitem(OPERATORS, "half", half)


@pytest.fixture
def reward(reward_spec):
    return load_reward("proxy", reward_spec)


@pytest.fixture
def generate(run, tiny):
    where = ("--policy", tiny.policy, "--reward", tiny.reward, "--max-new-tokens", 8, "--prompt", "fix a bike")

    def call(method: str) -> tuple[int, str, str]:
        return run("generate", *where, "--method", method)

    return call


def answer_of(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out.partition("\ncost: ")[2].partition("\n")[2]


def test_the_file_is_short():
    assert len(FILE.read_text().splitlines()) < 60


def test_a_batch_with_its_ledger(additions, policy64, reward):
    sampler = serve(policy64, reward, "drafts(num_drafts=3)", SAMPLING)
    assert isinstance(sampler, Drafts)
    assert sampler.settings == DraftsSettings(num_drafts=3)
    completions = sampler.sample(PROMPTS, seed=1)
    pools = serve(policy64, reward, "bon(3)", SAMPLING).sample(PROMPTS, seed=1)
    for completion, pool, prompt in zip(completions, pools, PROMPTS, strict=True):
        assert completion.cost.reward_calls == 3
        assert completion.cost.policy_decode_tokens == pool.cost.policy_decode_tokens > 0
        assert completion.cost.flops == pool.cost.flops > 0
        good = [c for c in pool.candidates if c.reward >= 0]
        assert completion.text == (min(good, key=lambda c: len(c.token_ids)).text if good else pool.text)
        (alone,) = sampler.sample([prompt], seed=1)
        assert alone.text == completion.text


def test_by_name_and_by_file(additions, generate):
    by_name, by_file = generate("drafts(num_drafts=3)"), generate(f"{FILE}:Drafts(num_drafts=3)")
    assert answer_of(by_name) == answer_of(by_file)
    assert "drafts(num_drafts=3): 3 candidates" in by_name[1]
    assert "3 reward calls" in by_file[1]


@pytest.fixture
def evaluated(run, tiny, raw_config, tmp_path):
    """An evaluation of the base by these methods, from the command line."""

    def call(*methods: str) -> dict[str, dict]:
        base = {"policies": {"base": raw_config["policies"]["base"]}, "trained": "base", "references": ["base"]}
        raw = raw_config | base | {"methods": ["bon", *methods], "criteria": raw_config["criteria"][:1]}
        (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(raw))
        code, _, err = run("evaluate", "--config", tmp_path / "evaluate.yaml")
        assert code == 0, err
        summary = load_summary(Path(raw["output_dir"]))
        return {row["method"]: row for row in summary["curves"] if row["method"] != "bon"}

    return call


def test_an_evaluation(additions, evaluated, raw_config, policy, reward):
    named, filed = "drafts(num_drafts=3)", f"{FILE}:Drafts(num_drafts=3)"
    rows = evaluated(named, filed, "worst(2)", "half(3)")
    prompts = [json.loads(line)["prompt"] for line in Path(raw_config["prompts"]).read_text().splitlines()]
    sampling = Sampling(**raw_config["sampling"])
    completions = serve(policy, reward, named, sampling).sample(prompts, seed=1)
    assert rows[named]["proxy"] == pytest.approx(np.mean([c.reward for c in completions]), abs=1e-5)
    assert rows[named]["reward_calls"] == 3
    assert rows[named]["policy_decode_tokens"] == np.mean([c.cost.policy_decode_tokens for c in completions])
    for unit in ("proxy", "gold", "policy_decode_tokens", "reward_tokens"):
        assert rows[filed][unit] == pytest.approx(rows[named][unit], abs=1e-5), unit
    assert rows["worst(2)"]["proxy"] < rows["half(3)"]["proxy"]
    assert rows["worst(2)"]["reward_calls"] == rows["half(3)"]["reward_calls"] == 2


def test_answers_are_drawn_anew_when_the_file_changes(run, raw_config, tmp_path):
    """Its text is all that is known of a sampler's code."""
    file = tmp_path / "mine.py"
    file.write_text(FILE.read_text())
    raw = raw_config | {"methods": ["bon", f"{file}:Drafts"], "criteria": raw_config["criteria"][:1]}
    raw |= {"policies": {"base": raw_config["policies"]["base"]}, "trained": "base", "references": []}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(raw))
    names = []
    for comment in ("", "# changed\n"):
        file.write_text(FILE.read_text() + comment)
        (Path(raw["output_dir"]) / "summary.json").unlink(missing_ok=True)
        assert run("evaluate", "--config", tmp_path / "evaluate.yaml")[0] == 0
        names.append({path.name for path in (Path(raw["output_dir"]) / "answers").iterdir()})
    assert names[0] < names[1]


def test_a_rule(additions, policy64, reward, generate):
    (worst,) = serve(policy64, reward, "worst(4)", SAMPLING).sample(PROMPTS[:1], seed=2)
    assert worst.reward == min(c.reward for c in worst.candidates)
    assert "worst(4): 4 candidates" in generate("worst(4)")[1]
    assert "write at most 1 by place, then key=value, e.g. worst(n=4)" in generate("worst(4, 5)")[2]


def test_an_operator(additions, generate):
    operator = parse_operator("half(4)")
    assert operator.value(np.full(4, 0.25), np.arange(4.0)) == pytest.approx(
        0.5 * 1.5 + 0.5 * bon(4).value(np.full(4, 0.25), np.arange(4.0))
    )
    assert "half(4): " in generate("half(4)")[1]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gone.py:Drafts", "cannot import sampler 'gone.py:Drafts' (no such file: gone.py); write path/to/file.py:"),
        ("json:Gone(x=1)", "cannot import sampler 'json:Gone' (json has no attribute 'Gone')"),
        ("json:dumps", "'json:dumps' is no sampler; write a class with `Settings`, a model of its settings that"),
        ("{file}:DraftsSettings", "is no sampler; write a class with `Settings`"),
        ("{file}:Drafts(num_draft=3)", "unknown key 'num_draft'; did you mean 'num_drafts'?"),
        ("{file}:Drafts(num_drafts=0)", "num_drafts: Input should be greater than or equal to 1"),
        ("{file}:Drafts(3)", "'3' is no setting; write key=value"),
        ("Drafts(num_drafts=3)", "method 'Drafts(num_drafts=3)' is not known; write one of identity, bon(4)"),
    ],
)
def test_what_is_none_is_refused_in_one_line(generate, method, message):
    code, _, err = generate(method.format(file=FILE))
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
