"""Regenerate docs/results/demo.md and the table in README.md: the samples that an IAMA base saves on the demo world.

    make results

1. Search: linear GRPO and IAMA each get the same grid of learning rates and betas on world seed 0; each keeps the
   pair with the highest summed proxy reward under Best-of-4 on validation prompts, among those whose KL to the
   reference ends within a limit: far from it a proxy says little. Gold rewards are not loaded.
2. Publish: with those settings, world and training seeds 10 to 12; pools of 256 samples a test prompt.
3. Combine the seeds and write the page and the table.

Everything finished is kept under runs/results, so a killed run goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console

from iama.files import write_atomically
from inference.evaluation.compare import combine_runs
from inference.evaluation.question import Question
from inference.evaluation.summary import load_summary
from scripts import launch
from scripts.build_demo_models import Parameters, stamp_of
from scripts.experiments import figures, frame
from scripts.experiments.frame import CRITERIA, FOLDER, MAX_KL, SEARCH_SEED, SEEDS, Claim, Row, Table, final_kl

README = Path("README.md")
BEGIN, END = "<!-- written by make results -->", "<!-- end -->"
EVALUATION = "configs/demo-evaluate.yaml"
METHODS = {"grpo": "configs/demo-grpo.yaml", "iama": "configs/demo.yaml"}
LEARNING_RATES, BETAS = (2e-3, 4e-3), (0.08, 0.2, 0.3, 0.5)
BUDGET = 4


def main() -> None:
    """Search, publish, combine, write.

    Example: python -m scripts.results
    """
    console = Console(highlight=False, soft_wrap=True)
    refuse_outdated()
    search = run_search(console)
    best = {method: choose(rows) for method, rows in search.items()}
    for seed in SEEDS:
        publish(seed, best, console)
    folders = [FOLDER / f"evaluation-{seed}" for seed in SEEDS]
    summaries = {seed: dict(load_summary(folder)) for seed, folder in zip(SEEDS, folders, strict=True)}
    combined = dict(combine_runs(folders, Question(BUDGET)))
    worlds = {seed: json.loads((world(seed) / "world.json").read_text())["measurements"] for seed in SEEDS}
    write(frame.PAGES, search, best, summaries, combined, worlds)
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(README, f"{before}{BEGIN}\n{readme_table(combined)}\n{END}{after}")
    console.print(f"wrote the table in {README}")


def refuse_outdated() -> None:
    """Never mix runs of other worlds, recipes or grids: stop, and say what to delete."""
    parts = [(launch.ROOT / path).read_text(encoding="utf-8") for path in (*METHODS.values(), EVALUATION)]
    settings = [SEARCH_SEED, SEEDS, LEARNING_RATES, BETAS, MAX_KL, BUDGET, stamp_of(Parameters())]
    sources = "\n".join([*parts, json.dumps(settings)])
    note = launch.ROOT / FOLDER / "sources.txt"
    if note.is_file() and not launch.same_sources(note, sources):
        sys.exit(
            f"error: {FOLDER} was made from another world, recipe or grid; move it away or delete it, and start over"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, sources)


def world(seed: int) -> Path:
    """Folder of a demo world."""
    return FOLDER / f"world-{seed}"


def run_search(console: Console) -> dict[str, list[dict[str, float]]]:
    """One row a candidate: learning rate, beta, summed proxy under Best-of-4 on validation prompts, KL."""
    path = FOLDER / "search.json"
    if path.is_file():
        rows: dict[str, list[dict[str, float]]] = json.loads(path.read_text())
        return rows
    launch.build_world(SEARCH_SEED, str(world(SEARCH_SEED)))
    grid = list(itertools.product(LEARNING_RATES, BETAS))
    for method, (rate, beta) in itertools.product(METHODS, grid):
        console.rule(f"search  {method}  learning rate {rate:g}  beta {beta:g}")
        train(method, SEARCH_SEED, rate, beta, FOLDER / "search" / candidate(method, rate, beta))
    console.rule("search  validation")
    names = {candidate(m, *pair): FOLDER / "search" / candidate(m, *pair) for m in METHODS for pair in grid}
    evaluate("search-evaluation", SEARCH_SEED, names, "validation", num_samples=64, gold=False)
    curves = load_summary(FOLDER / "search-evaluation")["curves"]
    search = {
        method: [
            {
                "learning_rate": rate,
                "beta": beta,
                "proxy": summed_proxy(curves, candidate(method, rate, beta)),
                "kl_per_token": final_kl(FOLDER / "search" / candidate(method, rate, beta)),
            }
            for rate, beta in grid
        ]
        for method in METHODS
    }
    write_atomically(path, json.dumps(search, indent=2))
    return search


def choose(rows: list[dict[str, float]]) -> dict[str, float]:
    """The highest proxy within the KL limit; where no candidate is, the one nearest to it."""
    within = [row for row in rows if row["kl_per_token"] <= MAX_KL]
    return max(within, key=lambda row: row["proxy"]) if within else min(rows, key=lambda row: row["kl_per_token"])


def publish(seed: int, best: dict[str, dict[str, float]], console: Console) -> None:
    """World, training and evaluation of one published seed."""
    if (FOLDER / f"evaluation-{seed}" / "summary.json").is_file():
        return
    console.rule(f"seed {seed}  world")
    launch.build_world(seed, str(world(seed)))
    adapters = {}
    for method, row in best.items():
        console.rule(f"seed {seed}  train {method}")
        adapters[method] = FOLDER / f"{method}-{seed}"
        train(method, seed, row["learning_rate"], row["beta"], adapters[method])
    console.rule(f"seed {seed}  evaluate")
    evaluate(f"evaluation-{seed}", seed, adapters, "test", num_samples=256, gold=True)


def train(method: str, seed: int, rate: float, beta: float, out: Path) -> None:
    """One training run, as a user would start it."""
    launch.train(
        METHODS[method],
        f"name={out.name}",
        f"output_dir={out}",
        f"seed={seed}",
        f"policy.path={world(seed)}/policy",
        f"prompts={world(seed)}/prompts-train.jsonl",
        *(f"objective.criteria.{k}.proxy.model={world(seed)}/rm-{name}" for k, name in enumerate(CRITERIA)),
        f"trainer.learning_rate={rate}",
        f"trainer.beta={beta}",
    )


def candidate(method: str, rate: float, beta: float) -> str:
    """Name of a search run."""
    return f"{method}-lr{rate:g}-beta{beta:g}"


def evaluate(name: str, seed: int, adapters: dict[str, Path], split: str, num_samples: int, gold: bool) -> None:
    """`iama evaluate` with configs/demo-evaluate.yaml turned to a world and its adapters, the base included."""
    raw: dict[str, Any] = yaml.safe_load((launch.ROOT / EVALUATION).read_text())
    policy = f"{world(seed)}/policy"
    raw["policies"] = {"base": {"path": policy}} | {
        policy_name: {"path": policy, "adapter": f"{folder}/adapter"} for policy_name, folder in adapters.items()
    }
    for criterion in raw["criteria"]:
        criterion["proxy"] = {"model": f"{world(seed)}/rm-{criterion['name']}"}
        criterion["gold"] = criterion["gold"] if gold else None
    raw |= {
        "name": name,
        "output_dir": str(FOLDER / name),
        "prompts": f"{world(seed)}/prompts-{split}.jsonl",
        "log_probabilities": False,
        "methods": ["bon"],
        "budgets": [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= num_samples // 4],
        "num_samples": num_samples,
        "trained_budget": BUDGET,
        "seed": seed,
    }
    path = FOLDER / f"{name}.yaml"
    write_atomically(path, yaml.safe_dump(raw, sort_keys=False))
    launch.iama("evaluate", "--config", str(path))


def summed_proxy(curves: Sequence[Mapping[str, Any]], policy: str) -> float:
    """Sum over criteria of the proxy reward, each criterion served by its own Best-of-4."""
    rows = [row for row in curves if row["policy"] == policy and row["samples"] == BUDGET]
    assert len(rows) == len(CRITERIA)
    return sum(float(row["proxy"]) for row in rows)


# The page. ----------------------------------------------------------------------------------------------


def write(
    folder: Path,
    search: Mapping[str, Sequence[Row]],
    best: Mapping[str, Row],
    seeds: Mapping[int, Row],
    combined: Row,
    worlds: Mapping[int, Row],
) -> None:
    """Write the page, its figure and its tables."""
    tables = {
        "parts": frame.parts_table(claims(combined)),
        "savings": savings_table({**{str(seed): row for seed, row in seeds.items()}, "**all**": combined}),
        "summed": summed_table({**{str(seed): row for seed, row in seeds.items()}, "**all**": combined}),
        "sampler": sampler_table(seeds),
        "curves": curves_table(seeds),
        "search": search_table(search, best),
        "worlds": worlds_table(worlds),
    }
    first = next(iter(seeds.values()))
    values = {"seeds": list(seeds), "num_samples": first["num_samples"], "num_prompts": first["num_prompts"]}
    write_tables(folder, values, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page and its figure from its tables."""
    plot(folder / "demo.svg", tables["curves"], tables["sampler"])
    combined = tables["savings"].where(seed="**all**")
    gap = tables["summed"].where(seed="**all**", reference="grpo", reward="gold").rows[0]
    settings = {
        "shown": combined.only(*combined.header[1:]),
        "gap": f"{gap[-2]} ({gap[-1]})",
        "max_kl": MAX_KL,
        "steps": yaml.safe_load((launch.ROOT / METHODS["iama"]).read_text(encoding="utf-8"))["trainer"]["max_steps"],
        "num_candidates": len(LEARNING_RATES) * len(BETAS),
        "other_steps": frame.STEPS,
    }
    frame.write_claim(folder, "demo", {**settings, **values}, tables, "results")


