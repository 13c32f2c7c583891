"""What an evaluation refuses before anything is sampled, and the KL that it tells."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from iama.cli.app import app
from iama.config.files import EvaluationConfig
from iama.config.schema import validate
from iama.errors import ConfigError, IamaError, RunError
from inference.engine.responses import Pool
from inference.evaluation.plan import make_plan
from inference.pools.file import read_pool, write_pool
from inference.selection.divergences import best_of_n_kl, best_of_n_kl_estimate
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed, pool_of, sampled  # noqa: F401 - a fixture
from tests.inference.evaluation.test_recomputed import chances, mean


def with_another_end(tiny, folder):
    """A policy that ends its answers with '<|system|>', too, and a reward in which that id is another special token."""
    policy, reward = (shutil.copytree(path, folder / path.name) for path in (tiny.policy, tiny.reward))
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 6]}))
    tokens = reward / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace("<|system|>", "<|sister|>"))
    return policy, reward


class TestKL:
    def test_of_the_reference_and_its_equal(self, config):
        """grpo is base under another name: nothing but the operator's own divergence, by its estimate."""
        summary = evaluate(changed(config, methods=["bon"], criteria=config.model_dump()["criteria"][:1]))
        rows = {(r["policy"], r["samples"]): r for r in summary["curves"]}
        assert {r["kl_kind"] for r in rows.values()} == {"estimate"}
        assert rows["base", 1]["kl"] == pytest.approx(0, abs=1e-5)
        path = next((pool_of(config, "base").parent.parent / "log_probabilities").glob("base-*.jsonl"))
        stored = [json.loads(line)["log_probabilities"] for line in path.read_text().splitlines()]
        scores = next((pool_of(config, "base").parent.parent / "scores").glob("base-*.jsonl"))
        values = [json.loads(line)["values"] for line in scores.read_text().splitlines()]
        for n in config.budgets:
            expected = []
            for prompt, found, distinct in zip(read_pool(pool_of(config, "base")).prompts, stored, values, strict=True):
                texts = [sample.text for sample in prompt.samples]
                by_text = dict(zip(dict.fromkeys(texts), distinct, strict=True))
                kept = chances([by_text[text] for text in texts], n)
                expected.append(sum(c * float(best_of_n_kl_estimate(n, x)) for c, x in zip(kept, found, strict=True)))
            assert rows["base", n]["kl"] == pytest.approx(mean(expected), abs=1e-4)
            assert rows["grpo", n]["kl"] == pytest.approx(rows["base", n]["kl"], abs=1e-5)
            assert rows["base", n]["kl"] <= best_of_n_kl(n) + 1e-6
        assert rows["iama", 1]["kl"] > 0.1  # an adapter with random weights is far away

    def test_is_unknown_where_sampling_is_not_plain(self, config):
        settings = changed(config, sampling={"max_new_tokens": 8, "top_p": 0.9}, methods=["bon"])
        summary = evaluate(settings)
        assert {(r["kl"], r["kl_kind"]) for r in summary["curves"]} == {(None, None)}
        assert {r["mean_log_ratio"] for r in summary["sampling"]} == {None}
        assert None not in {r["fluency"] for r in summary["sampling"]}

    def test_without_log_probabilities_is_the_bound(self, config):
        summary = evaluate(changed(config, log_probabilities=False, methods=["bon"]))
        for row in summary["curves"]:
            bound = float(best_of_n_kl(row["samples"])) if row["policy"] == "base" else None
            assert row["kl"] == pytest.approx(bound)
            assert row["kl_kind"] == (None if bound is None else "upper bound")

    @pytest.mark.slow
    def test_ids_of_another_vocabulary_are_not_judged(self, config, tmp_path):
        """A stored pool's token ids count only where the reference reads them as the texts say."""
        small = changed(config, methods=["bon"])
        first = evaluate(small)
        path = pool_of(small, "iama")
        pool = read_pool(path)
        for name, shift in (("same", 0), ("other", 1)):
            prompts = [
                type(p)(p.prompt_id, p.prompt, p.columns, tuple(
                    replace(s, token_ids=tuple(t + shift for t in s.token_ids), scores={})
                    for s in p.samples), p.cost, p.estimated) for p in pool.prompts
            ]  # fmt: skip
            write_pool(tmp_path / f"{name}.jsonl", Pool(pool.header, prompts))
        policies = {"base": small.model_dump()["policies"]["base"]}
        policies |= {name: {"pool": str(tmp_path / f"{name}.jsonl")} for name in ("same", "other")}
        settings = changed(small, policies=policies, trained="same", output_dir=str(tmp_path / "stored"))
        fluency = {r["policy"]: r["fluency"] for r in evaluate(settings)["sampling"]}
        before = {r["policy"]: r["fluency"] for r in first["sampling"]}
        assert fluency["same"] == pytest.approx(before["iama"], abs=1e-4)
        assert fluency["other"] is None


JUDGE = {"url": "http://localhost:1/v1", "model": "m", "temperature": 0.7}


