"""Engines that draw samples for pools: this package's, OpenAI-compatible servers, and vLLM in this process."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from iama.config.specs import PolicySpec, Sampling
from iama.cost import Cost
from iama.errors import ConfigError, ModelError
from iama.machines import Spread, Work
from iama.prompts.conversations import render_prompts
from iama.prompts.data import PromptRows, with_system_prompt
from iama.prompts.render import Prompt
from iama.reading import read_object
from iama.rewards.judge import num_tokens
from iama.rewards.remote import ChatAnswer, ChatRequest, Endpoint
from iama.rewards.replies import well_formed
from inference.engine.decode import iter_decode
from inference.engine.policy import load_policy, read_policy_files, resolve_paths
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import Response, check_fit
from inference.engine.vocabulary import special_tokens
from inference.pools.file import prompt_ids
from inference.pools.journal import digest

Drawn: TypeAlias = Iterator[tuple[int, list[Response], Cost, bool]]
"""Prompts as they are done: (index, samples, cost, whether the cost is estimated)."""
Draw: TypeAlias = Callable[[PromptRows, Sequence[int]], Drawn]
"""An engine with its settings: from all rows and the indices of those to draw."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters that vLLM accepts."""
LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower ones to it."""
ROWS_AT_ONCE = 2048
"""Samples that vLLM is given together, so many as a kill can cost."""


def spread_draw(spread: Spread, begin: Callable[[], Draw]) -> Draw:
    """Draw with an engine that `begin` makes, wherever `spread` does it."""

    def draw(rows: PromptRows, indices: Sequence[int]) -> Drawn:
        for _, drawn in spread(partial(_drawing, begin, rows), indices):
            yield drawn

    return draw


def _drawing(begin: Callable[[], Draw], rows: PromptRows) -> Work[int, tuple[int, list[Response], Cost, bool]]:
    draw = begin()

    def work(indices: Sequence[int]) -> Iterator[tuple[int, tuple[int, list[Response], Cost, bool]]]:
        places = {index: place for place, index in enumerate(indices)}
        for drawn in draw(rows, indices):
            yield places[drawn[0]], drawn

    return work


def request_seed(seed: int, prompt_id: str) -> int:
    """A prompt's seed: 31 bits, so that repeated prompts and other seeds get other samples."""
    return int(digest([seed, prompt_id])[:8], 16) >> 1


# This package's engine. --------------------------------------------------------------------------------------------


def transformers_draw(
    policy_name: str,
    spec: PolicySpec,
    system_prompt: str | None,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    prompts_ids: Sequence[Sequence[int]] | None = None,
) -> Draw:
    """Draw with the engine of `inference.engine.decode`; the policy is loaded at the first draw.

    `prompts_ids` are the token ids of all rows' prompts, where they are known already.
    """
    loaded = cache(partial(load_policy, policy_name, spec, sampling))

    def draw(rows: PromptRows, indices: Sequence[int]) -> Drawn:
        policy = loaded()
        ids = prompts_ids or render_prompts(
            policy.tokenizer,
            [with_system_prompt(row["prompt"], system_prompt) for row in rows],
            policy.eos_token_ids,
            f"policy {policy_name!r}",
        )
        keys = prompt_keys(ids)  # of all rows, so that repeated prompts differ whichever are drawn here
        for place, responses, cost in iter_decode(
            policy,
            [ids[i] for i in indices],
            num_samples,
            sampling,
            seed=seed,
            batch_size=batch_size,
            keys=[keys[i] for i in indices],
        ):
            yield indices[place], responses, cost, False

    return draw


# OpenAI-compatible servers. -----------------------------------------------------------------------------


def openai_draw(
    endpoint: Endpoint, sampling: Sampling, num_samples: int, seed: int, system_prompt: str | None = None
) -> Draw:
    """Draw with one request a prompt. What the samples are is the server's matter: it need not heed the seed.

    Tokens are the server's usage, estimated by length where it tells none; a prompt is counted once, in however many
    replies its samples came. Operations and steps are not known.
    """
    extra = _unlike(sampling, {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0})

    def draw(rows: PromptRows, indices: Sequence[int]) -> Drawn:
        names = prompt_ids(rows)
        prompts = [with_system_prompt(rows[i]["prompt"], system_prompt) for i in indices]
        requests = [
            ChatRequest(
                prompt=prompt,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                n=num_samples,
                top_p=sampling.top_p,
                stop=sampling.stop,
                seed=request_seed(seed, names[i]),
                extra=extra,
            )
            for i, prompt in zip(indices, prompts, strict=True)
        ]
        start = time.perf_counter()
        for place, answer in endpoint.ask_all(requests):
            now = time.perf_counter()
            tokens, estimated = _usage(prompts[place], answer)
            yield indices[place], _samples(answer), Cost(*tokens, seconds=now - start), estimated
            start = now

    return draw


def _samples(answer: ChatAnswer) -> list[Response]:
    """Texts with what is known of their lengths: the server counts the tokens of all together."""
    number = answer.completion_tokens if len(answer.texts) == 1 else None
    return [
        Response(text, finish_reason=reason, length=number)
        for text, reason in zip(answer.texts, answer.finish_reasons, strict=True)
    ]


