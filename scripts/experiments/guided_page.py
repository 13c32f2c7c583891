"""The page docs/results/guided.md, from what `scripts.experiments.guided_study` has kept beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iama.arrays import Floats, Indices
from iama.files import write_atomically
from inference.statistics.equal_cost import EqualCost, difference_at_equal_cost
from inference.statistics.savings import Comparison
from scripts.experiments import figures, frame, guided
from scripts.experiments.frame import Claim, Estimate, Row, table
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
"""Methods whose rows stand in the CSV file alone."""
COVERED = (1, 2)
RARE = 0.01
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
    """Write page, figure and tables of numbers from the units that are there; real text is left out without any."""
    data = folder / "data"
    if not (data / UNITS).is_file():
        return
    units = [json.loads(line) for line in (data / UNITS).read_text(encoding="utf-8").splitlines()]
    settings = json.loads((data / SETTINGS).read_text(encoding="utf-8")) if (data / SETTINGS).is_file() else {}
    parts = {part: places_of(units, part) for part in (Demo.name, Story.name)}
    demo, story = parts.values()
    if ("base", Demo.criteria[0]) not in demo:
        return
    write_atomically(data / "guided.csv", differences_csv(parts))
    if story:
        write_atomically(data / "guided-coverage.csv", csv_text(coverage_rows(story)))
    plot(folder / "guided.svg", demo, story)
    parts_of_it = claims(demo, story)
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
        "headline": headline(demo, story),
        "claims": parts_of_it,
        "answer": answer(parts_of_it, is_whole=bool(story)),
        "cards": cards_lines(demo),
        "demo": demo_table(demo),
        "story": story_table(story) if story else "",
        "twins": twins_table(demo) if twin_seeds(demo) else "",
        "num_twins": len(twin_seeds(demo)),
        "story_seeds": min((len(found.units) for found in story.values()), default=0),
        "rare": rare_text(story),
    }
    frame.write_page(folder / "guided.md", "guided", values)


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


def headline(demo: Mapping[Place, Measured], story: Mapping[Place, Measured]) -> list[str]:
    """What was found, in a few sentences."""
    places = {f"{POLICIES[p]} {c}": found for (p, c), found in demo.items() if p in ("base", *TRAINED)}
    real = {f"real text {c}": found for (_, c), found in story.items()}
    every = places | real
    best, base = "blockwise tilted 4", [found for (p, _), found in demo.items() if p == "base"]
    lines = []
    for name in (best, "blockwise distinct 4", "CARDS, target", "GGRO 8", "random nudges 8", "SEA"):
        some = {place: found for place, found in every.items() if name in found.names}
        gaps = {place: guided.over_bon(found.cells, name) for place, found in some.items()}
        by = frame.by_verdict(gaps)
        told = {verdict: ", ".join(f"{place} ({gaps[place].mean:+.2f})" for place in by[verdict]) for verdict in by}
        lines.append(
            f"**{TITLES[name]}** against Best-of-n with as many operations: more gold on {told['higher'] or 'none'}; "
            f"less on {told['lower'] or 'none'}; no difference shown on {told['no difference shown'] or 'none'}."
        )
    for title, found in (("demo world", base), ("real text", list(real.values()))):
        if not found:
            continue
        n, steps, ms = cost_cells(found, best)
        lines.append(
            f"The price of {TITLES[best]} ({title}, base): {steps} sequential steps and {ms} ms of a core a prompt, in "
            f"brackets those of Best-of-n with as many operations (n = {n})."
        )
    return lines


def answer(parts: Sequence[Claim], *, is_whole: bool) -> str:
    """Yes, no or in part; in part, too, where real text was not measured."""
    holding, total = sum(part.met for part in parts), len(parts)
    if holding == 0:
        return f"No: none of {total} parts holds."
    word = "Yes" if holding == total and is_whole else "In part"
    untold = "" if is_whole else " What was set for real text is not yet measured."
    return f"{word}: {holding} of {total} parts hold.{untold}"


def claims(demo: Mapping[Place, Measured], story: Mapping[Place, Measured]) -> list[Claim]:
    """What was set beforehand, and what was measured."""
    base = {place: found for place, found in demo.items() if place[0] == "base"}
    trained = {place: found for place, found in demo.items() if place[0] in TRAINED}
    rows = []
    for m in (2, 4):
        name = f"blockwise tilted {m}"
        gaps = [guided.over_bon(found.cells, name) for found in base.values()]
        rows.append(frame.count_above(f"{TITLES[name]}: above Best-of-n on every criterion of the base", gaps))
        if not trained:
            continue
        gaps = [guided.over_bon(found.cells, name) for found in trained.values()]
        lower = sum(gap.verdict == "lower" for gap in gaps)
        measured = f"above in {sum(gap.verdict == 'higher' for gap in gaps)} of {len(gaps)}, below in {lower}"
        rows.append(Claim(f"{TITLES[name]}: never below Best-of-n on linear GRPO and IAMA", "", measured, not lower))
    for other in ("distinct", "policy"):
        pairs = ("blockwise tilted 4", f"blockwise {other} 4")
        gaps = [guided.difference(found.cells, *pairs) for found in base.values()]
        rows.append(frame.count_above(f"tilted above {other} at m = 4 on the base", gaps, note=shown(gaps)))
    wrong = [
        found.at_equal_cost(f"blockwise tilted {m}", "wrong").difference for found in base.values() for m in (2, 4)
    ]
    text = "tilted on the base: at most 3 points more ungrammatical answers than Best-of-n"
    rows.append(Claim(text, "", f"at most {100 * max(wrong):+.1f} points", max(wrong) <= 0.03))
    if not story:
        return rows
    for names, text in (
        (GREEDY, "real text: GGRO greedy, S = 2, 4 and 8, above Best-of-n on both signs"),
        (("blockwise tilted 4",), "real text: blockwise tilted, m = 4, above Best-of-n on both signs"),
        (("blockwise distinct 4",), "real text: blockwise distinct, m = 4, above Best-of-n on both signs"),
    ):
        rows.append(
            frame.count_above(text, [guided.over_bon(found.cells, name) for found in story.values() for name in names])
        )
    gaps = [between(found.cells, "blockwise tilted 4", ["GGRO 2", "GGRO 4", "GGRO 8"]) for found in story.values()]
    rows.append(
        frame.count_above("real text: tilted, m = 4, above GGRO greedy at equal operations", gaps, note=shown(gaps))
    )
    return rows


def shown(gaps: Sequence[Estimate]) -> str:
    """Differences after their counts."""
    return ": " + "; ".join(map(str, gaps))


def cards_lines(demo: Mapping[Place, Measured]) -> list[str]:
    """CARDS against blockwise at equal operations, and its two rules against each other."""
    places = {f"{POLICIES[p]} {c}": found for (p, c), found in demo.items() if p in ("base", *TRAINED)}
    lines = []
    for name in ("CARDS, target", "CARDS, length"):
        for first in ("policy", "distinct"):
            gaps = {place: between(found.cells, name, of_sizes(first)) for place, found in places.items()}
            lines.append(f"{TITLES[name]} against blockwise {first}: {verdicts(gaps)}")
    gaps = {place: target_over_length(found) for place, found in places.items()}
    lines.append(f"`finish=target` against `finish=length`, each above Best-of-n: {verdicts(gaps)}")
    return lines


def target_over_length(found: Measured) -> Estimate:
    """What CARDS has above Best-of-n at equal operations, with one rule minus the other."""
    seeds = []
    for cell in found.cells:
        excess = {}
        for name in ("CARDS, target", "CARDS, length"):
            flops = cell.served[name].values["flops"].mean()
            n = float(np.interp(flops, cell.bon["flops"].mean(axis=0), np.arange(1.0, cell.bon["flops"].shape[1] + 1)))
            low = min(int(n), cell.bon["gold"].shape[1] - 1)
            bon_P = cell.bon["gold"][:, low - 1] + (n - low) * (cell.bon["gold"][:, low] - cell.bon["gold"][:, low - 1])
            excess[name] = cell.served[name].values["gold"] - bon_P
        seeds.append(excess)
    return frame.bootstrap(seeds, lambda m: m["CARDS, target"] - m["CARDS, length"], NUM_BOOTSTRAP)


def verdicts(gaps: Mapping[str, Estimate]) -> str:
    """Where gold is higher, lower, and where nothing is shown, and the mean difference."""
    by = frame.by_verdict(gaps)
    parts = [f"{verdict} on {', '.join(names) or 'none'}" for verdict, names in by.items()]
    return f"{'; '.join(parts)}; mean {np.mean([gap.mean for gap in gaps.values()]):+.3f}"


def chosen_text(chosen: Mapping[str, Mapping[str, float]]) -> str:
    """Chosen settings in a line."""
    return "; ".join(
        f"{kind.replace('_', ' ')}: " + ", ".join(f"{k} = {v:g}" for k, v in s.items()) for kind, s in chosen.items()
    )


# Tables. ------------------------------------------------------------------------------------------------


def gap_cell(gap: EqualCost) -> str:
    """A difference with its interval, bold where that excludes 0; `>`: Best-of-n's pool has no n of that cost."""
    assert gap.ci95 is not None
    low, high = gap.ci95
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{gap.difference:+.3f}{mark} ({low:+.2f} to {high:+.2f}){'>' * (gap.clipped == 'high')}"


