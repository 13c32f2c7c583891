"""The page docs/results/guided.md, from what `scripts.experiments.guided_study` has kept beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from iama.arrays import Floats, Indices
from inference.statistics.equal_cost import EqualCost, difference_at_equal_cost
from inference.statistics.savings import Comparison
from scripts.experiments import figures, frame, guided
from scripts.experiments.frame import Claim, Estimate, Row, Table, table
from scripts.experiments.guided import NUM_BOOTSTRAP, Cell, Served
from scripts.experiments.guided_parts import FORMS, QUANTILE, Demo, Story

SETTINGS, UNITS = "guided-settings.json", "guided-units.jsonl"
POLICIES = {"base": "base", "grpo": "linear GRPO", "iama": "IAMA", "tilt": "tilt"}
TRAINED = ("grpo", "iama")
SELECTING = ("BoN 4", "BoN 16")
FIRSTS = ("policy", "distinct", "tilted")
GREEDY = ("GGRO 2", "GGRO 4", "GGRO 8")
TITLES = {
    "GGRO 8, published": "GGRO greedy, S = 8, as published",
    "random nudges 8": "random nudges, S = 8",
    "CARDS, length": "CARDS, `finish=length`",
    "CARDS, target": "CARDS, `finish=target`",
    "redraw": "`redraw(4, 8, 2)`",
    "SEA": "SEA, 5 steps, 2 chains",
    **{f"GGRO {s}": f"GGRO greedy, S = {s}" for s in (2, 4, 8)},
    **{f"blockwise {first} {m}": f"blockwise {first}, m = {m}" for first in FIRSTS for m in (2, 4)},
}
LEFT_OUT = ("blockwise policy 2", "blockwise distinct 2", "redraw")
"""Methods whose rows stand in the CSV files alone."""
COVERED = (1, 2)
RARE = 0.01
UNKNOWN = "not yet measured"
AFTERWARDS = "looked at afterwards: every interval above 0"
"""The bar of a part that nobody set beforehand."""
GRADIENTS = {
    "GGRO greedy above random nudges, S = 8": ("GGRO 8", "random nudges 8"),
    "tilted above policy, m = 4": ("blockwise tilted 4", "blockwise policy 4"),
    "tilted above distinct, m = 4": ("blockwise tilted 4", "blockwise distinct 4"),
}
"""What the reward's gradient adds: a method with it, and the same without."""
MOST_WRONG = 0.03
"""Share of answers that may be ungrammatical beyond Best-of-n's."""
Place = tuple[str, str]


@dataclass(frozen=True)
class Measured:
    """One policy and criterion of a part: the seeds' cells, core seconds and answers of each method."""

    cells: list[Cell]
    units: list[Row]

    @property
    def seeds(self) -> list[int]:
        """The cells' seeds."""
        return [unit["key"][1] for unit in self.units]

    def seconds(self, name: str) -> float:
        """Seconds of one core an answer."""
        return float(np.mean([unit["methods"][name]["core_seconds"] for unit in self.units]))

    def bon_seconds(self, n: float) -> float:
        """The same of Best-of-n, on the line through those of n = 4 and 16."""
        four, sixteen = self.seconds("BoN 4"), self.seconds("BoN 16")
        return max(four + (sixteen - four) * (n - 4) / 12, 0.0)

    @property
    def names(self) -> list[str]:
        """Methods but Best-of-n."""
        return [name for name in FORMS if name in self.units[0]["methods"] and name not in SELECTING]

    def at_equal_cost(self, name: str, metric: str = "gold") -> EqualCost:
        """A method minus Best-of-n of as many operations."""
        return guided.equal_flops(self.cells, name, metric)

    def beside_bon(self, name: str, metric: str) -> tuple[float, float]:
        """A method's mean, and that of Best-of-n with as many operations."""
        ours = guided.mean(self.cells, name, metric)
        return ours, ours - self.at_equal_cost(name, metric).difference


