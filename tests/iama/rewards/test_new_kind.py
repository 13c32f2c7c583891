"""A new kind of reward is a scorer and an entry of `KINDS`; it works wherever a reward does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from iama.config.schema import validate
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.cost import Cost
from iama.errors import ConfigError, RewardError
from iama.prompts.render import Prompt, completion_text
from iama.rewards.load import KINDS, Kind, check_reward, load_reward
from iama.rewards.reward import Columns, Scorer, TrlCompletion
from inference import load_policy, serve
from inference.pools.file import read_pool


@dataclass
class Brevity(Scorer):
    """Minus the distance of a text's length from `target` characters."""

    target: int

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        lengths = [len(completion_text(completion)) for completion in completions]
        return [-float(abs(length - self.target)) for length in lengths], Cost()


BREVITY = Kind(lambda spec, source: Brevity(**spec.kind_settings))
PROMPT = [{"role": "user", "content": "bake bread"}]


@pytest.fixture(autouse=True)
def _brevity(monkeypatch):
    monkeypatch.setitem(KINDS, "brevity", BREVITY)


def test_a_sampler_keeps_what_it_prefers(tiny):
    policy = load_policy("base", PolicySpec(path=str(tiny.policy)))
    reward = load_reward("brief", RewardSpec(kind="brevity(target=10)"))
    (answer,) = serve(policy, reward, "bon(4)", Sampling(max_new_tokens=8)).sample([PROMPT], seed=0)
    best = min(answer.candidates, key=lambda candidate: abs(len(candidate.text) - 10))
    assert answer.text == best.text
    assert answer.cost.reward_calls == 4


def test_score_writes_it_into_a_pool(tiny, tmp_path, run):
    pool, spec = tmp_path / "pool.jsonl", tmp_path / "reward.yaml"
    spec.write_text("kind: brevity(target=10)\n")
    flags = ("--prompts", str(tiny.prompts), "--policy", str(tiny.policy), "--n", "2", "--max-new-tokens", "4")
    assert run("pool", str(pool), *flags, "--max-prompts", "2")[0] == 0
    code, out, err = run("score", str(pool), "--spec", str(spec), "--column", "brief")
    assert code == 0, out + err
    samples = [sample for prompt in read_pool(pool).prompts for sample in prompt.samples]
    assert [sample.scores["brief"] for sample in samples] == [-abs(len(sample.text) - 10) for sample in samples]


def test_trl_trains_with_it(tiny, tmp_path):
    reward = load_reward("brief", RewardSpec(kind="brevity(target=10)", scale={"mean": -5.0, "std": 2.0}))
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, logging_steps=1,
        max_completion_length=4, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(tiny.policy), reward_funcs=[reward], args=args, train_dataset=Dataset.from_list([{"prompt": PROMPT}])
    )
    trainer.train()
    assert any("rewards/brief/mean" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("kind", ["brevity(10)", "brevity(target=)", "model", "two words"])
def test_what_is_no_kind_is_refused(kind):
    with pytest.raises(ConfigError, match="kind"):
        validate({"kind": kind}, RewardSpec, "here")


def test_a_kind_that_nobody_registered_is_named(monkeypatch):
    monkeypatch.delitem(KINDS, "brevity")
    with pytest.raises(
        RewardError, match=r"kind 'brevity\(target=1\)' is not known; write path/to/file.py:Class, or one of model"
    ):
        check_reward("r", RewardSpec(kind="brevity(target=1)"))


def test_a_kind_in_a_file_needs_no_entry(tmp_path):
    (tmp_path / "constant.py").write_text(
        "from iama.cost import Cost\n"
        "from iama.rewards.reward import Scorer\n\n\n"
        "class Constant(Scorer):\n"
        "    def __init__(self, value):\n        self.value = value\n\n"
        "    def score(self, prompts, completions, columns):\n"
        "        return [self.value] * len(prompts), Cost(reward_tokens=3)\n"
    )
    spec = RewardSpec(kind=f"{tmp_path}/constant.py:Constant(value=1.5)")
    scores, cost = load_reward("r", spec).score([PROMPT], ["a"], {})
    assert (scores, cost.reward_tokens, cost.reward_calls) == ([1.5], 3, 1)
    with pytest.raises(RewardError, match=r"kind .*Constant.*unexpected keyword"):
        check_reward("r", RewardSpec(kind=f"{tmp_path}/constant.py:Constant(other=1)"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Cold(value=-1)", r"kind '.*Cold\(value=-1\)': value -1 is below 0$"),
        (
            "Cold(value=1)",
            r"kind '.*Cold\(value=1\)' gives a Cold, which is no scorer; write a class that derives from",
        ),
        ("nothing", r"kind '.*nothing' gives a NoneType, which is no scorer"),
    ],
)
@pytest.mark.parametrize("load", [check_reward, load_reward])
def test_what_a_file_gives_that_is_no_scorer_is_one_line(tmp_path, load, kind, message):
    (tmp_path / "cold.py").write_text(
        "class Cold:\n"
        "    def __init__(self, value):\n"
        "        if value < 0:\n            raise ValueError(f'value {value} is below 0')\n\n\n"
        "def nothing():\n    return None\n"
    )
    with pytest.raises(RewardError, match=f"^reward 'r': {message}"):
        load("r", RewardSpec(kind=f"{tmp_path}/cold.py:{kind}"))


def test_configurations_without_it_are_written_as_before():
    assert "kind" not in json.loads(RewardSpec(model="rm").model_dump_json())
