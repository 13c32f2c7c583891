"""Log-probabilities of finished responses under a policy, and the fluency read off them.

They are those of softmax(logits): temperature 1, whole vocabulary, whatever the responses were drawn with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from iama.arrays import Floats
from iama.models.inputs import accepted_arguments, pad
from iama.models.loading import halved, is_out_of_memory
from inference.engine.next_token import entropy, log_probabilities, top_log_probabilities
from inference.engine.policy import Policy

T = TypeVar("T")
MOST_LOGITS = 2**26
"""Logits of a batch at most, 256 MB in float32: 256 rows of 100 tokens have 20 times as many at 50,000 words."""


def sequence_log_probabilities(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    responses_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> list[tuple[float, int]]:
    """Summed log-probability (nats) and number of tokens of each response, given its prompt (one prompt a response).

    `responses_ids` are scored as they are, the end token included where they hold one: decoding keeps it, and
    `response_ids` makes them from text. An empty response gives (0, 0). Where memory runs out the batch is halved,
    with a warning. A token beyond what the head can give has log-probability -inf.
    """
    sums = _each(policy, prompts_ids, responses_ids, batch_size, _sum)
    return [(sums.get(i, 0.0), len(response)) for i, response in enumerate(responses_ids)]


def token_entropies(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    responses_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> list[list[float]]:
    """Entropy (nats) of the law that each token of each response was drawn from, at temperature 1: `[R][T]`."""
    found = _each(policy, prompts_ids, responses_ids, batch_size, lambda logits_TV, _: entropy(logits_TV).tolist())
    return [found.get(i, []) for i in range(len(responses_ids))]


class TokenLikelihood(NamedTuple):
    """A response's token, its log-probability (nats), and the likeliest tokens in its place with theirs, in order."""

    token_id: int
    log_probability: float
    top: list[tuple[int, float]]


def token_likelihoods(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    responses_ids: Sequence[Sequence[int]],
    num_top: int,
    batch_size: int,
) -> list[list[TokenLikelihood]]:
    """Each token of each response, with the `num_top` likeliest in its place: `[R][T]`.

    A token beyond what the head can give has log-probability -inf. Where memory runs out the batch is halved, with a
    warning.
    """

    def read(logits_TV: torch.Tensor, tokens: Sequence[int]) -> list[TokenLikelihood]:
        ids_T = np.asarray(tokens, dtype=np.int64)
        known_T = ids_T < logits_TV.shape[1]
        own_T = log_probabilities(logits_TV, np.where(known_T, ids_T, 0)).tolist()
        tops = top_log_probabilities(logits_TV, num_top)
        rows = zip(tokens, own_T, known_T.tolist(), tops, strict=True)
        return [TokenLikelihood(token, own if is_known else -np.inf, top) for token, own, is_known, top in rows]

    found = _each(policy, prompts_ids, responses_ids, batch_size, read)
    return [found.get(i, []) for i in range(len(responses_ids))]


def _each(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    responses_ids: Sequence[Sequence[int]],
    batch_size: int,
    read: Callable[[torch.Tensor, Sequence[int]], T],
) -> dict[int, T]:
    """What `read` makes of the logits `[T, V]` and the tokens of each response that has any, by its place."""
    assert len(prompts_ids) == len(responses_ids)
    assert all(prompts_ids), "a prompt without tokens"
    results: dict[int, T] = {}
    # Neighbours are of a length, so that little is padding; the longest first, so that memory runs out at once.
    waiting = sorted(
        (i for i, ids in enumerate(responses_ids) if ids),
        key=lambda i: -len(prompts_ids[i]) - len(responses_ids[i]),
    )
    while waiting:
        batch = waiting[: min(batch_size, _num_rows(policy, prompts_ids, responses_ids, waiting[0]))]
        try:
            values = _forward(policy, [prompts_ids[i] for i in batch], [responses_ids[i] for i in batch], read)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch_size = halved(len(batch), f"policy {policy.name!r}", error)
            continue
        results |= dict(zip(batch, values, strict=True))
        waiting = waiting[len(batch) :]
    return results


