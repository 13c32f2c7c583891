"""`iama tune --config`, and evaluations and answers that take their number from what it wrote."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from inference.hedging.tuning_file import Tuning, load_tuning
from inference.pools import engines
from inference.pools.file import read_pool, write_pool
from tests.iama.cli.test_tune_cli import OTHER_PROMPTS, PROMPTS, done, refusal
from tests.openai_server import OpenAIServer


@pytest.fixture
def raw(tmp_path, tiny) -> dict:
    """An evaluation of two policies by a model and a function, on calibration prompts."""
    file = tmp_path / "gold.py"
    file.write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[-1]['content'] for c in completions]\n"
        "    return [sum(c in 'aeiou' for c in t) / (1 + len(t)) for t in texts]\n"
    )
    for name, prompts in (("calibration", PROMPTS[:4]), ("test", OTHER_PROMPTS[:4])):
        rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "evaluation"),
        "policies": {
            "base": {"path": str(tiny.policy)},
            "told": {"path": str(tiny.policy), "system_prompt": "be kind"},
        },
        "trained": "told",
        "prompts": {"path": str(tmp_path / "test.jsonl")},
        "criteria": [
            {"name": "helpful", "proxy": {"model": str(tiny.reward)}, "gold": {"function": f"{file}:vowels"}},
            {"name": "brief", "proxy": {"model": str(tiny.other_reward)}, "gold": {"function": f"{file}:vowels"}},
        ],
        "methods": ["bon(tuned)"],
        "tuning": str(tmp_path / "tune" / "tuning.json"),
        "budgets": [1, 2, 4],
        "num_samples": 16,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 8},
        "num_bootstrap": 100,
        "log_probabilities": False,
    }


class TestMadeByTheCommand:
    def tuned(self, run, raw, tmp_path, *more) -> Tuning:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
        prompts = ["--set", f"prompts.path={tmp_path / 'calibration.jsonl'}"]
        done(run("tune", "--config", tmp_path / "config.yaml", *prompts, "--out", tmp_path / "tune", *more))
        return load_tuning(tmp_path / "tune" / "tuning.json")

    @pytest.mark.slow
    def test_tuned_then_evaluated_with_one_file(self, run, raw, tmp_path, monkeypatch):
        tuning = self.tuned(run, raw, tmp_path)
        names = [(c.policy.name, c.criterion.name) for c in tuning.calibrations]
        assert names == [("base", "helpful"), ("base", "brief"), ("told", "helpful"), ("told", "brief")]
        first = tuning.calibrations[0]
        assert list(first.methods) == ["bon(tuned)"]  # what the file leaves to be tuned
        assert first.generation_seconds is not None
        assert first.sampling is not None
        assert (first.sampling.max_new_tokens, len(first.prompt_ids), first.num_samples) == (8, 4, 16)
        asked = []
        real = engines.iter_decode
        monkeypatch.setattr(engines, "iter_decode", lambda *a, **k: asked.append(1) or real(*a, **k))
        again = self.tuned(run, raw, tmp_path)
        assert asked == []  # samples and scores are kept
        for before, after in zip(tuning.calibrations, again.calibrations, strict=True):
            assert before.methods["bon(tuned)"].result == after.methods["bon(tuned)"].result
        told = done(run("evaluate", "--config", tmp_path / "config.yaml", "--dry-run"))
        assert f"told, brief: bon(tuned) is {tuning.calibrations[3].methods['bon(tuned)'].result.written}" in told
        done(run("evaluate", "--config", tmp_path / "config.yaml"))
        rows = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["curves"]
        written = {(row["policy"], row["criterion"]): row["written"] for row in rows}
        expected = [c.methods["bon(tuned)"].result.written for c in tuning.calibrations]
        assert [written[name] for name in names] == expected

    def test_budgets_of_the_evaluation_do_not_matter(self, run, raw, tmp_path):
        """Those that the pool is too small for, too."""
        expected = self.tuned(run, raw, tmp_path, "--criterion", "helpful")
        raw |= {"budgets": [1, 64], "trained_budget": 64, "win_rate_baseline": {"policy": "gone", "samples": 64}}
        found = self.tuned(run, raw, tmp_path, "--criterion", "helpful")
        for one, other in zip(expected.calibrations, found.calibrations, strict=True):
            assert one.methods["bon(tuned)"].result == other.methods["bon(tuned)"].result
        line = refusal(run("evaluate", "--config", tmp_path / "config.yaml"))
        assert "budgets [64] lie outside 1..4" in line

    @pytest.mark.slow
    def test_the_pool_is_that_of_an_evaluation(self, run, raw, tmp_path):
        """Tuned on what `iama pool` and `iama score` would give: the same samples, the same number."""
        tuning = self.tuned(run, raw, tmp_path, "--criterion", "helpful", "--method", "bop")
        path, gold = tmp_path / "p.jsonl", raw["criteria"][0]["gold"]["function"]
        policy, reward = raw["policies"]["base"]["path"], raw["criteria"][0]["proxy"]["model"]
        prompts = tmp_path / "calibration.jsonl"
        pooled = ["--policy", policy, "--n", 16, "--max-new-tokens", 8, "--name", "base"]
        done(run("pool", path, "--prompts", prompts, *pooled))
        done(run("score", path, "--reward", reward, "--column", "helpful"))
        done(run("score", path, "--reward", gold, "--column", "helpful/gold"))
        done(run("tune", "--pool", path, "--method", "bop", "--out", tmp_path / "other"))
        (other,) = load_tuning(tmp_path / "other" / "tuning.json").calibrations
        own = tuning.calibrations[0]
        assert (other.policy.fingerprint, set(other.prompt_ids)) == (own.policy.fingerprint, set(own.prompt_ids))
        found, expected = (asdict(c.methods["bop(tuned)"].result) for c in (other, own))
        for key in ("value", "gold", "gain", "proxy"):
            assert found[key] == pytest.approx(expected[key], abs=1e-6)

    @pytest.mark.slow
    def test_what_an_evaluation_refuses(self, run, raw, tmp_path, tiny):
        tuning = self.tuned(run, raw, tmp_path)
        same = tmp_path / "calibration.jsonl"
        changed = tmp_path / "changed"
        shutil.copytree(tiny.policy, changed)
        config = json.loads((changed / "generation_config.json").read_text())
        (changed / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
        cases = [
            (f"prompts.path={same}", "4 of the evaluation's 4 prompts are among the 4 that 'base' was calibrated on"),
            (f"policies.base.path={changed}", "tuned for another policy 'base' (weights, tokenizer, chat template or"),
            (
                "policies.told.system_prompt=be brief",
                "tuned with the system prompt None or 'be kind', but it is 'be brief'",
            ),
            ("sampling.temperature=0.5", "tuned with temperature 1.0, but it is 0.5; run `iama tune`"),
            (f"criteria.0.proxy.model={changed}", "error: "),
            ("criteria.0.proxy={verifier: math}", "error: "),
            (f"criteria.0.proxy={{function: '{tmp_path}/gold.py:vowels'}}", "is another, or has been changed; run"),
        ]
        for setting, told in cases:
            line = refusal(run("evaluate", "--config", tmp_path / "config.yaml", "--set", setting))
            assert told in line
        assert not (tmp_path / "evaluation").exists()
        assert len(tuning.calibrations) == 4

    @pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.slow
    def test_a_noisy_judge_as_gold_is_told(self, run, raw, tmp_path, temperature):
        """Only the criterion that it judges; what chooses by it reports by it."""
        (tmp_path / "judge.txt").write_text("{prompt} {completion}")
        with OpenAIServer() as server:
            server.answer = lambda body: str(1 + len(body["messages"][0]["content"]) % 10)
            judge = {"url": server.url, "model": "j", "prompt_file": str(tmp_path / "judge.txt")}
            judge |= {"temperature": temperature, "cache": str(tmp_path / "cache")}
            raw["criteria"][1]["gold"] = {"judge": judge}
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
            code, _, err = run("tune", "--config", tmp_path / "config.yaml", "--out", tmp_path / "tune")
        assert code == 0, err
        told = [line for line in err.splitlines() if "gold judge answers" in line]
        assert len(told) == (temperature > 0)
        for line in told:
            assert "criterion 'brief': its gold judge answers at temperature 0.7, and the same answers choose" in line
            assert "tune with --pool, --gold-column and --report-column" in line

    def test_criteria_without_gold(self, run, raw, tmp_path):
        del raw["criteria"][1]["gold"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
        out = ("--method", "bon", "--out", tmp_path / "tune")
        line = refusal(run("tune", "--config", tmp_path / "config.yaml", "--criterion", "brief", *out))
        assert "criterion 'brief' has no gold reward, without which nothing can be tuned" in line
        line = refusal(
            run("tune", "--config", tmp_path / "config.yaml", "--criterion", "x", "--out", tmp_path / "tune")
        )
        assert "--criterion 'x' is not in" in line
        line = refusal(run("tune", "--config", tmp_path / "config.yaml", "--gold-column", "x"))
        assert "--gold-column 'x' belongs to --pool" in line
        assert not (tmp_path / "tune").exists()
        code, _, err = run("tune", "--config", tmp_path / "config.yaml", *out)
        assert code == 0
        assert "note: criterion 'brief' has no gold reward and is not tuned" in err
        tuned = load_tuning(tmp_path / "tune" / "tuning.json").calibrations
        assert {calibration.criterion.name for calibration in tuned} == {"helpful"}
        assert len(self.tuned(run, raw, tmp_path, "--criterion", "helpful").calibrations) == 2


class TestGenerate:
    def serve(self, run, tiny, tuning: Path | None, *more, method="bon(tuned)"):
        options = ["--reward", tiny.reward, "--max-new-tokens", 8, "--method", method, "--prompt", "fix a bike"]
        tuned = [] if tuning is None else ["--tuning", tuning]
        return run("generate", "--policy", tiny.policy, *options, *tuned, *more)

    @pytest.fixture
    def tuning(self, run, raw, tmp_path) -> Path:
        TestMadeByTheCommand().tuned(run, raw, tmp_path)
        return tmp_path / "tune" / "tuning.json"

    def test_serves_the_number_of_its_reward(self, run, tiny, tuning):
        calibration = load_tuning(tuning).calibrations[0]
        written = calibration.methods["bon(tuned)"].result.written
        told = done(self.serve(run, tiny, tuning))
        plain = done(self.serve(run, tiny, None, method=written))
        assert told.split("cost")[0] == plain.split("cost")[0]  # the same table
        assert f"{written}: " in told

    def test_mistakes(self, run, tiny, tuning):
        cases = [
            ((None,), {}, "--method 'bon(tuned)' takes its number from a file of `iama tune`; give --tuning"),
            ((tuning,), {"method": "bon(4)"}, "has no use with method 'bon(4)'; write e.g. 'bon(tuned)'"),
            ((tuning, "--temperature", 0.5), {}, "tuned with temperature 1.0, but it is 0.5"),
            ((tuning, "--dtype", "bfloat16"), {}, "is another; run `iama tune`"),
            ((tuning,), {"method": "bop(tuned)"}, "bop(tuned) was not tuned for 'base' and 'helpful'"),
        ]
        for given, named, told in cases:
            assert told in refusal(self.serve(run, tiny, *given, **named))
        options = ["--method", "bon(tuned)", "--tuning", tuning, "--max-new-tokens", 8, "--prompt", "fix a bike"]
        line = refusal(run("generate", "--policy", tiny.policy, "--reward", tiny.policy.parent / "gone", *options))
        assert "error: " in line

    def test_a_system_prompt_is_that_of_the_pool(self, run, tiny, tuning):
        raw = json.loads(tuning.read_text())
        for calibration in raw["calibrations"]:
            calibration["system_prompt"] = "be careful"
        tuning.write_text(json.dumps(raw))
        line = refusal(self.serve(run, tiny, tuning))
        assert "tuned with the system prompt 'be careful', but it is None" in line
        done(self.serve(run, tiny, tuning, "--system-prompt", "be careful"))

    @pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
    def test_a_reward_known_by_its_column(self, run, tiny, tuning, tmp_path):
        """Pool, score, tune, serve: which reward wrote the column is taken on trust, with a word."""
        (pool,) = (tmp_path / "tune" / "pools").glob("base-*.jsonl")
        stored = read_pool(pool)
        path = tmp_path / "scored.jsonl"
        write_pool(path, stored)
        gold = f"{tmp_path}/gold.py:vowels"
        for column, reward in (("a", tiny.reward), ("a/gold", gold), ("b", tiny.other_reward), ("b/gold", gold)):
            done(run("score", path, "--reward", reward, "--column", column))
        done(run("tune", "--pool", path, "--method", "bon", "--criterion", "a", "--out", tmp_path / "one"))
        code, _, err = self.serve(run, tiny, tmp_path / "one" / "tuning.json")
        assert code == 0
        assert "warning: " in err
        assert f"'a' was tuned with the column 'a', and model {str(tiny.reward)!r} gives the same scores" in err
        done(run("tune", "--pool", path, "--method", "bon", "--out", tmp_path / "two"))
        line = refusal(self.serve(run, tiny, tmp_path / "two" / "tuning.json"))
        assert "the criteria a, b were tuned with this proxy; name one of them" in line
        code, _, err = self.serve(run, tiny, tmp_path / "two" / "tuning.json", "--criterion", "b")
        assert code == 0
        assert "'b' was tuned with the column 'b'" in err