def write(folder: Path) -> None:
    """Write page, figure and tables from the units that are there; nothing without the demo's base."""
    data = folder / "data"
    if not (data / UNITS).is_file():
        return
    units = [json.loads(line) for line in (data / UNITS).read_text(encoding="utf-8").splitlines()]
    settings = json.loads((data / SETTINGS).read_text(encoding="utf-8")) if (data / SETTINGS).is_file() else {}
    parts = {part: places_of(units, part) for part in (Demo.name, Story.name)}
    demo, story = parts.values()
    if ("base", Demo.criteria[0]) not in demo:
        return
    plot(folder / "guided.svg", demo, story)
    cards = cards_gaps(demo)
    tables = {
        "parts": frame.parts_table(claims(demo, story)),
        "differences": differences_table(parts),
        "costs": costs_table(demo, story),
        "coverage": coverage_table(story),
        "cards": cards_table(cards),
        "twins": twins_table(demo),
    }
    values = {
        "seeds": len(next(iter(demo.values())).units),
        "num_prompts": len(next(iter(demo.values())).cells[0].proxy_PS),
        "num_story": len(next(iter(story.values())).cells[0].proxy_PS) if story else 0,
        "num_samples": Demo.num_samples,
        "num_rare": Story.num_samples - Story.num_compared,
        "num_drawn": Story.num_compared,
        "max_new_tokens": Story.sampling.max_new_tokens,
        "num_bootstrap": NUM_BOOTSTRAP,
        "quantile": QUANTILE,
        "steps": frame.STEPS,
        "chosen": {part: chosen_text(settings.get(part, {}).get("chosen", {})) for part in parts},
        "shown": shown_table(demo, story),
        "prices": prices(tables["costs"]),
        "cards": cards_text(cards),
        "num_twins": len(twin_seeds(demo)),
        "num_apart": num_apart(tables["twins"]),
        "story_seeds": min((len(found.units) for found in story.values()), default=0),
        "rare": rare_text(story),
        "covered": covered_text(tables["coverage"]),
        "num_afterwards": tables["parts"].column("what was set").count(AFTERWARDS),
        "gradient": gradient_text(story),
        "grammar": grammar_text(demo),
    }
    frame.write_claim(folder, "guided", values, tables)


def places_of(units: Sequence[Row], part: str) -> dict[Place, Measured]:
    """Measured policies and criteria of a part."""
    places: dict[Place, list[Row]] = {}
    for unit in units:
        name, _, policy, criterion = unit["key"]
        if name == part:
            places.setdefault((policy, criterion), []).append(unit)
    order = [place for policy in POLICIES for place in places if place[0] == policy]
    return {place: Measured([cell_of(unit) for unit in places[place]], places[place]) for place in order}


def cell_of(unit: Row) -> Cell:
    """A unit as curves of Best-of-n and answers; between the n that are kept it is linear in log n."""
    points = np.asarray(unit["points"], dtype=np.float64)
    n = np.arange(1.0, points[-1] + 1)
    curves: dict[str, Floats] = {
        metric: np.stack([np.interp(np.log(n), np.log(points), row) for row in unit[metric]])
        for metric in ("gold", "proxy", "wrong", "steps")
        if metric in unit
    }
    first_P, last_P = (np.asarray(values) for values in unit["mflops"])
    curves["flops"] = first_P[:, None] + (last_P - first_P)[:, None] * (n - 1) / (n[-1] - 1)
    served = {name: served_of(answers, len(first_P)) for name, answers in unit["methods"].items()}
    proxy_PS, gold_PS = (np.asarray(unit.get(f"rest_{metric}", unit[metric])) for metric in ("proxy", "gold"))
    return Cell(curves, proxy_PS, gold_PS, served)


def served_of(answers: Row, num_prompts: int) -> Served:
    """A method's answers, one round over the prompts after the other."""

    def by_prompt(values: Sequence[float]) -> Floats:
        return np.asarray(values, dtype=np.float64).reshape(answers["num_answers"], num_prompts).T

    metrics: dict[str, Floats] = {
        metric: by_prompt(answers[metric]) for metric in ("gold", "proxy", "wrong", "fluency") if metric in answers
    }
    metrics |= {"flops": by_prompt(answers["mflops"]), "steps": by_prompt(answers["steps"])}
    means = {metric: values.mean(axis=1) for metric, values in metrics.items()}
    return Served(np.arange(num_prompts), means, metrics["gold"], [], [], "")


# Comparisons. -------------------------------------------------------------------------------------------


