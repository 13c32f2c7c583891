"""What an evaluation checks of rewards, names and prompts beforehand, and what it does with missing scores."""

from __future__ import annotations

import json
import math
import sys

import pytest
from transformers import LlamaForSequenceClassification

from iama.cli import main
from iama.cli.evaluate import model_paths
from iama.config.files import EvaluationConfig
from iama.config.schema import validate
from iama.config.specs import RewardSpec, Sampling
from iama.cost import Cost
from iama.environment import prepare_environment
from iama.errors import ConfigError, DataError, ModelError, RewardError
from iama.rewards.load import check_columns
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.evaluation import answers as guided_draw
from inference.evaluation.describe import judge_lines
from inference.evaluation.plan import make_plan
from inference.pools.file import read_pool, write_pool
from inference.samplers.base import Completion, Segment
from tests.conftest import make_tokenizer, tiny_config
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed
from tests.inference.evaluation.test_from_pools import write as write_pool_file
from tests.inference.pools.test_pool_file import HEADER
from tests.openai_server import OpenAIServer

CARDS = "cards(target=5, entropy_threshold=1.0, min_segment=2, max_proposals=2)"
JUDGE = {"url": "http://localhost:1/v1", "model": "m", "temperature": 0.7}


@pytest.fixture
def judge(tmp_path) -> dict:
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    return JUDGE | {"prompt_file": str(tmp_path / "judge.txt"), "cache": str(tmp_path / "cache")}


def criteria(proxy, gold=None) -> list[dict]:
    return [{"name": "c", "proxy": proxy} | ({} if gold is None else {"gold": gold})]


