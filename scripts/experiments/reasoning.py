"""GGRO and SEA on small sums: training twins, budgets, coverage, drift and weak bases, docs/results/reasoning.md.

    python -m scripts.experiments.reasoning

The worlds are those of scripts/sums_world.py; they are built, and the policies trained, where that was not done.
Everything is kept under runs/results, so that a killed command goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import typer
from matplotlib.axes import Axes

from iama.arrays import Floats, Integers
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec
from inference.samplers.args import ArgsSettings
from inference.samplers.ggro import GgroSettings
from inference.samplers.sea import SeaSettings
from inference.statistics.equal_cost import difference_at_equal_cost
from inference.statistics.savings import samples_needed
from scripts import launch
from scripts.build_sums_models import SHARES
from scripts.experiments import figures, frame, guided
from scripts.experiments.frame import SEEDS, Claim, Estimate, Row, Table, table
from scripts.experiments.guided import RARE_N, RARE_SHARE, TIE, Case, Cell, bon_mean, mean, over_bon, pool_size
from scripts.experiments.pools import SAMPLING, Task, make_all, quieten
from scripts.experiments.rewards import KINDS
from scripts.experiments.rivals import Setting
from scripts.sums_world import is_grammatical

Place = tuple[str, str, str]
"""Policy, criterion and split."""
Results = Mapping[int, Mapping[Place, Cell]]

CRITERIA = tuple(KINDS)
WEIGHTS = {"helpful": 0.5, "harmless": 0.5, "correct": 1.0}  # they add up to 1 on every prompt
SETTINGS = {"iama": Setting(4e-3, 0.1), "grpo": Setting(2e-3, 0.2)}
"""What the search chose (docs/results/search.md); the tilts take IAMA's, since nothing was searched for them."""
METRICS = ("proxy", "gold", "strict", "fluency", "ungrammatical")


@dataclass(frozen=True)
class Method:
    """A sampler: its kind, a level (GGRO's S, SEA's steps, ARGS' weight), settings, and answers a prompt."""

    kind: str
    level: float
    sampler: Literal["ggro", "sea", "args"]
    settings: Mapping[str, Any]
    num_answers: int = 1

    @property
    def name(self) -> str:
        """Name of its answers."""
        return f"{self.kind} {self.level:g}"

    @property
    def title(self) -> str:
        """In words."""
        if self.sampler == "ggro":
            return "greedy decoding" if self.kind == "greedy" else f"{self.kind} S = {self.level:g}"
        return f"{self.kind} {self.level:g}{' steps' if self.sampler == 'sea' else ''}"

    @property
    def is_slow(self) -> bool:
        """Whether it answers only some of the prompts."""
        return self.sampler != "ggro"

    def parsed(self) -> GgroSettings | SeaSettings | ArgsSettings:
        """Its settings."""
        kinds = {"ggro": GgroSettings, "sea": SeaSettings, "args": ArgsSettings}
        settings: GgroSettings | SeaSettings | ArgsSettings = kinds[self.sampler](**self.settings)
        return settings


def ggro(level: int, num_answers: int = 2) -> Method:
    """GGRO with S = `level`, sampled."""
    return Method("GGRO", level, "ggro", {"greedy": False, "num_candidates": level}, num_answers)


def sea(num_steps: int, alpha: float | None = None) -> Method:
    """SEA; `alpha` None: its default."""
    name = "SEA" if alpha is None else f"SEA, alpha = {alpha:g},"
    settings: dict[str, float] = {"num_steps": num_steps} | ({} if alpha is None else {"alpha": alpha})
    return Method(name, num_steps, "sea", settings)


LEVELS = (2, 4, 8)
GREEDY = Method("greedy", 1, "ggro", {"num_candidates": 1})
ARGS = Method("ARGS", 1.5, "args", {"weight": 1.5})
NUM_COVERED = 16
EARLY = Method("GGRO, from 0.5 nats,", 8, "ggro", {"greedy": False, "num_candidates": 8, "entropy_threshold": 0.5}, 2)
TWINS = ("iama", "tilt", "capped")
COMPARED = (GREEDY, *map(ggro, LEVELS), EARLY, sea(10), sea(30))
COVERING = ggro(4, NUM_COVERED)
TWIN_METHODS = (ggro(4), ggro(8), sea(10))
WEAK_METHODS = (sea(10), sea(30), sea(30, 0.0), ARGS)
METHODS: Mapping[str, tuple[Method, ...]] = {
    "base": (*(m for m in COMPARED if m.name != COVERING.name), COVERING, ggro(16), sea(30, 0.0), ARGS),
    "grpo": COMPARED,
    "iama": COMPARED,
    "tilt": TWIN_METHODS,
    "capped": TWIN_METHODS,
    **dict.fromkeys(SHARES, WEAK_METHODS),
}
"""By policy, on prompts of the split `test`; the base answers often enough for coverage where S = 4."""
DRIFT_SPLITS = ("phrasing", "topic")
DRIFT_POLICIES, DRIFT_METHOD = ("base", "iama"), ggro(8)
POLICIES = {
    "base": "base",
    "grpo": "linear GRPO",
    "iama": "IAMA, bon(4)",
    "tilt": "tilt",
    "capped": "capped tilt",
    "policy-30": "30 % of the fit",
    "policy-10": "10 % of the fit",
}
MAIN = ("base", "grpo", "iama")
BASES = ("policy-10", "policy-30", "base")
COUNTS = (1, 2, 4, 8, 16)
NEEDED_LEVELS = {float(level): ggro(level).name for level in (*LEVELS, 16)}
NEEDED_STEPS = {float(steps): sea(steps).name for steps in (10, 30)}
WEAK_N = (1, 4, 16, 64, 256)
LOOKS = {"GGRO": (figures.ORANGE, "^-"), "SEA": (figures.RED, "D-"), "greedy": (figures.BLUE, "s")}


