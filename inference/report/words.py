"""Numbers, names and marks in plain words; the sentences are made of them (`inference.report.sentences`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from iama.config.methods import AT_EVERY_BUDGET
from inference.evaluation.summary import Summary
from inference.statistics.bootstrap import MIN_PROMPTS
from inference.statistics.savings import FALL_TOLERANCE
from inference.statistics.summary_rows import (
    AverageRow,
    EqualBudgetRow,
    IntervalRow,
    QualityRow,
    Ratio,
    SavingsRow,
    Unit,
)

UNITS: dict[Unit, str] = {
    "samples": "samples",
    "policy_tokens": "policy tokens",
    "policy_prefill_tokens": "policy prefill tokens",
    "policy_decode_tokens": "policy decode tokens",
    "reward_calls": "reward calls",
    "reward_tokens": "reward tokens",
    "backward_tokens": "backward tokens",
    "sequential_steps": "sequential steps",
    "flops": "FLOPs",
    "seconds": "seconds",
}
"""Units of a budget, and how they are called."""
TITLES = {"base": "the untrained base", "grpo": "linear GRPO"}
METHODS = {"bon": "Best-of-N", "bop": "Best-of-Poisson", "stop": "Best-of-N with stopping"}
FALLS = f"gold falls by more than {100 * FALL_TOLERANCE:.0f} % of its range"
ENDS = {
    "low": "a single sample of the reference costs more",
    "high": "the curve of the reference ends at a lower cost",
}
SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line
CHANCE = "a proxy is the same for all answers, so it selects by chance"
ALIKE = "gold is the same for all answers, so it judges nothing"
ROUNDING = 1e-6
"""A ratio this little below a round number is that number."""
NO_GOLD = "no gold reward judges"
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def number(value: float | None) -> str:
    """Three significant digits, from a million on with an SI prefix; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) < 999.5:  # from there on three digits are 1,000
        return f"{value:.3g}"
    if abs(value) < 999_999.5:
        return f"{value:,.0f}"
    value = float(f"{value:.3g}")
    power = min(int(math.log10(abs(value)) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g}{SPACE}{PREFIXES[power]}"


def plain(value: float) -> str:
    """Two digits, and no fraction from ten on: what a sentence has of a number."""
    if not math.isfinite(value):
        return "any number of"
    if abs(value) >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.095 else f"{value:.1g}"


def at_least(value: float) -> str:
    """The same, rounded down."""
    step = 1 if value >= 10 else 10
    return plain(math.floor(value * step + ROUNDING) / step) if math.isfinite(value) else plain(value)


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}{SPACE}%"


def interval(ci95: IntervalRow | None) -> str:
    """An interval of any number; a dash where there is none."""
    return "-" if ci95 is None or not _is_known(ci95) else f"[{number(ci95[0])}, {number(ci95[1])}]"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def used_units(rows: Iterable[Mapping[str, object]]) -> dict[Unit, str]:
    """Units in which some row has a value other than zero, and how they are called."""
    rows = list(rows)
    return {unit: name for unit, name in UNITS.items() if any(row.get(unit) for row in rows)}


def savings_units(savings: Sequence[SavingsRow]) -> dict[Unit, str]:
    """Units in which some row has a ratio, and samples, if some row is told in them; and how they are called."""
    known = {unit for unit in UNITS for row in savings if unit == told_unit(row) or ratio_in(row, unit)}
    return {unit: name for unit, name in UNITS.items() if unit in known}


def told_unit(row: SavingsRow | AverageRow) -> Unit:
    """The unit of a row's own ratio."""
    return row.get("unit", "samples")


def tells(row: SavingsRow, unit: Unit) -> bool:
    """Whether a row is told in a unit, though its ratio there may be none."""
    return unit == told_unit(row) or unit in row["units"]


def ratio_in(row: SavingsRow, unit: Unit) -> Ratio | None:
    """A saving in one unit; None where it was not measured, or a constant proxy or gold makes it say nothing."""
    if says_nothing(row):
        return None
    own: Ratio = {"ratio": row["ratio"], "ci95": row["ci95"]}
    ratio: Ratio | None = own if unit == told_unit(row) else row["units"].get(unit)
    return None if ratio is None or ratio["ratio"] is None else ratio


def ratio_text(row: SavingsRow, unit: Unit = "samples") -> str:
    """A saving in one unit: `>` marks a lower bound, `<` an upper one."""
    ratio = ratio_in(row, unit)
    return "-" if ratio is None else _bound(ratio["ratio"], is_lower=row["censored"], is_upper=row["floor"])


def average_text(row: AverageRow, unit: Unit = "samples") -> str:
    """A mean of ratios in samples, policy tokens or seconds, marked like them where it rests on bounds."""
    means: dict[Unit, float | None] = {"policy_tokens": row["token_ratio"], "seconds": row.get("seconds_ratio")}
    ratio = (means | {told_unit(row): row["ratio"]}).get(unit)
    return "-" if ratio is None else _bound(ratio, is_lower=bool(row["num_censored"]), is_upper=bool(row["num_floor"]))


def _bound(ratio: float, *, is_lower: bool, is_upper: bool) -> str:
    sign = "<> " if is_lower and is_upper else "> " if is_lower else "< " if is_upper else ""
    return f"{sign}{ratio:.2f}x"