def demo_table(demo: Mapping[Place, Measured]) -> str:
    """Methods against Best-of-n; costs are those of the base, means over criteria."""
    compared = {place: found for place, found in demo.items() if place[0] in ("base", *TRAINED)}
    base = [found for place, found in demo.items() if place[0] == "base"]
    header = ["method", *(f"{POLICIES[policy]} {criterion}" for policy, criterion in compared)]
    rows = []
    for name in base[0].names:
        if name in LEFT_OUT:
            continue
        gaps = [gap_cell(found.at_equal_cost(name)) if name in found.names else "-" for found in compared.values()]
        rows.append([TITLES[name], *gaps, *cost_cells(base, name), wrong_cell(base, name)])
    return table([*header, "n", "steps", "ms", "ungrammatical, %"], rows)


def cost_cells(places: Sequence[Measured], name: str) -> list[str]:
    """n of Best-of-n at equal operations, steps and milliseconds of one core; Best-of-n's in brackets."""
    n = float(np.mean([found.at_equal_cost(name).reference_samples for found in places]))
    steps = np.mean([found.beside_bon(name, "steps") for found in places], axis=0)
    ours = np.mean([found.seconds(name) for found in places])
    theirs = np.mean([found.bon_seconds(found.at_equal_cost(name).reference_samples) for found in places])
    return [f"{n:.1f}", f"{steps[0]:.0f} ({steps[1]:.0f})", f"{1000 * ours:.0f} ({1000 * theirs:.0f})"]