def between(cells: Sequence[Cell], ours: str, theirs: Sequence[str], metric: str = "gold") -> Estimate:
    """A method minus another at as many operations, on the line through several of its sizes, the smallest first.

    Where the method costs more than the largest, it is compared with that one.
    """
    seeds = []
    for cell in cells:
        values, flops = (
            np.stack([cell.served[name].values[which] for name in theirs], axis=1) for which in (metric, "flops")
        )
        method = cell.served[ours].values
        seeds.append(Comparison(values, None, method[metric], 1.0, {"flops": (flops, method["flops"])}))
    return guided.as_estimate(difference_at_equal_cost(seeds, "flops", num_bootstrap=NUM_BOOTSTRAP, seed=0))


def of_sizes(first: str) -> list[str]:
    """Sizes of a blockwise method, the smallest first."""
    return [f"blockwise {first} {m}" for m in (2, 4)]


def summed(ours: Sequence[tuple[list[Cell], str]], theirs: Sequence[tuple[list[Cell], str]]) -> Estimate:
    """Gold summed over criteria, of one policy and method minus another; prompts are resampled jointly."""
    seeds = [
        {
            f"{side} {k}": cells[seed].served[name].values["gold"]
            for side, places in (("ours", ours), ("theirs", theirs))
            for k, (cells, name) in enumerate(places)
        }
        for seed in range(len(ours[0][0]))
    ]
    numbers = range(len(ours))
    return frame.bootstrap(
        seeds, lambda m: np.sum([m[f"ours {k}"] - m[f"theirs {k}"] for k in numbers], axis=0), NUM_BOOTSTRAP
    )


def claims(demo: Mapping[Place, Measured], story: Mapping[Place, Measured]) -> list[Claim]:
    """What was set beforehand, and what was measured."""
    base = [found for (policy, _), found in demo.items() if policy == "base"]
    trained = [found for (policy, _), found in demo.items() if policy in TRAINED]
    rows = []
    for m in (2, 4):
        name = f"blockwise tilted {m}"
        text = f"{TITLES[name]}: above Best-of-n on every criterion of the base"
        rows.append(above(text, [guided.over_bon(found.cells, name) for found in base]))
        verdicts = [guided.over_bon(found.cells, name).verdict for found in trained]
        higher, lower = verdicts.count("higher"), verdicts.count("lower")
        measured = f"above in {higher} of {len(verdicts)}, below in {lower}" if verdicts else UNKNOWN
        text = f"{TITLES[name]}: never below Best-of-n on linear GRPO and IAMA"
        rows.append(Claim(text, "no interval below 0", measured, bool(verdicts) and not lower))
    for other in ("distinct", "policy"):
        pairs = ("blockwise tilted 4", f"blockwise {other} 4")
        gaps = [guided.difference(found.cells, *pairs) for found in base]
        rows.append(above(f"tilted above {other} at m = 4 on the base", gaps, noted=True))
    rows.append(grammar(demo))
    for names, text in (
        (GREEDY, "real text: GGRO greedy, S = 2, 4 and 8, above Best-of-n on both signs"),
        (("blockwise tilted 4",), "real text: blockwise tilted, m = 4, above Best-of-n on both signs"),
        (("blockwise distinct 4",), "real text: blockwise distinct, m = 4, above Best-of-n on both signs"),
    ):
        rows.append(above(text, [guided.over_bon(found.cells, name) for found in story.values() for name in names]))
    gaps = [between(found.cells, "blockwise tilted 4", GREEDY) for found in story.values()]
    rows.append(above("real text: tilted, m = 4, above GGRO greedy at equal operations", gaps, noted=True))
    for text, pair in GRADIENTS.items():
        gaps = [excess_over(found, *pair) for found in story.values()]
        text = f"real text: {text}, each beside Best-of-n at equal operations"
        rows.append(above(text, gaps, AFTERWARDS, noted=True))
    return rows


def above(text: str, gaps: Sequence[Estimate], bar: str = "every interval above 0", *, noted: bool = False) -> Claim:
    """A claim that holds where every interval lies above 0, and does not where nothing is measured."""
    claim = frame.count_above(text, gaps, bar)
    if not gaps:
        return replace(claim, measured=UNKNOWN, met=False)
    return replace(claim, measured=f"{'; '.join(map(str, gaps))}: {claim.measured}") if noted else claim


def gradient_text(story: Mapping[Place, Measured]) -> str:
    """What the reward's gradient is shown to add on real text."""
    places = list(story.values())
    found = [excess_over(place, *pair).verdict for place in places for pair in GRADIENTS.values()]
    if not found:
        return ""
    if higher := found.count("higher"):
        return f"On real text the reward's gradient is shown to add gold in {higher} of {len(found)} comparisons."
    without = {name for _, name in GRADIENTS.values()}
    carries = all(guided.over_bon(place.cells, name).verdict == "higher" for place in places for name in without)
    text = "On real text no gain of the gradient over random nudges or other first tokens is shown."
    return f"{text} Choosing segment by segment carries the gain there." if carries else text