@dataclass(frozen=True)
class Size:
    """Numbers of prompts a kind, of those that slow samplers answer, and of pooled samples: of bases, of the others."""

    num_prompts: int = 24
    num_few: int = 12
    num_base_samples: int = 256
    num_samples: int = 128
    num_drift_samples: int = 32


def main() -> None:
    """Build, train, serve, write the page.

    Example: python -m scripts.experiments.reasoning
    """
    quieten()
    runs = {seed: jobs(seed, scales(seed)) for seed in SEEDS}
    folders = {seed: dict(zip(some, frame.train_many(list(some.values())), strict=True)) for seed, some in runs.items()}
    adapters = {seed: {name: run / "adapter" for name, run in some.items()} for seed, some in folders.items()}
    results = {seed: measure(seed, adapters[seed]) for seed in SEEDS}
    kl = {seed: {name: frame.final_kl(run) for name, run in some.items()} for seed, some in folders.items()}
    worlds = {seed: json.loads((world(seed) / "world.json").read_text(encoding="utf-8")) for seed in SEEDS}
    write(frame.PAGES, results, kl, {seed: built["measurements"] for seed, built in worlds.items()}, Size())


# Worlds and training. -----------------------------------------------------------------------------------


@cache
def world(seed: int) -> Path:
    """Folder of the world with sums of a seed; built unless it is there."""
    folder = frame.FOLDER / f"sums-{seed}"
    launch.run([sys.executable, "-m", "scripts.build_sums_models", "--seed", str(seed), "--out", str(folder)])
    return folder


@dataclass(frozen=True)
class SumsJob(frame.Job):
    """A training run in the world with sums of a seed."""

    config: str = "configs/experiments/sums.yaml"

    @property
    def home(self) -> Path:
        """Folder of the run's world with sums."""
        return world(self.seed)


def jobs(seed: int, scales: Mapping[str, tuple[float, float]], steps: int = frame.STEPS) -> dict[str, SumsJob]:
    """The runs of a seed by policy; `scales` are mean and standard deviation of each criterion's proxy at the base.

    The tilts' temperature is one standard deviation, their cap one above the mean: as with standardised rewards, but
    in the units that the other runs have, so that beta means the same.
    """
    operators = {
        "grpo": dict.fromkeys(scales, "identity"),
        "iama": dict.fromkeys(scales, "bon(4)"),
        "tilt": {name: f"tilt({std:.3f})" for name, (_, std) in scales.items()},
        "capped": {name: f"tilt({std:.3f}, cap={mean + std:.3f})" for name, (mean, std) in scales.items()},
    }
    runs = {}
    for policy, by_criterion in operators.items():
        criteria: list[Row] = [
            {
                "name": name,
                "proxy": {"function": f"scripts.experiments.rewards:{name}"},
                "operator": operator,
                "weight": WEIGHTS[name],
            }
            for name, operator in by_criterion.items()
        ]
        setting = SETTINGS.get(policy, SETTINGS["iama"])
        overrides = frame.objective(criteria, setting.learning_rate, setting.beta)
        runs[policy] = SumsJob(f"reasoning-{policy}", seed, overrides, steps=steps)
    return runs


def scales(seed: int, num_samples: int = 16) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each proxy over the base's samples on validation prompts."""
    by_name = {}
    for name in CRITERIA:
        case = case_of(seed, "base", name, "validation", Size().num_prompts, num_samples, {})
        proxy_PS = case.task.scored(case.criterion).proxy_PS
        by_name[name] = float(proxy_PS.mean()), float(proxy_PS.std())
    return by_name


# Cells. -------------------------------------------------------------------------------------------------


