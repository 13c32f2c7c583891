"""Rewarded soups: the LoRA weights of two specialists, interpolated.

What is interpolated is the change that each adapter makes to the base, `w B1 A1 + (1 - w) B2 A2`: exactly, as an
adapter of twice the rank (PEFT's `cat`). Averaging A and B separately would be another model.
Source: Rame et al. 2023, *Rewarded soups*.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from iama.files import temporary_name
from iama.models.fingerprint import fingerprint
from scripts.experiments.pools import quieten

NOTE = "soup.txt"


def mix_adapters(base: Path, adapters: Sequence[Path], weights: Sequence[float], out: Path) -> Path:
    """Write the adapter `sum_i weights[i] * adapters[i]` to `out`, unless that very adapter is there."""
    note = "\n".join(f"{weight} {fingerprint(folder)}" for folder, weight in zip(adapters, weights, strict=True))
    if (out / NOTE).is_file() and (out / NOTE).read_text(encoding="utf-8") == note:
        return out
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    quieten()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    names = [f"part-{i}" for i in range(len(adapters))]
    mixed = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        mixed.load_adapter(folder, adapter_name=name)
    mixed.add_weighted_adapter(names, list(weights), adapter_name="soup", combination_type="cat")
    temporary = temporary_name(out)
    shutil.rmtree(temporary, ignore_errors=True)
    mixed.save_pretrained(temporary, selected_adapters=["soup"])
    shutil.rmtree(out, ignore_errors=True)
    (temporary / "soup" / NOTE).write_text(note, encoding="utf-8")
    (temporary / "soup").replace(out)
    shutil.rmtree(temporary)
    return out