class TestJudges:
    @pytest.mark.parametrize(
        "changes",
        [
            {"url": "http://localhost:2/v1"},
            {"concurrency": 2},
            {"highest": 5},
            {"cache": "elsewhere"},
            {"timeout_s": 9},
        ],
    )
    def test_the_same_answers_under_other_settings(self, config, judge, changes):
        gold = {"judge": judge | changes, "scale": {"mean": 1, "std": 2}}
        with pytest.raises(ConfigError, match="proxy and gold are the same answers of a judge at temperature"):
            make_plan(changed(config, criteria=criteria({"judge": judge}, gold)))

    @pytest.mark.parametrize("changes", [{"draw": 1}, {"model": "n"}, {"temperature": 0.8}, {"max_tokens": 5}])
    def test_other_answers(self, config, judge, changes):
        make_plan(changed(config, criteria=criteria({"judge": judge}, {"judge": judge | changes})))

    def test_the_plan_counts_a_stored_pool_by_its_own_texts(self, tmp_path, judge):
        path = write_pool_file(tmp_path / "a.jsonl", size=16)
        raw = {
            "name": "stored",
            "output_dir": str(tmp_path / "out"),
            "policies": {"base": {"pool": str(path)}},
            "criteria": criteria({"judge": judge}),
            "budgets": [1, 2],
            "num_samples": 8,
            "trained_budget": 2,
        }
        config = EvaluationConfig.model_validate(raw)
        (line,) = judge_lines(make_plan(config))
        pool = read_pool(path)
        chars = sum(len(p.prompt) + len(s.text) for p in pool.prompts for s in p.samples[:8]) / 24
        tokens = 24 * -(-(chars + len("{prompt} {completion}")) // 4)
        assert "24 requests" in line
        assert f"about {tokens:,.0f} prompt tokens" in line

    def test_of_a_large_stored_pool_only_what_is_used_is_judged(self, tmp_path, judge):
        path = write_pool_file(tmp_path / "a.jsonl", size=16)
        with OpenAIServer(lambda body: str(1 + len(body["messages"][0]["content"]) % 9)) as server:
            raw = {
                "name": "stored",
                "output_dir": str(tmp_path / "out"),
                "policies": {"base": {"pool": str(path)}},
                "criteria": criteria({"judge": judge | {"url": server.url}}),
                "budgets": [1, 2],
                "num_samples": 8,
                "trained_budget": 2,
                "num_bootstrap": 100,
            }
            summary = evaluate(EvaluationConfig.model_validate(raw))
            texts = {p.prompt + " " + s.text for p in read_pool(path).prompts for s in p.samples[:8]}
            asked = {body["messages"][0]["content"] for body in server.requests}
        assert asked == texts
        assert len(server.requests) == len(texts)
        assert summary["sampling"][0]["num_samples"] == 16  # what it cost is that of all of them

    def test_scoring_a_pool_says_what_it_will_ask(self, tmp_path, judge, monkeypatch, capsys):
        path = write_pool_file(tmp_path / "a.jsonl", size=4)
        (tmp_path / "reward.yaml").write_text(json.dumps({"judge": judge}))
        with OpenAIServer(lambda body: "7") as server:
            (tmp_path / "reward.yaml").write_text(json.dumps({"judge": judge | {"url": server.url}}))
            for replace, told in (([], "12 requests (0 more"), (["--replace"], "0 requests (12 more")):
                monkeypatch.setattr(sys, "argv", ["iama", "score", str(path), "--spec", str(tmp_path / "reward.yaml"),
                                                  "--column", "judged", *replace])  # fmt: skip
                with pytest.raises(SystemExit) as exit_:
                    main()
                assert exit_.value.code in (0, None)
                assert f"judged: judge m at {server.url}: {told}" in capsys.readouterr().err


class TestPrompts:
    def test_columns_that_rewards_read(self, config, judge, tmp_path):
        (tmp_path / "pairwise.txt").write_text("{prompt} {first} {second}")
        pairwise = judge | {
            "mode": "pairwise",
            "prompt_file": str(tmp_path / "pairwise.txt"),
            "baseline_column": "othr",
        }
        for proxy, told in (
            ({"verifier": "math", "answer_column": "solution"}, r"no column 'solution' \(answer_column\), only \["),
            ({"judge": pairwise}, r"no column 'othr' \(baseline_column\), only \["),
        ):
            with pytest.raises(RewardError, match=told) as raised:
                make_plan(changed(config, criteria=criteria(proxy)))
            assert "\n" not in str(raised.value)

    def test_messages_for_a_reward_without_a_template(self, config, tiny, tmp_path):
        folder = short_reward(tmp_path / "plain", tiny, 128, chat_template=None)
        with pytest.raises((DataError, ModelError, RewardError), match="template") as raised:
            make_plan(changed(config, criteria=criteria({"model": str(folder)})))
        assert "\n" not in str(raised.value)

    def test_prompts_that_a_reward_cannot_read(self, config, tiny, tmp_path):
        prompts = tmp_path / "prompts.jsonl"
        rows = [[{"role": "user", "content": text}] for text in ("bake bread", "how to bake bread " * 6)]
        prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
        folder = short_reward(tmp_path / "short", tiny, 24)
        settings = changed(config, prompts=str(prompts), criteria=criteria({"model": str(folder)}))
        with pytest.raises(DataError, match=r"'c \(proxy\)': prompt 2 .* reads at most 24; .*too_long: drop") as raised:
            make_plan(settings)
        assert "\n" not in str(raised.value)
        plan = make_plan(changed(settings, prompts={"path": str(prompts), "too_long": "drop"}))
        assert (len(plan.rows), plan.dropped) == (1, 1)


def short_reward(folder, tiny, context_length, **changes):
    """A classifier that reads few tokens."""
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    model = LlamaForSequenceClassification(
        tiny_config(tokenizer, max_position_embeddings=context_length, num_labels=1, tie_word_embeddings=False)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestNames:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"trained": "iamma"}, "trained names 'iamma', which is no policy; did you mean 'iama'"),
            ({"references": ["base", "gppo"]}, "references names 'gppo', which is no policy; did you mean 'grpo'"),
            ({"methods": ["bon", "bop", "bon"]}, "methods names 'bon' twice"),
        ],
    )
    def test_that_are_no_policies_or_come_twice(self, raw_config, changes, told):
        with pytest.raises(ConfigError, match=told):
            validate(raw_config | changes, EvaluationConfig, "test")

    def test_defaults_may_be_absent(self, raw_config):
        policies = {"mine": raw_config["policies"]["base"]}
        config = validate(raw_config | {"policies": policies}, EvaluationConfig, "test")
        assert (config.trained, config.references) == ("iama", ["base", "grpo"])


def test_an_adapter_as_path_has_the_size_of_its_base(config, adapter_dir, tiny):
    with_base = {"path": str(tiny.policy), "adapter": str(adapter_dir)}
    exported = adapter_dir.parent / "exported"
    if not exported.exists():
        exported.mkdir()
        for file in adapter_dir.iterdir():
            (exported / file.name).write_bytes(file.read_bytes())
        recorded = json.loads((exported / "adapter_config.json").read_text())
        recorded["base_model_name_or_path"] = str(tiny.policy)
        (exported / "adapter_config.json").write_text(json.dumps(recorded))
    policies = {"base": with_base, "iama": {"path": str(exported)}}
    sizes = [source.size for source in make_plan(changed(config, policies=policies, references=["base"])).sources]
    assert sizes[0] == sizes[1]
    assert sizes[0] is not None


