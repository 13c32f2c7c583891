"""Which of TRL's options bend the objective: the expected gradient of a step against that of `R[pi]`, counted out.

    python -m scripts.experiments.direction

Writes docs/results/direction.md and its data. Every option of `trainers/options.py` is measured on `direction_toy`,
through TRL's own loss, masks and weights, under three operators and three rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from iama.arrays import Floats
from iama.objective.operators import Operator, bon, identity, soft_bon, tilt
from scripts.experiments import figures, frame
from scripts.experiments.direction_toy import (
    COMPLETIONS,
    EIGHTHS,
    GROUP,
    Case,
    Counted,
    Unchecked,
    at_distance,
    kl_gradient,
    law,
    sampler_logits,
    true_gradient,
)
from scripts.experiments.frame import Claim
from trainers.options import OPTIONS, Option, Setting

OPERATORS = (identity(), bon(2), bon(4))
SOFT = (soft_bon(2, 0.3), tilt(0.3))
REWARDS = (
    np.array([0.2, 0.9, 0.0, 0.6, 1.0, 0.3]),
    np.array([0.0, 0.2, 0.3, 0.5, 0.8, 1.0]),
    np.array([1.0, 0.7, 0.6, 0.4, 0.2, 0.0]),
)
"""Of each completion: one that has little to do with its length, one that likes it long, one that likes it short."""
BAR = 0.99
"""Cosine below which an option is refused or warned of."""
LATER, ENGINE = 0.05, 0.1
"""KL in nats a completion: that an earlier update moved the policy by, and between the sampler and the policy."""
MEAN_TOKENS = sum(weight / 8 * len(y) for weight, y in zip(EIGHTHS, COMPLETIONS, strict=True))


@dataclass(frozen=True)
class Measured:
    """Of one option under one operator: the lowest cosine over the rewards, and the range of the length ratio.

    The ratio is 1 for a gradient of `R[pi]` that is divided by the mean number of tokens, as TRL's default is.
    """

    cosine: float
    lengths: tuple[float, float]


class OnScoreAlone(Unchecked):
    """The trainer without ratios inside the operators: what TRL's correction does by itself."""

    def _ratios(self, *_: Any) -> Floats | None:
        return None


class KeepsRanks(Unchecked):
    """The trainer whose masked completions stay in their group: what TRL's mask does by itself."""

    def _without_masked(self, _output: dict[str, Any], rewards_PGK: Floats) -> Floats:
        return rewards_PGK


def main() -> None:
    """Measure all options, write the page.

    Example: python -m scripts.experiments.direction
    """
    torch.set_num_threads(1)
    options = {option: measure(option) for option in frame.track(OPTIONS, len(OPTIONS), "options", "rows")}
    write(frame.PAGES, options)


@cache
def trained_policy(setting: Setting) -> torch.Tensor:
    """Logits of the policy that TRL differentiates; `sampler_logits` draw the groups."""
    start = sampler_logits()
    if setting == "later":
        return at_distance(true_gradient(start, bon(2), REWARDS[0]), LATER)
    if setting == "sampler":
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return at_distance(noise, ENGINE)
    return start


def measure(
    option: Option,
    operators: Sequence[Operator] = OPERATORS,
    *,
    finished_only: bool | None = None,
    size: int = GROUP,
    trainer_class: Any = Unchecked,
) -> list[Measured]:
    """One option under each operator, in groups of `size`; masked completions are judged given that a policy ends."""
    if finished_only is None:
        finished_only = bool(option.example.get("mask_truncated_completions"))
    logits = trained_policy(option.setting)
    case = Case(option.example, logits, is_engine=option.setting == "sampler", size=size)
    measured = []
    for operator in operators:
        pairs = []
        for rewards_Y in REWARDS:
            counted = Counted(case, operator, rewards_Y, trainer_class)
            few = {"group": size, "one": 1}.get(option.rows)
            found = counted.gradient() if few is None else counted.gradient_of_few(few)
            pairs.append((found, true_gradient(logits, operator, rewards_Y, finished_only=finished_only)))
        measured.append(compare(pairs))
    return measured