def claims(combined: Row) -> list[Claim]:
    """What the project set itself, and whether it holds."""
    parts = []
    for row in gold_rows(combined):
        if row["reference"] == "base":
            low, high = row["ci95"]
            is_met = row["counts"] and row["ratio"] >= 8 and low > 4
            text = f"IAMA's gold with 4 samples is worth 8 times the samples of the base, {row['criterion']}"
            bar = "ratio 8 or more, lower bound above 4"
            parts.append(Claim(text, bar, f"{ratio(row)} ({low:.2f} to {high:.2f})", is_met))
    gap = _gold_gap(combined)
    low, high = gap["ci95"]
    text = "summed gold, each criterion served by its own Best-of-4, is above linear GRPO's"
    measured = f"{gap['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
    return [*parts, Claim(text, "interval above 0", measured, low > 0)]


def readme_table(combined: Row) -> str:
    """The combined figures in a few lines, for the README."""
    header = "demo: each criterion served by its own Best-of-4 | saved against the base | against linear GRPO"
    rows: dict[str, list[str]] = {}
    for row in gold_rows(combined):
        remark = "" if row["counts"] else "; does not count: its gold falls"
        told = frame.told(
            row["ratio"], row["ci95"], censored=row["censored"], floor=row["floor"], ci_censored=row["ci_censored"]
        )
        rows.setdefault(row["criterion"], []).append(f"{told}{remark}")
    table = frame.table(header, [[criterion, *cells] for criterion, cells in rows.items()])
    return "\n".join(["", table, "", verdict(combined), ""])