class TestBadInput:
    """Each is refused in one line, before anything is sampled."""

    @pytest.fixture(autouse=True)
    def _nothing_is_sampled(self, sampled):  # noqa: F811
        yield
        assert sampled == []

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"methods": ["bno"]}, "method 'bno' is not known; did you mean 'bon'. write one of identity, bon"),
            ({"methods": ["bon(5)"]}, r"'bon\(5\)' keeps one of 5 samples, more than a quarter of num_samples = 16"),
            ({"methods": ["bop_zt(4)"], "num_samples": 18}, r"'bop_zt\(4\)' keeps one of 4\.07463 samples"),
            ({"methods": ["soft_bon(5, 0.5)"]}, r"soft_bon\(5, 0\.5\)' keeps one of 5"),
            ({"methods": ["tilt(0.5)"]}, "not a way to sample"),
            ({"methods": ["cards(targt=1)"]}, "unknown key 'targt'; did you mean 'target'"),
            ({"budgets": [1, 5]}, r"test: budgets \[5\] lie outside 1\.\.4"),
            ({"trained_budget": 9}, r"trained_budget = 9 lies outside 1\.\.4"),
            ({"budgets": [1, 2, 2, 4]}, "budgets names 2 samples twice"),
            ({"methods": ["bop(3)", "bop(mu=3.0)"]}, r"'bop\(mu=3\.0\)' is the same as 'bop\(3\)'; write it once"),
            ({"win_rate_baseline": {"policy": "bsae"}}, r"baseline\.policy 'bsae' is no policy; did you mean 'base'"),
            ({"win_rate_baseline": {"policy": "base", "samples": 5}}, "budget 5 is more than a quarter of the 16"),
        ],
    )  # fmt: skip
    def test_settings(self, config, changes, told):
        with pytest.raises(ConfigError, match=told) as raised:
            evaluate(validate(config.model_dump() | changes, EvaluationConfig, "test"))
        assert "\n" not in str(raised.value)

    def test_a_criterion_that_is_not_there(self, config):
        policies = config.model_dump()["policies"]
        policies["iama"]["by_criterion"] = {"breif": {"system_prompt": "be brief"}}
        with pytest.raises(ConfigError, match=r"by_criterion names 'breif'; did you mean 'brief'"):
            validate(config.model_dump() | {"policies": policies}, EvaluationConfig, "test")

    def test_the_same_noisy_judge_twice(self, config, tmp_path):
        (tmp_path / "judge.txt").write_text("{prompt} {completion}")
        judge = JUDGE | {"prompt_file": str(tmp_path / "judge.txt"), "cache": str(tmp_path / "cache")}
        criteria = [{"name": "c", "proxy": {"judge": judge}, "gold": {"judge": judge}}]
        with pytest.raises(ConfigError, match=r"same answers of a judge at temperature 0\.7.*set gold\.judge\.draw: 1"):
            evaluate(changed(config, criteria=criteria))
        criteria[0]["gold"] = {"judge": judge | {"draw": 1}}
        make_plan(changed(config, criteria=criteria))

    def test_a_training_run_that_is_not_there(self, config, tmp_path):
        policies = config.model_dump()["policies"]
        policies["iama"]["training_run"] = str(tmp_path / "gone")
        with pytest.raises(RunError, match="gone") as raised:
            evaluate(changed(config, policies=policies))
        assert "\n" not in str(raised.value)

    def test_a_guided_method_and_a_column_with_a_stored_pool(self, config, tmp_path):
        line = {"prompt": "a", "text": "b", "scores": {"c": 1.0}}
        header = {"iama_pool": 1, "policy": {"name": "p"}}
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [header, *[line] * 16])))
        policies = config.model_dump()["policies"] | {"stored": {"pool": str(tmp_path / "p.jsonl")}}
        with pytest.raises(ConfigError, match="needs a model, but policy 'stored' is a pool file"):
            evaluate(changed(config, policies=policies, methods=["cards"]))
        criteria = [{"name": "c", "proxy": {"column": "c"}}]
        with pytest.raises(
            ConfigError, match=r"'c \(proxy\)' is the column 'c' of a pool file, but policy 'base' is a"
        ):
            evaluate(changed(config, policies=policies, criteria=criteria))

    @pytest.mark.parametrize("method", ["sea(num_steps=2)", "ggro(num_candidates=2)"])
    def test_a_gradient_of_a_function_or_of_another_vocabulary(self, config, tiny, tmp_path, method):
        (tmp_path / "f.py").write_text("def f(prompts, completions, **columns): return [0.0 for _ in prompts]\n")
        function = [{"name": "c", "proxy": {"function": f"{tmp_path}/f.py:f"}}]
        with pytest.raises(ConfigError, match=r"needs the gradient of a reward, and reward 'c \(proxy\)' is no clas"):
            evaluate(changed(config, criteria=function, methods=[method]))
        shutil.copytree(tiny.reward, tmp_path / "other")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
        tokenizer.add_tokens(["zebra"])
        tokenizer.save_pretrained(tmp_path / "other")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(tmp_path / "other")
        classifier = [{"name": "c", "proxy": {"model": str(tmp_path / "other")}}]
        with pytest.raises(
            ConfigError, match=r"needs one vocabulary, but policy 'base' and reward 'c \(proxy\)'.*zebra"
        ):
            evaluate(changed(config, criteria=classifier, methods=[method]))

    def test_a_gradient_of_a_reward_that_reads_another_end_token(self, config, tiny, tmp_path):
        """A policy may end its answers with more tokens than its tokenizer's own end token."""
        policy, reward = with_another_end(tiny, tmp_path)
        base = {"base": {"path": str(policy)}}
        settings = changed(config, policies=base, criteria=[{"name": "c", "proxy": {"model": str(reward)}}],
                           methods=["ggro(num_candidates=2)"])  # fmt: skip
        with pytest.raises(ConfigError, match=r"differ in 1 token ids, e\.g\. 6 \('<\|system\|>' and '<\|sister\|>'\)"):
            make_plan(settings)
        (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
        make_plan(settings)

    def test_a_pool_with_a_file(self, tmp_path):
        result = CliRunner().invoke(app, ["evaluate", "--pool", "a=b.jsonl", "--config", str(tmp_path / "c.yaml")])
        assert isinstance(result.exception, IamaError)
        assert "(and not both)" in str(result.exception)
        assert np.char.count(str(result.exception), "\n") == 0
