"""Rows reach rewards in training as `iama score` reads them; rewards of several tasks train each its own prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from iama.config.files import TrainingConfig
from iama.errors import IamaWarning, RewardError
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon
from iama.prompts.data import load_prompts
from trainers.run.build import as_dataset, build_trainer, by_row, load_rewards
from trainers.run.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")

HARD = {
    "optional": [{"max_words": 5}, {"must_contain": "roof"}, {}, {"nested": [{"a": None}, 1]}],
    "mixed": [5, "1/2", 2.5, None],
    "huge": [100, 10**24, -(10**30), 0],
    "flags": [True, 1, False, 0],
    "lists": [["5", "five"], "7", [], [[1], ["1"]]],
    "empty": [{}, {}, {}, {}],
    "completion": ["a", "b", "c", "d"],
    "self": [1, 2, 3, 4],
    "images": [None, [], "x", 0],
}
PROMPTS = [
    [{"role": "user", "content": "bake bread"}],
    [{"role": "user", "name": "ann", "content": "grow red tomatoes"}],
    [{"role": "system", "content": "be careful"}, {"role": "user", "content": "fix a bike"}],
    [{"role": "user", "content": "mix water"}],
]
KEEPER = """
SEEN = []

def keep(prompts, completions, completion_ids, trainer_state, **columns):
    names = sorted(name for name, value in columns.items() if not callable(value))
    SEEN.append([names, [(prompt, {name: columns[name][i] for name in names}) for i, prompt in enumerate(prompts)]])
    SEEN[-1][1] = repr(SEEN[-1][1])
    columns["optional"][0].clear()  # what is done to a row does not last
    return [float(i) for i, _ in enumerate(prompts)]

def maths(completions, task, **_):
    return [float(len(c[-1]["content"])) if t == "maths" else None for c, t in zip(completions, task)]

def prose(completions, task, **_):
    return [-float(len(c[-1]["content"])) if t == "prose" else None for c, t in zip(completions, task)]