def wrong_gaps(demo: Mapping[Place, Measured]) -> dict[str, Estimate]:
    """Ungrammatical answers of tilted minus those of Best-of-n at equal operations, shares, by place and m."""
    return {
        f"{POLICIES[policy]} {criterion}, m = {m}": guided.over_bon(found.cells, f"blockwise tilted {m}", "wrong")
        for (policy, criterion), found in demo.items()
        if policy in ("base", *TRAINED)
        for m in (2, 4)
    }


def within(gap: Estimate) -> bool:
    """Whether an interval of ungrammatical answers lies within what was set."""
    return gap.ci95[1] <= MOST_WRONG


def grammar(demo: Mapping[Place, Measured]) -> Claim:
    """The part on ungrammatical answers, which the ends of intervals judge."""
    gaps = wrong_gaps(demo)
    worst = max(gaps, key=lambda place: gaps[place].mean)
    of_base = max((place for place in gaps if place.startswith("base")), key=lambda place: gaps[place].mean)
    told = "; ".join(f"{points(gaps[place])}, {place}" for place in dict.fromkeys((worst, of_base)))
    return Claim(
        "tilted: at most 3 points more ungrammatical answers than Best-of-n",
        "at most 3 points on the base; linear GRPO, IAMA and the ends of intervals were added afterwards",
        f"worst in points: {told}: within 3 in {sum(map(within, gaps.values()))} of {len(gaps)}",
        all(map(within, gaps.values())),
    )


def points(gap: Estimate) -> str:
    """A difference of shares in points."""
    mean, low, high = (f"{100 * share:+.1f}" for share in (gap.mean, *gap.ci95))
    return f"{mean} ({low} to {high})"


def grammar_text(demo: Mapping[Place, Measured]) -> str:
    """What so few answers say of ungrammatical ones."""
    gaps = wrong_gaps(demo).values()
    widths = [100 * (gap.ci95[1] - gap.ci95[0]) for gap in gaps]
    beyond = sum(gap.ci95[0] > MOST_WRONG for gap in gaps)
    return (
        f"intervals are {min(widths):.0f} to {max(widths):.0f} points wide. At most 3 points more is shown in "
        f"{sum(map(within, gaps))} of {len(gaps)} cases, and more than 3 in {beyond}. The others are open."
    )


def cards_gaps(demo: Mapping[Place, Measured]) -> dict[tuple[str, str], dict[str, Estimate]]:
    """CARDS against blockwise at equal operations, and its two rules against each other, by place."""
    places = {f"{POLICIES[p]} {c}": found for (p, c), found in demo.items() if p in ("base", *TRAINED)}
    gaps = {
        (TITLES[name], f"blockwise {first}"): {
            place: between(found.cells, name, of_sizes(first)) for place, found in places.items()
        }
        for name in ("CARDS, target", "CARDS, length")
        for first in ("policy", "distinct")
    }
    rules = {place: excess_over(found, "CARDS, target", "CARDS, length") for place, found in places.items()}
    return gaps | {(TITLES["CARDS, target"], "`finish=length`, each above Best-of-n"): rules}


def excess_over(found: Measured, ours: str, theirs: str) -> Estimate:
    """What a method has above Best-of-n of as many operations, minus what another has above its own Best-of-n."""
    seeds = []
    for cell in found.cells:
        excess = {}
        for name in (ours, theirs):
            flops = cell.served[name].values["flops"].mean()
            n = float(np.interp(flops, cell.bon["flops"].mean(axis=0), np.arange(1.0, cell.bon["flops"].shape[1] + 1)))
            low = min(int(n), cell.bon["gold"].shape[1] - 1)
            bon_P = cell.bon["gold"][:, low - 1] + (n - low) * (cell.bon["gold"][:, low] - cell.bon["gold"][:, low - 1])
            excess[name] = cell.served[name].values["gold"] - bon_P
        seeds.append(excess)
    return frame.bootstrap(seeds, lambda m: m[ours] - m[theirs], NUM_BOOTSTRAP)