def wrong_cell(places: Sequence[Measured], name: str) -> str:
    """Share of ungrammatical answers, with Best-of-n's in brackets."""
    ours, theirs = 100 * np.mean([found.beside_bon(name, "wrong") for found in places], axis=0)
    return f"{ours:.0f} ({theirs:.0f})"


def story_table(story: Mapping[Place, Measured]) -> str:
    """Methods on real text; costs are means over both signs."""
    places = list(story.values())
    header = ["method", *(criterion for _, criterion in story), "n", "steps", "ms", "log p a token"]
    header += [f"rare gold in {m} (Best-of-n)" for m in COVERED]
    rows = []
    for name in places[0].names:
        if name in LEFT_OUT or name == "blockwise tilted 2":
            continue
        gaps = [gap_cell(found.at_equal_cost(name)) for found in places]
        fluency = np.mean([guided.mean(found.cells, name, "fluency") for found in places])
        covered = [covered_cell(story, name, m) for m in COVERED]
        rows.append([TITLES[name], *gaps, *cost_cells(places, name), f"{fluency:.2f}", *covered])
    return table(header, rows)


def twin_seeds(demo: Mapping[Place, Measured]) -> list[int]:
    """Seeds in which both twins are measured on both criteria."""
    known = [
        set(demo[policy, name].seeds) if (policy, name) in demo else set()
        for policy in ("iama", "tilt")
        for name in Demo.criteria
    ]
    return sorted(set.intersection(*known))


