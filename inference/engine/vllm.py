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
from iama.errors import ModelError
from iama.models.generation import check_generation_config
from iama.models.loading import LIBRARY_ERRORS
from iama.models.vllm import check_sampling, import_vllm, llm_settings, open_llm
from inference.engine.policy import AnyPolicy, VllmPolicy, load_policy, read_policy_files, resolve_paths
from inference.engine.random_streams import stream_keys
from inference.engine.responses import Ends, Response, check_fit, response_text
from inference.engine.vocabulary import end_tokens

ROWS_AT_ONCE = 2048
"""Samples that vLLM is given together, so many as a kill can cost."""


def load_vllm_policy(name: str, spec: PolicySpec, sampling: Sampling) -> VllmPolicy:
    """Open a policy in vLLM, with its adapter beside the base; raises as `load_policy` and `check_sampling` do.

    vLLM's process ends when nobody holds the policy any more (`open_llm`).
    """
    source = f"policy {name!r}"
    check_sampling(sampling)
    base, adapter = resolve_paths(name, spec)
    settings = llm_settings(spec, adapter) | {"trust_remote_code": spec.trust_remote_code}
    settings["max_logprobs"] = -1  # whole laws may be asked for (`inference.samplers.vllm_segments`)
    vllm = import_vllm(source)
    check_generation_config(base, source, sampling)
    tokenizer, context_length, ends = read_policy_files(name, spec)
    llm = open_llm(base, source, settings)
    lora = vllm.lora.request.LoRARequest(name, 1, adapter) if adapter else None
    return VllmPolicy(name, llm, tokenizer, ends, context_length, lora)


def open_policy(name: str, spec: PolicySpec, sampling: Sampling) -> AnyPolicy:
    """A policy on the engine that its specification names."""
    return (load_vllm_policy if spec.engine == "vllm" else load_policy)(name, spec, sampling)


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


def outputs_of(policy: VllmPolicy, rows_ids: Sequence[Sequence[int]], arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """vLLM's outputs for requests that go on from token ids, each with its arguments of `SamplingParams`.

    Raises `ModelError` with vLLM's reason.
    """
    source = f"policy {policy.name!r}"
    params = import_vllm(source).SamplingParams
    requests, settings = [{"prompt_token_ids": list(ids)} for ids in rows_ids], [params(**given) for given in arguments]
    try:
        return list(policy.llm.generate(requests, settings, use_tqdm=False, lora_request=policy.lora))
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelError(f"{source}: LLM.generate failed ({reason}); write engine: transformers") from error


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


class VllmPrompts:
    """Sampling in rounds, as `inference.engine.decode.HeldPrompts` does it; nothing has to be let go.

    Sample `i` of a prompt has the seed that it has where all are drawn at once. Each round counts its prompts, whole,
    though vLLM may find most of them in its prefix cache.
    """

    def __init__(
        self,
        policy: VllmPolicy,
        prompts_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        keys: Sequence[int],
    ) -> None:
        self._policy, self._prompts_ids, self._sampling = policy, prompts_ids, sampling
        self._seeds = vllm_seeds(seed, keys)

    def draw(self, indices: Sequence[int], first: int, number: int) -> dict[int, tuple[list[Response], Cost]]:
        """Samples `first` to `first + number - 1` of some prompts, by index, and what they cost."""
        ids, seeds = [self._prompts_ids[i] for i in indices], [self._seeds[i] + first for i in indices]
        drawn = iter_vllm(self._policy, ids, number, self._sampling, seeds)
        return {indices[place]: (responses, cost) for place, responses, cost in drawn}

    def let_go(self, indices: Sequence[int]) -> None:
        """Some prompts are done with."""


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
        self._ends, self._end_ids = Ends(policy, sampling), sorted(end_tokens(policy, sampling))

    def write(self, asked: Sequence[tuple[Sequence[int], int, int]]) -> list[list[_Row]]:
        """The samples of each prompt, all together; asked are its ids, how many samples, and their first seed."""
        rows = [[_Row(seed + i) for i in range(count)] for _, count, seed in asked]
        groups = [(ids, group) for (ids, _, _), group in zip(asked, rows, strict=True) if group]
        while groups:
            outputs = outputs_of(
                self._policy,
                [[*ids, *group[0].ids] for ids, group in groups],
                [self._arguments(group) for _, group in groups],
            )
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