def _usage(prompt: Prompt, answer: ChatAnswer) -> tuple[tuple[int, int], bool]:
    """Prefill and decode tokens, and whether one of them is estimated; a sample's last token is not fed back."""
    read, written = answer.prompt_tokens, answer.completion_tokens
    estimated = read is None or written is None
    if read is None:
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        read = num_tokens(sum(map(len, texts)))
    if written is None:
        written = sum(num_tokens(len(text)) for text in answer.texts)
    return (read, max(written - len(answer.texts), 0)), estimated


def _unlike(sampling: Sampling, neutral: dict[str, float]) -> dict[str, Any]:
    """Settings that are not neutral, which the protocol lacks and a server may refuse."""
    return {name: getattr(sampling, name) for name, value in neutral.items() if getattr(sampling, name) != value}


# vLLM. --------------------------------------------------------------------------------------------------


def vllm_draw(
    policy_name: str,
    spec: PolicySpec,
    system_prompt: str | None,
    num_samples: int,
    sampling: Sampling,
    seed: int,
) -> Draw:
    """Draw with vLLM in this process, from the same token ids as `transformers_draw`, but with its random numbers.

    Raises `ConfigError` at once if vllm is not installed. Operations are not known.
    """
    vllm = _import_vllm()
    base, adapter = resolve_paths(policy_name, spec)

    def draw(rows: PromptRows, indices: Sequence[int]) -> Drawn:
        tokenizer, context_length, ends = read_policy_files(policy_name, spec)
        prompts = [with_system_prompt(row["prompt"], system_prompt) for row in rows]
        prompts_ids = render_prompts(tokenizer, prompts, ends, f"policy {policy_name!r}")
        check_fit(policy_name, tokenizer, context_length, prompts_ids, sampling)
        special = special_tokens(tokenizer)
        end_ids = [special[stop] for stop in sampling.stop if stop in special]
        names = prompt_ids(rows)
        lora = vllm.lora.request.LoRARequest(policy_name, 1, adapter) if adapter else None
        model = vllm.LLM(model=base, **vllm_model_settings(spec, adapter))
        width = max(1, ROWS_AT_ONCE // num_samples)
        for start in range(0, len(indices), width):
            chunk = indices[start : start + width]
            settings = [vllm_settings(sampling, num_samples, request_seed(seed, names[i])) for i in chunk]
            begin = time.perf_counter()
            outputs = model.generate(
                [{"prompt_token_ids": prompts_ids[i]} for i in chunk],
                [vllm.SamplingParams(**arguments, stop_token_ids=end_ids or None) for arguments in settings],
                use_tqdm=False,
                lora_request=lora,
            )
            seconds = (time.perf_counter() - begin) / len(chunk)
            for i, output in zip(chunk, outputs, strict=True):
                yield i, *_vllm_samples(output, len(prompts_ids[i]), seconds), False

    return draw


def vllm_settings(sampling: Sampling, num_samples: int, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` that mean the same; raises `ConfigError` for what it would change."""
    if sampling.temperature < LOWEST_TEMPERATURE:
        raise ConfigError(
            f"sampling.temperature {sampling.temperature:g} is below {LOWEST_TEMPERATURE:g}, to which vLLM would raise "
            "it; use the transformers engine"
        )
    return {
        "n": num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # all, in every version
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop),
        "seed": seed,
    }


def vllm_model_settings(spec: PolicySpec, adapter: str | None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` besides the model; raises `ConfigError` for an adapter of too high a rank."""
    settings: dict[str, Any] = {"dtype": spec.dtype, "trust_remote_code": spec.trust_remote_code}
    if adapter is None:
        return settings
    file = Path(adapter) / "adapter_config.json"
    rank = int(read_object(file, ModelError, "save the adapter again").get("r", 0))
    if rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"{file}: rank {rank} is more than vLLM's {LORA_RANKS[-1]}; merge the adapter with iama export"
        )
    return settings | {"enable_lora": True, "max_lora_rank": next(r for r in LORA_RANKS if r >= rank)}


def _vllm_samples(output: Any, num_prompt_tokens: int, seconds: float) -> tuple[list[Response], Cost]:
    """Samples of a `RequestOutput`, and what they cost: all were decoded side by side."""
    samples = [
        Response(
            well_formed(o.text), tuple(map(int, o.token_ids)), o.finish_reason or "unknown", is_empty=not o.token_ids
        )
        for o in sorted(output.outputs, key=lambda o: int(o.index))
    ]
    lengths = [len(sample.token_ids) for sample in samples]
    cost = Cost(
        policy_prefill_tokens=num_prompt_tokens,
        policy_decode_tokens=sum(max(length - 1, 0) for length in lengths),
        sequential_steps=max(lengths),
        seconds=seconds,
    )
    return samples, cost


def _import_vllm() -> Any:
    try:
        importlib.import_module("vllm.lora.request")
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(f"--engine vllm: vLLM cannot be imported ({error}); pip install vllm") from error