def interval_text(row: SavingsRow, unit: Unit = "samples") -> str:
    """A saving's interval; `>` and `<` mark ends that are bounds: resamples were censored, or at one sample already."""
    ratio = ratio_in(row, unit)
    ci95 = None if ratio is None else ratio["ci95"]
    if ci95 is None or not _is_known(ci95):
        return "-"
    low, high = ("<" if row["ci_floor"] else ""), (">" if row["ci_censored"] else "")
    return f"[{low}{ci95[0]:.2f}, {high}{ci95[1]:.2f}]"


def _is_known(ci95: IntervalRow | None) -> bool:
    """Whether an interval has both ends."""
    return ci95 is not None and None not in ci95


def judged_savings(savings: Sequence[SavingsRow]) -> list[SavingsRow]:
    """The rows by gold, and those by proxy of criteria that have no gold."""
    judged = {row["criterion"] for row in savings if row["metric"] == "gold"}
    return [row for row in savings if row["metric"] == "gold" or row["criterion"] not in judged]


def quality_values(row: QualityRow) -> tuple[str, list[float | None]]:
    """By what a policy's means are told, gold or proxy: of one sample and the sampler, then both of the worst 5 %."""
    if row["without"] is None and row["with"] is None:
        return "proxy", [row["proxy_without"], row["proxy_with"], None, None]
    return "gold", [row["without"], row["with"], row["worst_without"], row["worst_with"]]


def note(row: SavingsRow) -> str:
    """What a reader must know about a savings row."""
    notes = []
    if why := says_nothing(row):
        return f"not counted: {why}"
    if row["counts"] is False:
        notes.append(f"not counted: {why_not_counted(row)}")
    elif row["hacked"]:
        notes.append(f"the reference's {FALLS} at larger budgets")
    if row["censored"]:
        notes.append(f"censored {row['num_censored']}/{row['num_seeds']}")
    if row["floor"]:
        notes.append(f"{'the cheapest point of its dial' if by_dial(row) else 'one reference sample'} is enough")
    return "; ".join(notes)


def says_nothing(row: SavingsRow) -> str:
    """Why a ratio says nothing at all; empty for one that says something."""
    return CHANCE if row.get("constant_proxy") else ALIKE if row.get("constant_gold") else ""


def why_not_counted(row: SavingsRow) -> str:
    """Why a row that does not count does not."""
    return says_nothing(row) or f"the reference never gets there, and its {FALLS} (hacking)"


def by_dial(row: SavingsRow) -> bool:
    """Whether a row's reference stands by the points of a dial, and not by numbers of samples."""
    return row.get("reference_method", "bon") not in AT_EVERY_BUDGET


def reference_text(row: SavingsRow | AverageRow) -> str:
    """A row's reference, with the method that it stands by where that is told apart from the row's."""
    other = row.get("reference_method")
    return row["reference"] if other is None else f"{row['reference']} by {method_title(other)}"


def equal_budget_note(row: EqualBudgetRow) -> str:
    """What a reader must know about a row of equal budget."""
    notes = [ENDS[row["clipped"]]] if row["clipped"] in ENDS else []
    if row["reference_method"] not in (None, row["method"]):
        notes.append(f"the reference by {method_title(row['reference_method'])}")
    return "; ".join(notes)


def title(policy: str) -> str:
    """A reference as a sentence names it."""
    return TITLES.get(policy, policy)


def method_title(method: str) -> str:
    """A method as a reader knows it."""
    return METHODS.get(method, method)


def point_names(summary: Summary) -> dict[str, str]:
    """Methods that are points of a dial, by their short names: `cards(quantile=0.5)` is `cards at 0.5`."""
    return {row["method"]: f"{row['dial']} at {row['value']}" for row in summary["curves"] if "dial" in row}


def label(method: str, budget: float | None) -> str:
    """A method with its number of samples."""
    if budget is None:
        return method
    if method == "bon":
        return f"Best-of-{number(budget)}"
    return f"{method_title(method)} at {number(budget)} sample{'' if budget == 1 else 's'}"


def first_method(summary: Summary) -> str:
    """The method of the headline: the first that has averages, or else the first of all."""
    methods = summary["methods"] or ["bon"]
    averaged = {row["method"] for row in summary["averages"] if "reference_method" not in row}
    return next((method for method in methods if method in averaged), methods[0])


def num_seeds(summary: Summary) -> int:
    """Evaluations that a summary holds together; of older files told from their rows."""
    return summary.get("num_seeds") or max(
        [row["num_seeds"] or 1 for row in (*summary["savings"], *summary["differences"])], default=1
    )


def too_few_prompts(summary: Summary) -> str:
    """Why nothing is concluded from a summary of less than `MIN_PROMPTS` prompts a seed; empty for one with enough."""
    return too_few(num_prompts(summary), MIN_PROMPTS)


def num_asked(summary: Summary) -> int | None:
    """Prompts of each seed, each as often as it is asked."""
    return None if summary["num_prompts"] is None else summary["num_prompts"] // num_seeds(summary)


def num_prompts(summary: Summary) -> int | None:
    """Different prompts of each seed; where all seeds answered the same ones, the summary counts these once."""
    count = summary.get("num_distinct_prompts")
    if count is None:
        return num_asked(summary)
    return count if summary.get("prompts_digest") else count // num_seeds(summary)


def too_few(count: int | None, least: int) -> str:
    """That so many prompts are too few for something; empty where they are not, or not known."""
    if count is None or count >= least:
        return ""
    return f"{count} prompt{' is' if count == 1 else 's are'} too few, at least {least} are needed"
