"""What CARDS' segmentation is for: does a prefix's reward tell the finished answer's? docs/results/segmentation.md.

    python -m scripts.experiments.segmentation

Unguided samples of the base and of IAMA are scored at every length. Boundaries before uncertain tokens are set against
boundaries at fixed and at random lengths of the same mean, and against themselves moved by a few tokens. Samples and
scores are kept under runs/results; the entropy threshold is the one that segment_samplers chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import rankdata

from iama.models.fingerprint import fingerprint
from iama.prompts.render import render_prompt
from inference.engine.next_token import entropy
from inference.engine.responses import response_text
from inference.engine.reward_rows import RewardRows
from inference.pools.journal import append_line, digest, read_lines
from inference.samplers.best_of import draw
from inference.samplers.cards import CardsSettings
from scripts.experiments import common
from scripts.experiments.common import CRITERIA, SEARCH_SEED, SEEDS
from scripts.experiments.pools import SAMPLING, quieten
from scripts.experiments.segment_samplers import adapters, choose, run_search
from scripts.experiments.segment_setup import progress_bar, prompts, setup

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from iama.config.specs import Sampling
    from scripts.experiments.common import Estimate
    from scripts.experiments.segment_setup import Adapters, Setup

    Floats = NDArray[np.float64]
    Cuts = list[list[list[int]]]  # [P][S], prefix lengths in tokens
    Results = Mapping[int, Mapping[str, "Samples"]]
    Units = Mapping[str, Floats]

POLICIES = ("base", "iama-w50")
NUM_SAMPLES = 32
AT_ONCE = 8  # prompts whose samples are scored together
EDGES = (4, 10, 16, 22, 28, 48)
"""Bins of a prefix's length in tokens, within which prefixes are compared."""
MIN_SAMPLES = 8
SHIFTS = (-3, -2, -1, 1, 2, 3)
ENTROPY, FIXED, RANDOM, SHIFTED = "entropy", "fixed", "random", "shifted"
RIVALS = (FIXED, RANDOM, SHIFTED)


@dataclass(frozen=True)
class Samples:
    """Unguided samples `[P][S]` of one policy.

    Of each: the entropy after every token of its text but the last, and by criterion the proxy of every prefix, the
    last being the finished answer.
    """

    entropies: list[list[list[float]]]
    rewards: Mapping[str, list[list[list[float]]]]


def main() -> None:
    """Sample, score, write the page."""
    from scripts.experiments import segmentation_page
    from scripts.experiments.search import best_settings

    quieten()
    best = best_settings()
    threshold = choose(run_search(adapters(SEARCH_SEED, best))).entropy_threshold
    found = {seed: adapters(seed, best) for seed in SEEDS}
    results = measure({seed: {name: some[name] for name in POLICIES} for seed, some in found.items()})
    segmentation_page.write(results, threshold)
    Console(highlight=False).print(f"wrote {segmentation_page.PAGE} and {segmentation_page.PLOT}")


# Samples and the rewards of their prefixes. -------------------------------------------------------------


def measure(
    policies: Mapping[int, Adapters],
    max_prompts: int | None = None,
    num_samples: int = NUM_SAMPLES,
    sampling: Sampling = SAMPLING,
) -> Results:
    """Every seed's policies on test prompts."""
    results: dict[int, dict[str, Samples]] = {}
    rows_by_seed = {seed: prompts(seed, "test", max_prompts) for seed in policies}
    with progress_bar() as progress:
        bar = progress.add_task(
            "prompts", total=sum(len(rows_by_seed[seed]) * len(policies[seed]) for seed in policies)
        )
        for seed, some in policies.items():
            results[seed] = {}
            for name, adapter in some.items():
                ready = setup(seed, name, adapter, "test", rows_by_seed[seed], sampling)
                lines = []
                for line in _lines(ready, num_samples):
                    lines.append(line)
                    progress.advance(bar)
                rewards = {c: [line["rewards"][c] for line in lines] for c in CRITERIA}
                results[seed][name] = Samples([line["entropies"] for line in lines], rewards)
    return results


def _lines(ready: Setup, num_samples: int) -> Iterator[dict[str, Any]]:
    """A line a prompt, from disk where it is there."""
    home = common.world(ready.seed)
    path = common.FOLDER / "segmentation" / f"test-{ready.seed}" / f"{ready.name}.jsonl"
    models = [fingerprint(home / part) for part in ("policy", *(f"rm-{name}" for name in CRITERIA))]
    adapter = fingerprint(Path(ready.spec.adapter)) if ready.spec.adapter else None
    law = [models, adapter, ready.sampling.model_dump(mode="json"), ready.seed, num_samples]
    keys = [digest([law, row["prompt"]]) for row in ready.rows]
    known = read_lines(path)
    for start in range(0, len(keys), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(keys)))
        missing = [i for i in some if keys[i] not in known]
        for i, line in zip(missing, _sample(ready, missing, num_samples), strict=True):
            append_line(path, {"key": keys[i], **line})
            known[keys[i]] = line
        yield from (known[keys[i]] for i in some)


