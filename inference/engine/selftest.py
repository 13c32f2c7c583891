"""What `iama selftest` asks of an engine: that it samples the law that transformers' own forward pass gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from iama.config.specs import PolicySpec, Sampling, VllmSettings
from iama.errors import RunError
from iama.models.vllm import close_llm, import_vllm
from inference.engine.decode import decode
from inference.engine.likelihood import sequence_log_probabilities
from inference.engine.next_token import draw_tokens, probabilities
from inference.engine.policy import Policy, load_policy
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.vllm import load_vllm_policy, vllm_arguments
from inference.engine.vocabulary import end_tokens

PROMPTS = ("Name a colour.", "What is a boat?", "Hm")
NUM_SAMPLES, LENGTH, SEED = 4, 24, 7
SAMPLING = Sampling(max_new_tokens=LENGTH, temperature=0.9, top_p=0.95)
LARGEST_GAP = 1e-4
"""Between log-probabilities of a whole response, nats."""
LARGEST_VLLM_GAP = 1e-3
"""Between those of vLLM and of transformers, nats a token."""


def check_law(path: Path, adapter: Path | None) -> str:
    """Samples are those that the logits of whole forward passes give with the same random numbers.

    Raises `RunError`; returns a line that says how far log-probabilities are apart.
    """
    spec = PolicySpec(path=str(path), adapter=None if adapter is None else str(adapter))
    policy = load_policy("selftest", spec)
    prompts = [list(policy.tokenizer(text)["input_ids"]) for text in PROMPTS]
    drawn, _ = decode(policy, prompts, NUM_SAMPLES, SAMPLING, seed=SEED, batch_size=NUM_SAMPLES)
    keys, num, gap = prompt_keys(prompts), 0, 0.0
    for prompt, key, responses in zip(prompts, keys, drawn, strict=True):
        streams = stream_keys(SEED, [key] * NUM_SAMPLES, np.arange(NUM_SAMPLES))
        answers = [list(response.token_ids) for response in responses]
        sums = sequence_log_probabilities(policy, [prompt] * NUM_SAMPLES, answers, NUM_SAMPLES)
        for sample, (answer, (total, _)) in enumerate(zip(answers, sums, strict=True)):
            logits_TV = whole_logits(policy, prompt, answer)
            law_TV = probabilities(logits_TV, SAMPLING, source="the tiny policy")
            numbers_T = uniforms(streams[[sample] * len(answer)], np.arange(len(answer)))
            expected = draw_tokens(law_TV, numbers_T).tolist()
            if expected != answer:
                step = next(i for i, (a, b) in enumerate(zip(expected, answer, strict=True)) if a != b)
                raise RunError(f"sample {sample}: token {step} is {answer[step]}, and {expected[step]} is right")
            log_TV = torch.log_softmax(logits_TV.double(), dim=-1)
            gap = max(gap, abs(total - sum(log_TV[t, token].item() for t, token in enumerate(answer))))
            num += len(answer)
    if not gap <= LARGEST_GAP:
        raise RunError(f"log-probabilities of responses are apart by {gap:.2g} nats, more than {LARGEST_GAP:g}")
    return f"{num} tokens as drawn from whole forward passes; log-probabilities within {gap:.1e} nats"


def check_vllm_law(path: Path, adapter: Path) -> str:
    """Samples of vLLM, the adapter beside the base, have the log-probabilities that transformers gives them.

    Raises `RunError`, and `ConfigError` where vLLM is missing.
    """
    settings: dict[str, Any] = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 64}
    spec = PolicySpec(path=str(path), adapter=str(adapter))
    vllm = import_vllm("--engine vllm")
    if vllm.platforms.current_platform.is_cpu():
        settings["kv_cache_memory_bytes"] = 2**28
    else:
        settings["gpu_memory_utilization"] = 0.1
    policy = load_policy("selftest", spec)
    served = spec.model_copy(update={"engine": "vllm", "vllm": VllmSettings.model_validate(settings)})
    opened = load_vllm_policy("selftest", served, SAMPLING)
    try:
        prompts = [list(policy.tokenizer(text)["input_ids"]) for text in PROMPTS]
        ends = sorted(end_tokens(opened, SAMPLING))
        asked = vllm.SamplingParams(**vllm_arguments(SAMPLING, ends, NUM_SAMPLES, SEED) | {"logprobs": 0})
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = opened.llm.generate(requests, asked, use_tqdm=False, lora_request=opened.lora)
        drawn = [
            (ids, list(sample.token_ids), sample.logprobs)
            for ids, output in zip(prompts, outputs, strict=True)
            for sample in output.outputs
        ]
    finally:
        close_llm(opened.llm)
    ours = sequence_log_probabilities(policy, [row[0] for row in drawn], [row[1] for row in drawn], len(drawn))
    gap = 0.0
    for (total, number), (_, answer, laws) in zip(ours, drawn, strict=True):
        theirs = sum(law[token].logprob for law, token in zip(laws, answer, strict=True))
        gap = max(gap, abs(total - theirs) / max(number, 1))
    if not gap <= LARGEST_VLLM_GAP:
        raise RunError(f"log-probabilities of vLLM are off by {gap:.2g} nats a token, more than {LARGEST_VLLM_GAP:g}")
    return f"log-probabilities of {len(drawn)} samples within {gap:.1e} nats a token"


def whole_logits(policy: Policy, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits `[T, V]` of an answer's tokens by one pass of transformers over all of it, without a cache."""
    model: Any = policy.model
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits_TV: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits_TV
