"""Decoding by vLLM in this process: the same token ids go in, the same law comes out, with random numbers of its own.

vLLM is told when to stop, but where a response ends `Ends` says, as it does for our own engine: vLLM reads a response's
text after its prompt, so that a stop string may show there and not in the response by itself, or the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from iama.config.specs import PolicySpec, Sampling
from iama.cost import Cost
from iama.errors import ConfigError, ModelError
from iama.models.generation import check_generation_config
from iama.models.loading import LIBRARY_ERRORS
from iama.models.vllm import import_vllm, llm_settings, open_llm
from inference.engine.policy import VllmPolicy, read_policy_files, resolve_paths
from inference.engine.random_streams import stream_keys
from inference.engine.responses import Ends, Response, check_fit, response_text
from inference.engine.vocabulary import end_tokens

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
"""vLLM raises lower ones to the former, and takes none above the latter."""
ROWS_AT_ONCE = 2048
"""Samples that vLLM is given together, so many as a kill can cost."""


def load_vllm_policy(name: str, spec: PolicySpec, sampling: Sampling) -> VllmPolicy:
    """Open a policy in vLLM, with its adapter beside the base; raises as `load_policy` and `check_sampling` do.

    Whoever opens it closes it (`iama.models.vllm.close_llm`).
    """
    source = f"policy {name!r}"
    check_sampling(sampling)
    base, adapter = resolve_paths(name, spec)
    settings = llm_settings(spec, adapter) | {"trust_remote_code": spec.trust_remote_code}
    vllm = import_vllm(source)
    check_generation_config(base, source, sampling)
    tokenizer, context_length, ends = read_policy_files(name, spec)
    llm = open_llm(base, source, settings)
    lora = vllm.lora.request.LoRARequest(name, 1, adapter) if adapter else None
    return VllmPolicy(name, llm, tokenizer, ends, context_length, lora)


def check_sampling(sampling: Sampling, source: str = "engine: vllm") -> None:
    """Raise `ConfigError` for sampling that vLLM would change."""
    if not LOWEST_TEMPERATURE <= sampling.temperature <= HIGHEST_TEMPERATURE:
        raise ConfigError(
            f"{source}: sampling.temperature {sampling.temperature:g} is outside {LOWEST_TEMPERATURE:g} to "
            f"{HIGHEST_TEMPERATURE:g}, and vLLM would raise or refuse it; use the transformers engine"
        )
    if sampling.min_p > 0 and sampling.top_p < 1:
        raise ConfigError(
            f"{source}: sampling.min_p {sampling.min_p:g} beside sampling.top_p {sampling.top_p:g}: vLLM applies min_p "
            "first, which is another law; drop one of them, or use the transformers engine"
        )


def vllm_seeds(seed: int, keys: Sequence[int]) -> list[int]:
    """A seed of 31 bits a prompt, from the keys of prompts (`prompt_keys`)."""
    return [int(key) >> 33 for key in stream_keys(seed, keys, [0] * len(keys))]


def vllm_arguments(sampling: Sampling, ends: Sequence[int], num_samples: int, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` that mean the same as `sampling`; `ends` are all end tokens.

    Of `num_samples` sample i has the seed `seed` + i.
    """
    return {
        "n": num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # all, in every version
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop),
        "ignore_eos": True,  # `ends` has the tokenizer's, and those of the generation config, which vLLM would not know
        "stop_token_ids": sorted(ends),
        "detokenize": bool(sampling.stop),
        "seed": seed,
    }


@dataclass
class _Row:
    """A sample that is being written, and how many of its tokens are known to end nothing.

    `num_drawn` are all that vLLM drew for it, with those behind its end.
    """

    seed: int
    ids: list[int] = field(default_factory=list)
    num_checked: int = 0
    num_drawn: int = 0
    reason: str = ""