def verdict(combined: Row) -> str:
    """The claims that the project set itself, and which hold, in a sentence."""
    *saved, beats = claims(combined)
    names = [claim.text.rpartition(", ")[2] for claim in saved if claim.met]
    return (
        "What was set before the first attempt: at least 8 times saved against the base on both, lower ends above 4, "
        f"holds on {' and '.join(names) or 'none'}; gold above linear GRPO's, summed over both criteria served by "
        f"Best-of-4, {'holds' if beats.met else 'does not hold'}: {beats.measured}."
    )


def _gold_gap(combined: Row) -> Row:
    """Difference of summed gold between IAMA and linear GRPO."""
    gap: Row = next(r for r in combined["differences"] if r["metric"] == "gold" and r["reference"] == "grpo")
    return gap


def gold_rows(results: Row) -> list[Row]:
    """Savings by gold."""
    return [row for row in results["savings"] if row["metric"] == "gold"]


def by_proxy(results: Row, row: Row) -> Row:
    """The savings by proxy that belong to those by gold."""
    same = ("criterion", "reference")
    savings: Row = next(r for r in results["savings"] if r["metric"] == "proxy" and all(r[k] == row[k] for k in same))
    return savings


def ratio(row: Row, key: str = "ratio") -> str:
    """A ratio, which may be a bound."""
    return f"{'> ' if row['censored'] else ''}{row[key]:.2f}"


def remarks(row: Row) -> str:
    """What a ratio's reader has to know."""
    notes = {
        f"{row['num_censored']}/{row['num_seeds']} bounds": row["censored"],
        "reference's gold falls before its largest budget": row["hacked"],
        "does not count": not row["counts"],
        "one reference sample is enough: at most this": row["floor"],
    }
    return "; ".join(note for note, holds in notes.items() if holds)