def _num_rows(
    policy: Policy, prompts_ids: Sequence[Sequence[int]], responses_ids: Sequence[Sequence[int]], longest: int
) -> int:
    """Rows no longer than the longest whose logits a batch may hold; at least 1."""
    num_tokens = len(prompts_ids[longest]) + len(responses_ids[longest])
    return max(1, MOST_LOGITS // (num_tokens * int(policy.model.config.get_text_config(decoder=True).vocab_size)))


def response_ids(policy: Policy, text: str, finish_reason: str) -> list[int]:
    """Token ids of a response of which only the text is known.

    The text is tokenised anew, which may split it otherwise than it was sampled: its log-probability is then a
    little lower than that of all splits together, and not that of the sampled one. A response that ended with
    "stop" gets the tokenizer's end token (which is wrong after a stop string that is no token).
    """
    ids = list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    end = policy.tokenizer.eos_token_id
    if finish_reason == "stop" and end is None:
        end = min(policy.eos_token_ids)
    return [*ids, end] if finish_reason == "stop" else ids


def fluency(log_probability_PS: Floats, num_tokens_PS: NDArray[Any]) -> Floats:
    """Log-probability a token, `[P, S]`: with a reference's log-probabilities, how natural it finds a text.

    NaN for responses without tokens or without a log-probability.
    """
    counts_PS = np.asarray(num_tokens_PS, dtype=np.float64)
    return np.where(counts_PS > 0, log_probability_PS / np.where(counts_PS > 0, counts_PS, 1.0), np.nan)


def fluency_z(fluency_PS: Floats, reference_PS: Floats) -> float | None:
    """How many standard deviations a pool's mean fluency lies above that of a pool drawn from the reference.

    Prompt by prompt, in units of the reference samples' spread within their prompts (its root mean square over
    prompts); both measured under the reference. Pools may differ in size. None where nothing can be compared.
    """
    mean_P, reference_P = _row_means(fluency_PS), _row_means(reference_PS)
    gaps_P = mean_P - reference_P
    squares_PS = (reference_PS - reference_P[:, None]) ** 2
    known_P = ~np.isnan(gaps_P)
    if not known_P.any():
        return None
    spread = float(np.sqrt(np.nanmean(_row_means(squares_PS)[known_P])))
    return float(gaps_P[known_P].mean() / spread) if spread > 0 else None


def _row_means(values_PS: Floats) -> Floats:
    """Mean of each row's known values, NaN where there are none."""
    known_PS = ~np.isnan(values_PS)
    counts_P = known_PS.sum(axis=1)
    sums_P = np.where(known_PS, values_PS, 0.0).sum(axis=1)
    return np.where(counts_P > 0, sums_P / np.maximum(counts_P, 1), np.nan)


@torch.inference_mode()
def _forward(
    policy: Policy,
    prompts_ids: list[Sequence[int]],
    responses_ids: list[Sequence[int]],
    read: Callable[[torch.Tensor, Sequence[int]], T],
) -> list[T]:
    """What `read` makes of a batch: one forward pass over prompts and responses, padded on the right."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts_ids, responses_ids, strict=True)]
    width = max(map(len, rows))
    device = policy.model.device
    pad_id = max(0, getattr(policy.model.config, "pad_token_id", None) or 0)
    inputs: dict[str, Any] = {"input_ids": pad(rows, pad_id, device=device)}
    if any(len(row) < width for row in rows):
        inputs["attention_mask"] = pad([[1] * len(row) for row in rows], 0, device=device)
    # Logits of the shared part of the prompts are not needed; nor is the last column's, which predicts nothing.
    first = min(map(len, prompts_ids)) - 1
    model: Any = policy.model
    if "logits_to_keep" in accepted_arguments(model):
        logits_BTV = model(**inputs, use_cache=False, logits_to_keep=width - first).logits
    else:
        logits_BTV = model(**inputs, use_cache=False).logits[:, first:]
    starts = [len(prompt) - 1 - first for prompt in prompts_ids]
    return [
        read(logits_TV[start : start + len(response)], response)
        for logits_TV, start, response in zip(logits_BTV, starts, responses_ids, strict=True)
    ]


def _sum(logits_TV: torch.Tensor, tokens: Sequence[int]) -> float:
    ids_T = np.asarray(tokens, dtype=np.int64)
    if (ids_T >= logits_TV.shape[1]).any():
        return -np.inf
    return float(log_probabilities(logits_TV, ids_T).sum())
