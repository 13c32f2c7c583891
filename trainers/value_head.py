"""A value head, fitted by least squares: from a policy's hidden state and a token to the final reward of its samples.

The mean final reward of a policy's own samples that pass through a state and go on with a token is what that token is
worth there; `Q(h, v) = f(h) + A(h) B_v` (`iama.models.value_head`) is the nearest function of its kind. `B_v` are the
first principal components of the policy's output matrix, so that all that is fitted is linear, and exact.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iama.arrays import Floats, Integers
from iama.errors import ConfigError, DataError
from iama.files import building
from iama.models.flops import row_flops, size_of
from iama.models.inputs import pad
from iama.models.value_head import (
    HeadCost,
    HeadFit,
    HeadPolicy,
    HeadPool,
    HeadRecord,
    ValueHead,
    hidden_states,
    output_size,
    save_head,
    with_constant,
)
from iama.prompts.render import Prompt
from trainers.distill import held_out_prompts

BATCH_SIZE = 64
"""Samples that the policy reads together."""
MOST_FEATURES = 2**14
"""Numbers that are fitted at once: their products are two gigabytes."""


@dataclass(frozen=True)
class HeadSettings:
    """How a head is fitted; `reward` names what it foretells, `held_out` is a share of the prompts."""

    reward: str
    rank: int = 16
    ridge: float = 0.01
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class ScoredSamples:
    """A policy's own samples: token ids of prompts `[P][T]` and samples `[P][S][T]`, and final rewards `[P][S]`.

    A reward that is NaN is missing. `flops` is what drawing them took.
    """

    prompts: Sequence[Prompt]
    prompts_ids: Sequence[Sequence[int]]
    token_ids: Sequence[Sequence[Sequence[int]]]
    rewards: Sequence[Sequence[float]]
    flops: float = 0.0


@dataclass(frozen=True)
class _Tokens:
    """Sampled tokens `[N]`, hidden states before them `[N, D]`, and final rewards and prompts of their samples."""

    hidden_ND: torch.Tensor
    tokens_N: Integers
    rewards_N: Floats
    prompts_N: Integers


def fit_value_head(
    model: Any,
    samples: ScoredSamples,
    policy: HeadPolicy,
    pool: dict[str, Any],
    settings: HeadSettings,
    out: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> HeadRecord:
    """Fit a head on a policy's scored samples and save it in the folder `out`, which appears whole or not at all.

    `pool` are those fields of `HeadPool` that the samples do not tell. `advance` gets numbers of prompts that are read.
    Raises `DataError` for samples that hold nothing to learn, `ConfigError` for too high a rank, `ModelError` for a
    model without an output matrix, `RunError` where `out` is in the way.
    """
    size, vocabulary = output_size(model, f"policy {policy.name!r}")
    rank = min(settings.rank, size, vocabulary - 1)
    _check_features(size, rank, settings, policy)
    learnt, judged = held_out_prompts(samples.prompts, settings.held_out, settings.seed, "prompts")
    _check_rewards(samples, settings.reward, learnt, judged)
    with building(out) as folder:
        found = _fit(model, samples, learnt, rank, settings, advance)
        record = HeadRecord(
            policy=policy,
            reward=settings.reward,
            pool=HeadPool(
                **pool,
                num_prompts=len(learnt),
                num_held_out=len(judged),
                num_samples=found.num_samples,
                num_tokens=found.num_tokens,
            ),
            hidden_size=size,
            vocabulary=vocabulary,
            rank=rank,
            ridge=settings.ridge,
            spread=found.spread,
            held_out=found.held_out,
            cost=found.cost,
            versions={name: importlib.metadata.version(name) for name in ("iama", "torch", "transformers")},
        )
        weights, basis = (torch.from_numpy(array).float() for array in (found.weights_DR, found.basis_VR))
        save_head(folder, ValueHead(record, weights[:, 0], weights[:, 1:], basis[:, 1:]))
    return record


@dataclass(frozen=True)
class _Fitted:
    """Weights `[D + 1, R]` of the basis `[V, R]`, how well they foretell, and what they were fitted on."""

    weights_DR: Floats
    basis_VR: Floats
    spread: float
    held_out: HeadFit
    num_samples: int
    num_tokens: int
    cost: HeadCost


def _fit(
    model: Any,
    samples: ScoredSamples,
    learnt: Sequence[int],
    rank: int,
    settings: HeadSettings,
    advance: Callable[[int], None],
) -> _Fitted:
    """Read the samples, fit on those of the prompts `learnt`, judge on the others; `DataError` where Q is constant."""
    begin = time.perf_counter()
    tokens, hidden_flops, num_samples, read_tokens = _read(model, samples, advance)
    is_learnt_N = np.isin(tokens.prompts_N, learnt)
    known, judging = _of(tokens, is_learnt_N), _of(tokens, ~is_learnt_N)
    basis_VR = token_basis(model.get_output_embeddings().weight.detach(), rank)
    weights_DR, fit_flops = least_squares(known.hidden_ND, known.tokens_N, known.rewards_N, basis_VR, settings.ridge)
    spread = float(_values(known, weights_DR, basis_VR).std())
    if not spread > 0:
        raise DataError(f"the scores {settings.reward!r} do not depend on the tokens, so there is nothing to learn")
    held_out = judge(_values(judging, weights_DR, basis_VR), judging.rewards_N, judging.prompts_N)
    cost = HeadCost(
        samples_flops=samples.flops,
        hidden_flops=hidden_flops,
        fit_flops=fit_flops,
        read_tokens=read_tokens,
        seconds=time.perf_counter() - begin,
    )
    return _Fitted(weights_DR, basis_VR, spread, held_out, num_samples, len(known.tokens_N), cost)


def _check_features(size: int, rank: int, settings: HeadSettings, policy: HeadPolicy) -> None:
    """Raise `ConfigError` where a rank makes more numbers to fit than memory holds."""
    if (size + 1) * (rank + 1) > MOST_FEATURES:
        raise ConfigError(
            f"rank = {settings.rank} with the {size} numbers of policy {policy.name!r}'s hidden state makes "
            f"{(size + 1) * (rank + 1)} to fit, more than {MOST_FEATURES}; use at most "
            f"rank = {max(1, MOST_FEATURES // (size + 1) - 1)}"
        )


def _check_rewards(samples: ScoredSamples, name: str, learnt: Sequence[int], judged: Sequence[int]) -> None:
    """Raise `DataError` where what is learnt from, or what judges, has no two different rewards."""
    for indices, what in ((learnt, "to learn from"), (judged, "held out")):
        known = {reward for i in indices for reward in samples.rewards[i] if not np.isnan(reward)}
        if len(known) < 2:
            raise DataError(
                f"the {len(indices)} prompts {what} have no two different scores {name!r}; draw more samples and score "
                "them"
            )


# Tokens and what stood before them. ---------------------------------------------------------------------------------


def _read(model: Any, samples: ScoredSamples, advance: Callable[[int], None]) -> tuple[_Tokens, float, int, int]:
    """Every token of every scored sample; operations of reading them, their number of samples, and tokens in all."""
    rows = [
        (i, list(ids), reward)
        for i, (row, rewards) in enumerate(zip(samples.token_ids, samples.rewards, strict=True))
        for ids, reward in zip(row, rewards, strict=True)
        if ids and not np.isnan(reward)
    ]
    prompts_ids = samples.prompts_ids
    inputs = [[*prompts_ids[i], *ids[:-1]] for i, ids, _ in rows]
    hidden = [torch.empty(0)] * len(rows)
    left = np.bincount([i for i, _, _ in rows], minlength=len(prompts_ids))
    advance(int((left == 0).sum()))
    for batch in _batches(inputs):
        for place, states_TD in zip(batch, _hidden(model, [inputs[place] for place in batch]), strict=True):
            hidden[place] = states_TD[-len(rows[place][1]) :]
            left[rows[place][0]] -= 1
            advance(int(left[rows[place][0]] == 0))
    counts = [len(ids) for _, ids, _ in rows]
    tokens = _Tokens(
        torch.cat(hidden),
        np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids, _ in rows]),
        np.repeat(np.asarray([reward for _, _, reward in rows], dtype=np.float64), counts),
        np.repeat(np.asarray([i for i, _, _ in rows]), counts),
    )
    flops = float(row_flops(size_of(model), 0, [len(row) for row in inputs]).sum())
    return tokens, flops, len(rows), sum(map(len, inputs)) + len(rows)


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), BATCH_SIZE):
        yield order[start : start + BATCH_SIZE]


@torch.no_grad()
def _hidden(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What the output matrix reads at each token of each row, `[T, D]` float32 each."""
    device = model.device
    mask = pad([[1] * len(row) for row in rows], 0, device=device)
    with hidden_states(model) as seen:
        model(input_ids=pad(rows, 0, device=device), attention_mask=mask, use_cache=False)
    (states_RTD,) = seen
    return [states_TD[: len(row)].float().cpu() for states_TD, row in zip(states_RTD, rows, strict=True)]


