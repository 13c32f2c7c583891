"""The page and the plots of the estimator study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.experiments.figures import BLUE, GREEN, ORANGE, PURPLE, figure, label
from scripts.experiments.pages import Claim, claims_table, table, write_page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from scripts.experiments.estimator_study import Cell, Normaliser

NAMES = {"loo": "LOO", "loo1": "LOO-1", "plugin": "plug-in, centred", "grpo": "plain GRPO"}
COLOURS = {"loo": BLUE, "loo1": GREEN, "plugin": PURPLE, "grpo": ORANGE}

EARLIER_NOISE: dict[tuple[int, int], dict[str, float]] = {
    (2, 4): {"loo": 3.6, "loo1": 4.5, "plugin": 2.4, "grpo": 3.0},
    (2, 8): {"loo": 2.2, "loo1": 3.0, "plugin": 1.8, "grpo": 2.0},
    (2, 16): {"loo": 1.5, "loo1": 2.1, "plugin": 1.4, "grpo": 1.3},
    (4, 5): {"loo": 4.0, "loo1": 3.95, "plugin": 2.0, "grpo": 2.6},
    (4, 8): {"loo": 2.67, "loo1": 2.85, "plugin": 1.84, "grpo": 1.92},
    (4, 16): {"loo": 1.70, "loo1": 1.89, "plugin": 1.43, "grpo": 1.31},
    (4, 64): {"loo": 0.80, "loo1": 0.91, "plugin": 0.77, "grpo": 0.64},
    (8, 8): {"loo1": 3.62, "plugin": 1.57, "grpo": 1.82},
    (8, 16): {"loo": 2.07, "loo1": 2.10, "plugin": 1.43, "grpo": 1.25},
    (8, 64): {"loo": 0.92, "loo1": 0.96, "plugin": 0.84, "grpo": 0.61},
}
EARLIER_BIAS: dict[tuple[int, int], dict[str, float]] = {
    (2, 4): {"plugin": 0.31, "grpo": 0.33},
    (2, 8): {"plugin": 0.16},
    (2, 16): {"plugin": 0.08},
    (4, 5): {"plugin": 0.41, "grpo": 0.59},
    (4, 8): {"plugin": 0.27, "grpo": 0.60},
    (4, 16): {"plugin": 0.15},
    (4, 64): {"plugin": 0.03},
    (8, 8): {"plugin": 0.50, "grpo": 0.81},
    (8, 16): {"plugin": 0.29},
    (8, 64): {"plugin": 0.08},
}
"""An earlier study with a single policy, whose draw is not known; rounded to two digits."""

MAX_ERROR = 1.5

READING = """At N = 4 and G = 8, normal rewards, the paper's plug-in has {share:.2f} times the noise of LOO, but most of
that is shrinkage: its expected gradient is {scale:.2f} times as long as the true one (cosine {cosine:.3f}), and
measured against its own length its noise is {own:.2f} to LOO's {loo:.2f}. Plain GRPO is quieter still in large
groups, where noise matters least, and its bias stays. With binary rewards the gradients of one prompt are parallel
for all N: plain GRPO is the quietest there, and what it gets wrong is the length alone, which weighs prompts against
each other.
"""

INTRO = """One prompt, a softmax policy over 64 atoms, Best-of-N on a reward: `loo`, `loo1` and `plugin` are the
library's estimators (`iama.objective.estimators.advantages`), *plain GRPO* the leave-one-out advantage of the reward itself,
which knows no N. **Noise** is the standard deviation of the gradient from one group over the length of the true
gradient, **bias** the distance of its expectation from the true gradient over the same; biases are computed exactly,
noise from {groups} groups for each of {tables} policies (logits and rewards drawn anew); figures are means over
policies, with the range in brackets. Three reward laws: normal, heavy-tailed (Student, 3 degrees of freedom), and
binary with 20 % ones.
"""

NORMALISER = """## A U-statistic behind a mean/std normaliser

The U-statistic of the first variation is unbiased, but it is not an advantage. Given to a trainer as a reward, its
group mean is subtracted, which leaves (1 - N/G) of the gradient: {half:.2f} of LOO at G = 2N, and at G = N every
completion of a group gets the same number (largest centred value {full:.0e}), so that nothing is ever learned. And a
division by the group's standard deviation turns Best-of-N training on binary rewards into plain GRPO: the two
standardised advantages differ by at most {binary:.0e} over groups with 1 to 11 ones of 16.
"""

TILT = """## The tilt

