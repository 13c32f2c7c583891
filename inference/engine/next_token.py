"""The law that the next token is drawn from, and the draw itself: pure functions of logits, in float64.

Settings mean what they mean in transformers' `generate`, and are applied in its order: repetition penalty,
temperature, top_k, top_p, min_p. Of equally likely tokens a top_k of 1 keeps the first, where transformers keeps all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from iama.arrays import Floats, Integers
from iama.config.specs import Sampling
from iama.errors import ModelError

IN_CACHE = 2**17
"""Probabilities that a core works on at once: a megabyte, which its cache holds from step to step of the law."""


def probabilities(
    logits_RV: torch.Tensor,
    sampling: Sampling,
    seen: Sequence[Sequence[int]] | None = None,
    *,
    source: str,
) -> torch.Tensor:
    """The law that each row's next token is drawn from: `[R, V]`, float64, on the logits' device, rows sum to 1.

    `seen` holds each row's token ids so far, prompt and response; only a repetition penalty needs them. Single
    logits may be -inf. Raises `ModelError` naming `source` ("policy 'base'") for NaN, +inf, or a row of only -inf.
    """
    scores_RV = logits_RV.double()
    if sampling.repetition_penalty != 1:
        assert seen is not None
        scores_RV = _penalise(scores_RV, seen, sampling.repetition_penalty)
    if sampling.temperature != 1:
        scores_RV = scores_RV / sampling.temperature
    if sampling.top_k > 0:
        scores_RV = _keep_top_k(scores_RV, sampling.top_k)
    if sampling.top_p < 1:
        scores_RV = _keep_top_p(scores_RV, sampling.top_p)
    if sampling.min_p > 0:
        scores_RV = _keep_min_p(scores_RV, sampling.min_p)
    law_RV = torch.softmax(scores_RV, dim=-1)
    # Whatever is not finite turns its whole row into NaN, through every step above, so one column tells.
    if bool(law_RV[:, 0].isnan().any()):
        raise ModelError(f"{source} gives logits that are not finite; its weights are damaged")
    return law_RV


def draw_tokens(probabilities_RV: torch.Tensor, u_R: Floats) -> Integers:
    """A token id a row by inverse CDF of `u_R` in [0, 1): `[R]`. It never has probability 0."""
    cdf_RV = probabilities_RV.cumsum(dim=-1)
    target_R1 = torch.from_numpy(u_R).to(cdf_RV.device).unsqueeze(1) * cdf_RV[:, -1:]
    tokens_R: Integers = torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1).cpu().numpy()
    return tokens_R


def draw_distinct(log_weights_O: Floats, u_O: Floats, number: int) -> list[int]:
    """Places of up to `number` options, drawn one after the other in proportion to e^(log weight), none twice.

    By Gumbel top-k (Kool et al. 2019), with a number in [0, 1) for each. One with a weight of -inf is never drawn.
    """
    keys_O = log_weights_O - np.log(-np.log(u_O + 2.0**-53))
    order = np.argsort(-keys_O, kind="stable")[:number]
    places: list[int] = order[log_weights_O[order] > -np.inf].tolist()
    return places


def sample_tokens(
    logits_RV: torch.Tensor,
    sampling: Sampling,
    u_R: Floats,
    seen: Sequence[Sequence[int]] | None = None,
    *,
    source: str,
) -> Integers:
    """`draw_tokens` from `probabilities`: `[R]`. On a CPU a few rows at a time, so that no law leaves the cache.

    The tokens are the same: rows do not depend on each other. Arguments and errors are those of the two.
    """
    blocks = _blocks(logits_RV)
    if len(blocks) == 1:
        return draw_tokens(probabilities(logits_RV, sampling, seen, source=source), u_R)
    laws = (probabilities(logits_RV[rows], sampling, seen and seen[rows], source=source) for rows in blocks)
    return np.concatenate([draw_tokens(law_RV, u_R[rows]) for law_RV, rows in zip(laws, blocks, strict=True)])


def log_probabilities(logits_RV: torch.Tensor, tokens_R: Integers) -> torch.Tensor:
    """Log-probability of each row's token under softmax(logits): `[R]`, float64, nats.

    It is that of the whole vocabulary at temperature 1, whatever the token was drawn from. Logits that `probabilities`
    refuses give NaN. On a CPU a few rows are read at a time, as by `sample_tokens`.
    """
    tokens_R1 = torch.from_numpy(tokens_R).to(logits_RV.device).unsqueeze(1)
    parts = [
        torch.log_softmax(logits_RV[rows].double(), dim=-1).gather(1, tokens_R1[rows]) for rows in _blocks(logits_RV)
    ]
    return torch.cat(parts).squeeze(1)


def top_log_probabilities(logits_RV: torch.Tensor, number: int) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each row with their `log_probabilities`, the best first: `[R][number]`."""
    number = min(number, logits_RV.shape[1])
    found: list[list[tuple[int, float]]] = []
    for rows in _blocks(logits_RV) if number else []:
        values, ids = torch.log_softmax(logits_RV[rows].double(), dim=-1).topk(number, dim=-1)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        found += [list(zip(own_ids, own_values, strict=True)) for own_ids, own_values in pairs]
    return found if number else [[] for _ in logits_RV]


