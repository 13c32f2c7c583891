"""Guided samplers beside Best-of-n on one policy: answers kept on disk, values at equal operations, coverage.

A `Case` is a policy that serves one criterion on some prompts. Its pool gives Best-of-n for every n; `answers` gives
what a sampler (CARDS, GGRO, SEA, ARGS, or served Best-of-n) answers to the same prompts.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import comb

from iama.arrays import Floats, Integers, Mask
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import IamaWarning
from iama.models.fingerprint import fingerprint
from iama.models.flops import size_of
from iama.objective.operators import bon
from iama.prompts.render import render_prompt
from iama.rewards.classifier import Classifier
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.likelihood import response_ids, sequence_log_probabilities
from inference.engine.policy import Policy, load_policy
from inference.engine.responses import Pool
from inference.engine.reward_rows import num_common, reads_in_pieces
from inference.pools.held import lengths
from inference.pools.journal import append_line, digest, read_lines
from inference.pools.score import PoolScores
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.cards import Cards, CardsSettings, acceptance_summary
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Sea, SeaSettings
from inference.samplers.serve import serve
from inference.selection.curves import curves, rank_weights
from inference.statistics.costs import pool_costs
from inference.statistics.equal_cost import EqualCost, difference_at_equal_cost
from inference.statistics.savings import Comparison, paired_difference
from scripts.experiments.frame import Estimate, Row
from scripts.experiments.pools import Task, asked

Settings = CardsSettings | ArgsSettings | GgroSettings | SeaSettings | str
"""A sampler's settings, or a method as people write it, e.g. `bon(4)`."""
SAMPLERS: dict[type[Any], Any] = {CardsSettings: Cards, ArgsSettings: Args, GgroSettings: Ggro, SeaSettings: Sea}
OTHER_SEED = 1000  # proposals begin with the random numbers of a pool of the same seed
RUN = uuid.uuid4().hex
TIE = 1e-9
NUM_BOOTSTRAP = 500
RARE_N, RARE_SHARE = 64, 0.1
COSTS = ("policy_tokens", "reward_tokens", "backward_tokens", "flops", "sequential_steps")


# Answers. -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A policy that serves one criterion on the prompts of its pool."""

    task: Task
    criterion: EvaluationCriterion

    @property
    def policy(self) -> Policy:
        """The policy, loaded once."""
        return load_once(self.task.name, self.task.spec, self.task.sampling)

    @property
    def reward(self) -> Reward:
        """The proxy that guides and selects, loaded once."""
        return _reward(self.criterion.name, self.criterion.proxy.model_dump_json())

    @property
    def classifier(self) -> Classifier:
        """The proxy's model."""
        classifier = self.reward.classifier
        assert classifier is not None, self.criterion
        return classifier

    @property
    def journal(self) -> Path:
        """File of the policy's answers."""
        return self.task.folder / "answers" / f"{self.task.name}.jsonl"

    def identity(self, *models: str | None) -> list[Any]:
        """What answers depend on besides settings and prompts; `models` are folders."""
        spec, sampling = self.task.spec, self.task.sampling
        folders = [Path(str(folder)) for folder in (spec.path, *models)]
        adapter = fingerprint(Path(spec.adapter)) if spec.adapter else None
        return [[fingerprint(folder) for folder in folders], adapter, sampling.model_dump(mode="json"), self.task.seed]


def load_once(name: str, spec: PolicySpec, sampling: Sampling) -> Policy:
    """A policy, loaded once."""
    return _policy(name, spec.model_dump_json(), sampling.model_dump_json())


@cache
def _policy(name: str, spec: str, sampling: str) -> Policy:
    return load_policy(name, PolicySpec.model_validate_json(spec), Sampling.model_validate_json(sampling))