def measure(
    seed: int,
    adapters: Mapping[str, Path | None],
    size: Size | None = None,
    methods: Mapping[str, Sequence[Method]] = METHODS,
    drift: Method = DRIFT_METHOD,
) -> dict[Place, Cell]:
    """Every policy, criterion and split of a seed; what is on disk is read."""
    size = size or Size()
    todo: dict[Place, tuple[Case, Sequence[Method]]] = {}
    for policy, some in methods.items():
        number = size.num_samples if policy in adapters else size.num_base_samples
        for name in CRITERIA:
            case = case_of(seed, policy, name, "test", size.num_prompts, number, adapters)
            todo[policy, name, "test"] = case, some
    for policy in DRIFT_POLICIES:
        for split, name in drifting():
            case = case_of(seed, policy, name, split, size.num_prompts, size.num_drift_samples, adapters)
            todo[policy, name, split] = case, [drift]
    make_all([(case.task, [case.criterion]) for case, _ in todo.values()])
    items = frame.track(todo.items(), len(todo), f"reasoning, world {seed}", "policies x criteria")
    return {place: cell(case, some, size.num_few) for place, (case, some) in items}


def drifting() -> list[tuple[str, str]]:
    """Splits outside the distribution, with the criteria that they hold prompts for."""
    return [(split, name) for split in DRIFT_SPLITS for name in CRITERIA if split == "phrasing" or name != "correct"]