def _of(tokens: _Tokens, which_N: Any) -> _Tokens:
    return _Tokens(
        tokens.hidden_ND[torch.from_numpy(which_N)],
        tokens.tokens_N[which_N],
        tokens.rewards_N[which_N],
        tokens.prompts_N[which_N],
    )


# Least squares. -------------------------------------------------------------------------------------------------------


def token_basis(output_VD: torch.Tensor, rank: int) -> Floats:
    """Numbers that describe each token, `[V, 1 + rank]`: a constant 1, then principal components of the output matrix.

    Each component has mean 0 and variance 1 over the vocabulary.
    """
    rows_VD = output_VD.double().cpu()
    rows_VD = rows_VD - rows_VD.mean(dim=0)
    directions_DD = torch.linalg.eigh(rows_VD.T @ rows_VD).eigenvectors
    top_DR = directions_DD[:, -rank:].flip(1)
    scores_VR = (rows_VD @ top_DR).numpy()
    deviations_R = scores_VR.std(axis=0)
    scores_VR = scores_VR / np.where(deviations_R > 0, deviations_R, 1.0)
    return np.concatenate([np.ones((len(scores_VR), 1)), scores_VR], axis=1)


def least_squares(
    hidden_ND: torch.Tensor, tokens_N: Integers, rewards_N: Floats, basis_VR: Floats, ridge: float
) -> tuple[Floats, float]:
    """The `W` `[D + 1, R]` that minimises `mean((rewards - h W b_v)^2) + ridge * |W'|^2`, and the operations it took.

    `h` are hidden states with a last entry of 1, `b_v` the basis of each token. `W'` is `W` for hidden states of mean 0
    and variance 1, of which the constant of `f` is not held down.
    """
    mean_D, deviation_D = hidden_ND.double().mean(dim=0), hidden_ND.double().std(dim=0, correction=0)
    deviation_D = torch.where(deviation_D > 0, deviation_D, torch.ones_like(deviation_D))
    offset = float(rewards_N.mean())
    gram, moment, flops = _products(
        hidden_ND, mean_D, deviation_D, tokens_N, torch.from_numpy(rewards_N - offset), torch.from_numpy(basis_VR)
    )
    number = len(rewards_N)
    weights = torch.full((len(gram),), ridge * number, dtype=torch.float64)
    weights[len(mean_D) * basis_VR.shape[1]] = 0.0  # f's constant
    gram += torch.diag(weights)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise DataError("the samples do not determine the value head; use a greater ridge, or more samples")
    solved = torch.cholesky_solve(moment[:, None], factor)[:, 0].view(len(mean_D) + 1, -1)
    flops += len(gram) ** 3 / 3
    # Back to hidden states as they are.
    weights_DR = torch.cat([solved[:-1] / deviation_D[:, None], solved[-1:]])
    weights_DR[-1] -= mean_D @ weights_DR[:-1]
    weights_DR[-1, 0] += offset
    return weights_DR.numpy(), float(flops)


