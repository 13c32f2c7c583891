"""vLLM through the commands: pools, evaluations, answers, and what is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from iama.config.specs import RewardSpec
from iama.rewards.load import load_reward
from inference.pools.file import read_pool
from inference.pools.score import reward_key

QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
FLAGS = ("--engine", "vllm", "--vllm", "enforce_eager=true", "--vllm", f"kv_cache_memory_bytes={2**28}")
ON_VLLM = {"engine": "vllm", "vllm": QUICK}


def config(wide, folder, proxy=None, **changes):
    """A file of an evaluation whose policy runs on vLLM."""
    raw = {
        "name": "tiny",
        "output_dir": str(folder / "out"),
        "policies": {"base": {"path": str(wide.policy), **ON_VLLM}},
        "prompts": str(wide.prompts),
        "criteria": [
            {
                "name": "good",
                "proxy": {"model": str(wide.reward), **(proxy or {})},
                "gold": {"model": str(wide.two_headed_reward), "head": "good"},
            }
        ],
        "num_samples": 32,
        "trained_budget": 2,
        "num_bootstrap": 100,
        "sampling": {"max_new_tokens": 8},
        **changes,
    }
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(raw))
    return folder / "evaluation.yaml"


@pytest.mark.vllm
@pytest.mark.slow
def test_an_evaluation_opens_policy_and_reward_side_by_side(run_with_files, wide, tmp_path, monkeypatch):
    """Each in a process of its own, as a user has it; scores are those of transformers."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    code, _, err = run_with_files("evaluate", "--config", config(wide, tmp_path, ON_VLLM))
    assert code == 0, err
    (path,) = (tmp_path / "out" / "pools").iterdir()
    pool = read_pool(path)
    assert (pool.header["engine"], "vllm" in str(pool.header["versions"])) == ("vllm", True)
    key = reward_key(RewardSpec(model=str(wide.reward), **ON_VLLM))[:12]
    (journal,) = (tmp_path / "out" / "scores").glob(f"*.{key}.jsonl")
    told = map(json.loads, journal.read_text().splitlines())
    reward = load_reward("good", RewardSpec(model=str(wide.reward)))
    for line, prompt in zip(told, pool.prompts, strict=True):
        texts = list(dict.fromkeys(sample.text for sample in prompt.samples))
        expected, _ = reward.score([prompt.prompt] * len(texts), texts, {})
        np.testing.assert_allclose(line["values"], expected, atol=1e-3)


@pytest.mark.vllm
@pytest.mark.slow
def test_pools_of_two_engines_are_kept_apart(run_with_files, wide, tmp_path):
    code, _, err = run_with_files("evaluate", "--config", config(wide, tmp_path))
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["policies"]["base"]["engine"] == "vllm"
    assert all(np.isfinite(row["proxy"]) for row in summary["curves"])
    ours = config(wide, tmp_path, policies={"base": {"path": str(wide.policy)}})
    code, _, err = run_with_files("evaluate", "--config", ours)
    assert code == 2
    assert "policies.base.engine was 'vllm', is '(not set)'" in err
    (tmp_path / "out" / "summary.json").unlink()
    code, _, err = run_with_files("evaluate", "--config", ours)
    assert code == 0, err
    engines = sorted(read_pool(path).header["engine"] for path in (tmp_path / "out" / "pools").iterdir())
    assert engines == ["transformers", "vllm"]


@pytest.mark.vllm
@pytest.mark.slow
def test_pools_tuning_and_answers_come_from_vllm(run_with_files, wide, tmp_path):
    pool = ("pool", tmp_path / "pool.jsonl", "--prompts", wide.prompts, "--policy", wide.policy, "--n", 4)
    code, _, err = run_with_files(*pool, "--max-new-tokens", 8, *FLAGS)
    assert code == 0, err
    assert read_pool(tmp_path / "pool.jsonl").header["engine"] == "vllm"
    code, _, err = run_with_files(*pool, "--max-new-tokens", 8)
    assert code == 2
    assert "holds other samples (engine was 'vllm', is 'transformers')" in err
    code, out, err = run_with_files("tune", "--config", config(wide, tmp_path), "--out", tmp_path / "t")
    assert code == 0, err
    assert "best by gold" in out
    asked = ("generate", "--policy", wide.policy, "--reward", wide.reward, "--prompt", "how to bake bread")
    for method, told in (("soft_bon(3, 0.5)", "3 candidates"), ("bon(4, stop=pandora(0.1), width=2)", "of at most 4")):
        code, out, err = run_with_files(*asked, "--method", method, "--max-new-tokens", 6, *FLAGS)
        assert (code, told in out) == (0, True), err