def _sample(ready: Setup, indices: Sequence[int], num_samples: int) -> list[dict[str, Any]]:
    """Entropies and prefix rewards of some prompts' samples, rounded."""
    if not indices:
        return []
    asked = [ready.rows[i]["prompt"] for i in indices]
    pool = draw(ready.policy, asked, num_samples, ready.sampling, seed=ready.seed, batch_size=256)
    ids = [[_content(ready, c.token_ids) for c in row] for row in pool.samples]
    flat = [tokens for row in ids for tokens in row]
    spread = [prompt for prompt in asked for _ in range(num_samples)]
    rewards = {name: prefix_rewards(ready, name, spread, flat) for name in CRITERIA}
    found = []
    for p, prompt in enumerate(asked):
        rows = slice(p * num_samples, (p + 1) * num_samples)
        found.append(
            {
                "prompt": indices[p],
                "entropies": _rounded(_entropies(ready, prompt, ids[p])),
                "rewards": {name: _rounded(values[rows]) for name, values in rewards.items()},
            }
        )
    return found


def _content(ready: Setup, token_ids: Sequence[int]) -> list[int]:
    """A response without its end token."""
    ended = bool(token_ids) and token_ids[-1] in ready.policy.eos_token_ids
    return list(token_ids[:-1] if ended else token_ids)


