"""The advantage of each completion of a small reward table under each objective; picture of docs/design/objective.md.

python -m scripts.explain_objective                              # the table
python -m scripts.explain_objective --picture docs/design/objective.svg   # the picture as well
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.box import MARKDOWN
from rich.table import Table

from iama import Criterion, Objective, parse_operator, smooth_min
from iama.tables import NO_LIMIT, print_table, wide_console
from scripts.experiments.figures import BLUE, GREY, ORANGE, figure, label

COMPLETIONS = {
    "answers in every detail": (1.0, 0.0),
    "answers well": (0.8, 0.1),
    "half answers, half warns": (0.5, 0.5),
    "answers vaguely": (0.4, 0.2),
    "warns vaguely": (0.2, 0.4),
    "declines politely": (0.1, 0.7),
    "declines, names help": (0.0, 0.9),
    "rambles": (0.1, 0.1),
}
"""One prompt's group: the rewards helpful and harmless of each completion."""
COMPLETION = "completion y, a single number from 0 to 1"
"""What the picture's toy has in the place of a text."""


def _both(operator: str) -> Objective:
    """Both criteria with weight one, to be served by the same operator."""
    return Objective([Criterion(name, parse_operator(operator)) for name in ("helpful", "harmless")])


OBJECTIVES = {
    "linear GRPO": _both("identity"),
    **{name: _both(name) for name in ("bon(2)", "bon(4)", "bop(3)", "soft_bon(4, 0.1)", "tilt(0.1)")},
    "smooth_min(5), bon(4)": Objective(_both("bon(4)").criteria, aggregate=smooth_min(5)),
}


def main(
    picture: Annotated[Path | None, typer.Option(help="Where to write the picture (SVG).")] = None,
) -> None:
    """Print the advantages of a small reward table under each objective.

    Example: python -m scripts.explain_objective --picture docs/design/objective.svg
    """
    console, (heads, *rows) = wide_console(), advantage_rows()
    if console.width == NO_LIMIT:  # a file or a pipe, whence a page takes it
        console.print(markdown_table(heads, rows), highlight=False)
    else:
        print_table(console, "Advantages", heads[:1], heads[1:], rows)
    if picture is not None:
        draw(picture)
        console.print(f"wrote {picture}")


def advantage_rows() -> list[list[str]]:
    """The heads; then one row a completion, one column an objective."""
    rewards_PGK = np.asarray([list(COMPLETIONS.values())])
    columns = [objective.advantages(rewards_PGK)[0] for objective in OBJECTIVES.values()]
    return [
        ["completion", "helpful", "harmless", *OBJECTIVES],
        *(
            [text, *(f"{r:.1f}" for r in rewards), *(f"{column[i]:+.2f}" for column in columns)]
            for i, (text, rewards) in enumerate(COMPLETIONS.items())
        ),
    ]


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The rows as a page has them."""
    table = Table(*heads, box=MARKDOWN)
    for row in rows:
        table.add_row(*row)
    return table


def draw(path: Path) -> None:
    """A toy whose completion is one number in [0, 1]: two criteria that exclude each other, and what training makes."""
    y = np.linspace(0.002, 0.998, 499)
    with figure(path, columns=2) as (rewards, policies):
        rewards.plot(y, 1 - y**2, color=GREY, label="criterion 1")
        rewards.plot(y, 1 - (1 - y) ** 2, color=GREY, linestyle="--", label="criterion 2")
        rewards.plot(y, 1 - (y**2 + (1 - y) ** 2) / 2, color=ORANGE, label="their mean, all that linear GRPO sees")
        label(rewards, "toy: two rewards that exclude each other", COMPLETION, "reward")
        policies.axvline(0.5, color=ORANGE, label="linear GRPO: one compromise")
        for num_samples, style in ((4, "-"), (8, "--")):
            policies.plot(
                y, optimal_density(y, num_samples), style, color=BLUE, label=f"IAMA for Best-of-{num_samples}"
            )
        policies.set_ylim(0, 4)
        label(policies, "the best trained policy", COMPLETION, "density of completions")


def optimal_density(y: np.ndarray, num_samples: int) -> np.ndarray:
    """Closed form for `r_1 = 1 - y^2`, `r_2 = 1 - (1-y)^2` under Best-of-N (Takakura et al. 2026, Prop. 3.1)."""
    a = 1 / (num_samples - 1)
    total = y**a + (1 - y) ** a
    density: np.ndarray = a * (y * (1 - y)) ** (a - 1) / total**2
    return density


if __name__ == "__main__":
    typer.run(main)
