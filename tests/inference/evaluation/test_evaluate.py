from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iama.config.files import EvaluationConfig
from iama.config.schema import validate
from iama.errors import ConfigError, DataError, IamaError, ModelError, RewardError, RunError
from inference.evaluation.compare import combine_runs
from inference.evaluation.plan import make_plan
from inference.evaluation.question import Question
from inference.evaluation.summary import load_summary
from inference.evaluation.tables import load_tables
from inference.pools import engines
from inference.pools.file import read_pool
from inference.statistics.costs import UNITS
from tests.inference.evaluation.running import evaluate


def pool_of(config: EvaluationConfig, name: str) -> Path:
    (path,) = (Path(config.output_dir) / "pools").glob(f"{name}-*.jsonl")
    return path


def without_clock(value):
    """A summary without what a stopwatch or the operating system measured."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in ("seconds", "seconds_ratio", "peak_memory")}
    if isinstance(value, list):
        return [without_clock(item) for item in value if not (isinstance(item, dict) and item.get("unit") == "seconds")]
    return value


def changed(config: EvaluationConfig, **changes) -> EvaluationConfig:
    return EvaluationConfig.model_validate(config.model_dump(exclude_unset=True) | changes)


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """How many prompts each call of the engine was asked to sample."""
    asked = []
    real = engines.iter_decode

    def counted(policy, prompts_ids, *args, **kwargs):
        asked.append(len(prompts_ids))
        return real(policy, prompts_ids, *args, **kwargs)

    monkeypatch.setattr(engines, "iter_decode", counted)
    return asked


@pytest.mark.slow
def test_summary_has_the_agreed_shape(config):
    summary = evaluate(config)
    stored = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert stored == json.loads(json.dumps(summary)) == load_summary(Path(config.output_dir))
    assert len(stored["curves"]) == 3 * 2 * 2 * 3  # policies, criteria, methods, budgets
    row_keys = {"policy", "criterion", "method", "samples", "proxy", "gold", "proxy_ci95", "gold_ci95", "kl", "kl_kind"}
    assert {*row_keys, *UNITS, "num_prompts"} == set(stored["curves"][0])
    assert len(stored["savings"]) == 2 * 2 * 2 * 2  # criteria, methods, metrics, references
    saving_keys = {"criterion", "method", "metric", "reference", "samples", "ratio", "ci95", "censored"}
    assert saving_keys <= set(stored["savings"][0])
    assert set(stored["quality"]) == {"base", "grpo", "iama"}
    assert {"without", "with"} <= set(stored["quality"]["iama"]["brief"])
    assert not list(Path(config.output_dir).rglob("*.tmp"))


@pytest.mark.slow
def test_identical_policies_save_nothing(config):
    summary = evaluate(config)
    tables = load_tables(Path(config.output_dir))
    for row in summary["savings"]:
        key = (row["criterion"], row["method"], row["metric"])
        np.testing.assert_array_equal(tables.values["base", *key], tables.values["grpo", *key])
    same = {**config.policies, "iama": config.policies["base"]}
    summary = evaluate(changed(config, policies=same, output_dir=config.output_dir + "-same"))
    for row in summary["savings"]:
        if row["metric"] == "proxy":  # a gold curve need not rise, so another n may reach its value first
            assert row["ratio"] == pytest.approx(1)
            assert row["ci95"] == pytest.approx([1, 1])
    assert all(row["mean"] == 0 for row in summary["differences"])


@pytest.mark.slow
def test_curves_equal_a_direct_computation(config):
    summary = evaluate(config)
    pool = read_pool(pool_of(config, "base"))
    mean_brief = np.mean([[-len(text) for text in texts] for texts in pool.texts])
    row = next(r for r in summary["curves"] if (r["policy"], r["criterion"], r["samples"]) == ("base", "brief", 1))
    assert row["proxy"] == pytest.approx(mean_brief)
    prefill = np.mean([prompt.cost.policy_prefill_tokens for prompt in pool.prompts])
    fed_back = np.mean([[s.num_tokens - 1 for s in prompt.samples] for prompt in pool.prompts])
    assert row["policy_tokens"] == pytest.approx(prefill + fed_back)


@pytest.mark.slow
def test_each_distinct_text_is_scored_once_per_reward(config):
    summary = evaluate(config)
    rows = {}
    for name in config.policies:
        for prompt in read_pool(pool_of(config, name)).prompts:
            rows.setdefault(prompt.prompt_id, set()).update(s.text for s in prompt.samples)
    distinct = sum(map(len, rows.values()))
    assert [row["reward_calls"] for row in summary["costs"]] == [distinct] * 4


@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_gives_the_same(config, sampled):
    first = evaluate(config)
    assert sampled == [4, 4, 4]
    pool = pool_of(config, "iama")
    lines = pool.read_bytes().splitlines(keepends=True)
    block = 1 + config.num_samples
    pool.write_bytes(b"".join(lines[: 1 + 2 * block + 5]) + lines[40][:40])  # killed while writing the third block
    for scores in (Path(config.output_dir) / "scores").iterdir():
        scores.write_bytes(scores.read_bytes()[:-30])
    second = evaluate(config)
    assert sampled == [4, 4, 4, 2]
    assert without_clock(second) == without_clock(first)
    evaluate(config)
    assert len(sampled) == 4  # nothing was left to sample


@pytest.mark.slow
def test_other_settings_never_mix_with_an_old_pool(config, sampled):
    def killed(settings: EvaluationConfig) -> None:
        evaluate(settings)
        (Path(config.output_dir) / "summary.json").unlink()

    killed(config)
    killed(changed(config, seed=1))
    killed(changed(config, sampling={"max_new_tokens": 8}))
    assert sampled == [4] * 9
    killed(config)
    two = {**config.prompts.model_dump(), "max_prompts": 2}
    killed(changed(config, prompts=two, batch_size=7))  # neither changes what a prompt's samples are
    assert sampled == [4] * 9


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "other"}, "name was 'tiny', is 'other'"),
        ({"seed": 1, "num_bootstrap": 200}, "num_bootstrap was 100, is 200; seed was 0, is 1"),
        ({"budgets": [1, 2]}, r"budgets was \[1, 2, 4\], is \[1, 2\]"),
        ({"sampling": {"max_new_tokens": 8}}, "sampling.max_new_tokens was 12, is 8"),
        ({"trained": "grpo"}, "trained was 'iama', is 'grpo'"),
    ],
)
@pytest.mark.slow
def test_results_of_another_configuration_are_not_overwritten(config, changes, told):
    evaluate(config)
    path = Path(config.output_dir) / "summary.json"
    before = path.read_bytes()
    with pytest.raises(
        RunError, match=f"holds another evaluation \\({told}\\); delete its summary\\.json to replace it, or"
    ):
        evaluate(changed(config, **changes))
    assert path.read_bytes() == before
    evaluate(EvaluationConfig.model_validate(config.model_dump()))


@pytest.mark.slow
def test_a_policy_or_criterion_more_or_less_is_another_configuration(config):
    evaluate(config)
    fewer = {name: spec for name, spec in config.policies.items() if name != "grpo"}
    with pytest.raises(RunError, match=r"policies\.grpo\.path was '.*', is '\(not set\)'; .*; \.\.\.\); delete"):
        evaluate(changed(config, policies=fewer))
    with pytest.raises(RunError, match=r"criteria\.1\.name was 'brief', is '\(not set\)'"):
        evaluate(changed(config, criteria=config.model_dump()["criteria"][:1]))


def test_a_retrained_adapter_is_sampled_again(config, sampled, adapter_dir, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "adapter"
    shutil.copytree(adapter_dir, copy)
    policies = {"iama": config.policies["base"].model_copy(update={"adapter": str(copy)})}
    config = config.model_copy(update={"policies": policies})
    evaluate(config)
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, copy / "adapter_model.safetensors")
    evaluate(config)
    assert sampled == [4, 4]


@pytest.mark.slow
def test_order_and_batch_size_do_not_matter(config, tmp_path):
    lines = Path(config.prompts.path).read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(lines)))
    first = evaluate(config)
    second = evaluate(changed(config, prompts=str(turned), batch_size=50, output_dir=str(tmp_path / "turned")))
    for one, two in zip(first["curves"], second["curves"], strict=True):
        assert one["proxy"] == pytest.approx(two["proxy"], abs=1e-4)
        assert one["policy_tokens"] == pytest.approx(two["policy_tokens"])


@pytest.mark.slow
def test_seeds_are_combined_from_their_folders(config):
    folders = []
    for seed in (0, 1):
        folders.append(Path(config.output_dir + str(seed)))
        evaluate(changed(config, seed=seed, output_dir=str(folders[-1])))
    one = combine_runs(folders[:1], Question(2, num_bootstrap=config.num_bootstrap))
    assert one["savings"] == load_summary(folders[0])["savings"]
    both = combine_runs(folders, Question(2))
    singles = [combine_runs([folder], Question(2))["savings"] for folder in folders]
    for row, first, second in zip(both["savings"], *singles, strict=True):
        assert row["num_seeds"] == 2
        assert row["ratio"] == pytest.approx((first["ratio"] * second["ratio"]) ** 0.5)
    other = Path(config.output_dir + "other")
    evaluate(changed(config, methods=["bon"], output_dir=str(other)))
    with pytest.raises(RunError, match="other policies, criteria"):
        combine_runs([folders[0], other], Question(2))


def test_gold_is_optional_and_policies_may_have_any_name(config):
    criteria = [criterion.model_copy(update={"gold": None}) for criterion in config.criteria]
    policies = {"mine/v2": config.policies["base"]}
    summary = evaluate(config.model_copy(update={"criteria": criteria, "policies": policies}))
    assert summary["savings"] == []
    assert {row["gold"] for row in summary["curves"]} == {None}
    assert summary["quality"]["mine/v2"]["brief"]["without"] is None


class TestBadInput:
    """Each is refused in one line, before anything is sampled."""

    @pytest.fixture(autouse=True)
    def _nothing_is_sampled(self, sampled):
        yield
        assert sampled == []

    def test_prompt_longer_than_the_context(self, config):
        with pytest.raises(DataError, match=r"prompt 1 .*max_new_tokens = 200 it exceeds the 128 tokens"):
            evaluate(changed(config, sampling={"max_new_tokens": 200}))

    def test_empty_prompts(self, config, tmp_path):
        (tmp_path / "none.jsonl").write_text("")
        with pytest.raises(DataError, match="no prompts"):
            evaluate(changed(config, prompts=str(tmp_path / "none.jsonl")))

    def test_missing_policy(self, config):
        broken = {**config.policies, "iama": {"path": "./nowhere"}}
        with pytest.raises(ModelError, match=r"policy 'iama'.*'./nowhere' does not exist"):
            evaluate(changed(config, policies=broken))

    def test_two_outputs_and_no_head(self, config, tiny):
        criteria = [{"name": "c", "proxy": {"model": str(tiny.two_headed_reward)}}]
        with pytest.raises(RewardError, match="head"):
            evaluate(changed(config, criteria=criteria))

    @pytest.mark.parametrize("name", ["policies", "methods", "budgets", "criteria"])
    def test_nothing_to_evaluate(self, config, name):
        with pytest.raises(ConfigError, match=f"{name}: must not be empty"):
            validate(config.model_dump() | {name: {} if name == "policies" else []}, EvaluationConfig, "test")

    @pytest.mark.parametrize("role", ["proxy", "gold"])
    @pytest.mark.parametrize(
        ("broken", "message"),
        [({"model": "./gone"}, r"'\./gone' does not exist"), ({"function": "gone.py:f"}, "cannot import function")],
    )
    def test_rewards_are_checked_before_policies_are_read(self, config, monkeypatch, role, broken, message):
        monkeypatch.setattr("inference.evaluation.sources.read_policy_files", None)
        criteria = config.model_dump()["criteria"]
        criteria[1][role] = broken
        with pytest.raises(IamaError, match=f"'brief \\({role}\\)'.*{message}"):
            make_plan(changed(config, criteria=criteria))

    def test_folder_of_another_run(self, config):
        folder = Path(config.output_dir)
        folder.mkdir()
        for content in ('{"name": "older"}', "[1]", "{"):
            (folder / "summary.json").write_text(content)
            with pytest.raises(RunError, match=r"summary\.json:.* no evaluation's, or damaged"):
                evaluate(config)
            assert (folder / "summary.json").read_text() == content
        (folder / "summary.json").unlink()
        (folder / "metrics.jsonl").write_text("")
        with pytest.raises(RunError, match="training run"):
            evaluate(config)


@pytest.mark.slow
def test_nan_from_a_reward(config, gold_file):
    criteria = [{"name": "c", "proxy": {"function": f"{gold_file}:broken"}}]
    with pytest.raises(RewardError, match=r"criterion 'c': only 0 of the 16 samples of policy 'base' .* have a score"):
        evaluate(changed(config, criteria=criteria))
    with pytest.raises(RewardError, match=r"method 'cards': not one of 64 samples has a proxy score"):
        evaluate(changed(config, criteria=criteria, methods=["cards"]))


@pytest.mark.slow
def test_a_damaged_pool_is_refused(config):
    evaluate(config)
    pool = pool_of(config, "base")
    lines = pool.read_bytes().splitlines(keepends=True)
    pool.write_bytes(lines[0] + b"nonsense\n" + b"".join(lines[1:]))
    with pytest.raises(DataError, match=r"base-\w+\.jsonl:2: not JSON"):
        evaluate(config)


@pytest.mark.parametrize("name", ["summary.json", "prompt_values.npz"])
def test_unfinished_or_damaged_results_are_refused(tmp_path, name):
    read = load_summary if name == "summary.json" else load_tables
    with pytest.raises(RunError, match="iama evaluate"):
        read(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(RunError, match="damaged"):
        read(tmp_path)
