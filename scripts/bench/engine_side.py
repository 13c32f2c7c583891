"""A process that samples when it is told to: one model, loaded once, for `scripts.bench.engines`.

It reads a job, then a line for each round: the side's name and a seed. It answers with the round's seconds.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iama.config.specs import PolicySpec, Sampling, VllmSettings

MARK = "BENCH "  # libraries print to the same stream
WARM_UP = 2  # tokens


@dataclass(frozen=True)
class Job:
    """What is sampled: `num_samples` for each prompt, all together, each of `new_tokens` tokens."""

    engine: str  # transformers or vllm
    path: str
    dtype: str
    prompts_ids: list[list[int]]
    num_samples: int
    new_tokens: int


Side = Callable[[int, int], int]
"""From a seed and a number of new tokens to the number of tokens that were sampled."""


def main() -> None:
    """Answer until the input ends."""
    job = Job(**json.loads(sys.stdin.readline()))
    sides = transformers_sides(job) if job.engine == "transformers" else vllm_sides(job)
    for side in sides.values():
        side(0, WARM_UP)
    answer(sorted(sides))
    for line in sys.stdin:
        name, seed = line.split()
        start = time.perf_counter()
        number = sides[name](int(seed), job.new_tokens)
        seconds = time.perf_counter() - start
        assert number == len(job.prompts_ids) * job.num_samples * job.new_tokens, f"{name}: {number} tokens"
        answer(seconds)


def answer(value: Any) -> None:
    """A line for the other end."""
    print(MARK + json.dumps(value), flush=True)


def transformers_sides(job: Job) -> dict[str, Side]:
    """Our engine, and `model.generate` on the same model."""
    import torch

    from inference.engine.decode import decode
    from inference.engine.policy import load_policy

    policy = load_policy("base", PolicySpec.model_validate({"path": job.path, "dtype": job.dtype, "device": "cpu"}))
    policy = dataclasses.replace(policy, eos_token_ids=frozenset())  # nothing ends early, whoever samples
    model: Any = policy.model
    model.generation_config.eos_token_id = None
    inputs = torch.tensor(job.prompts_ids)

    def ours(seed: int, new_tokens: int) -> int:
        size = len(job.prompts_ids) * job.num_samples
        sampling = Sampling(max_new_tokens=new_tokens)
        responses, _ = decode(policy, job.prompts_ids, job.num_samples, sampling, seed=seed, batch_size=size)
        return sum(len(response.token_ids) for row in responses for response in row)

    @torch.inference_mode()
    def generate(seed: int, new_tokens: int) -> int:
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=job.num_samples,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        sampled: list[list[int]] = output[:, inputs.shape[1] :].tolist()
        return sum(map(len, sampled))

    return {"ours": ours, "generate": generate}


def vllm_sides(job: Job) -> dict[str, Side]:
    """vLLM alone, without seeds and with one a request, and our tool on the very same `LLM`."""
    from iama.models.vllm import import_vllm
    from inference.engine.random_streams import prompt_keys
    from inference.engine.vllm import iter_vllm, load_vllm_policy, vllm_seeds

    most = len(job.prompts_ids[0]) + job.new_tokens
    settings = VllmSettings(enforce_eager=True, max_model_len=most, max_num_seqs=len(job.prompts_ids) * job.num_samples)
    spec = PolicySpec.model_validate({"path": job.path, "dtype": job.dtype, "engine": "vllm", "vllm": settings})
    policy = load_vllm_policy("base", spec, Sampling(max_new_tokens=job.new_tokens))
    policy = dataclasses.replace(policy, eos_token_ids=frozenset())
    params = import_vllm("the bench").SamplingParams

    def alone(seed: int | None, new_tokens: int) -> int:
        given = {"n": job.num_samples, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
        asked = params(temperature=1.0, top_p=1.0, top_k=-1, seed=seed, **given)
        outputs = policy.llm.generate([{"prompt_token_ids": ids} for ids in job.prompts_ids], asked, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    def on_vllm(seed: int, new_tokens: int) -> int:
        sampling = Sampling(max_new_tokens=new_tokens)
        seeds = vllm_seeds(seed, prompt_keys(job.prompts_ids))
        found = iter_vllm(policy, job.prompts_ids, job.num_samples, sampling, seeds)
        return sum(len(response.token_ids) for _, responses, _ in found for response in responses)

    return {"vllm": lambda _, number: alone(None, number), "vllm_seeded": alone, "on_vllm": on_vllm}


if __name__ == "__main__":
    main()