A tilt has no unbiased estimator; the library takes soft Best-of-N at n = G, whose gradient differs from the tilt's by
this much (exact; rewards `-((length - target) / 256)^2`, uniform lengths 1 to 256, temperature 0.1):
"""


def write(
    folder: Path,
    cells: Sequence[Cell],
    normaliser: Normaliser,
    tilt: Mapping[int, Sequence[float]],
    sizes: Sequence[int],
) -> None:
    """`estimators.md` and its SVG; `tilt` has the bias at each of `sizes` for each target length."""
    plot(folder / "estimators.svg", [c for c in cells if c.law == "normal"])
    parts = [
        INTRO.format(groups=cells[0].num_groups, tables=cells[0].noise_T.size),
        claims_table(claims(cells, normaliser)),
        _reading(cells),
        "![Noise and bias against group size, normal rewards](estimators.svg)",
        *(f"## {law.capitalize()} rewards\n\n{_law_table(cells, law)}" for law in dict.fromkeys(c.law for c in cells)),
        NORMALISER.format(half=normaliser.half_group, full=normaliser.full_group, binary=normaliser.binary),
        TILT + "\n" + _tilt_table(tilt, sizes),
    ]
    write_page(folder / "estimators.md", "Estimators", "python -m scripts.experiments.estimator_study", parts)


def claims(cells: Sequence[Cell], normaliser: Normaliser) -> list[Claim]:
    """What was expected, and what came out."""
    constant = max(np.ptp([_mean(c.bias_T) for c in cells if (c.method, c.law, c.n) == key]) for key in _plain(cells))
    return [
        _mean_claim(cells, ("loo", "loo1"), "LOO and LOO-1 are unbiased"),
        _mean_claim(cells, ("plugin", "grpo"), "the plug-in ascends the mixture of smaller N, plain GRPO N = 1"),
        _choice_claim(cells),
        _earlier_claim(cells, "noise"),
        _earlier_claim(cells, "bias"),
        Claim(
            "plain GRPO's bias does not fall with G",
            "the same at every G",
            f"differs by at most {constant:.0e}",
            bool(constant < 1e-9),
        ),
        Claim(
            "a U-statistic centred by its group mean learns nothing at G = N",
            "0 at G = N, half at G = 2N",
            f"{normaliser.full_group:.0e}, {normaliser.half_group:.2f}",
            normaliser.full_group < 1e-12 and abs(normaliser.half_group - 0.5) < 1e-9,
        ),
    ]


def _plain(cells: Sequence[Cell]) -> set[tuple[str, str, int]]:
    return {(c.method, c.law, c.n) for c in cells if c.method == "grpo"}


def _mean_claim(cells: Sequence[Cell], methods: Sequence[str], text: str) -> Claim:
    errors = [float(np.sqrt(np.mean(c.error_T**2))) for c in cells if c.method in methods]
    bar = f"sampled mean within {MAX_ERROR:g} standard errors (root mean square over policies; 1 is expected)"
    return Claim(
        text, bar, f"{min(errors):.2f} to {max(errors):.2f} over {len(errors)} cells", max(errors) <= MAX_ERROR
    )


def _choice_claim(cells: Sequence[Cell]) -> Claim:
    """Whether `auto`, LOO where G >= 2N, takes the quieter of the two."""
    noise = {(c.law, c.n, c.size, c.method): _mean(c.noise_T) for c in cells}
    excess = {}
    for law, n, size, method in noise:
        if method == "loo":
            both = noise[law, n, size, "loo"], noise[law, n, size, "loo1"]
            excess[law, n, size] = (both[0] if size >= 2 * n else both[1]) / min(both) - 1
    quieter = sum(e == 0.0 for e in excess.values())
    law, n, size = worst = max(excess, key=lambda key: excess[key])
    measured = f"{quieter} of {len(excess)}; worst {excess[worst]:+.1%} (N = {n}, G = {size}, {law})"
    return Claim("`auto` takes the quieter of LOO and LOO-1", "in every cell", measured, quieter == len(excess))


def _earlier_claim(cells: Sequence[Cell], what: str) -> Claim:
    """Whether the figures of the earlier study lie in the range over policies."""
    earlier = EARLIER_NOISE if what == "noise" else EARLIER_BIAS
    inside, ratios = 0, []
    for cell in cells:
        if cell.law == "normal" and cell.method in earlier.get((cell.n, cell.size), {}):
            figure_T = cell.noise_T if what == "noise" else cell.bias_T
            known = earlier[cell.n, cell.size][cell.method]
            inside += bool(figure_T.min() - 0.005 <= known <= figure_T.max() + 0.005)
            ratios.append(_mean(figure_T) / known)
    measured = f"{inside} of {len(ratios)}; mean over policies {min(ratios):.2f} to {max(ratios):.2f} times it"
    text = f"the {what} of an earlier study (one policy, normal rewards) is reproduced"
    return Claim(text, "each figure in the range over policies", measured, inside == len(ratios))


def _reading(cells: Sequence[Cell]) -> str:
    """What the small noise of the plug-in is worth."""
    found = {c.method: c for c in cells if (c.law, c.n, c.size) == ("normal", 4, 8)}
    loo, plugin = _mean(found["loo"].noise_T), found["plugin"]
    own, scale = _mean(plugin.noise_T / plugin.scale_T), _mean(plugin.scale_T)
    share, cosine = _mean(plugin.noise_T) / loo, _mean(plugin.cosine_T)
    return READING.format(share=share, scale=scale, cosine=cosine, own=own, loo=loo)


def _law_table(cells: Sequence[Cell], law: str) -> str:
    rows: dict[tuple[int, int], dict[str, Cell]] = {}
    for cell in cells:
        if cell.law == law:
            rows.setdefault((cell.n, cell.size), {})[cell.method] = cell
    header = ["N", "G", *(f"{name}: noise" for name in NAMES.values()), "plug-in: bias", "plain GRPO: bias (cosine)"]
    lines = []
    for (n, size), row in rows.items():
        noise = [_spread(row[m].noise_T) if m in row else "undefined" for m in NAMES]
        plain = f"{_mean(row['grpo'].bias_T):.2f} ({_mean(row['grpo'].cosine_T):.2f})"
        lines.append([str(n), str(size), *noise, f"{_mean(row['plugin'].bias_T):.2f}", plain])
    return table(header, lines)


def _tilt_table(tilt: Mapping[int, Sequence[float]], sizes: Sequence[int]) -> str:
    header = ["target length", *(f"G = {size}" for size in sizes)]
    return table(header, [[str(target), *(f"{100 * b:.0f} %" for b in row)] for target, row in tilt.items()])


def _mean(values_T: object) -> float:
    return float(np.mean(np.asarray(values_T)))


def _spread(values_T: object) -> str:
    values = np.asarray(values_T)
    return f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"


def plot(path: Path, cells: Sequence[Cell]) -> None:
    """Noise in the first row, bias in the second, a column a budget."""
    budgets = sorted({c.n for c in cells})
    with figure(path, len(budgets), 2, size=(3.4, 2.8)) as axes:
        for column, n in enumerate(budgets):
            top, bottom = axes[column], axes[len(budgets) + column]
            for method, name in NAMES.items():
                chosen = [c for c in cells if (c.n, c.method) == (n, method)]
                sizes = [c.size for c in chosen]
                style: dict[str, Any] = {"color": COLOURS[method], "marker": "o", "label": name}
                top.plot(sizes, [_mean(c.noise_T) for c in chosen], **style)
                bottom.plot(sizes, [_mean(c.bias_T) for c in chosen], **style)
            for axis in (top, bottom):
                axis.set_xscale("log", base=2)
                ticks = sorted({c.size for c in cells if c.n == n})
                axis.set_xticks(ticks, [str(tick) for tick in ticks])
                axis.minorticks_off()
            top.set_yscale("log", base=2)
            top.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
            label(top, f"N = {n}: noise", "group size G", "std / |gradient|", legend=False)
            label(bottom, f"N = {n}: bias", "group size G", "|bias| / |gradient|", legend=False)
        shown, names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(shown, names, loc="outside upper center", ncols=len(names))
