"""Training that goes on from an adapter: `policy.adapter` gives the first weights, and the base stays the reference.

The adapter may come from another training of this kind, from TRL's SFTTrainer or from whatever else PEFT saves. It is
copied into the adapter that is trained, so `lora` must describe one of the same kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, load_peft_weights, set_peft_model_state_dict

from iama.errors import ConfigError, RunError
from iama.models.loading import check_adapter_folder, loading, warn_of_other_base
from trainers.run.adapter import check_adapter, expected_shapes

SAME = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Fields of LoRA that say what an adapter's matrices mean. Which layers have some, the matrices themselves tell."""


def check_start(adapter: str, base: str, lora: LoraConfig, source: str) -> None:
    """Refuse a start that is no LoRA adapter, or not of the kind that `lora` trains; nothing heavy is read.

    Warns where it was trained on other weights than the base's.
    """
    check_adapter_folder(Path(adapter), f"{source}: policy.adapter")
    with loading(adapter, f"{source}: policy.adapter"):
        found: Any = PeftConfig.from_pretrained(adapter)
    if not isinstance(found, LoraConfig):
        kind = getattr(found.peft_type, "value", found.peft_type)
        raise ConfigError(f"{source}: policy.adapter {adapter!r} is of the kind {kind}; training starts from LoRA only")
    for name in SAME:
        wanted, own = getattr(lora, name), getattr(found, name)
        if wanted != own:
            raise ConfigError(
                f"{source}: policy.adapter {adapter!r} has {name} {own!r}, and lora.{name} is {wanted!r}; "
                f"write lora.{name}: {own!r}"
            )
    warn_of_other_base(base, adapter, f"{source}: policy.adapter")


def start_from(model: Any, adapter: str) -> None:
    """Give the adapter that is trained the weights of a saved one; `ConfigError` where they are of other layers."""
    try:
        check_adapter(Path(adapter), expected_shapes(model), trained=False)
    except RunError as error:
        raise ConfigError(
            f"policy.adapter does not fit what `lora` trains: {error}; write into lora.target_modules what "
            f"{Path(adapter) / 'adapter_config.json'} names"
        ) from error
    set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