def answers(case: Case, settings: Settings, indices: Sequence[int] | None = None, num_answers: int = 1) -> Row:
    """A sampler's answers to the prompts `indices` (all), `num_answers` times over; from disk where they are there."""
    rows = case.task.rows
    chosen = list(range(len(rows))) if indices is None else list(indices)
    written = settings if isinstance(settings, str) else settings.model_dump(mode="json")
    parts = [
        type(settings).__name__,
        written,
        case.criterion.proxy.sign,
        [rows[i]["prompt"] for i in chosen],
        num_answers,
    ]
    key = digest([*case.identity(case.criterion.proxy.model), *parts])

    def make() -> Row:
        about = {"run": RUN, "criterion": case.criterion.name, "settings": written, "num_answers": num_answers}
        return {**about, "prompts": chosen, **_serve(case, settings, [rows[i] for i in chosen * num_answers])}

    return _kept(case.journal, key, make)


def _kept(journal: Path, key: str, make: Callable[[], Row]) -> Row:
    """The line of a journal with this key, made unless it is there."""
    line = read_lines(journal).get(key)
    if line is None:
        line = {"key": key, **make()}
        append_line(journal, line)
    return line


def _serve(case: Case, settings: Settings, rows: Sequence[Row]) -> Row:
    prompts, columns = asked(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IamaWarning)  # of forced segments, whose share pages have
        begin = time.process_time()
        completions = sampler(case, settings).sample(prompts, seed=case.task.seed + OTHER_SEED, columns=columns)
        core_seconds = (time.process_time() - begin) / len(completions)
    is_segmented = not isinstance(settings, str | ArgsSettings)
    return {
        "texts": [c.text for c in completions],
        "token_ids": [list(c.token_ids) for c in completions],
        "segments": [[[s.num_tokens, s.nudge] for s in c.trace] if is_segmented else [] for c in completions],
        "proxy": [c.reward for c in completions],
        **{unit: [c.cost.as_dict()[unit] for c in completions] for unit in (*COSTS, "seconds")},
        "core_seconds": core_seconds,  # of this process an answer: what else runs on the machine does not count
        "summary": acceptance_summary(completions) if isinstance(settings, CardsSettings) else {},
    }


def sampler(case: Case, settings: Settings) -> Any:
    """What answers prompts with these settings."""
    if isinstance(settings, str):
        return serve(case.policy, case.reward, settings, case.task.sampling)
    return SAMPLERS[type(settings)](case.policy, case.reward, settings, case.task.sampling)


def judged(case: Case, line: Row, gold: RewardSpec) -> Floats:
    """Gold of a line's answers, which is not kept lest the gold function change."""
    prompts, columns = asked([case.task.rows[i] for i in line["prompts"] * line["num_answers"]])
    return np.asarray(_reward("gold", gold.model_dump_json()).score(prompts, line["texts"], columns)[0])


@cache
def _reward(name: str, spec: str) -> Reward:
    return load_reward(name, RewardSpec.model_validate_json(spec))


def fluency(case: Case, base: PolicySpec, line: Row) -> list[float]:
    """Log-probability a token of a line's answers under a base, nats; kept on disk."""
    prompts = [case.task.rows[i]["prompt"] for i in line["prompts"] * line["num_answers"]]
    key = digest(["fluency", line["key"], *case.identity(base.path)])
    values = _kept(case.journal, key, lambda: {"fluency": _fluency(case, base, prompts, line["token_ids"])})["fluency"]
    return list(values)


def pool_fluency(case: Case, base: PolicySpec, pool: Pool) -> Floats:
    """The same of a pool's samples, `[P, S]`; texts that occur twice are read once."""
    prompts = [row["prompt"] for row in case.task.rows]
    every = [(p, s.text, s.finish_reason) for p, row in enumerate(pool.prompts) for s in row.samples]

    def make() -> Row:
        distinct = list(dict.fromkeys(every))
        model = load_once("base", base, case.task.sampling)
        responses = [response_ids(model, text, reason) for _, text, reason in distinct]
        values = _fluency(case, base, [prompts[p] for p, *_ in distinct], responses)
        known = dict(zip(distinct, values, strict=True))
        return {"fluency": [round(known[sample], 5) for sample in every]}

    key = digest(["fluency", case.task.split, case.task.num_samples, prompts, *case.identity(base.path)])
    return np.asarray(_kept(case.journal, key, make)["fluency"], dtype=np.float64).reshape(len(pool.prompts), -1)