@pytest.mark.parametrize(("source", "name"), [("function", "picky"), ("kind", "Picky")])
@pytest.mark.slow
def test_a_function_or_kind_without_a_score_for_some_answers(config, tmp_path, source, name):
    """Answers that the user's own code says nothing of are left out and counted; it can guide no method."""
    (tmp_path / "picky.py").write_text(
        "import math\n"
        "from iama.cost import Cost\n"
        "from iama.rewards.reward import Scorer\n\n\n"
        "def picky(prompts, completions, **_):\n"
        "    texts = [c[-1]['content'] for c in completions]\n"
        "    return [None if len(t) % 4 == 0 else float(len(t)) for t in texts]\n\n\n"
        "class Picky(Scorer):\n"
        "    def score(self, prompts, completions, columns):\n"
        "        scores = picky(prompts, completions)\n"
        "        return [math.nan if score is None else score for score in scores], Cost()\n"
    )
    proxy = {source: f"{tmp_path / 'picky.py'}:{name}"}
    settings = changed(config, criteria=criteria(proxy), budgets=[1, 2], methods=["bon"], num_samples=32)
    summary = evaluate(settings)
    missing = {row["policy"]: row["num_missing"] for row in summary["missing"]}
    for source in make_plan(settings).sources:
        (path,) = (tmp_path / "evaluation" / "pools").glob(f"{source.file_name}.jsonl")
        texts = [s.text for p in read_pool(path).prompts for s in p.samples]
        assert missing[source.policy] == sum(len(text) % 4 == 0 for text in texts)
    assert sum(missing.values()) > 0
    json.dumps(summary, allow_nan=False)
    with pytest.raises(RewardError, match="has no score for a text that it must guide"):
        evaluate(changed(settings, methods=["bon", CARDS], output_dir=str(tmp_path / "guided")))


def test_a_guided_answer_without_a_score_is_null_in_its_pool(policy, tmp_path):
    segment = Segment(2, math.nan, math.nan, 1, False, 0)
    completion = Completion([Response("a b", (7, 8), "length", math.nan)], 0, Cost(1), (segment,))
    sample = guided_draw._stored(policy, completion, Sampling())
    block = PooledPrompt("q", "why?", {}, (sample,), Cost(1), False)
    write_pool(tmp_path / "answers.jsonl", Pool(HEADER | {"num_samples": 1}, [block]))
    (read,) = read_pool(tmp_path / "answers.jsonl").prompts
    assert read.samples[0].scores == {"proxy": None}
    assert [(s["reward"], s["threshold"]) for s in read.samples[0].segments] == [(None, None)]


def test_files_of_an_evaluation_decide_whether_the_hub_is_asked(raw_config, tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with_functions, models = raw_config["criteria"], [{"name": "brief", "proxy": {"model": str(tiny.reward)}}]
    raw_config = raw_config | {"criteria": models}
    for changes, offline in (
        ({}, True),
        ({"criteria": with_functions}, False),  # whose code may ask it
        ({"prompts": "openai/gsm8k"}, False),
        ({"policies": raw_config["policies"] | {"told": raw_config["policies"]["base"]
          | {"by_criterion": {"brief": {"adapter": "org/adapter"}}}}}, False),
    ):  # fmt: skip
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that the change is undone
        monkeypatch.delenv("HF_HUB_OFFLINE")
        prepare_environment(model_paths(EvaluationConfig.model_validate(raw_config | changes)))
        import os

        assert (os.environ.get("HF_HUB_OFFLINE") == "1") == offline


@pytest.mark.parametrize(("columns", "refused"), [({"topic"}, False), ({"topic", "more"}, False), (set(), True)])
def test_a_function_that_needs_another_column_is_refused(tmp_path, columns, refused):
    path = tmp_path / "needy.py"
    path.write_text("def f(prompts, completions, topic, weight=1, **kwargs):\n    return [0.0] * len(prompts)\n")
    spec, row = RewardSpec(function=f"{path}:f"), {"prompt": "p", **dict.fromkeys(columns, "x")}
    if not refused:
        check_columns("c", spec, [row])
        return
    with pytest.raises(RewardError, match=r"needy\.py:f' needs the column 'topic', but the prompts have none"):
        check_columns("c", spec, [row])
