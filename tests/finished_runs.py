"""Folders of finished runs, without a training."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from iama.config.manifest import Manifest, ManifestCriterion
from iama.config.specs import RewardSpec, Sampling
from tests.conftest import Tiny


def finished_run(folder: Path, tiny: Tiny) -> Path:
    """With an adapter that changes the logits."""
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
