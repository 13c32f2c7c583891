"""vLLM through the commands: pools, evaluations, answers, and what is refused in one line."""

from __future__ import annotations

import json

import pytest
import yaml

from inference.pools.file import read_pool

QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
FLAGS = ("--engine", "vllm", "--vllm", "enforce_eager=true", "--vllm", f"kv_cache_memory_bytes={2**28}")


def config(wide, folder, **changes):
    """A file of an evaluation whose policy and proxy run on vLLM."""
    on_vllm = {"engine": "vllm", "vllm": QUICK}
    raw = {
        "name": "tiny",
        "output_dir": str(folder / "out"),
        "policies": {"base": {"path": str(wide.policy), **on_vllm}},
        "prompts": str(wide.prompts),
        "criteria": [
            {
                "name": "good",
                "proxy": {"model": str(wide.reward), **on_vllm},
                "gold": {"model": str(wide.two_headed_reward), "head": "good"},
            }
        ],
        "num_samples": 16,
        "trained_budget": 2,
        "num_bootstrap": 100,
        "sampling": {"max_new_tokens": 8},
        **changes,
    }
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(raw))
    return folder / "evaluation.yaml"


@pytest.mark.vllm
@pytest.mark.slow
def test_an_evaluation_on_vllm_keeps_its_engine_apart(run, wide, tmp_path):
    file = config(wide, tmp_path)
    code, _, err = run("evaluate", "--config", file)
    assert code == 0, err
    (path,) = (tmp_path / "out" / "pools").iterdir()
    header = read_pool(path).header
    assert (header["engine"], "vllm" in str(header["versions"])) == ("vllm", True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["policies"]["base"]["engine"] == "vllm"
    before = path.read_bytes()
    (tmp_path / "out" / "summary.json").unlink()
    code, _, err = run("evaluate", "--config", file)  # all is there
    assert (code, path.read_bytes() == before) == (0, True), err
    (tmp_path / "out" / "summary.json").unlink()
    ours = {"engine": "transformers", "vllm": {}}
    raw = yaml.safe_load(file.read_text())
    raw["policies"]["base"] |= ours
    raw["criteria"][0]["proxy"] |= ours
    file.write_text(yaml.safe_dump(raw))
    code, _, err = run("evaluate", "--config", file)
    assert code == 0, err
    assert sorted(read_pool(p).header["engine"] for p in path.parent.iterdir()) == ["transformers", "vllm"]


@pytest.mark.vllm
@pytest.mark.slow
def test_pools_tuning_and_answers_come_from_vllm(run, wide, tmp_path):
    pool = ("pool", tmp_path / "pool.jsonl", "--prompts", wide.prompts, "--policy", wide.policy, "--n", 4)
    code, _, err = run(*pool, "--max-new-tokens", 8, *FLAGS)
    assert code == 0, err
    assert read_pool(tmp_path / "pool.jsonl").header["engine"] == "vllm"
    code, _, err = run(*pool, "--max-new-tokens", 8)
    assert code == 2
    assert "holds other samples (engine was 'vllm', is 'transformers')" in err
    code, out, err = run("tune", "--config", config(wide, tmp_path), "--set", "num_samples=32", "--out", tmp_path / "t")
    assert code == 0, err
    assert "best by gold" in out
    asked = ("generate", "--policy", wide.policy, "--reward", wide.reward, "--prompt", "how to bake bread")
    for method in ("bon", "bop"):
        code, out, err = run(*asked, "--method", method, "--n", 4, "--max-new-tokens", 6, *FLAGS)
        assert (code, "candidates" in out) == (0, True), err
    code, out, err = run(*asked, "--method", "soft_bon(4, 0.5)", "--max-new-tokens", 6, *FLAGS)
    assert (code, "4 candidates" in out) == (0, True), err


@pytest.mark.parametrize("method", ["cards(target=1)", "ggro()", "args()"])
def test_methods_that_steer_the_policy_are_refused_in_the_plan(run, wide, tmp_path, method):
    code, _, err = run("evaluate", "--config", config(wide, tmp_path, methods=[method]), "--dry-run")
    assert (code, err.count("\n")) == (2, 1)
    assert f"methods, policies.base: method {method!r} needs this package's own engine; write engine: transf" in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--engine", "vlm"), "engine: Input should be 'transformers' or 'vllm' (got 'vlm')"),
        (("--vllm", "max_model_len=64"), "`vllm` has no use with engine: transformers; write engine: vllm, or drop"),
        (("--engine", "vllm", "--vllm", "seed=3"), "unknown key 'vllm.seed'"),
        (("--engine", "vllm", "--vllm", "enforce_eager"), "--vllm 'enforce_eager': write KEY=VALUE, e.g. gpu_memory"),
        (("--engine", "vllm", "--device", "cpu"), "device 'cpu' has no use with engine: vllm"),
        (("--engine", "vllm", "--method", "cards(target=1)"), "method 'cards(target=1)' needs this package's own"),
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
