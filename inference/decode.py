"""The decoding engine: many rows at once, one prefill for all samples of a prompt, costs counted here only.

What a row samples depends on its policy, prompt, sample index and seed alone: its random numbers are addressed
by them (`random_streams`), so batch size and order change nothing beyond floating-point rounding of the logits.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from transformers import DynamicCache

from iama.cost import Cost
from iama.errors import DataError, ModelError
from inference.random_streams import prompt_keys, stream_keys, uniforms

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from iama.config import Sampling
    from inference.policy import Policy
    from inference.random_streams import Keys

# Below this share of unfinished rows the batch is compacted. The cache is copied at every step anyway (it
# grows by concatenation), so a compaction costs about as much as one step of the rows that it keeps.
COMPACT_BELOW = 0.9


@dataclass(frozen=True)
class Decoded:
    """A response: sampled token ids (the end token included, if there is one) and why it ended."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class _Prefill:
    """Prompts forwarded once: cache, key mask `[P, L]` (False on padding), last logits `[P, V]`."""

    cache: DynamicCache
    mask_PL: torch.Tensor
    logits_PV: torch.Tensor


def decode(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    keys: Sequence[int] | None = None,
) -> tuple[list[list[Decoded]], Cost]:
    """Sample responses for every prompt, in the prompts' order, with their total cost.

    `num_samples` is one number or one a prompt; sample `i` of a prompt is the same however many are drawn. Cost
    counts forwarded tokens: a prefill token is a prompt token (once for all samples), a decode token a response
    token that was fed back, so a response of T tokens costs T - 1. Padding is not counted. `batch_size` is the
    number of rows decoded together; `keys` replaces the prompts' `prompt_keys`, for a list that is part of a
    longer one.

    Raises `DataError` naming the prompt, before anything is decoded, if one is empty or does not fit.
    """
    responses: list[list[Decoded]] = [[] for _ in prompts_ids]
    costs = []
    for index, decoded, cost in iter_decode(
        policy,
        prompts_ids,
        num_samples,
        sampling,
        seed=seed,
        batch_size=batch_size,
        keys=keys,
    ):
        responses[index] = decoded
        costs.append(cost)
    return responses, reduce(add, costs, Cost())


def iter_decode(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    keys: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[Decoded], Cost]]:
    """`decode`, yielding (prompt index, its responses, its cost) as batches finish, shortest prompts first."""
    check_fit(policy.name, policy.tokenizer, policy.context_length, prompts_ids, sampling)
    counts = [num_samples] * len(prompts_ids) if isinstance(num_samples, int) else list(num_samples)
    keys = prompt_keys(prompts_ids) if keys is None else keys
    for group in _groups([len(ids) for ids in prompts_ids], counts, batch_size):
        start = time.perf_counter()
        rows = [(p, s) for p in range(len(group)) for s in range(counts[group[p]])]
        streams = stream_keys(seed, [keys[group[p]] for p, _ in rows], [s for _, s in rows])
        decoded = _decode_group(policy, [prompts_ids[i] for i in group], rows, streams, sampling, batch_size)
        seconds = time.perf_counter() - start
        for p, index in enumerate(group):
            own = [response for (q, _), response in zip(rows, decoded, strict=True) if q == p]
            yield index, own, _cost(len(prompts_ids[index]), own, seconds * len(own) / max(1, len(rows)))


def check_fit(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    prompts_ids: Sequence[Sequence[int]],
    sampling: Sampling,
) -> None:
    """Raise `DataError` for the first prompt that is empty or leaves policy `name` no room for `max_new_tokens`."""
    for number, ids in enumerate(prompts_ids, start=1):
        if not ids:
            raise DataError(f"prompt {number} has no tokens for policy {name!r}; give a prompt that is not empty")
        if context_length is not None and len(ids) + sampling.max_new_tokens > context_length:
            start = tokenizer.decode(ids[:24], skip_special_tokens=True)
            raise DataError(
                f"prompt {number} ({str(start)[:60]!r}...) has {len(ids)} tokens; with sampling.max_new_tokens = "
                f"{sampling.max_new_tokens} it exceeds the {context_length} tokens that policy {name!r} reads; "
                "shorten the prompt or lower max_new_tokens"
            )


def response_text(policy: Policy, response: Decoded) -> str:
    """The text of a response, without its end token and other special tokens."""
    ids = response.token_ids[:-1] if response.finish_reason == "stop" else response.token_ids
    text = policy.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _cost(num_prompt_tokens: int, responses: Sequence[Decoded], seconds: float) -> Cost:
    if not responses:
        return Cost()
    fed_back = sum(len(r.token_ids) - 1 for r in responses)
    return Cost(policy_prefill_tokens=num_prompt_tokens, policy_decode_tokens=fed_back, seconds=seconds)


