"""Exports: adapters that PEFT loads, merged models that equal base + adapter, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from iama.errors import RunError
from iama.manifest import Manifest, ManifestCriterion, load_manifest
from iama.specs import RewardSpec, Sampling
from trainers.export import export_run


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A finished run's folder with an adapter that changes the logits."""
    folder = tmp_path_factory.mktemp("export") / "run"
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.policy), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(folder / "adapter")
    criterion = ManifestCriterion(
        name="helpful", operator="bon(4)", weight=1.0, reward=RewardSpec(model=str(tiny.reward))
    )
    manifest = Manifest(
        base_model=str(tiny.policy),
        criteria=[criterion],
        estimator="auto",
        sampling=Sampling(max_new_tokens=8),
        seed=0,
        versions={},
    )
    (folder / "adapter" / "iama.json").write_text(manifest.model_dump_json())
    return folder


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(7, 20)[None]).logits


def test_an_adapter_export_loads_in_peft(run, tiny, tmp_path):
    export_run(run, tmp_path / "out", merge=False, base_model="org/base")
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