def iter_vllm(
    policy: VllmPolicy,
    prompts_ids: Sequence[Sequence[int]],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int],
) -> Iterator[tuple[int, list[Response], Cost]]:
    """Samples of many prompts, in their order: (index, responses, cost); `seeds` has one a prompt.

    Costs count a prompt once and every token that is fed back, those behind a response's end included; operations and
    memory are not known.
    """
    check_sampling(sampling)
    check_fit(policy.name, policy.tokenizer, policy.context_length, prompts_ids, sampling)
    counts = [num_samples] * len(prompts_ids) if isinstance(num_samples, int) else list(num_samples)
    writer = _Writer(policy, sampling)
    chunk: list[int] = []
    for index in range(len(counts)):
        chunk.append(index)
        if sum(counts[i] for i in chunk) >= ROWS_AT_ONCE or index == len(counts) - 1:
            start = time.perf_counter()
            asked = [(prompts_ids[i], counts[i], seeds[i]) for i in chunk]
            written = writer.write(asked)
            seconds = (time.perf_counter() - start) / max(1, sum(map(len, written)))
            for i, rows in zip(chunk, written, strict=True):
                yield i, [writer.response(row) for row in rows], _cost(len(prompts_ids[i]), rows, seconds)
            chunk = []


def _cost(num_prompt_tokens: int, rows: Sequence[_Row], seconds: float) -> Cost:
    """Of a prompt's samples, decoded side by side in `seconds` each."""
    return Cost(
        policy_prefill_tokens=num_prompt_tokens if rows else 0,
        policy_decode_tokens=sum(max(row.num_drawn - 1, 0) for row in rows),
        sequential_steps=max((row.num_drawn for row in rows), default=0),
        seconds=seconds * len(rows),
    )


class _Writer:
    """Writes rows to their ends."""

    def __init__(self, policy: VllmPolicy, sampling: Sampling) -> None:
        self._policy, self._sampling = policy, sampling
        self._params = import_vllm(f"policy {policy.name!r}").SamplingParams
        self._ends, self._end_ids = Ends(policy, sampling), sorted(end_tokens(policy, sampling))

    def write(self, asked: Sequence[tuple[Sequence[int], int, int]]) -> list[list[_Row]]:
        """The samples of each prompt, all together; asked are its ids, how many samples, and their first seed."""
        rows = [[_Row(seed + i) for i in range(count)] for _, count, seed in asked]
        groups = [(ids, group) for (ids, _, _), group in zip(asked, rows, strict=True) if group]
        while groups:
            requests = [{"prompt_token_ids": [*ids, *group[0].ids]} for ids, group in groups]
            params = [self._params(**self._arguments(group)) for _, group in groups]
            lora = self._policy.lora
            try:
                outputs = self._policy.llm.generate(requests, params, use_tqdm=False, lora_request=lora)
            except LIBRARY_ERRORS as error:
                reason = " ".join(str(error).split())[:240]
                raise ModelError(
                    f"policy {self._policy.name!r}: LLM.generate failed ({reason}); write engine: transformers"
                ) from error
            for (_, group), output in zip(groups, outputs, strict=True):
                for row, drawn in zip(group, sorted(output.outputs, key=lambda o: int(o.index)), strict=True):
                    self._append(row, list(map(int, drawn.token_ids)))
            # What vLLM ended and we do not goes on by itself, from its own tokens.
            groups = [(ids, [row]) for ids, group in groups for row in group if not row.reason]
        return rows

    def _arguments(self, group: Sequence[_Row]) -> dict[str, Any]:
        """Of a request for new rows of one prompt, or for one that goes on."""
        num_written = len(group[0].ids)
        seed = group[0].seed if not num_written else vllm_seeds(group[0].seed, [num_written])[0]
        given = vllm_arguments(self._sampling, self._end_ids, len(group), seed)
        return given | {"max_tokens": self._sampling.max_new_tokens - num_written}

    def _append(self, row: _Row, ids: list[int]) -> None:
        """Add tokens, and cut the row where it ends; without stop strings vLLM ends where we do."""
        if not ids:  # nothing more will come
            row.reason = "stop"
            return
        row.ids += ids
        row.num_drawn += len(ids)
        first = row.num_checked + 1 if self._sampling.stop else len(row.ids)
        for length in range(first, len(row.ids) + 1):
            row.reason = self._ends.reason(row.ids[:length])
            if row.reason:
                del row.ids[length:]
                return
        row.num_checked = len(row.ids)

    def response(self, row: _Row) -> Response:
        """A row as an answer."""
        text = response_text(self._policy, row.ids, self._sampling.stop)
        return Response(text, tuple(row.ids), row.reason, is_empty=not row.ids)