"""


@pytest.fixture
def write(tmp_path):
    def write(**columns: list[object]) -> Path:
        rows = [{"prompt": PROMPTS[i], **{k: v[i] for k, v in columns.items()}} for i in range(4)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "keep.py").write_text(KEEPER)
        return tmp_path / "rows.jsonl"

    return write


def same(left: object, right: object) -> bool:
    """Equal, and of the same types throughout (1 is not True, 5 is not 5.0)."""
    return repr(left) == repr(right)


def test_rows_arrive_as_they_were_read(write):
    rows = load_prompts(write(**HARD))
    data = as_dataset(rows)
    for order in ([0, 1, 2, 3], [3, 3, 1]):
        for item, i in zip(data.__getitems__(order), order, strict=True):
            assert same({"prompt": item["prompt"], **item["iama_row"]}, rows[i])
    data[0]["iama_row"]["optional"].clear()
    assert same(data[0]["iama_row"]["optional"], {"max_words": 5})


@pytest.mark.filterwarnings("ignore:.*which only training has:iama.errors.IamaWarning")
def test_a_reward_in_training_gets_them_with_what_trl_has(write, make_config):
    path = write(**HARD)
    reward = {"function": f"{path.parent}/keep.py:keep"}
    config = make_config(prompts=str(path), objective__criteria=[{"name": "keep", "proxy": reward}])
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    trainer.model.train()
    rows = load_prompts(path)
    for _ in range(2):
        trainer._generate_and_score_completions(trainer.train_dataset.__getitems__(MIXED))
    names = sorted(HARD)
    expected = [(rows[i]["prompt"], {name: rows[i][name] for name in names}) for i in MIXED]
    seen = trainer.reward_funcs[0].__wrapped__.scorer._function.__globals__["SEEN"]
    assert seen == [[names, repr(expected)]] * 2


def tasks(make_config, path: Path, **changes: object) -> TrainingConfig:
    criteria = [{"name": n, "proxy": {"function": f"{path.parent}/keep.py:{n}"}} for n in ("maths", "prose")]
    return make_config(prompts=str(path), objective={"criteria": criteria, **changes})


def roll_out(config: TrainingConfig, order: list[int]):
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(trainer.train_dataset.__getitems__(order))


MIXED = [0] * 4 + [1] * 4


def test_each_prompt_trains_by_what_scores_it(write, make_config):
    path = write(task=["maths", "prose", "maths", "neither"])
    trainer, output = roll_out(tasks(make_config, path, on_nan="skip_criterion"), MIXED)
    rewards = trainer._gathered_rewards.double().numpy().reshape(2, 4, 2)
    expected = [
        Objective([Criterion(name, bon(4))]).advantages(rewards[[p]][:, :, [p]])[0]
        for p, name in enumerate(("maths", "prose"))
    ]
    np.testing.assert_allclose(output["advantages"].reshape(2, 4), expected, rtol=1e-5, atol=1e-5)
    metrics = trainer._metrics["train"]
    assert [metrics[key] for key in ("skipped/maths", "skipped/prose", "dropped")] == [[1.0], [1.0], [0.0]]
    with pytest.warns(IamaWarning, match=r"'maths' returned None or NaN for the prompt 'mix water' .*skip_criterion"):
        output = trainer._generate_and_score_completions(trainer.train_dataset.__getitems__([3] * 4 + [1] * 4))
    assert metrics["dropped"] == [0.0, 4.0]
    assert (output["advantages"][:4] == 0).all()
    assert output["advantages"][4:].abs().max() > 0


@pytest.mark.parametrize("on_nan", ["error", "drop"])
def test_any_other_setting_advises_it_at_the_first_batch(write, make_config, on_nan):
    path = write(task=["maths", "prose", "maths", "neither"])
    with pytest.raises(RewardError, match=r"returned None or NaN for the prompt .* objective\.on_nan: skip_criterion"):
        roll_out(tasks(make_config, path, on_nan=on_nan), MIXED)


def test_one_prompt_a_batch_tells_tasks_apart_too(write, make_config):
    path = write(task=["maths", "prose", "maths", "neither"])
    with pytest.warns(IamaWarning, match="skip_criterion"):
        trainer, _ = roll_out(tasks(make_config, path, on_nan="drop"), [0] * 4)
    with pytest.raises(RewardError, match=r"'maths' .*leaves no completion to train on.* skip_criterion"):
        trainer._generate_and_score_completions(trainer.train_dataset.__getitems__([1] * 4))


def test_an_aggregate_trains_the_criteria_that_have_values(write, make_config):
    path = write(task=["maths", "prose", "maths", "neither"])
    trainer, output = roll_out(tasks(make_config, path, on_nan="skip_criterion", aggregate="min"), [0] * 4)
    assert output["advantages"].abs().max() > 0
    assert trainer._metrics["train"]["weight/maths"] == [1.0]
    assert trainer._metrics["train"]["weight/prose"] == [0.0]


def test_a_reward_that_is_down_is_no_task(write, make_config):
    """All of one criterion's scores are missing: dropped as before, with the advice in the warning."""
    path = write(task=["prose", "prose", "maths", "neither"])
    with pytest.warns(IamaWarning, match=r"'maths' .*on_nan: drop\).*skip_criterion"):
        _, output = roll_out(tasks(make_config, path, on_nan="drop"), MIXED)
    assert (output["advantages"] == 0).all()


def test_a_gold_reward_may_have_no_score(write, make_config):
    path = write(task=["maths", "maths", "prose", "neither"])
    functions = {name: {"function": f"{path.parent}/keep.py:{name}"} for name in ("maths", "prose")}
    criteria = [{"name": "maths", "proxy": functions["maths"], "gold": functions["prose"]}]
    trainer, output = roll_out(make_config(prompts=str(path), objective={"criteria": criteria}), MIXED)
    assert output["advantages"].abs().max() > 0
    assert np.isnan(trainer._gathered_rewards[:, 1]).all()


def test_by_row_is_the_reward(make_config):
    (helpful, *_) = load_rewards(make_plan(make_config(), "test.yaml"))
    rows = [{"topic": "a"}, {"topic": "b"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("bake red bread", "no thanks")]
    scores = by_row(helpful)(prompts=PROMPTS[:2], completions=completions, iama_row=rows, trainer_state=object())
    assert scores == helpful(PROMPTS[:2], completions)
    assert by_row(helpful).__name__ == "helpful"
