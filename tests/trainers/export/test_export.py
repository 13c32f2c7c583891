"""Exports: adapters that PEFT loads, merged models that equal base + adapter, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from iama.config.manifest import Manifest, ManifestCriterion, load_manifest
from iama.config.specs import EnsembleSpec, JudgeSpec, RewardSpec, Sampling
from iama.errors import ConfigError, ModelError, RunError
from iama.models.fingerprint import weights_revision
from iama.models.vllm import lora_objections
from tests.finished_runs import finished_run
from trainers.export.export import Names, export_run
from trainers.export.model_card import model_card
from trainers.export.publish import push


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A finished run's folder with an adapter that changes the logits."""
    return finished_run(tmp_path_factory.mktemp("export") / "run", tiny)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(7, 20)[None]).logits


def test_an_adapter_export_loads_in_peft(run, tiny, tmp_path):
    export_run(run, tmp_path / "out", merge=False, names=Names("org/base"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in (tmp_path / "out" / "README.md").read_text()
    assert load_manifest(tmp_path / "out").criteria[0].operator == "bon(4)"
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.policy), run / "adapter")
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.policy), tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(live), atol=0, rtol=0)


def test_a_merged_export_equals_base_and_adapter(run, tiny, tmp_path):
    export_run(run, tmp_path / "out", merge=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.policy), run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(tiny.policy)), atol=1e-2)
    assert load_manifest(tmp_path / "out").base_model == str(tiny.policy)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_half_precision_base_is_merged_without_rounding(run, tiny, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny.policy, dtype=torch.bfloat16).save_pretrained(half)
    moved = shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((moved / "adapter" / "iama.json").read_text()) | {"base_model": str(half)}
    (moved / "adapter" / "iama.json").write_text(json.dumps(manifest))
    export_run(moved, tmp_path / "out", merge=True)
    base = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no finished run"):
        export_run(tmp_path, tmp_path / "out", merge=False)


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty"):
        export_run(run, tmp_path, merge=False)
    assert [item.name for item in tmp_path.iterdir()] == ["precious.txt"]


def test_a_killed_export_is_done_again(run, tmp_path):
    shutil.copytree(run, tmp_path / ".out.tmp")
    export_run(run, tmp_path / "out", merge=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / ".out.tmp").exists()


def write_summary(folder: Path, run: Path, gold: float | None = 0.25, **policy: object) -> Path:
    """What an evaluation of a base, linear GRPO and IAMA leaves behind, as far as a card reads it."""
    values = {"iama": gold, "base": 0.5, "grpo": 0.75}
    rows = [
        {"policy": policy, "criterion": "helpful", "method": "bon", "samples": n, "gold": value, "proxy": 2.0 + n}
        for policy, value in values.items()
        for n in (1, 4)
    ]
    folder.mkdir()
    trained = policy or {"path": "base", "adapter": str(run / "adapter")}
    config = {"policies": {"iama": trained, "base": {"path": "base"}}}
    summary = {"curves": rows, "trained": "iama", "references": ["base", "grpo"], "num_prompts": 32, "config": config}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def card(folder: Path) -> list[str]:
    """Lines of a card behind its front matter."""
    return (folder / "README.md").read_text().split("---\n", 2)[2].splitlines()


def test_the_cards_first_line_is_quality_without_a_sampler(run, tmp_path):
    evaluation = write_summary(tmp_path / "evaluation", run)
    notes = export_run(run, tmp_path / "out", merge=False, evaluation=evaluation)
    assert card(tmp_path / "out")[0] == (
        "**Without a sampler** (one sample, mean gold reward, 32 prompts): helpful 0.250 (the untrained base 0.500, "
        "linear GRPO 0.750). Where that is below the base, do not serve this model without its sampler."
    )
    assert not any("--evaluation" in note for note in notes)


def test_without_gold_the_card_tells_the_proxy(run, tmp_path):
    evaluation = write_summary(tmp_path / "evaluation", run, gold=None)
    export_run(run, tmp_path / "out", merge=False, evaluation=evaluation)
    assert "mean proxy reward, 32 prompts): helpful 3.000" in card(tmp_path / "out")[0]