def _groups(lengths: Sequence[int], counts: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Prompts to prefill together: of similar length, and together at most `batch_size` rows (or one prompt)."""
    group: list[int] = []
    num_rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and num_rows + counts[index] > batch_size:
            yield group
            group, num_rows = [], 0
        group.append(index)
        num_rows += counts[index]
    if group:
        yield group


def _decode_group(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, int]],
    streams: Keys,
    sampling: Sampling,
    batch_size: int,
) -> list[Decoded]:
    """Responses of the rows (prompt, sample); the prompts are prefilled once, the rows decoded in chunks."""
    if not rows:
        return []
    prefill = _prefill(policy, prompts_ids)
    decoded: list[Decoded] = []
    for start in range(0, len(rows), batch_size):
        chunk = slice(start, start + batch_size)
        is_last = start + batch_size >= len(rows)
        cache = prefill.cache if is_last else copy.deepcopy(prefill.cache)
        fork = torch.tensor([p for p, _ in rows[chunk]])
        decoded += _decode_rows(policy, _fork(replace(prefill, cache=cache), fork), streams[chunk], sampling)
    return decoded


@torch.inference_mode()
def _prefill(policy: Policy, prompts_ids: Sequence[Sequence[int]]) -> _Prefill:
    """Forward left-padded prompts."""
    width = max(map(len, prompts_ids))
    pad_id = policy.tokenizer.pad_token_id or 0  # masked, so any id does
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts_ids])
    mask = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts_ids])
    device = policy.model.device
    cache = DynamicCache(config=policy.model.config)
    output = policy.model(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _Prefill(cache, mask.to(device), output.logits[:, -1])


def _fork(state: _Prefill, rows: torch.Tensor) -> _Prefill:
    """The state with rows selected, dropped or repeated; the given state's cache is consumed."""
    rows = rows.to(state.mask_PL.device)
    state.cache.batch_select_indices(rows)
    return _Prefill(state.cache, state.mask_PL[rows], state.logits_PV[rows])


@torch.inference_mode()
def _decode_rows(policy: Policy, state: _Prefill, streams: Keys, sampling: Sampling) -> list[Decoded]:
    """Sample rows to their ends. A finished row is masked until the batch is compacted, and not counted."""
    tokens: list[list[int]] = [[] for _ in streams]
    rows = np.arange(len(streams))  # which response each row of the batch is
    alive = np.ones(len(streams), dtype=bool)
    eos = np.asarray(sorted(policy.eos_token_ids))
    for step in range(sampling.max_new_tokens):
        sampled = _sample(policy, state.logits_PV, uniforms(streams[rows], step), sampling.temperature)
        for row, token in zip(rows[alive], sampled[alive], strict=True):
            tokens[row].append(int(token))
        alive &= ~np.isin(sampled, eos)
        if not alive.any() or step == sampling.max_new_tokens - 1:
            break
        if alive.mean() < COMPACT_BELOW:
            keep = np.flatnonzero(alive)
            state = _fork(state, torch.from_numpy(keep))
            rows, sampled, alive = rows[keep], sampled[keep], alive[keep]
        state = _advance(policy, state, torch.from_numpy(sampled), torch.from_numpy(alive))
    ended = [bool(ids) and ids[-1] in policy.eos_token_ids for ids in tokens]
    return [Decoded(tuple(ids), "stop" if end else "length") for ids, end in zip(tokens, ended, strict=True)]


def _advance(policy: Policy, state: _Prefill, sampled: torch.Tensor, alive: torch.Tensor) -> _Prefill:
    """Feed one token a row."""
    mask = torch.cat([state.mask_PL, alive.to(state.mask_PL.device).unsqueeze(1)], dim=1)
    output = policy.model(
        input_ids=sampled.to(mask.device).unsqueeze(1),
        attention_mask=mask,
        position_ids=(mask.sum(dim=1, keepdim=True) - 1).clamp(min=0),
        past_key_values=state.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _Prefill(state.cache, mask, output.logits[:, -1])


def _sample(
    policy: Policy, logits_RV: torch.Tensor, u_R: np.ndarray[tuple[int], np.dtype[np.float64]], temperature: float
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Inverse CDF of softmax(logits / temperature) in float64."""
    cdf_RV = torch.softmax(logits_RV.double() / temperature, dim=-1).cumsum(dim=-1)
    total_R1 = cdf_RV[:, -1:]
    if not bool(torch.isfinite(total_R1).all()):
        raise ModelError(f"policy {policy.name!r} gives logits that are not finite; its weights are damaged")
    target_R1 = torch.from_numpy(u_R).to(cdf_RV.device).unsqueeze(1) * total_R1
    tokens: np.ndarray[tuple[int], np.dtype[np.int64]] = (
        torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1).cpu().numpy()
    )
    return tokens
