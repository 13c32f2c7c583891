"""Engines that draw samples for pools: this package's, OpenAI-compatible servers, and vLLM in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

from iama.config.specs import PolicySpec, Sampling
from iama.cost import Cost
from iama.machines import Spread, Work
from iama.models.vllm import check_sampling, check_vllm
from iama.prompts.conversations import render_prompts
from iama.prompts.data import PromptRows, with_system_prompt
from iama.prompts.render import Prompt
from iama.rewards.judge import num_tokens
from iama.rewards.remote import ChatAnswer, ChatRequest, Endpoint
from inference.engine.decode import iter_decode
from inference.engine.policy import AnyPolicy, load_policy
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import Response
from inference.engine.vllm import iter_vllm, load_vllm_policy
from inference.pools.file import prompt_ids
from inference.pools.journal import digest

Drawn: TypeAlias = Iterator[tuple[int, list[Response], Cost, bool]]
"""Prompts as they are done: (index, samples, cost, whether the cost is estimated)."""
Draw: TypeAlias = Callable[[PromptRows, Sequence[int]], Drawn]
"""An engine with its settings: from all rows and the indices of those to draw."""


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
        ids = prompts_ids or _rendered(policy, rows, system_prompt)
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


def _rendered(policy: AnyPolicy, rows: PromptRows, system_prompt: str | None) -> Sequence[Sequence[int]]:
    """Token ids of all rows' prompts."""
    prompts = [with_system_prompt(row["prompt"], system_prompt) for row in rows]
    return render_prompts(policy.tokenizer, prompts, policy.eos_token_ids, f"policy {policy.name!r}")


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
    prompts_ids: Sequence[Sequence[int]] | None = None,
) -> Draw:
    """Draw with vLLM in this process, from the same token ids as `transformers_draw`, but with its random numbers.

    Raises `ConfigError` at once if vLLM is not installed or would change the sampling. vLLM stays open for further
    draws, until nobody holds what is given here.
    """
    check_vllm(f"policy {policy_name!r}")
    check_sampling(sampling)
    loaded = cache(partial(load_vllm_policy, policy_name, spec, sampling))

    def draw(rows: PromptRows, indices: Sequence[int]) -> Drawn:
        policy = loaded()
        ids = prompts_ids or _rendered(policy, rows, system_prompt)
        names = prompt_ids(rows)
        seeds = [request_seed(seed, names[i]) for i in indices]
        wanted = [ids[i] for i in indices]
        for place, responses, cost in iter_vllm(policy, wanted, num_samples, sampling, seeds):
            yield indices[place], responses, cost, False

    return draw


def local_draw(
    policy_name: str,
    spec: PolicySpec,
    system_prompt: str | None,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    batch_size: int,
    prompts_ids: Sequence[Sequence[int]] | None = None,
) -> Draw:
    """Draw with the engine that a policy names; vLLM finds its batches itself."""
    given = (policy_name, spec, system_prompt, num_samples, sampling, seed)
    if spec.engine == "vllm":
        return vllm_draw(*given, prompts_ids)
    return transformers_draw(*given, batch_size, prompts_ids)