def test_without_an_evaluation_the_card_says_that_nothing_was_measured(run, tmp_path):
    notes = export_run(run, tmp_path / "out", merge=False)
    assert card(tmp_path / "out")[0].startswith("**Quality without a sampler was not measured.**")
    assert any("--evaluation" in note for note in notes)


def test_an_evaluation_without_the_trained_policy_says_so(run, tmp_path):
    evaluation = write_summary(tmp_path / "evaluation", run)
    path = evaluation / "summary.json"
    path.write_text(path.read_text().replace('"policies": {"iama"', '"policies": {"mine"'))
    told = r"evaluated no policy 'iama', which .* but 'mine', 'base'; set `trained:` there to"
    with pytest.raises(RunError, match=told):
        export_run(run, tmp_path / "out", merge=False, evaluation=evaluation)


def test_an_evaluation_of_other_criteria_is_refused_before_anything_is_written(run, tmp_path):
    evaluation = write_summary(tmp_path / "evaluation", run)
    path = evaluation / "summary.json"
    path.write_text(path.read_text().replace("helpful", "brief"))
    with pytest.raises(RunError, match="no single sample of 'iama' for the criterion 'helpful'"):
        export_run(run, tmp_path / "out", merge=False, evaluation=evaluation)
    with pytest.raises(RunError, match=r"holds no summary\.json"):
        export_run(run, tmp_path / "out", merge=False, evaluation=tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_another_model_is_refused(run, tiny, tmp_path):
    """What counts is which weights were evaluated, not where they lie or what the policy is called."""
    export_run(run, tmp_path / "exported", merge=False)
    merged = tmp_path / "merged"
    export_run(run, merged, merge=True)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    weights = other / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    base, adapter = str(tiny.policy), str(run / "adapter")
    specialist = {"helpful": {"adapter": str(other / "adapter")}}
    cases = {
        "copy": ({"path": base, "adapter": str(tmp_path / "exported")}, True),
        "merged": ({"path": str(merged), "adapter": None, "training_run": []}, True),
        "pool": ({"pool": "iama.jsonl", "training_run": [str(run / "adapter" / "..")]}, True),
        "other adapter": ({"path": base, "adapter": str(other / "adapter"), "training_run": [str(run)]}, False),
        "specialist": ({"path": base, "adapter": adapter, "by_criterion": specialist}, False),
        "base": ({"path": base, "training_run": [str(run)]}, False),
        "nameless pool": ({"pool": "iama.jsonl"}, False),
    }
    for name, (policy, is_this) in cases.items():
        evaluation = write_summary(tmp_path / f"evaluation {name}", run, **policy)
        refusal = pytest.raises(RunError, match=r"which is not what .* trained; give an evaluation with the adapter")
        with nullcontext() if is_this else refusal:
            export_run(run, tmp_path / f"out {name}", merge=False, evaluation=evaluation)
        assert (tmp_path / f"out {name}").exists() == is_this


def test_public_names_are_those_that_the_manifest_tells_wherever_it_is_exported(run, tmp_path, monkeypatch):
    """Relative paths of the training's folder name nothing here, and a hub's name is a folder here."""
    judge = JudgeSpec(
        url="http://gpu7.corp:8000/v1", model="/secret/judge", prompt_file="secret/ask.txt", cache="secret/c"
    )
    members = (RewardSpec(model="secret/rm-b"), RewardSpec(model="org/rm-c"), RewardSpec(kind="secret/rules.py:Brief"))
    rewards = {
        "local": (RewardSpec(model="secret/rm-a"), {"reward_revision": "a" * 32}),
        "hub": (RewardSpec(model="org/rm"), {"reward_revision": "b" * 40}),
        "unknown": (RewardSpec(model="secret/rm-u"), {}),
        "file": (RewardSpec(function="secret/rules.py:brief"), {}),
        "module": (RewardSpec(function="package.module:brief"), {}),
        "kind": (RewardSpec(kind="secret/rules.py:Brief(data=secret/d.json, url='http://corp/v1', target=10)"), {}),
        "named": (RewardSpec(kind="brevity(target=10)"), {}),
        "judge": (RewardSpec(judge=judge), {}),
        "ensemble": (
            RewardSpec(ensemble=EnsembleSpec(members=members, same_scale=True)),
            {"member_revisions": ("a" * 32, "b" * 40)},
        ),
    }
    criteria = [
        ManifestCriterion(name=name, operator="bon(4)", weight=1.0, reward=reward, **more)
        for name, (reward, more) in rewards.items()
    ]
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    recorded = load_manifest(run / "adapter").model_copy(update={"base_model": "secret/base", "criteria": criteria})
    (moved / "adapter" / "iama.json").write_text(recorded.model_dump_json())
    (tmp_path / "here" / "org" / "rm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    export_run(moved, tmp_path / "out", merge=False, names=Names("org/base"))
    for file in (tmp_path / "out").iterdir():
        for word in (b"secret/", b"corp"):
            assert word not in file.read_bytes(), file.name
    public = {c.name: c.reward for c in load_manifest(tmp_path / "out").criteria}
    assert [public[name].model for name in ("local", "hub", "unknown")] == ["rm-a", "org/rm", "rm-u"]
    assert [public[name].function for name in ("file", "module")] == ["rules.py:brief", "package.module:brief"]
    assert [member.model or member.kind for member in public["ensemble"].parts] == [
        "rm-b",
        "org/rm-c",
        "rules.py:Brief",
    ]
    kinds = ["rules.py:Brief(data=d.json, url=v1, target=10)", "brevity(target=10)"]
    assert [public[name].kind for name in ("kind", "named")] == kinds
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| `{kind}` |" in card for kind in kinds)
    assert (public["judge"].judge.prompt_file, public["judge"].judge.model) == ("ask.txt", "judge")


def test_a_base_with_code_of_its_own_is_merged(tiny, tmp_path):
    """Who merges says that the code may run: an iama.json, which may come from elsewhere, does not suffice."""
    base = Path(shutil.copytree(tiny.policy, tmp_path / "base"))
    (base / "own_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnLlama(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnLlama"}
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own_llama", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    folder = tmp_path / "run" / "adapter"
    get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(folder)
    criterion = ManifestCriterion(name="a", operator="identity", weight=1.0, reward=RewardSpec(function="m:f"))
    told = Manifest(
        base_model=str(base), criteria=[criterion], estimator="auto", sampling=Sampling(), seed=0, versions={}
    )
    for trusted in (False, True):
        (folder / "iama.json").write_text(told.model_copy(update={"trust_remote_code": trusted}).model_dump_json())
        with pytest.raises(ModelError, match=r"base_model in .* brings code of its own, .*--trust-remote-code"):
            export_run(tmp_path / "run", tmp_path / "out", merge=True)
    export_run(tmp_path / "run", tmp_path / "out", merge=True, trust_remote_code=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(merged).__name__ == "OwnLlama"


@pytest.mark.parametrize("merge", [False, True])
def test_under_public_names_no_path_of_this_machine_is_left(run, tiny, tmp_path, merge):
    export_run(run, tmp_path / "out", merge=merge, names=Names("org/base", {"helpful": "org/helpful-rm"}))
    home = str(tiny.policy.parent)
    for file in (tmp_path / "out").iterdir():
        assert home.encode() not in file.read_bytes(), file.name
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.base_model, manifest.criteria[0].reward.model) == ("org/base", "org/helpful-rm")


def test_a_reward_without_a_public_name_keeps_its_last_part(run, tiny, tmp_path):
    export_run(run, tmp_path / "out", merge=False, names=Names("org/base"))
    assert load_manifest(tmp_path / "out").criteria[0].reward.model == tiny.reward.name


def test_names_of_no_criterion_or_without_a_base_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="--reward-name brief=org/rm: no such criterion"):
        export_run(run, tmp_path / "out", merge=False, names=Names("org/base", {"brief": "org/rm"}))
    with pytest.raises(ConfigError, match="goes with --base-model"):
        export_run(run, tmp_path / "out", merge=False, names=Names(None, {"helpful": "org/rm"}))


def test_a_reference_adapter_is_left_behind(run, tmp_path):
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copytree(moved / "adapter", moved / "adapter" / "ref")
    export_run(moved, tmp_path / "out", merge=False)
    assert not any(item.is_dir() for item in (tmp_path / "out").iterdir())


def test_the_adapter_keeps_vllms_contract_of_files(run, tmp_path):
    export_run(run, tmp_path / "out", merge=False)
    assert lora_objections(tmp_path / "out") == []
    path = tmp_path / "out" / "adapter_config.json"
    spoiled = {"r": 1024, "bias": "all", "use_dora": True, "modules_to_save": ["lm_head"]}
    spoiled |= {"lora_bias": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 2}}
    path.write_text(json.dumps(json.loads(path.read_text()) | spoiled))
    told = "; ".join(lora_objections(tmp_path / "out"))
    for word in ("rank 1024", "bias is 'all'", "DoRA", "lm_head", "lora_bias", "rank_pattern", "alpha_pattern"):
        assert word in told