def cards_table(gaps: Mapping[tuple[str, str], Mapping[str, Estimate]]) -> Table:
    """A row a comparison, a column a place."""
    rows = [[*names, *by_place.values(), f"{mean_of(by_place):+.3f}"] for names, by_place in gaps.items()]
    return table(["rule", "against", *next(iter(gaps.values())), "mean"], rows)


def cards_text(gaps: Mapping[tuple[str, str], Mapping[str, Estimate]]) -> str:
    """How many of these differences are shown, and their means."""
    *blockwise, rules = gaps.values()
    found = [gap.verdict for by_place in blockwise for gap in by_place.values()]
    means = [mean_of(by_place) for by_place in blockwise]
    own = [gap.verdict for gap in rules.values()]
    return (
        f"CARDS minus blockwise at equal operations: {found.count('higher')} of {len(found)} differences are above "
        f"0, {found.count('lower')} below; their means are {min(means):+.3f} to {max(means):+.3f}. `finish=target` "
        f"against `finish=length`: above in {own.count('higher')} of {len(own)}, below in {own.count('lower')}; "
        f"mean {mean_of(rules):+.3f}."
    )


def mean_of(gaps: Mapping[str, Estimate]) -> float:
    """Mean difference over places."""
    return float(np.mean([gap.mean for gap in gaps.values()]))


def chosen_text(chosen: Mapping[str, Mapping[str, float]]) -> str:
    """Chosen settings in a line."""
    return "; ".join(
        f"{kind.replace('_', ' ')}: " + ", ".join(f"{k} = {v:g}" for k, v in s.items()) for kind, s in chosen.items()
    )


# Tables. ------------------------------------------------------------------------------------------------


def four(value: object) -> str:
    """A number with four figures; nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def differences_table(parts: Mapping[str, Mapping[Place, Measured]]) -> Table:
    """Every method at every place, against Best-of-n at equal operations."""
    rows = []
    for part, places in parts.items():
        for (policy, criterion), found in places.items():
            for name in found.names:
                gap, proxy = found.at_equal_cost(name), found.at_equal_cost(name, "proxy")
                means = [guided.mean(found.cells, name, metric) for metric in ("gold", "flops")]
                wrong = found.beside_bon(name, "wrong") if part == Demo.name else ("", "")
                cells = [
                    *(part, policy, criterion, name, found.units[0]["methods"][name]["text"], means[0]),
                    *(gap.difference, *(gap.ci95 or ("", "")), gap.reference_samples, gap.clipped or ""),
                    *(proxy.difference, means[1], *found.beside_bon(name, "steps"), found.seconds(name), *wrong),
                ]
                rows.append([four(cell) for cell in cells])
    header = "part | policy | criterion | method | settings | gold | minus_bon | low | high | bon_n | beyond"
    more = "proxy_minus_bon | mflops | steps | bon_steps | core_seconds | wrong | bon_wrong"
    return table(f"{header} | {more}", rows)


def shown_table(demo: Mapping[Place, Measured], story: Mapping[Place, Measured]) -> Table:
    """Gold of each method minus that of Best-of-n with as many operations, by place."""
    places = {f"{POLICIES[p]} {c}": found for (p, c), found in demo.items() if p in ("base", *TRAINED)}
    places |= {f"real text {c}": found for (_, c), found in story.items()}
    rows = []
    for name in (name for name in demo["base", Demo.criteria[0]].names if name not in LEFT_OUT):
        gaps = [found.at_equal_cost(name) if name in found.names else None for found in places.values()]
        rows.append([TITLES[name], *("-" if gap is None else gap_cell(gap) for gap in gaps)])
    return table(["method", *places], rows)


def gap_cell(gap: EqualCost) -> str:
    """A difference, bold where its interval excludes 0; `>`: Best-of-n's pool has no n of that cost."""
    mark = "" if guided.as_estimate(gap).verdict == "no difference shown" else "**"
    return f"{mark}{gap.difference:+.3f}{mark}{'>' * (gap.clipped == 'high')}"


