"""What a model's generation_config.json asks for, of which only the end tokens are used."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from iama.config.files import SAMPLING_NAMES
from iama.config.specs import Sampling
from iama.errors import IamaWarning
from iama.models.loading import loading

PLAIN = {
    "max_length": 20,
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("length_penalty", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
}
"""Values that leave sampling as it is, where that is not None, 0 or nothing."""
NOT_SAMPLING = (
    *("do_sample", "use_cache", "cache_implementation", "return_dict_in_generate", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
)
NAMES = {**SAMPLING_NAMES, "max_length": "max_new_tokens", "stop_strings": "stop (not in training)"}
"""Where the advice is to write a setting."""


def check_generation_config(base: str, source: str, sampling: Sampling | None = None) -> None:
    """One `IamaWarning` that lists what a model's generation_config.json asks for and `sampling` does not say.

    Raises `ModelError` if the file is damaged: transformers would pass over it, and its end tokens would be lost.
    """
    file = Path(base) / "generation_config.json"
    try:
        with loading(str(file), source) if file.is_file() else nullcontext():
            settings = GenerationConfig.from_pretrained(base).to_diff_dict()
    except OSError:  # there is none
        return
    said = (sampling or Sampling()).model_dump(mode="json")
    unused = {
        key: value
        for key, value in settings.items()
        if _changes_sampling(key, value) and value != said.get(SAMPLING_NAMES.get(key, ""))
    }
    if unused:
        warnings.warn(
            f"{source}: of the generation_config.json in {base!r} only the end tokens are used, not "
            f"{', '.join(f'{key} {value}' for key, value in unused.items())}; {_advice(list(unused))}",
            IamaWarning,
            stacklevel=3,
        )


def end_token_ids(path: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a response: the tokenizer's end token and those of the model's generation config (TRL's rule)."""
    try:
        settings = GenerationConfig.from_pretrained(path)
    except OSError:  # there is none, and transformers makes one from the model's configuration
        settings = GenerationConfig.from_model_config(config)
    ids = settings.eos_token_id
    ends = {ids} if isinstance(ids, int) else set(ids or [])
    return frozenset(ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id})


def _changes_sampling(key: str, value: object) -> bool:
    """Whether a field may change what is sampled; a temperature of 0 does, a top_k of 0 does not."""
    if key.startswith(("_", "output_")) or key in NOT_SAMPLING or value is None:
        return False
    return value != PLAIN[key] if key in PLAIN else bool(value)


def _advice(keys: list[str]) -> str:
    """Where to write what can be had, and what cannot."""
    known = [f"sampling.{NAMES[key]}" for key in keys if key in NAMES]
    unknown = [key for key in keys if key not in NAMES]
    parts = [f"set {', '.join(known)} if that is wanted"] if known else []
    return "; ".join(parts + ([f"there is no setting for {', '.join(unknown)}"] if unknown else []))