def twins_table(demo: Mapping[Place, Measured]) -> str:
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
    for name in ("BoN 4", *(f"blockwise {first} 4" for first in FIRSTS)):
        sums = [f"{sum(guided.mean(cells, name, 'gold') for cells in by_policy[policy]):.3f}" for policy in policies]
        sides = [[(cells, name) for cells in by_policy[policy]] for policy in policies]
        rows.append([TITLES.get(name, "Best-of-4"), *sums, summed(sides[0], sides[1])])
    return table("served by | trained for `bon(4)` | trained for `tilt` | difference (95 % interval)", rows)


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


def covered_cell(story: Mapping[Place, Measured], name: str, m: int) -> str:
    """Share of such prompts with an answer that has the value, mean over the signs; Best-of-n's in brackets."""
    rows = [covered(found, name, m) for found in story.values()]
    known = [row for row in rows if row is not None]
    if not known:
        return "-"
    ours, gaps = np.mean([row[0] for row in known]), np.mean([row[1].difference for row in known])
    return f"{ours:.2f} ({ours - gaps:.2f})"


def coverage_rows(story: Mapping[Place, Measured]) -> list[Row]:
    """Every method's coverage."""
    rows = []
    for (_, criterion), found in story.items():
        value, cells = rare_cells(found)
        for name in found.names:
            for m in COVERED:
                figures_of = covered(found, name, m)
                if figures_of is not None:
                    ours, gap, plain = figures_of
                    rows.append(
                        {
                            "criterion": criterion,
                            "gold": value,
                            "num_prompts": sum(len(cell.proxy_PS) for cell in cells),
                            "method": name,
                            "answers": m,
                            "reached": ours,
                            "minus_bon": gap.difference,
                            "low": gap.ci95[0] if gap.ci95 else None,
                            "high": gap.ci95[1] if gap.ci95 else None,
                            "plain_samples": plain,
                        }
                    )
    return rows


def rare_text(story: Mapping[Place, Measured]) -> str:
    """What is rare, in words."""
    parts = []
    for (_, criterion), found in story.items():
        value, cells = rare_cells(found)
        number = sum(len(cell.proxy_PS) for cell in cells)
        parts.append(f"{criterion}: {value:.2f}, on {number} of {sum(len(c.proxy_PS) for c in found.cells)} prompts")
    return "; ".join(parts)


# Files. -------------------------------------------------------------------------------------------------


def differences_csv(parts: Mapping[str, Mapping[Place, Measured]]) -> str:
    """Every method at every place, against Best-of-n at equal operations."""
    rows = []
    for part, places in parts.items():
        for (policy, criterion), found in places.items():
            for name in found.names:
                gap, proxy = found.at_equal_cost(name), found.at_equal_cost(name, "proxy")
                ours, theirs = found.beside_bon(name, "steps")
                row = {
                    "part": part,
                    "policy": policy,
                    "criterion": criterion,
                    "method": name,
                    "settings": found.units[0]["methods"][name]["text"],
                    "gold": guided.mean(found.cells, name, "gold"),
                    "minus_bon": gap.difference,
                    "low": gap.ci95[0] if gap.ci95 else None,
                    "high": gap.ci95[1] if gap.ci95 else None,
                    "bon_n": gap.reference_samples,
                    "beyond": gap.clipped or "",
                    "proxy_minus_bon": proxy.difference,
                    "mflops": guided.mean(found.cells, name, "flops"),
                    "steps": ours,
                    "bon_steps": theirs,
                    "core_seconds": found.seconds(name),
                }
                wrong = found.beside_bon(name, "wrong") if part == Demo.name else (None, None)
                rows.append(row | {"wrong": wrong[0], "bon_wrong": wrong[1]})
    return csv_text(rows)


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV, numbers with four figures."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


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