def case_of(
    seed: int,
    policy: str,
    criterion: str,
    split: str,
    num_prompts: int,
    num_samples: int,
    adapters: Mapping[str, Path | None],
) -> Case:
    """A policy that serves a criterion on the first prompts of its kind; the policy may be a checkpoint of the fit."""
    kind, adapter = KINDS[criterion], adapters.get(policy)
    lines = (world(seed) / f"prompts-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == kind][:num_prompts]
    model = world(seed) / (policy if policy in SHARES else "policy")
    spec = PolicySpec(path=str(model), adapter=str(adapter) if adapter else None)
    task = Task(f"{policy}-{kind}", spec, rows, num_samples, seed, f"sums-{split}", SAMPLING)
    proxy, gold = RewardSpec(model=str(world(seed) / f"rm-{criterion}")), _gold(criterion)
    return Case(task, EvaluationCriterion(name=criterion, proxy=proxy, gold=gold))


def _gold(criterion: str) -> RewardSpec:
    """The reward that only judges."""
    return RewardSpec(function=f"scripts/sums_world.py:{criterion}")


def cell(case: Case, methods: Sequence[Method], num_few: int) -> Cell:
    """Best-of-n's curves and every method's answers."""
    pool, scores = case.task.sampled(), case.task.scored(case.criterion)
    base, wrong_PS = PolicySpec(path=str(case.task.home / "policy")), ungrammatical(scores.texts)
    metrics = {"proxy": scores.proxy_PS, "gold": scores.gold, "strict": guided.strict(scores.gold, wrong_PS)}
    metrics |= {"fluency": guided.pool_fluency(case, base, pool), "ungrammatical": wrong_PS}
    curves = guided.bon_curves(case, pool, metrics)
    served = {}
    for method in methods:
        few = guided.spread_out(len(case.task.rows), num_few) if method.is_slow else None
        line = guided.answers(case, method.parsed(), few, method.num_answers)
        gold, wrong = guided.judged(case, line, _gold(case.criterion.name)), ungrammatical([line["texts"]])[0]
        line |= {"gold": gold.tolist(), "strict": guided.strict(gold, wrong).tolist(), "ungrammatical": wrong.tolist()}
        line["fluency"] = guided.fluency(case, base, line)
        served[method.name] = guided.served(line, METRICS)
    return Cell(curves, scores.proxy_PS, scores.gold, served)


def ungrammatical(texts_PS: Sequence[Sequence[str]]) -> Floats:
    """1 where the world's grammar does not hold an answer: `[P, S]`."""
    return np.asarray([[float(not is_grammatical(text)) for text in row] for row in texts_PS])


# Values. ------------------------------------------------------------------------------------------------


def cells_of(results: Results, policy: str, criterion: str, split: str = "test") -> list[Cell]:
    """The seeds' cells of one policy, criterion and split."""
    return [cells[policy, criterion, split] for cells in results.values()]


def best_below(cells: Sequence[Cell], name: str) -> tuple[float, int]:
    """Greatest gold of Best-of-n with at most as many operations as a method, on its prompts, and that n.

    Where the proxy is exploited, Best-of-n at equal operations is worse than with fewer. The n is chosen by gold, which
    flatters Best-of-n a little.
    """
    most = max(1, int(guided.equal_flops(cells, name, num_bootstrap=1).reference_samples))
    curve_N = np.mean([cell.bon["gold"][cell.served[name].rows, :most].mean(axis=0) for cell in cells], axis=0)
    return float(curve_N.max()), int(curve_N.argmax()) + 1


def policy_gap(
    results: Results, ours: str, theirs: str, name: str, criteria: Sequence[str], metric: str = "gold"
) -> Estimate:
    """A policy minus another, both served by one method, mean over criteria; prompts are resampled jointly."""
    arrays = []
    for cells in results.values():
        by_policy = {
            who: [cells[who, c, "test"].served[name].values[metric] for c in criteria] for who in (ours, theirs)
        }
        arrays.append({who: np.mean(values, axis=0) for who, values in by_policy.items()})
    return frame.bootstrap(arrays, lambda means: means[ours] - means[theirs], guided.NUM_BOOTSTRAP)


class Needed(NamedTuple):
    """What the base needs for a trained policy's gold: the least level that has it, and n of Best-of-n.

    None: no level that was measured has it. `is_beyond`: in some seed no n of the pool has it.
    """

    level: float | None
    samples: float
    is_beyond: bool


def needed(base: Sequence[Cell], target: float, levels: Mapping[float, str]) -> Needed:
    """The base's cells against a gold value; `levels` give the names of the base's own answers, in order."""
    level = next((level for level, name in levels.items() if mean(base, name, "gold") >= target - TIE), None)
    (first, *_) = levels.values()  # of the same prompts as the others
    curve_1N = np.mean([cell.bon["gold"][cell.served[first].rows].mean(axis=0) for cell in base], axis=0)[None, :]
    samples_1, censored_1 = samples_needed(curve_1N, np.asarray([target - TIE]))
    return Needed(level, float(samples_1[0]), bool(censored_1[0]))


def hard_prompts(cell: Cell, value: float) -> Integers:
    """Prompts for which the base's Best-of-64 has at least this gold with at most 10 % of its answers."""
    shares_PS = guided.keep_shares(cell.proxy_PS, min(RARE_N, pool_size([cell])))
    reach_P = (shares_PS * (cell.gold_PS > value - TIE)).sum(axis=1)
    prompts: Integers = np.flatnonzero(reach_P <= RARE_SHARE + TIE)
    return prompts


class Hard(NamedTuple):
    """Coverage of hard prompts: their number, and shares with a hit of GGRO, Best-of-n and plain samples."""

    number: int
    ours: float
    best: float
    plain: float


def hard_coverage(cells: Sequence[Cell], base: Sequence[Cell], name: str, value: float, m: int) -> Hard | None:
    """Share of hard prompts, pooled over seeds, that one of m answers solves; None where no prompt is hard.

    Each of the m answers of Best-of-n costs as many operations as one of the method.
    """
    ours, best, plain = [], [], []
    for cell, whole in zip(cells, base, strict=True):
        rows, method = hard_prompts(whole, value), cell.served[name]
        assert method.rows.tolist() == list(range(len(cell.proxy_PS))), name
        hits_PS = cell.gold_PS > value - TIE
        n = np.arange(1, pool_size([cell]) + 1)
        samples = np.interp(method.values["flops"].mean(), cell.bon["flops"].mean(axis=0), n)
        reach_P = at_samples(guided.reached(cell.proxy_PS, hits_PS), samples)
        ours += guided.any_of(method.gold_RM > value - TIE, m)[rows].tolist()
        best += (1 - (1 - reach_P) ** m)[rows].tolist()
        plain += guided.any_of(hits_PS, m)[rows].tolist()
    return Hard(len(ours), *(float(np.mean(shares)) for shares in (ours, best, plain))) if ours else None


def at_samples(curve_PN: Floats, n: float) -> Floats:
    """Each prompt's value at a (real) number of samples, linear in its logarithm: `[P]`."""
    sizes = np.log(np.arange(1, curve_PN.shape[1] + 1))
    return np.asarray([np.interp(np.log(n), sizes, row_N) for row_N in curve_PN])


class Drift(NamedTuple):
    """What GGRO does on prompts of a split: segments an answer, how often a token that may begin one does (it is as
    uncertain as that), nudges a segment, and gold over a single sample."""

    segments: float
    fired: float
    trigger: float
    single: float
    guided: float
    gain: Estimate
    change: Estimate | None


def drift(inside: Sequence[Cell], outside: Sequence[Cell] | None, name: str) -> Drift:
    """Of the prompts outside, with the change of the gain against those inside; of those inside where none are given.

    The prompts of the two are different ones, as many of each.
    """
    cells = inside if outside is None else outside
    segments = [cell.served[name].segments for cell in cells]
    gains = [_gain(cell, name) for cell in cells]
    change = None
    if outside is not None:
        pairs = [{"inside": _gain(a, name), "outside": gain} for a, gain in zip(inside, gains, strict=True)]
        change = frame.bootstrap(pairs, lambda means: means["outside"] - means["inside"], guided.NUM_BOOTSTRAP)
    return Drift(
        float(np.mean([guided.num_segments(cell.served[name]) for cell in cells])),
        float(np.mean([guided.cut_rate(some, GgroSettings().min_segment) for some in segments])),
        float(np.mean([guided.nudged_share(some) for some in segments])),
        float(np.mean([cell.gold_PS.mean() for cell in cells])),
        mean(cells, name, "gold"),
        frame.bootstrap([{"gain": gain} for gain in gains], lambda means: means["gain"], guided.NUM_BOOTSTRAP),
        change,
    )


def _gain(cell: Cell, name: str) -> Floats:
    method = cell.served[name]
    gain: Floats = method.values["gold"] - cell.gold_PS.mean(axis=1)[method.rows]
    return gain


def drift_of(results: Results, policy: str, criterion: str, split: str) -> Drift:
    """What GGRO does on prompts of a split, beside those inside the distribution."""
    outside = None if split == "test" else cells_of(results, policy, criterion, split)
    return drift(cells_of(results, policy, criterion), outside, DRIFT_METHOD.name)


def weakness_gap(weak: Sequence[Cell], whole: Sequence[Cell], name: str) -> Estimate:
    """SEA over Best-of-n at equal operations, of a weak base minus the same of the whole one.

    The two curves are read at the operations of all prompts; prompts are resampled jointly.
    """
    pairs = zip(weak, whole, strict=True)
    arrays = [{"weak": _gap_by_prompt(a, name), "whole": _gap_by_prompt(b, name)} for a, b in pairs]
    return frame.bootstrap(arrays, lambda means: means["weak"] - means["whole"], guided.NUM_BOOTSTRAP)


def _gap_by_prompt(cell: Cell, name: str) -> Floats:
    method = cell.served[name]
    whole = guided.comparison(cell, name, cell.bon["gold"], method.values["gold"])
    n = difference_at_equal_cost([whole], "flops", num_bootstrap=2, seed=0).reference_samples
    gap: Floats = method.values["gold"] - at_samples(cell.bon["gold"][method.rows], n)
    return gap


# Verdict. -----------------------------------------------------------------------------------------------


def write(
    folder: Path, results: Results, kl: Mapping[int, Mapping[str, float]], worlds: Mapping[int, Any], size: Size
) -> None:
    """Write the page and its plot."""
    plot(folder / "reasoning.svg", results)
    values = {
        "seeds": ", ".join(map(str, results)),
        "size": size,
        "num_bootstrap": guided.NUM_BOOTSTRAP,
        "rare_n": RARE_N,
        "rare_share": RARE_SHARE,
        "claims": frame.claims_table(claims(results)),
        "losses": losses(results),
        "whole_wins": whole_wins(results),
        "worlds": worlds_table(worlds),
        "kl": kl_table(kl),
        "equal": equal_table(results),
        "twins": twin_table(results),
        "needed": needed_table(results),
        "coverage": coverage_table(results),
        "hard": hard_table(results),
        "drift": drift_table(results),
        "weak": weak_table(results),
        "weakness": weakness_table(results),
        "parity": parity(results),
        "num_few": min(len(cell.served[sea(30).name].rows) for cell in cells_of(results, "base", CRITERIA[0])),
    }
    frame.write_page(folder / "reasoning.md", "reasoning", values)


def claims(results: Results) -> list[Claim]:
    """What was to be shown, set before anything was measured, and whether it is."""
    rows = []
    for method in (ggro(8), sea(30)):
        for name, criteria in (("on every criterion", CRITERIA), ("on correct alone", ("correct",))):
            gaps = [over_bon(cells_of(results, policy, c), method.name) for policy in MAIN for c in criteria]
            text = f"{method.title}: gold above Best-of-n's at equal operations, {name}"
            rows.append(_count(text, gaps))
    for text, name in (("GGRO S = 8", ggro(8).name), ("SEA 10 steps", sea(10).name)):
        gaps = [policy_gap(results, policy, "base", name, (c,)) for policy in TWINS for c in CRITERIA]
        rows.append(_count(f"{text}: every twin's gold above the base's, served alike", gaps))
    for method in TWIN_METHODS:
        gaps = [policy_gap(results, "iama", other, method.name, CRITERIA) for other in ("tilt", "capped")]
        rows.append(_count(f"{method.title}: the bon(4) twin's mean gold above either tilt's", gaps))
    text = "GGRO, m = 16: coverage above Best-of-n's at equal operations, base"
    rows.append(_count(text, _cover_gaps(results)))
    gaps = [guided.difference(cells_of(results, "base", c), sea(30).name, sea(30, 0.0).name) for c in CRITERIA]
    text = "gold above that of alpha = 0, which chooses among its 4 chains by reward as well, base"
    rows.append(_count(f"SEA 30 steps: {text}", gaps))
    pairs = [[cells_of(results, base, c) for base in (weak, "base")] for weak in BASES[:-1] for c in CRITERIA]
    gaps = [weakness_gap(weak, whole, sea(30).name) for weak, whole in pairs]
    rows.append(_count("SEA 30 steps over Best-of-n at equal operations: better the weaker the base", gaps))
    drifts = [drift_of(results, policy, c, split).change for policy in DRIFT_POLICIES for split, c in drifting()]
    changes = [change for change in drifts if change is not None]
    below = sum(change.verdict == "lower" for change in changes)
    measured = f"below in {below} of {len(changes)}; mean change {np.mean([change.mean for change in changes]):+.3f}"
    text = "GGRO S = 8: outside the distribution its gain over a single sample is no smaller"
    return [*rows, Claim(text, "no interval of the change below 0", measured, below == 0)]


def _count(text: str, gaps: Sequence[Estimate]) -> Claim:
    return frame.count_above(text, gaps, note=f"; mean {np.mean([gap.mean for gap in gaps]):+.3f}")


def losses(results: Results) -> dict[str, dict[str, list[str]]]:
    """Where each method wins and loses against Best-of-n at equal operations; all from the figures."""
    places = [(policy, c) for policy in MAIN for c in CRITERIA]
    by_method = {}
    for method in COMPARED:
        gaps = {f"{POLICIES[p]} {c}": over_bon(cells_of(results, p, c), method.name) for p, c in places}
        by_method[method.title] = frame.by_verdict(gaps)
    return by_method


def whole_wins(results: Results) -> list[str]:
    """Wins at equal operations whose gold is also above that of Best-of-n with fewer."""
    wins = []
    for method in COMPARED:
        for policy in MAIN:
            for criterion in CRITERIA:
                cells = cells_of(results, policy, criterion)
                is_win = over_bon(cells, method.name).verdict == "higher"
                if is_win and mean(cells, method.name, "gold") > best_below(cells, method.name)[0]:
                    wins.append(f"{method.title} on {POLICIES[policy]} {criterion}")
    return wins


def _cover_gaps(results: Results) -> list[Estimate]:
    gaps = []
    for criterion in CRITERIA:
        cells = cells_of(results, "base", criterion)
        values = [guided.rare_value(cell.proxy_PS, cell.gold_PS)[0] for cell in cells]
        gaps.append(guided.as_estimate(guided.coverage(cells, COVERING.name, values, counts_of(cells)[-1])[1]))
    return gaps


def parity(results: Results) -> dict[str, Any]:
    """What a weak base changes of SEA's standing beside Best-of-n at equal operations."""
    words: dict[str, Any] = {}
    for name, bases in (("weak", BASES[:-1]), ("whole", BASES[-1:])):
        verdicts = [over_bon(cells_of(results, p, c), sea(30).name).verdict for p in bases for c in CRITERIA]
        kinds = ("higher", "lower", "no difference shown")
        words[name] = ", ".join(f"{kind} in {verdicts.count(kind)}" for kind in kinds)
        words[f"{name}_count"] = len(verdicts)
        words[f"{name}_gains"] = verdicts.count("higher") > verdicts.count("lower")
    return words


# Tables. ------------------------------------------------------------------------------------------------


def worlds_table(worlds: Mapping[int, Any]) -> Table:
    """What the models of each world are worth by themselves."""
    rows = []
    for seed, measured in worlds.items():
        for name in ("policy", "policy-30", "policy-10"):
            policy = measured["policy"][name]
            shares = (policy[key] for key in ("correct", "grammatical_job", "grammatical_sum"))
            rows.append([seed, name, *(f"{share:.2f}" for share in shares), ""])
        pairs = {name: measured[f"rm-{name}"]["pair_accuracy"] for name in CRITERIA}
        rows += [[seed, f"rm-{name}", "", "", "", f"{share:.2f}"] for name, share in pairs.items()]
    return table("seed | model | sums right | grammatical, jobs | grammatical, sums | pairs right", rows)


def kl_table(kl: Mapping[int, Mapping[str, float]]) -> Table:
    """How far the trained policies ended from the base."""
    names = next(iter(kl.values()))
    rows = [[POLICIES[name], *(f"{by_policy[name]:.3f}" for by_policy in kl.values())] for name in names]
    return table(["trained", *(f"KL at the end, seed {seed}" for seed in kl)], rows)


def equal_table(results: Results) -> Table:
    """Every method against Best-of-n's curve."""
    rows: list[list[object]] = []
    for policy in MAIN:
        for criterion in CRITERIA:
            cells = cells_of(results, policy, criterion)
            rows.append([POLICIES[policy], criterion, "single sample", *_levels(cells, None), *[""] * 6])
            for method in COMPARED:
                gap = guided.equal_flops(cells, method.name)
                gold = guided.as_estimate(gap)
                best = "{:.3f} (n = {})".format(*best_below(cells, method.name))
                columns = [*_levels(cells, method.name), guided.samples_of(gap, cells), str(gold), gold.verdict, best]
                others = [over_bon(cells, method.name, metric) for metric in ("proxy", "fluency")]
                rows.append([POLICIES[policy], criterion, method.title, *columns, *others])
    header = "policy | criterion | sampler | gold | strict | proxy | ungrammatical | 10^6 operations | n"
    return table(f"{header} | gold over Best-of-n | it is | best with fewer | proxy | fluency", rows)


def _levels(cells: Sequence[Cell], name: str | None) -> list[str]:
    """Gold, strict gold, proxy, ungrammatical share and operations of a method, or of a single sample."""
    metrics = {"gold": "{:.3f}", "strict": "{:.3f}", "proxy": "{:+.2f}", "ungrammatical": "{:.2f}", "flops": "{:.0f}"}
    values = {m: bon_mean(cells, 1, m) if name is None else mean(cells, name, m) for m in metrics}
    values["flops"] /= 1e6
    return [shown.format(values[metric]) for metric, shown in metrics.items()]


def twin_table(results: Results) -> Table:
    """Each policy under the samplers that it may be the twin of."""
    rows = []
    for method in TWIN_METHODS:
        for policy in ("base", *(["grpo"] if _has(results, "grpo", method) else []), *TWINS):
            golds = [mean(cells_of(results, policy, c), method.name, "gold") for c in CRITERIA]
            gap = policy_gap(results, policy, "base", method.name, CRITERIA)
            other = policy_gap(results, policy, "iama", method.name, CRITERIA)
            shown = ["", ""] if policy == "iama" else [other, other.verdict]
            columns = [f"{np.mean(golds):.3f}", gap if policy != "base" else "", *shown]
            rows.append([method.title, POLICIES[policy], *(f"{gold:.3f}" for gold in golds), *columns])
    header = ["sampler", "policy", *CRITERIA, "mean", "mean over the base's", "mean over the bon(4) twin's", "it is"]
    return table(header, rows)


def _has(results: Results, policy: str, method: Method) -> bool:
    return all(method.name in cell.served for cell in cells_of(results, policy, CRITERIA[0]))


def needed_table(results: Results) -> Table:
    """The base's budget for a trained policy's gold."""
    rows = []
    for method, levels in ((ggro(4), NEEDED_LEVELS), (ggro(8), NEEDED_LEVELS), (sea(10), NEEDED_STEPS)):
        for criterion in CRITERIA:
            base = cells_of(results, "base", criterion)
            tried = ", ".join(f"{mean(base, name, 'gold'):.3f}" for name in levels.values())
            for policy in (p for p in ("grpo", *TWINS) if _has(results, p, method)):
                target = mean(cells_of(results, policy, criterion), method.name, "gold")
                need = needed(base, target, levels)
                level = f"> {max(levels):g}" if need.level is None else f"{need.level:g}"
                samples = f"> {need.samples:.0f}" if need.is_beyond else f"{need.samples:.1f}"
                rows.append([method.title, criterion, POLICIES[policy], f"{target:.3f}", tried, level, samples])
    header = "sampler | criterion | trained | its gold | base's gold by S or steps | S or steps needed"
    return table(f"{header} | Best-of-n: n needed", rows)


def counts_of(cells: Sequence[Cell]) -> list[int]:
    """Numbers of answers whose coverage can be told."""
    num_answers = min(cell.served[COVERING.name].gold_RM.shape[1] for cell in cells)
    return [m for m in COUNTS if m <= num_answers]


def coverage_table(results: Results) -> Table:
    """Coverage of sampled GGRO, Best-of-n at equal operations and plain samples, on the base."""
    rows = []
    for criterion in CRITERIA:
        cells = cells_of(results, "base", criterion)
        rare = [guided.rare_value(cell.proxy_PS, cell.gold_PS) for cell in cells]
        values = ", ".join(f"{value:.2f} ({share:.2f})" for value, share in rare)
        for m in counts_of(cells):
            ours, gap, plain = guided.coverage(cells, COVERING.name, [value for value, _ in rare], m)
            shown = guided.as_estimate(gap)
            best = f"{ours - gap.difference:.3f} (n = {guided.samples_of(gap, cells)})"
            rows.append([criterion, m, values, f"{ours:.3f}", best, shown, shown.verdict, f"{plain:.3f}"])
    header = "criterion | m | gold by seed (share) | GGRO | Best-of-n | difference | it is | plain samples"
    return table(header, rows)


def hard_table(results: Results) -> Table:
    """The same on the prompts that the base rarely gets right."""
    rows = []
    for criterion in CRITERIA:
        cells = cells_of(results, "base", criterion)
        value = 1.0 if criterion == "correct" else max(guided.rare_value(c.proxy_PS, c.gold_PS)[0] for c in cells)
        for m in counts_of(cells):
            hard = hard_coverage(cells, cells, COVERING.name, value, m)
            shown = ["0", "-", "-", "-"] if hard is None else [hard.number, *(f"{share:.3f}" for share in hard[1:])]
            rows.append([criterion, f"{value:.2f}", m, *shown])
    return table("criterion | gold | m | hard prompts | GGRO | Best-of-n | plain samples", rows)


def drift_table(results: Results) -> Table:
    """GGRO inside and outside the distribution."""
    rows = []
    for policy in DRIFT_POLICIES:
        for criterion in CRITERIA:
            for split in ("test", *(split for split, c in drifting() if c == criterion)):
                d = drift_of(results, policy, criterion, split)
                work = [f"{d.segments:.1f}", f"{d.fired:.3f}", f"{d.trigger:.2f}"]
                golds = [f"{d.single:.3f}", f"{d.guided:.3f}", d.gain, "" if d.change is None else d.change]
                rows.append([POLICIES[policy], criterion, split, *work, *golds])
    header = "policy | criterion | prompts | segments | threshold fires | nudged segments"
    return table(f"{header} | gold, single sample | gold, GGRO | gain | change against test", rows)


def weak_table(results: Results) -> Table:
    """SEA, Best-of-n and ARGS by strength of the base, all on SEA's prompts."""
    rows: list[list[object]] = []
    name = WEAK_METHODS[0].name
    metrics = ("gold", "strict", "ungrammatical")
    for criterion in CRITERIA:
        for policy in BASES:
            cells = cells_of(results, policy, criterion)
            single = bon_mean(cells, 1, "gold", name)

            def shown(gold: float, held: float, wrong: float, single: float = single) -> list[str]:
                gain = f"{100 * (gold / single - 1):+.0f} %" if single > 0.005 else "-"
                return [f"{gold:.3f}", gain, f"{wrong:.2f}", f"{held:.3f}"]

            for n in (n for n in WEAK_N if n <= pool_size(cells)):
                sampler = "single sample" if n == 1 else f"Best-of-{n}"
                columns = shown(*(bon_mean(cells, n, metric, name) for metric in metrics))
                rows.append([criterion, _base(policy), sampler, *columns, *[""] * 4])
            for method in WEAK_METHODS:
                columns = shown(*(mean(cells, method.name, metric) for metric in metrics))
                gap, strict_gap = (guided.equal_flops(cells, method.name, metric) for metric in metrics[:2])
                gold = guided.as_estimate(gap)
                gaps = [guided.samples_of(gap, cells), gold, gold.verdict, guided.as_estimate(strict_gap)]
                rows.append([criterion, _base(policy), method.title, *columns, *gaps])
    header = "criterion | base | sampler | gold | relative gain | ungrammatical | strict gold | n"
    return table(f"{header} | gold over Best-of-n | it is | strict gold over Best-of-n", rows)


def weakness_table(results: Results) -> Table:
    """How SEA against Best-of-n at equal operations changes with the base's strength."""
    rows = []
    name = sea(30).name
    for criterion in CRITERIA:
        whole = cells_of(results, "base", criterion)
        for policy in BASES[:-1]:
            weak = cells_of(results, policy, criterion)
            gaps = [f"{over_bon(cells, name).mean:+.3f}" for cells in (weak, whole)]
            change = weakness_gap(weak, whole, name)
            rows.append([criterion, _base(policy), *gaps, change, change.verdict])
    return table("criterion | base | its gold over Best-of-n | whole fit's | difference | it is", rows)


def _base(policy: str) -> str:
    return "whole fit" if policy == "base" else POLICIES[policy]


def plot(path: Path, results: Results) -> None:
    """Gold against operations: a row a criterion, a column a policy; means over seeds."""
    with figures.figure(path, columns=len(MAIN), rows=len(CRITERIA), size=(3.6, 2.9)) as axes:
        grid = [(criterion, policy) for criterion in CRITERIA for policy in MAIN]
        for axis, (criterion, policy) in zip(axes, grid, strict=True):
            _panel(axis, cells_of(results, policy, criterion))
            axis.set_xscale("log")
            figures.label(axis, f"{POLICIES[policy]}, {criterion}", "10^6 operations", "gold", legend=axis is axes[0])


def _panel(axis: Axes, cells: Sequence[Cell]) -> None:
    every = range(1, pool_size(cells) + 1)
    points = np.asarray([[bon_mean(cells, n, metric) for n in every] for metric in ("flops", "gold")])
    axis.plot(points[0] / 1e6, points[1], "-", color=figures.GREY, label="Best-of-n")
    for kind, (colour, mark) in LOOKS.items():
        names = [method.name for method in COMPARED if method.kind == kind]
        points = np.asarray([[mean(cells, name, metric) for name in names] for metric in ("flops", "gold")])
        axis.plot(points[0] / 1e6, points[1], mark, color=colour, label=kind)


if __name__ == "__main__":
    typer.run(main)