def savings_table(every: Mapping[str, Row]) -> Table:
    """Savings by gold, a row a seed, criterion and reference."""
    rows = []
    for seed, results in every.items():
        for row in gold_rows(results):
            interval = "{:.2f} to {:.2f}".format(*row["ci95"])
            others = [ratio(row, "token_ratio"), ratio(by_proxy(results, row)), remarks(row)]
            rows.append([seed, row["criterion"], row["reference"], ratio(row), interval, *others])
    header = "seed | criterion | reference | samples saved | 95 % interval | tokens saved | by proxy | remarks"
    return frame.table(header, rows)


def summed_table(every: Mapping[str, Row]) -> Table:
    """IAMA minus the reference in summed reward, paired over prompts."""
    rows = []
    for seed, results in every.items():
        for row in results["differences"]:
            interval = "{:+.3f} to {:+.3f}".format(*row["ci95"])
            rows.append([seed, row["reference"], row["metric"], f"{row['mean']:+.3f}", interval])
    return frame.table("seed | reference | reward | difference | 95 % interval", rows)


def sampler_table(seeds: Mapping[int, Row]) -> Table:
    """Mean gold with and without the sampler."""
    rows = [
        [seed, policy, name, f"{row['without']:.3f}", f"{row['with']:.3f}"]
        for seed, results in seeds.items()
        for policy, criteria in results["quality"].items()
        for name, row in criteria.items()
    ]
    return frame.table("seed | policy | criterion | one sample | Best-of-4", rows)


def search_table(search: Mapping[str, Sequence[Row]], best: Mapping[str, Row]) -> Table:
    """Every candidate of the search."""
    rows = []
    for method, candidates in search.items():
        for row in candidates:
            remark = "chosen" if row == best[method] else "beyond the limit" if row["kl_per_token"] > MAX_KL else ""
            settings = [f"{row['learning_rate']:g}", f"{row['beta']:g}"]
            rows.append([method, *settings, f"{row['proxy']:.3f}", f"{row['kl_per_token']:.3f}", remark])
    return frame.table("method | learning rate | beta | summed proxy | KL | remark", rows)


def worlds_table(worlds: Mapping[int, Row]) -> Table:
    """What the models of each world are worth by themselves."""
    rows = []
    for seed, world in worlds.items():
        pairs = [world[f"rm-{name}"]["pair_accuracy"] for name in CRITERIA]
        rows.append([seed, f"{world['policy']['parse_rate']:.3f}", *(f"{share:.3f}" for share in pairs)])
    return frame.table(["seed", "base samples that parse", *(f"pair accuracy, {name}" for name in CRITERIA)], rows)


def curves_table(seeds: Mapping[int, Row]) -> Table:
    """Gold by policy, criterion and budget, mean over seeds."""
    golds: dict[tuple[str, str], dict[int, list[float]]] = {}
    for results in seeds.values():
        for row in results["curves"]:
            golds.setdefault((row["policy"], row["criterion"]), {}).setdefault(row["samples"], []).append(row["gold"])
    budgets = sorted(next(iter(golds.values())))
    rows = [
        [*place, *(f"{sum(by_budget[n]) / len(by_budget[n]):.3f}" for n in budgets)]
        for place, by_budget in golds.items()
    ]
    return frame.table(["policy", "criterion", *(f"n = {n}" for n in budgets)], rows)


COLOURS = {"base": figures.GREY, "grpo": figures.ORANGE, "iama": figures.BLUE}
TITLES = {"base": "untrained base", "grpo": "linear GRPO", "iama": "IAMA"}


def plot(path: Path, curves: Table, sampler: Table) -> None:
    """Gold against the number of samples, a panel a criterion; single seeds with one and with four samples."""
    budgets = [int(name.removeprefix("n = ")) for name in curves.header[2:]]
    with figures.figure(path, columns=len(CRITERIA), size=(4.2, 3.2)) as axes:
        for axis, criterion in zip(axes, CRITERIA, strict=True):
            for policy, colour in COLOURS.items():
                (row,) = curves.where(policy=policy, criterion=criterion).rows
                axis.plot(budgets, [float(cell) for cell in row[2:]], "-", color=colour, label=TITLES[policy])
                for _, _, _, *golds in sampler.where(policy=policy, criterion=criterion).rows:
                    axis.plot([1, BUDGET], [float(gold) for gold in golds], "o", color=colour, alpha=0.6)
            axis.set_xscale("log", base=2)
            axis.set_xticks(budgets, [str(n) for n in budgets])
            figures.label(axis, criterion, "samples n", "gold", legend=axis is axes[0])


if __name__ == "__main__":
    typer.run(main)
