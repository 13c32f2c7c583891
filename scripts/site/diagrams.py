"""The pictures of docs/methods: answers as rows of tokens, what is kept of them, and what the reward says.

python -m scripts.site.diagrams               # writes docs/methods/*.svg
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

OUT = Path("docs/methods")
CELL, ROW, LEFT, TOP = 15, 26, 150, 34
FILL = {
    "prompt": "#bdbdbd",
    "kept": "#0072b2",
    "dropped": "#c5dcec",
    "nudge": "#d55e00",
    "new": "#009e73",
    "absent": "none",
}
"""Colours that the colour-blind can tell apart (Okabe and Ito); what was not drawn has an outline alone."""


class Row(NamedTuple):
    """A line of a picture: its words, what stands behind its tokens, and these as kinds with numbers, side by side."""

    label: str
    verdict: str
    cells: tuple[tuple[str, int], ...]


def _row(label: str, verdict: str, *cells: tuple[str, int]) -> Row:
    return Row(label, verdict, (("prompt", 4), *cells))


PICTURES: dict[str, tuple[str, list[Row]]] = {
    "bon": (
        "Best-of-4: four whole answers, one prompt; the reward keeps the best",
        [
            _row("answer 1", "reward 0.2", ("dropped", 12)),
            _row("answer 2", "reward 0.9: kept", ("kept", 15)),
            _row("answer 3", "reward 0.4", ("dropped", 10)),
            _row("answer 4", "reward 0.6", ("dropped", 14)),
        ],
    ),
    "bop": (
        "Best-of-Poisson: chance says how many answers; the reward keeps the best",
        [
            _row("query A, 2 drawn", "reward 0.3", ("dropped", 12)),
            _row("", "reward 0.7: kept", ("kept", 14)),
            _row("query B, 1 drawn", "reward 0.5: kept", ("kept", 10)),
            _row("query C, 3 drawn", "reward 0.1", ("dropped", 13)),
            _row("", "reward 0.8: kept", ("kept", 11)),
            _row("", "reward 0.6", ("dropped", 15)),
        ],
    ),
    "soft_bon": (
        "soft_bon(4, 0.3): the better an answer, the likelier it is kept",
        [
            _row("answer 1", "reward 0.2: chance 0.05", ("dropped", 12)),
            _row("answer 2", "reward 0.9: chance 0.56, kept this time", ("kept", 15)),
            _row("answer 3", "reward 0.4: chance 0.11", ("dropped", 10)),
            _row("answer 4", "reward 0.7: chance 0.28", ("dropped", 14)),
        ],
    ),
    "itp": (
        "itp(n, beta): answers that stand out are accepted by chance; the first one is kept",
        [
            _row("n draws find lam", "rewards in [0, 1]", ("dropped", 12)),
            _row("draw 1 of n more", "below lam: chance 0", ("dropped", 14)),
            _row("draw 2", "a little above: chance 0.2, not accepted", ("dropped", 10)),
            _row("draw 3", "far above: chance 0.9, accepted", ("kept", 13)),
            _row("draw 4", "comes too late", ("dropped", 15)),
        ],
    ),
    "mbr": (
        "mbr(4, weight): a good answer that others resemble",
        [
            _row("answer 1", "reward 0.9, like the others 0.1", ("dropped", 12)),
            _row("answer 2", "reward 0.8, like the others 0.6: kept", ("kept", 13)),
            _row("answer 3", "reward 0.5, like the others 0.6", ("dropped", 13)),
            _row("answer 4", "reward 0.4, like the others 0.5", ("dropped", 14)),
        ],
    ),
    "stopping": (
        "bon(5, stop=...): answers are drawn until the best is good enough",
        [
            _row("draw 1", "reward 0.3: go on", ("dropped", 12)),
            _row("draw 2", "reward 0.5: go on", ("dropped", 14)),
            _row("draw 3", "reward 0.9: above the level, stop", ("kept", 11)),
            _row("draw 4", "never drawn", ("absent", 13)),
            _row("draw 5", "never drawn", ("absent", 13)),
        ],
    ),
    "cards": (
        "CARDS: a segment is proposed again until the reward accepts what stands so far",
        [
            _row("segment 1", "reward below the threshold: rejected", ("dropped", 5)),
            _row("", "accepted; it ends where the policy is unsure", ("kept", 6)),
            _row("segment 2", "accepted at once", ("kept", 6), ("kept", 4)),
            _row("segment 3", "rejected", ("kept", 10), ("dropped", 5)),
            _row("", "accepted; the threshold has risen to the target", ("kept", 10), ("kept", 4)),
        ],
    ),
    "args": (
        "ARGS: at every token the likeliest candidates are scored; logit and reward choose",
        [
            _row("token 1", "logit 2.1 + weight x reward 0.1", ("dropped", 1)),
            _row("", "logit 1.9 + weight x reward 0.6: kept", ("kept", 1)),
            _row("token 2", "logit 3.0 + weight x reward 0.5: kept", ("kept", 1), ("kept", 1)),
            _row("", "logit 1.2 + weight x reward 0.7", ("kept", 1), ("dropped", 1)),
            _row("token 3", "and so on, a reward's step for each token", ("kept", 2), ("kept", 1)),
        ],
    ),
    "tilted_tokens": (
        "tilted_tokens(lam): every token is drawn from the policy, tilted by what a head foretells",
        [
            _row("token 1", "policy 0.6, head -0.2: drawn with 0.4", ("dropped", 1)),
            _row("", "policy 0.4, head +0.3: drawn with 0.6, and drawn", ("kept", 1)),
            _row("token 2", "policy 0.9, head 0.0: drawn with 0.9, and drawn", ("kept", 1), ("kept", 1)),
            _row("token 3", "and so on; the head costs a product, not a pass", ("kept", 2), ("kept", 1)),
            _row("answer", "scored once, when it is done", ("kept", 13)),
        ],
    ),
    "ggro": (
        "GGRO: a segment begins with another token, which the reward's gradient proposes",
        [
            _row("as it decodes", "reward 0.4; its gradient names a token", ("dropped", 6)),
            _row("first nudge", "reward 0.5; names the next one", ("nudge", 1), ("dropped", 5)),
            _row("second nudge", "reward 0.7: the best, kept", ("nudge", 1), ("kept", 6)),
            _row("next segment", "...", ("nudge", 1), ("kept", 6), ("nudge", 1), ("dropped", 4)),
        ],
    ),
    "blockwise": (
        "blockwise(3): of three continuations to the end of a sentence the best goes on",
        [
            _row("sentence 1", "reward 0.3", ("dropped", 6)),
            _row("", "reward 0.6: goes on", ("kept", 5)),
            _row("", "reward 0.4", ("dropped", 7)),
            _row("sentence 2", "reward 0.5", ("kept", 5), ("dropped", 5)),
            _row("", "reward 0.7", ("kept", 5), ("dropped", 6)),
            _row("", "reward 0.8: goes on", ("kept", 5), ("kept", 4)),
        ],
    ),
    "redraw": (
        "redraw(2, 2, 1): the best answer is drawn anew from a place where it might have gone otherwise",
        [
            _row("answer 1", "reward 0.4", ("dropped", 12)),
            _row("answer 2", "reward 0.6: the best of the first ones", ("kept", 14)),
            _row("round 1", "reward 0.5: not better", ("kept", 8), ("nudge", 1), ("dropped", 4)),
            _row("round 2", "reward 0.8: takes its place", ("kept", 3), ("nudge", 1), ("new", 8)),
        ],
    ),
    "sea": (
        "SEA: all tokens of an answer may change at each step along the gradient",
        [
            _row("a sample", "log-probability and reward of the text", ("kept", 14)),
            _row("step 1", "one token has changed", ("kept", 5), ("nudge", 1), ("kept", 8)),
            _row("step 2", "two have", ("kept", 2), ("nudge", 1), ("kept", 2), ("nudge", 1), ("kept", 8)),
            _row(
                "step 3",
                "each chain's best text is kept",
                ("kept", 2),
                ("nudge", 2),
                ("kept", 1),
                ("nudge", 2),
                ("kept", 7),
            ),
        ],
    ),
}


def _attributes(values: Mapping[str, object]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in values.items())


def _box(**values: object) -> str:
    return f"<rect{_attributes(values)}/>"


def _label(words: str, **values: object) -> str:
    return f"<text{_attributes(values)}>{words}</text>"


def _pattern(kind: str) -> str:
    """A token: cells of one kind lie side by side as a pattern."""
    dashes = {"stroke_dasharray": "3 2"} if kind == "absent" else {}
    cell = _box(x=0.5, y=0.5, width=12, height=14, fill=FILL[kind], stroke="#666", **dashes)
    size = _attributes({"y": TOP + 4, "width": CELL, "height": ROW, "patternUnits": "userSpaceOnUse"})
    return f'<pattern id="{kind}"{size}>{cell}</pattern>'


def _line(row: Row, y: int) -> list[str]:
    """A row, whose upper edge is at `y`."""
    x, cells = LEFT, []
    for kind, number in row.cells:
        cells.append(_box(x=x, y=y + 4, width=CELL * number, height=15, fill=f"url(#{kind})"))
        x += CELL * number
    return [_label(row.label, x=12, y=y + 16), *cells, _label(row.verdict, x=x + 10, y=y + 16, fill="#333")]


def draw(title: str, rows: list[Row]) -> str:
    """The picture as SVG, on a white ground so that a dark page can show it."""
    height = TOP + ROW * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="sans-serif" font-size="14">',
        _box(width=860, height=height, rx=6, fill="#fff"),
        *(_pattern(kind) for kind in dict.fromkeys(kind for row in rows for kind, _ in row.cells)),
        _label(title, x=12, y=22, font_weight="bold"),
        *(part for number, row in enumerate(rows) for part in _line(row, TOP + ROW * number)),
    ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write all pictures."""
    for name, (title, rows) in PICTURES.items():
        (OUT / f"{name}.svg").write_text(draw(title, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