def test_a_push_that_fails_keeps_the_export(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export_run(run, tmp_path / "out", merge=False, names=Names("org/base"))
    with pytest.raises(RunError, match=r"--push-to-hub org/name: .*the export is whole"):
        push(tmp_path / "out", "org/name", private=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_push_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "none")
    with pytest.raises(RunError, match=r"--push-to-hub org/name: .*refused.*the export is whole") as caught:
        push(tmp_path, "org/name", private=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no", "a: b", "#1", "- x", "it's", '"q"', "1.5", "null", "a/b", "x" * 200, "é"])
def test_a_card_is_yaml_whatever_the_base_is_called(name):
    criterion = ManifestCriterion(name="a|b", operator="bon(2)", weight=1.0, reward=RewardSpec(function="m:f"))
    told = Manifest(base_model=name, criteria=[criterion], estimator="auto", sampling=Sampling(), seed=0, versions={})
    for merged in (True, False):
        card = model_card(told, merged)
        header = yaml.safe_load(card.split("---\n")[1])
        assert header["base_model"] == name
        assert header["tags"] == ["iama", "lora", "inference-time-alignment"]
        assert header.get("library_name") == (None if merged else "peft")
        assert "| a\\|b | `bon(2)` |" in card
        assert "no sampler" not in card
        assert "Dirichlet" not in card


def test_a_card_says_what_its_table_cannot():
    criterion = ManifestCriterion(name="a", operator="entropic(2)", weight=1.0, reward=RewardSpec(function="m:f"))
    told = Manifest(base_model="b", criteria=[criterion], estimator="auto", sampling=Sampling(), seed=0, versions={})
    card = model_card(told.model_copy(update={"weights": "simplex"}), merged=True)
    assert "| a | `soft_bon(16, 0.5)` |" in card
    assert "\n\na was trained for `entropic(2)`: what training assumed, and no sampler; the table" in card
    assert "Training ranked a group by the weighted sum of a" in card
    assert "\n\nWeights were drawn for each group" in card


def test_a_base_that_was_changed_after_training_is_not_merged(run, tiny, tmp_path):
    """A mended tokenizer or configuration is no other base; a run of before this was recorded merges."""
    base = Path(shutil.copytree(tiny.policy, tmp_path / "base"))
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = load_manifest(moved / "adapter").model_copy(update={"base_model": str(base)})
    for recorded in (None, weights_revision(str(base))):
        told = manifest.model_copy(update={"base_revision": recorded})
        (moved / "adapter" / "iama.json").write_text(told.model_dump_json())
        (base / "generation_config.json").write_text("{}")
        export_run(moved, tmp_path / f"out-{recorded}", merge=True)
    weights = load_file(base / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"base_model in .*iama\.json: the weights in '.*/base' are not those that the"):
        export_run(moved, tmp_path / "other", merge=True)
    assert not (tmp_path / "other").exists()
    export_run(moved, tmp_path / "adapter-alone", merge=False)


def test_a_base_with_an_adapter_beside_it_is_not_merged(run, tiny, tmp_path):
    """transformers would put that adapter on it, and the run's on top."""
    base = Path(shutil.copytree(tiny.policy, tmp_path / "base"))
    shutil.copy(run / "adapter" / "adapter_config.json", base)
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = load_manifest(moved / "adapter").model_copy(update={"base_model": str(base)})
    (moved / "adapter" / "iama.json").write_text(manifest.model_dump_json())
    with pytest.raises(ModelError, match=r"holds a whole model and adapter_config\.json"):
        export_run(moved, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