def _entropies(ready: Setup, prompt: Any, ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Entropy of what follows each prefix, but for the whole: `[S][T - 1]`."""
    start = render_prompt(ready.policy.tokenizer, prompt)
    width = max(map(len, ids), default=0)
    padded = torch.tensor([[*start, *row, *[0] * (width - len(row))] for row in ids])  # what follows is not read
    with torch.inference_mode():
        logits_STV = ready.policy.model(input_ids=padded).logits[:, len(start) :]
    entropies_ST = entropy(logits_STV)
    return [values[: max(0, len(row) - 1)].tolist() for values, row in zip(entropies_ST, ids, strict=True)]


def prefix_rewards(ready: Setup, name: str, asked: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Proxy of every prefix of every response, `[R][T]`, each read on from the one before."""
    held = RewardRows(ready.proxies[name])
    rows = held.allocate(len(ids))
    found: list[list[float]] = [[] for _ in ids]
    for length in range(1, max(map(len, ids), default=0) + 1):
        live = [i for i, tokens in enumerate(ids) if len(tokens) >= length]
        # The end token is kept off, so that a prefix is rendered as an answer that ends there.
        texts = [response_text(ready.policy, ids[i][:length]) for i in live]
        scores, _ = held.score([rows[i] for i in live], [asked[i] for i in live], texts)
        for i, score in zip(live, scores, strict=True):
            found[i].append(score)
    return found


def _rounded(values: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in values]


# Boundaries. --------------------------------------------------------------------------------------------


def entropy_cuts(entropies: Sequence[float], threshold: float, least: int, most: int) -> list[int]:
    """Lengths at which CARDS would end a segment of a response, its end left out."""
    cuts, start = [], 0
    for length, value in enumerate(entropies, start=1):
        if length - start >= most or (length - start >= least and value >= threshold):
            cuts.append(length)
            start = length
    return cuts


def schemes(samples: Samples, threshold: float, seed: int) -> dict[str, Cuts]:
    """Boundaries of every scheme; the first three have the same mean length of a segment.

    Random: the lengths of the entropy's segments, drawn anew. Shifted: each boundary of the entropy's, moved.
    """
    settings = CardsSettings(entropy_threshold=threshold)
    least, most = settings.min_segment, settings.max_segment
    cuts = [[entropy_cuts(e, threshold, least, most) for e in row] for row in samples.entropies]
    lengths = np.asarray([b - a for row in cuts for some in row for a, b in pairwise([0, *some])])
    if not lengths.size:
        return dict.fromkeys((ENTROPY, *RIVALS), cuts)
    rng = np.random.default_rng(seed)
    found: dict[str, Cuts] = {ENTROPY: cuts, FIXED: [], RANDOM: [], SHIFTED: []}
    for row, some in zip(samples.entropies, cuts, strict=True):
        ends = [len(e) for e in row]  # the longest prefix that is not the whole
        fixed = [np.round(np.arange(1, 1 + end) * lengths.mean()).astype(int) for end in ends]
        drawn = [np.cumsum(rng.choice(lengths, size=1 + end)) for end in ends]
        moved = [np.asarray(own, dtype=int) + rng.choice(SHIFTS, size=len(own)) for own in some]
        found[FIXED].append([[int(c) for c in r if c <= end] for r, end in zip(fixed, ends, strict=True)])
        found[RANDOM].append([[int(c) for c in r if c <= end] for r, end in zip(drawn, ends, strict=True)])
        # A boundary that is moved off the response keeps its place in the list, so that it stays paired.
        found[SHIFTED].append([r.tolist() for r in moved])
    return found


def mean_segment(cuts: Cuts) -> float:
    """Mean tokens of a segment that ends at a boundary."""
    return float(np.mean([b - a for row in cuts for some in row for a, b in pairwise([0, *some])]))


# Correlations. ------------------------------------------------------------------------------------------


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; NaN where one side is constant."""
    ranks = np.stack([rankdata(x), rankdata(y)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return float("nan")
    matrix = np.asarray(np.corrcoef(ranks))
    return float(matrix[0, 1])


def in_bin(cuts: Sequence[int], low: int, high: int) -> int | None:
    """Place of the first boundary in `low <= length < high`."""
    return next((i for i, cut in enumerate(cuts) if low <= cut < high), None)


def compare(samples: Samples, criterion: str, cuts: Mapping[str, Cuts], rival: str) -> dict[str, Floats]:
    """Entropy against another scheme, in each bin over the samples that have a boundary of both there: `[P]` each.

    Sums over a prompt's bins, to be divided by their `units`: rank correlation of the prefix's proxy with the finished
    answer's under both (`ours`, `theirs`), and mean length of the prefix in tokens; by bin too, as `NAME BIN`.
    """
    names = ("units", "ours", "theirs", "our tokens", "their tokens")
    bins = list(pairwise(EDGES))
    found: dict[str, list[float]] = {
        f"{name}{suffix}": [] for suffix in ("", *(f" {b}" for b in range(len(bins)))) for name in names
    }
    for p, rewards in enumerate(samples.rewards[criterion]):
        by_bin = [_unit(rewards, cuts[ENTROPY][p], cuts[rival][p], low, high, rival) for low, high in bins]
        for k, name in enumerate(names):
            values = [unit[k] for unit in by_bin]
            found[name].append(sum(values))
            for b, value in enumerate(values):
                found[f"{name} {b}"].append(value)
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}


def _unit(
    rewards: Sequence[Sequence[float]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    low: int,
    high: int,
    rival: str,
) -> tuple[float, ...]:
    """One prompt and bin: 1, both correlations and both mean lengths; zeros where there is too little."""
    pairs = []
    for own, other, values in zip(ours, theirs, rewards, strict=True):
        i = in_bin(own, low, high)
        j = i if rival == SHIFTED else in_bin(other, low, high)
        if i is not None and j is not None and 1 <= other[j] < len(values):
            pairs.append((values[own[i] - 1], values[other[j] - 1], values[-1], own[i], other[j]))
    if len(pairs) < MIN_SAMPLES:
        return (0.0,) * 5
    mine, yours, finished, my_tokens, your_tokens = zip(*pairs, strict=True)
    correlations = spearman(mine, finished), spearman(yours, finished)
    if np.isnan(correlations).any():
        return (0.0,) * 5
    return (1.0, *correlations, float(np.mean(my_tokens)), float(np.mean(your_tokens)))


def level(units: Sequence[Units], name: str, suffix: str = "") -> Estimate:
    """Mean over prompts and bins of one scheme's correlation or tokens."""
    return common.bootstrap(
        [_pick(some, (name, "units"), suffix) for some in units], lambda m: m[name] / np.maximum(m["units"], 1e-12)
    )


def gap(units: Sequence[Units], suffix: str = "") -> Estimate:
    """Entropy's correlation minus the rival's."""
    return common.bootstrap(
        [_pick(some, ("ours", "theirs", "units"), suffix) for some in units],
        lambda m: (m["ours"] - m["theirs"]) / np.maximum(m["units"], 1e-12),
    )


def _pick(units: Units, names: Sequence[str], suffix: str) -> dict[str, Floats]:
    assert units[f"units{suffix}"].sum() > 0, "no prompt has enough samples with both boundaries"
    return {name: units[f"{name}{suffix}"] for name in names}


def comparisons(results: Results, threshold: float) -> dict[tuple[str, str, str], list[Units]]:
    """The seeds' `compare` by policy, criterion and rival."""
    found: dict[tuple[str, str, str], list[Units]] = {}
    for seed, policies in results.items():
        for policy, samples in policies.items():
            cuts = schemes(samples, threshold, seed)
            for criterion, rival in product(CRITERIA, RIVALS):
                found.setdefault((policy, criterion, rival), []).append(compare(samples, criterion, cuts, rival))
    return found


if __name__ == "__main__":
    main()