def compare(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Measured:
    """Gradients that were found against those that are right."""
    pairs = list(pairs)
    lengths = [float(found.norm() / right.norm()) * MEAN_TOKENS for found, right in pairs]
    return Measured(min(cosine(*pair) for pair in pairs), (min(lengths), max(lengths)))


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of the angle between two gradients."""
    return float((left * right).sum() / (left.norm() * right.norm()))


def measure_soft(operator: Operator) -> list[Measured]:
    """A soft operator whose groups are the policy's own, then those of another engine."""
    settings: tuple[Setting, ...] = ("same", "sampler")
    return [measure(Option({}, setting, "keeps"), [operator])[0] for setting in settings]


def kl_penalty() -> dict[str, float]:
    """Cosine of TRL's KL penalty with the KL of whole completions, with and without its bias correction."""
    policy, reference = sampler_logits(), trained_policy("sampler")
    right = -kl_gradient(policy, reference)
    cases = {name: Case({"use_bias_correction_kl": on}, policy) for name, on in (("true", True), ("false", False))}
    return {
        name: cosine(Counted(case, identity(), REWARDS[0]).kl_gradient(reference), right)
        for name, case in cases.items()
    }


def is_right(option: Option, measured: Sequence[Measured]) -> bool:
    """Whether what is done about an option is what its cosines ask for."""
    keeps = min(m.cosine for m in measured) >= BAR
    return keeps == (option.verdict in ("keeps", "unused"))


# The page. ----------------------------------------------------------------------------------------------


GROUPS: Mapping[Setting, str] = {"same": "the policy's own", "later": "after an update", "sampler": "another engine's"}
UNUSED = "not used, with a warning"
DONE = {"keeps": "accepted", "unused": UNUSED, "warned": "warned of", "refused": "refused"}
MARKS = "osD"
COLOURS = {"accepted": figures.BLUE, "warned of": figures.ORANGE, "refused": figures.RED}


def write(folder: Path, options: Mapping[Option, list[Measured]]) -> None:
    """Write the page, its figure and its tables."""
    (mask,) = (option for option in options if "mask_truncated_completions" in option.example)
    larger = Option({**mask.example, "loss_type": "dr_grpo"}, "same", "warned", rows="group")  # exact group by group
    alone = measure(Option({}, "sampler", "keeps"), trainer_class=OnScoreAlone)
    settings: tuple[Setting, ...] = ("same", "later", "sampler")
    ratios = {name: law(trained_policy(name)) / law(sampler_logits()) for name in settings}
    tables = {
        "parts": frame.parts_table(claims(options, alone)),
        "options": _table(
            ["groups", "option"],
            [[GROUPS[o.setting], o.name, *_row(m), DONE[o.verdict]] for o, m in options.items()],
            "what is done",
        ),
        "engine": _table(
            ["ratios stand"],
            [
                ["at the completion's own score", *_row(alone)],
                ["there and in the operator", *_row(options[_default("sampler")])],
            ],
        ),
        "masked": _table(
            ["the policy's value"],
            [
                ["given that it ends", *_row(options[mask])],
                ["given that it ends, groups of six", *_row(measure(larger, size=6))],
                ["the same, were cut ones still ranked", *_row(measure(larger, size=6, trainer_class=KeepsRanks))],
                ["with its cut completions", *_row(measure(mask, finished_only=False))],
            ],
        ),
        "soft": frame.table(
            ["operator", "own groups", "another engine's"],
            [[o.name, *(f"{m.cosine:.4f}" for m in measure_soft(o))] for o in SOFT],
        ),
    }
    plot(folder / "direction.svg", tables["options"])
    values = {
        "counts": counts(tables["options"]),
        "bar": BAR,
        "kl": kl_penalty(),
        "ratios": {name: (float(of.min()), float(of.max())) for name, of in ratios.items()},
        "distances": {"later": LATER, "sampler": ENGINE},
        "mean_tokens": MEAN_TOKENS,
    }
    frame.write_claim(folder, "direction", values, tables)


def counts(options: frame.Table) -> dict[str, int]:
    """How many settings were tried, and what is done about them."""
    done = [row[-1].replace(UNUSED, "accepted") for row in options.rows]
    kept, warned, refused = (done.count(word) for word in ("accepted", "warned of", "refused"))
    return {"total": len(done), "kept": kept, "warned": warned, "refused": refused}


def plot(path: Path, options: frame.Table) -> None:
    """Cosines of the options that are not accepted, one mark an operator; those that are in one row."""
    by_name: dict[str, tuple[str, list[list[float]]]] = {}
    for groups, option, *cells, _, kind in options.rows:
        done = kind.replace(UNUSED, "accepted")
        name = "all that are accepted" if done == "accepted" else f"{option} ({groups})"
        by_name.setdefault(name, (done, []))[1].append([float(cell) for cell in cells])
    with figures.figure(path, size=(6.8, 0.2 * len(by_name) + 1.1)) as (axis,):
        for row, (done, cosines) in enumerate(by_name.values()):
            for place, mark in enumerate(MARKS):
                lowest = min(each[place] for each in cosines)
                axis.plot([lowest], [row], mark, color=COLOURS[done], alpha=0.8)
        for done, colour in COLOURS.items():
            axis.plot([], [], "-", color=colour, lw=3, label=done)
        for operator, mark in zip(OPERATORS, MARKS, strict=True):
            axis.plot([], [], mark, color=figures.GREY, label=operator.name)
        figures.rows(axis, list(by_name), zero=BAR)
        figures.label(axis, "", "cosine with the gradient of R", "", legend=False)
        axis.figure.legend(loc="outside lower center", ncols=6)


def _table(first: Sequence[str], rows: Iterable[Sequence[str]], *last: str) -> frame.Table:
    return frame.table([*first, *(operator.name for operator in OPERATORS), "length", *last], rows)


def _default(setting: Setting) -> Option:
    return next(o for o in OPTIONS if o.setting == setting and not o.example)


def _row(measured: Sequence[Measured]) -> list[str]:
    low, high = min(m.lengths[0] for m in measured), max(m.lengths[1] for m in measured)
    length = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    return [*(f"{m.cosine:.4f}" for m in measured), length]


def claims(options: Mapping[Option, list[Measured]], alone: Sequence[Measured]) -> list[Claim]:
    """What the page says at its top."""
    lowest = {option: min(m.cosine for m in measured) for option, measured in options.items()}
    taken = [c for o, c in lowest.items() if o.verdict in ("keeps", "unused")]
    refused = [c for o, c in lowest.items() if o.verdict == "refused"]
    warned = [c for o, c in lowest.items() if o.verdict == "warned"]
    engine = lowest[_default("sampler")]
    return [
        Claim(
            "options that are taken keep the direction", f"cosine {BAR} or more", f"{min(taken):.4f}", min(taken) >= BAR
        ),
        Claim(
            "options that are refused do not", f"cosine below {BAR}", f"{max(refused):.4f} at most", max(refused) < BAR
        ),
        Claim(
            "nor do those that are warned of", f"cosine below {BAR}", f"{max(warned):.4f} at most", max(warned) < BAR
        ),
        Claim(
            "weights inside the operator correct for another engine",
            "cosine above that of weights on the score alone",
            f"{engine:.4f}, against {min(m.cosine for m in alone):.4f}",
            engine > min(m.cosine for m in alone),
        ),
    ]


if __name__ == "__main__":
    typer.run(main)