def costs_table(demo: Mapping[Place, Measured], story: Mapping[Place, Measured]) -> Table:
    """What each method costs on the base beside Best-of-n with as many operations; means over criteria."""
    base = [found for (policy, _), found in demo.items() if policy == "base"]
    rows = []
    for title, places in (("demo world", base), ("real text", list(story.values()))):
        for name in places[0].names if places else ():
            n = float(np.mean([found.at_equal_cost(name).reference_samples for found in places]))
            steps = np.mean([found.beside_bon(name, "steps") for found in places], axis=0)
            ours = np.mean([found.seconds(name) for found in places])
            theirs = np.mean([found.bon_seconds(found.at_equal_cost(name).reference_samples) for found in places])
            cells = [f"{n:.1f}", *(f"{number:.0f}" for number in (*steps, 1000 * ours, 1000 * theirs))]
            if places is base:
                wrong = 100 * np.mean([found.beside_bon(name, "wrong") for found in places], axis=0)
                cells += [*(f"{share:.0f}" for share in wrong), ""]
            else:
                cells += ["", "", f"{np.mean([guided.mean(found.cells, name, 'fluency') for found in places]):.2f}"]
            rows.append([title, TITLES[name], *cells])
    header = "part | method | n | steps | steps of Best-of-n | ms | ms of Best-of-n | ungrammatical, %"
    return table(f"{header} | ungrammatical of Best-of-n, % | log p a token", rows)


def prices(costs: Table) -> list[str]:
    """The price of the method that is claimed, in words."""
    lines = []
    for part in dict.fromkeys(costs.column("part")):
        (row,) = costs.where(part=part, method=TITLES["blockwise tilted 4"]).rows
        _, name, n, steps, bon_steps, ms, bon_ms, *_ = row
        lines.append(
            f"The price of {name} ({part}, base): {steps} sequential steps and {ms} ms of a core a prompt; "
            f"of Best-of-n with as many operations (n = {n}) {bon_steps} and {bon_ms} ms."
        )
    return lines


def twin_seeds(demo: Mapping[Place, Measured]) -> list[int]:
    """Seeds in which both twins are measured on both criteria."""
    known = [
        set(demo[policy, name].seeds) if (policy, name) in demo else set()
        for policy in ("iama", "tilt")
        for name in Demo.criteria
    ]
    return sorted(set.intersection(*known))


def twins_table(demo: Mapping[Place, Measured]) -> Table:
    """Summed gold of the two trained policies, served by what both answered."""
    policies = ("iama", "tilt")
    seeds = twin_seeds(demo)
    by_policy = {
        policy: [
            [found.cells[found.seeds.index(seed)] for seed in seeds] for (p, _), found in demo.items() if p == policy
        ]
        for policy in policies
    }
    rows = []
    for name in ("BoN 4", *(f"blockwise {first} 4" for first in FIRSTS)) if seeds else ():
        sums = [f"{sum(guided.mean(cells, name, 'gold') for cells in by_policy[policy]):.3f}" for policy in policies]
        sides = [[(cells, name) for cells in by_policy[policy]] for policy in policies]
        rows.append([TITLES.get(name, "Best-of-4"), *sums, summed(sides[0], sides[1])])
    return table("served by | trained for `bon(4)` | trained for `tilt` | difference (95 % interval)", rows)


def num_apart(twins: Table) -> int:
    """Rows of the twins whose interval excludes 0."""
    found = [frame.parsed(cell) for cell in twins.column("difference (95 % interval)")]
    return sum(low > 0 or high < 0 for _, low, high in found)


# Coverage. ----------------------------------------------------------------------------------------------


def rare_of(found: Measured) -> tuple[float, list[Indices]]:
    """The gold that one in a hundred of all set-apart samples reaches, and each seed's prompts where none does."""
    seen = [np.asarray(unit["seen_gold"]) for unit in found.units]
    every = np.sort(np.concatenate([rows.ravel() for rows in seen]))[::-1]
    number = (Story.num_samples - Story.num_compared) * sum(len(rows) for rows in seen)
    value = float(every[int(RARE * number)])
    return value, [np.flatnonzero(rows[:, 0] < value) for rows in seen]


def rare_cells(found: Measured) -> tuple[float, list[Cell]]:
    """That gold, and the seeds' cells on those prompts alone."""
    value, prompts = rare_of(found)
    return value, [restricted(cell, rows) for cell, rows in zip(found.cells, prompts, strict=True) if len(rows)]


def restricted(cell: Cell, rows: Indices) -> Cell:
    """A cell on some of its prompts."""
    served = {
        name: Served(np.arange(len(rows)), {k: v[rows] for k, v in s.values.items()}, s.gold_RM[rows], [], [], s.run)
        for name, s in cell.served.items()
    }
    return Cell({k: v[rows] for k, v in cell.bon.items()}, cell.proxy_PS[rows], cell.gold_PS[rows], served)