@pytest.mark.vllm
@pytest.mark.slow
def test_cards_is_evaluated_on_vllm(run_with_files, wide, tmp_path):
    method = "cards(quantile=0.5, max_segment=4)"
    file = config(wide, tmp_path, methods=["bon", method])
    raw = yaml.safe_load(file.read_text())
    raw["criteria"][0]["proxy"] = {"model": str(wide.reward)}
    file.write_text(yaml.safe_dump(raw))
    code, _, err = run_with_files("evaluate", "--config", file)
    assert code == 0, err
    (path,) = (tmp_path / "out" / "answers").glob("*.jsonl")
    answers = read_pool(path)
    assert answers.header["engine"] == "vllm"
    assert answers.header["method"].startswith("cards(")
    assert all(prompt.samples[0].segments and prompt.cost.policy_decode_tokens for prompt in answers.prompts)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_on_a_ray_worker_draws_the_same_samples(run_with_files, wide, tmp_path):
    ray = pytest.importorskip("ray")
    asked = ("--prompts", wide.prompts, "--policy", wide.policy, "--n", 3, "--max-new-tokens", 6, *FLAGS)
    drawn = []
    for name, where in (("alone", ()), ("ray", ("--ray", "local"))):
        code, _, err = run_with_files("pool", tmp_path / name, *asked, "--name", "base", *where)
        assert code == 0, err
        assert ("ray: worker at" in err) == bool(where)
        drawn.append(
            {prompt.prompt_id: [s.token_ids for s in prompt.samples] for prompt in read_pool(tmp_path / name).prompts}
        )
    assert drawn[0] == drawn[1]
    assert not ray.is_initialized()


@pytest.mark.parametrize("other", ["vllm", "transformers"])
def test_policies_on_two_engines_are_noted(run, wide, tmp_path, monkeypatch, other):
    monkeypatch.setattr("iama.models.vllm.find_spec", lambda _: True)  # nothing is sampled
    file = config(wide, tmp_path)
    raw = yaml.safe_load(file.read_text())
    raw["policies"] |= {"other": {"path": str(wide.policy), "engine": other}}
    file.write_text(yaml.safe_dump(raw))
    code, _, err = run("evaluate", "--config", file, "--dry-run")
    assert code == 0, err
    told = "base by vllm, other by transformers: seconds and memory compare engines, and not policies"
    assert (told in err) == (other == "transformers")


@pytest.mark.parametrize("method", ["sea()", "ggro()", "args()"])
def test_methods_that_steer_the_policy_are_refused_in_the_plan(run, wide, tmp_path, method):
    code, _, err = run("evaluate", "--config", config(wide, tmp_path, methods=[method]), "--dry-run")
    assert (code, err.count("\n")) == (2, 1)
    assert f"methods, policies.base: method {method!r} needs this package's own engine; write engine: transf" in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--engine", "vlm"), "engine: Input should be 'transformers' or 'vllm' (got 'vlm')"),
        (("--vllm", "max_model_len=64"), "--vllm has no use with --engine transformers; write --engine vllm, or"),
        (("--engine", "vllm", "--vllm", "seed=3"), "unknown key 'vllm.seed'"),
        (("--engine", "vllm", "--vllm", "enforce_eager"), "--vllm 'enforce_eager': write KEY=VALUE, e.g. gpu_memory"),
        (("--engine", "vllm", "--device", "cpu"), "device 'cpu' has no use with --engine vllm"),
        (("--engine", "vllm", "--method", "ggro()"), "method 'ggro()' needs this package's own"),
    ],
)
def test_what_does_not_go_together_is_one_line(run, tiny, flags, told):
    method = () if "--method" in flags else ("--method", "bon", "--n", 2)
    code, _, err = run("generate", "--policy", tiny.policy, "--reward", tiny.reward, "--prompt", "a", *method, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert told in err


def test_training_leaves_vllm_to_trl(tmp_path):
    from iama.config.files import TrainingConfig
    from iama.config.schema import validate
    from iama.errors import ConfigError

    raw = {"name": "x", "output_dir": "x", "policy": {"path": "p"}, "prompts": "p.jsonl"}
    raw["objective"] = {"criteria": [{"name": "a", "proxy": {"model": "r", "engine": "vllm"}}]}
    with pytest.raises(ConfigError, match=r"proxy: engine: vllm is for evaluations; training scores with transformers"):
        validate(raw, TrainingConfig, "file")
    raw["objective"] = {"criteria": [{"name": "a", "proxy": {"model": "r"}}]}
    raw["policy"] = {"path": "p", "engine": "vllm"}
    with pytest.raises(ConfigError, match=r"for roll-outs write trainer.use_vllm: true"):
        validate(raw, TrainingConfig, "file")