def _fluency(case: Case, base: PolicySpec, prompts: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
    model = load_once("base", base, case.task.sampling)
    ids = [render_prompt(model.tokenizer, prompt) for prompt in prompts]
    return [value / max(1, number) for value, number in sequence_log_probabilities(model, ids, responses, 256)]


def spread_out(num_prompts: int, number: int) -> list[int]:
    """Indices of so many prompts, spread evenly."""
    indices: list[int] = np.unique(np.linspace(0, num_prompts - 1, min(number, num_prompts)).astype(int)).tolist()
    return indices


def strict(gold: Sequence[float] | Floats, wrong: Floats) -> Floats:
    """Gold that counts ungrammatical answers as 0."""
    counted: Floats = np.asarray(gold) * (1 - np.asarray(wrong))
    return counted


# Values. ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A method's answers to the pool's prompts `rows`: values `[R]` by metric and unit, gold `[R, M]` of each answer.

    `segments`: length and whether its first token was overridden, of every segment of every answer. Seconds of
    different runs are not to be compared.
    """

    rows: Integers
    values: Mapping[str, Floats]
    gold_RM: Floats
    token_ids: Sequence[Sequence[int]]
    segments: Sequence[Sequence[tuple[int, bool]]]
    run: str


@dataclass(frozen=True)
class Cell:
    """One policy and criterion in one seed: Best-of-n's curves `[P, N]` by metric and unit, the pool behind them."""

    bon: Mapping[str, Floats]
    proxy_PS: Floats
    gold_PS: Floats
    served: Mapping[str, Served]


def served(line: Mapping[str, Any], metrics: Sequence[str]) -> Served:
    """Answers that a line holds; values are means over a prompt's answers, lengths count the end token."""
    num_answers, rows = line["num_answers"], np.asarray(line["prompts"], dtype=np.int64)

    def by_prompt(values: Sequence[float]) -> Floats:
        return np.asarray(values, dtype=np.float64).reshape(num_answers, len(rows)).T

    values = {name: by_prompt(line[name]).mean(axis=1) for name in (*metrics, *COSTS, "seconds")}
    values["length"] = by_prompt([len(ids) for ids in line["token_ids"]]).mean(axis=1)
    segments = [[(number, nudge) for number, nudge in answer] for answer in line["segments"]]
    return Served(rows, values, by_prompt(line["gold"]), line["token_ids"], segments, line["run"])


def bon_curves(case: Case, pool: Pool, metrics: Mapping[str, Floats]) -> dict[str, Floats]:
    """What keeping the best of n = 1..N gives and costs, `[P, N]` by metric and unit; `metrics` include the proxy."""
    lengths_PS = lengths(pool)
    assert lengths_PS is not None, "pools sampled here tell their lengths"
    proxy_PS = metrics["proxy"]
    operators = [bon(n) for n in range(1, proxy_PS.shape[1] + 1)]
    values = {name: curves(proxy_PS, score, operators) for name, score in {"length": lengths_PS, **metrics}.items()}
    read = _tokens_read(pool, proxy_PS, case.classifier)
    costs = pool_costs(pool, read, size_of(case.policy.model), case.classifier.size, "bon", len(operators))
    return values | {unit: costs[unit] for unit in COSTS}


def _tokens_read(pool: Pool, proxy_PS: Floats, classifier: Classifier) -> PoolScores:
    """A pool's scores with the tokens that the reward reads for them."""
    tokens, shared = [], []
    for prompt, texts in zip(pool.prompts, pool.texts, strict=True):
        empty, *ids = classifier.render([prompt.prompt] * (len(texts) + 1), ["", *texts])
        tokens.append([len(row) for row in ids])
        shared.append(min(min(num_common(empty, row), len(row) - 1) for row in ids))
    shared_P = np.asarray(shared, dtype=np.int64) * reads_in_pieces(classifier)
    return PoolScores(proxy_PS, np.asarray(tokens, dtype=np.int64), shared_P, np.zeros(len(shared_P)), proxy_PS.size)


def mean(cells: Sequence[Cell], name: str, metric: str) -> float:
    """Mean of a method's metric over prompts and seeds."""
    return float(np.mean([cell.served[name].values[metric].mean() for cell in cells]))


def bon_mean(cells: Sequence[Cell], n: int, metric: str, rows_of: str | None = None) -> float:
    """The same of Best-of-n, on all prompts or on those that a method answered."""
    rows = [cell.served[rows_of].rows if rows_of else slice(None) for cell in cells]
    return float(np.mean([cell.bon[metric][some, n - 1].mean() for cell, some in zip(cells, rows, strict=True)]))


def pool_size(cells: Sequence[Cell]) -> int:
    """The largest n of Best-of-n."""
    return min(len(cell.proxy_PS[0]) for cell in cells)


def difference(cells: Sequence[Cell], ours: str, theirs: str, metric: str = "gold") -> Estimate:
    """A method's metric minus another's, both on the same prompts."""
    pairs = [(cell.served[ours].values[metric], cell.served[theirs].values[metric]) for cell in cells]
    assert all((c.served[ours].rows == c.served[theirs].rows).all() for c in cells), (ours, theirs)
    gap = paired_difference(pairs, num_bootstrap=NUM_BOOTSTRAP, seed=0)
    assert gap.ci95 is not None  # an experiment has far more prompts than an interval needs
    return Estimate((), gap.mean, gap.ci95)


# At equal operations. -----------------------------------------------------------------------------------


def equal_flops(cells: Sequence[Cell], name: str, metric: str = "gold", num_bootstrap: int | None = None) -> EqualCost:
    """A method's metric minus that of Best-of-n with as many operations, on the method's prompts, over seeds."""
    seeds = [comparison(cell, name, cell.bon[metric], cell.served[name].values[metric]) for cell in cells]
    return difference_at_equal_cost(seeds, "flops", num_bootstrap=num_bootstrap or NUM_BOOTSTRAP, seed=0)


def comparison(cell: Cell, name: str, curve_PN: Floats, values_R: Floats) -> Comparison:
    """A method's values against a curve of Best-of-n, on the method's prompts."""
    method = cell.served[name]
    costs = {"flops": (cell.bon["flops"][method.rows], method.values["flops"])}
    return Comparison(curve_PN[method.rows], None, values_R, 1.0, costs)


def over_bon(cells: Sequence[Cell], name: str, metric: str = "gold") -> Estimate:
    """`equal_flops` with its interval in the form that pages print."""
    return as_estimate(equal_flops(cells, name, metric))


def as_estimate(gap: EqualCost) -> Estimate:
    """A difference with its interval."""
    assert gap.ci95 is not None
    return Estimate((), gap.difference, gap.ci95)


def samples_of(gap: EqualCost, cells: Sequence[Cell]) -> str:
    """The n of Best-of-n at equal operations."""
    size, n = pool_size(cells), gap.reference_samples
    if gap.clipped == "high":
        return f"> {size}: beyond the pool" if n > size - 0.5 else f"{n:.1f}, in some seed beyond the pool"
    return f"{n:.1f} (< 1 in some seed)" if gap.clipped else f"{n:.1f}"


# Coverage. ----------------------------------------------------------------------------------------------


def keep_shares(proxy_PS: Floats, n: int) -> Floats:
    """How often each sample is the best by proxy of `n` of the pool, over all subsets: `[P, S]`, rows sum to 1."""
    weights_S = rank_weights(bon(n), proxy_PS.shape[1])
    shares_PS = np.empty_like(proxy_PS, dtype=np.float64)
    for row, proxy_S in enumerate(proxy_PS):
        _, block_S, size = np.unique(proxy_S, return_inverse=True, return_counts=True)
        by_sample_S = np.empty_like(weights_S)
        by_sample_S[np.argsort(proxy_S, kind="stable")] = weights_S
        shares_PS[row] = (np.bincount(block_S, weights=by_sample_S) / size)[block_S]
    return shares_PS


def rare_value(proxy_PS: Floats, gold_PS: Floats) -> tuple[float, float]:
    """The least gold that Best-of-64 (or of the whole pool) reaches with at most 10 % of its answers, and that share.

    Where even the pool's greatest gold is more frequent, that one, with its share.
    """
    shares_PS = keep_shares(proxy_PS, min(RARE_N, proxy_PS.shape[1])) / len(proxy_PS)
    reached = [(float(v), float(shares_PS[gold_PS > v - TIE].sum())) for v in np.unique(gold_PS)]
    return next((pair for pair in reached if pair[1] <= RARE_SHARE + TIE), reached[-1])


def any_of(hits_PM: Mask, m: int) -> Floats:
    """Chance that one of m of the answers (a subset at random) is a hit: `[P]`, unbiased for every m <= M."""
    size, num_missed_P = hits_PM.shape[1], (~hits_PM).sum(axis=1)
    chance: Floats = 1 - comb(num_missed_P, m) / comb(size, m)
    return chance


def reached(proxy_PS: Floats, hits_PS: Mask) -> Floats:
    """Chance that Best-of-n's answer is a hit: `[P, N]`."""
    operators = [bon(n) for n in range(1, hits_PS.shape[1] + 1)]
    return np.clip(curves(proxy_PS, hits_PS.astype(float), operators), 0, 1)


def coverage(cells: Sequence[Cell], name: str, values: Sequence[float], m: int) -> tuple[float, EqualCost, float]:
    """Share of prompts with a hit among m answers, its excess over m answers of Best-of-n, and that of plain samples.

    A hit has at least the seed's value of gold. Each of the m answers of Best-of-n costs as many operations as one of
    the method and is a draw of its own from the pool's law.
    """
    seeds, ours, plain = [], [], []
    for cell, value in zip(cells, values, strict=True):
        hits_PS = cell.gold_PS > value - TIE
        hit_R = any_of(cell.served[name].gold_RM > value - TIE, m)
        seeds.append(comparison(cell, name, 1 - (1 - reached(cell.proxy_PS, hits_PS)) ** m, hit_R))
        ours.append(hit_R.mean())
        plain.append(any_of(hits_PS[cell.served[name].rows], m).mean())
    gap = difference_at_equal_cost(seeds, "flops", num_bootstrap=NUM_BOOTSTRAP, seed=0)
    return float(np.mean(ours)), gap, float(np.mean(plain))


# What nudges do. ----------------------------------------------------------------------------------------


def cut_rate(segments: Sequence[Sequence[Sequence[int]]], min_segment: int) -> float:
    """How often a segment that may end does, per token: boundaries over the places where one could have been.

    `segments` are lengths (with what else is known) of every answer. The last segment of an answer ends with it.
    """
    least = min_segment - 1
    cuts = sum(len(answer) - 1 for answer in segments)
    places = sum(max(0, segment[0] - least) for answer in segments for segment in answer) + cuts
    return cuts / places if places else 0.0


def nudged_share(segments: Sequence[Sequence[tuple[int, bool]]]) -> float:
    """Share of segments whose first token was overridden."""
    nudges = [nudge for answer in segments for _, nudge in answer]
    return sum(nudges) / max(1, len(nudges))


def num_segments(answers: Served) -> float:
    """Segments an answer, mean."""
    return float(np.mean([len(answer) for answer in answers.segments]))