def covered(found: Measured, name: str, m: int) -> tuple[float, EqualCost, float] | None:
    """`guided.coverage` on prompts where the value is rare; None where a method has not so many answers."""
    value, cells = rare_cells(found)
    if cells[0].served[name].gold_RM.shape[1] < m:
        return None
    return guided.coverage(cells, name, [value] * len(cells), m)


def coverage_table(story: Mapping[Place, Measured]) -> Table:
    """Every method's coverage."""
    rows = []
    for (_, criterion), found in story.items():
        value, cells = rare_cells(found)
        number = sum(len(cell.proxy_PS) for cell in cells)
        for name in found.names:
            for m in COVERED:
                figures_of = covered(found, name, m)
                if figures_of is not None:
                    ours, gap, plain = figures_of
                    cells_of = [criterion, value, number, name, m, ours, gap.difference, *(gap.ci95 or ("", "")), plain]
                    rows.append([four(cell) for cell in cells_of])
    header = "criterion | gold | num_prompts | method | answers | reached | minus_bon | low | high | plain_samples"
    return table(header, rows)


def covered_text(coverage: Table) -> str:
    """How many differences to Best-of-n are shown, and the greatest with its interval."""
    keys = ("criterion", "method", "answers", "minus_bon", "low", "high")
    gaps = [
        (
            f"{TITLES[name]} with {m} answer{'s' * (m != '1')}, {criterion}",
            Estimate((), float(mean), (float(low), float(high))),
        )
        for criterion, name, m, mean, low, high in coverage.only(*keys).rows
        if low
    ]
    if not gaps:
        return "These are too few for an interval." if coverage.rows else ""
    found = [gap.verdict for _, gap in gaps]
    higher, lower = found.count("higher"), found.count("lower")
    told = f"{higher} are above 0 and {lower} below" if higher + lower else "none is shown"
    name, most = max(gaps, key=lambda pair: pair[1].mean)
    return (
        f"Of {len(gaps)} differences to Best-of-n with as many operations, in how often it is reached, {told}. "
        f"The greatest is {most.show(2)}: {name}."
    )


def rare_text(story: Mapping[Place, Measured]) -> str:
    """What is rare, in words."""
    parts = []
    for (_, criterion), found in story.items():
        value, cells = rare_cells(found)
        number = sum(len(cell.proxy_PS) for cell in cells)
        parts.append(f"{criterion}: {value:.2f}, on {number} of {sum(len(c.proxy_PS) for c in found.cells)} prompts")
    return "; ".join(parts)


# The figure. -------------------------------------------------------------------------------------------


LOOKS = {
    "blockwise tilted": (figures.BLUE, "o-"),
    "blockwise distinct": (figures.GREEN, "s-"),
    "blockwise policy": (figures.PURPLE, "v-"),
    "GGRO": (figures.ORANGE, "^-"),
    "random nudges": (figures.GREY, "x"),
    "CARDS, target": (figures.RED, "D"),
}


def plot(path: Path, demo: Mapping[Place, Measured], story: Mapping[Place, Measured]) -> None:
    """Gold against operations on the base: the demo world's criteria, and both signs on real text."""
    panels = {f"demo world, {c}": found for (p, c), found in demo.items() if p == "base"}
    panels |= {f"real text, {c}": found for (_, c), found in story.items()}
    with figures.figure(path, columns=2, rows=(len(panels) + 1) // 2, size=(4.2, 3.0)) as axes:
        for axis, (title, found) in zip(axes, panels.items(), strict=True):
            curve = [
                np.mean([cell.bon[metric].mean(axis=0) for cell in found.cells], axis=0) for metric in ("flops", "gold")
            ]
            axis.plot(*curve, "-", color=figures.GREY, label="Best-of-n")
            for kind, (colour, mark) in LOOKS.items():
                names = [name for name in (kind, *(f"{kind} {m}" for m in (2, 4, 8))) if name in found.names]
                if not names:
                    continue
                x, y = ([guided.mean(found.cells, name, metric) for name in names] for metric in ("flops", "gold"))
                axis.plot(x, y, mark, color=colour, label=kind)
            axis.set_xscale("log")
            figures.label(axis, title, "operations, millions", "gold", legend=axis is axes[0])