def _products(
    hidden_ND: torch.Tensor,
    mean_D: torch.Tensor,
    deviation_D: torch.Tensor,
    tokens_N: Integers,
    rewards_N: torch.Tensor,
    basis_VR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sums over tokens of the products of the features `h ⊗ b_v`, of those with the rewards, and the operations.

    A token's own features are a product, so that the sum over its occurrences is one too: `(sum of h h') ⊗ b_v b_v'`.
    """
    size, rank = hidden_ND.shape[1] + 1, basis_VR.shape[1]
    distinct, counts = np.unique(tokens_N, return_counts=True)
    order = torch.from_numpy(np.argsort(tokens_N, kind="stable"))
    gram = torch.zeros(size * size, rank * rank, dtype=torch.float64)
    moment = torch.zeros(size, rank, dtype=torch.float64)
    at_once = max(1, 2**24 // (size * size))
    ends = np.cumsum(counts)
    for first in range(0, len(distinct), at_once):
        block = range(first, min(first + at_once, len(distinct)))
        squares = torch.empty(len(block), size * size, dtype=torch.float64)
        for place, i in enumerate(block):
            rows = order[ends[i] - counts[i] : ends[i]]
            h_ND = with_constant((hidden_ND[rows].double() - mean_D) / deviation_D)
            squares[place] = (h_ND.T @ h_ND).flatten()
            moment += torch.outer(h_ND.T @ rewards_N[rows], basis_VR[distinct[i]])
        basis = basis_VR[torch.from_numpy(distinct[block.start : block.stop])]
        gram += squares.T @ (basis[:, :, None] * basis[:, None, :]).flatten(1)
    number = size * rank
    gram = gram.view(size, size, rank, rank).permute(0, 2, 1, 3).reshape(number, number)
    flops = 2.0 * len(tokens_N) * size * (size + 1) + 2.0 * len(distinct) * (size * rank) ** 2
    return gram, moment.flatten(), flops


def _values(tokens: _Tokens, weights_DR: Floats, basis_VR: Floats) -> Floats:
    """Q of each token, `[N]`."""
    projected_NR = (with_constant(tokens.hidden_ND) @ torch.from_numpy(weights_DR)).numpy()
    values_N: Floats = (projected_NR * basis_VR[tokens.tokens_N]).sum(axis=1)
    return values_N


def judge(values_N: Floats, rewards_N: Floats, prompts_N: Integers) -> HeadFit:
    """How well values foretell rewards: R^2, the same of what differs within a prompt, and Spearman's correlation."""
    within = _r_squared(_within(values_N, prompts_N), _within(rewards_N, prompts_N))
    return HeadFit(
        r_squared=_r_squared(values_N, rewards_N - rewards_N.mean(), shift=rewards_N.mean()),
        r_squared_within=within,
        spearman=_correlation(_ranks(values_N), _ranks(rewards_N)),
    )


def _r_squared(values_N: Floats, deviations_N: Floats, shift: float = 0.0) -> float:
    """1 less the share of the squared deviations that is left; 0 where there are none."""
    total = float(np.square(deviations_N).sum())
    return 1 - float(np.square(values_N - shift - deviations_N).sum()) / total if total > 0 else 0.0


def _within(values_N: Floats, prompts_N: Integers) -> Floats:
    """Values less the mean of their prompt."""
    _, places = np.unique(prompts_N, return_inverse=True)
    means = np.bincount(places, values_N) / np.bincount(places)
    deviations: Floats = values_N - means[places]
    return deviations


def _ranks(values_N: Floats) -> Floats:
    """Ranks, the mean of them for equal values."""
    _, places, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _correlation(a_N: Floats, b_N: Floats) -> float:
    """Pearson's; 0 where one side does not vary."""
    if not (np.ptp(a_N) and np.ptp(b_N)):
        return 0.0
    return float(np.corrcoef(a_N, b_N)[0, 1])