def _blocks(logits_RV: torch.Tensor) -> list[slice]:
    """Rows that are read together: on a CPU as many as its cache holds, elsewhere all."""
    num_rows, size = logits_RV.shape
    num = torch.get_num_threads() * max(1, IN_CACHE // size)
    if num_rows <= num or logits_RV.device.type != "cpu":
        return [slice(None)]
    return [slice(start, start + num) for start in range(0, num_rows, num)]


def entropy(logits_RV: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) over the whole vocabulary, at temperature 1: `[R]`, float64, nats.

    Logits that `probabilities` refuses give NaN. On a CPU a few rows are read at a time, as by `sample_tokens`.
    """
    laws = (torch.softmax(logits_RV[rows].double(), dim=-1) for rows in _blocks(logits_RV))
    return torch.cat([torch.special.entr(law_RV).sum(dim=-1) for law_RV in laws])


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the earliest occurrence of any stop string, and whether there was one."""
    starts = [start for start in map(text.find, stop) if start >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def _penalise(scores_RV: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Divide the positive and multiply the negative scores of each row's seen tokens."""
    assert len(seen) == len(scores_RV)
    counts = [len(ids) for ids in seen]
    rows = np.repeat(np.arange(len(seen)), counts)
    ids = np.fromiter(chain.from_iterable(seen), dtype=np.int64, count=sum(counts))
    known = ids < scores_RV.shape[1]  # embeddings may hold more tokens than the head can give
    is_seen_RV = torch.zeros_like(scores_RV, dtype=torch.bool)
    is_seen_RV[tuple(torch.from_numpy(np.stack([rows[known], ids[known]])).to(scores_RV.device))] = True
    penalised_RV = torch.where(scores_RV < 0, scores_RV * penalty, scores_RV / penalty)
    return torch.where(is_seen_RV, penalised_RV, scores_RV)


def _keep_top_k(scores_RV: torch.Tensor, k: int) -> torch.Tensor:
    """Drop what is below the k-th best score; ties with it stay, but of the best alone the first is kept."""
    if k == 1:
        best_R1 = scores_RV.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores_RV, -torch.inf).scatter(1, best_R1, scores_RV.gather(1, best_R1))
    kth_R1 = scores_RV.topk(min(k, scores_RV.shape[1]), dim=-1).values[:, -1:]
    return scores_RV.masked_fill(scores_RV < kth_R1, -torch.inf)


def _keep_top_p(scores_RV: torch.Tensor, p: float) -> torch.Tensor:
    """Drop the least likely tokens that together have at most probability 1 - p, never all."""
    ascending_RV, order_RV = scores_RV.sort(dim=-1, stable=True)
    dropped_RV = ascending_RV.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped_RV[:, -1] = False
    return scores_RV.masked_fill(dropped_RV.scatter(1, order_RV, dropped_RV), -torch.inf)


def _keep_min_p(scores_RV: torch.Tensor, p: float) -> torch.Tensor:
    """Drop tokens less likely than `p` times the likeliest one."""
    law_RV = scores_RV.softmax(dim=-1)
    return scores_RV.masked_fill(law_RV < p * law_RV.amax(dim=-1, keepdim=True), -torch.inf)
