"""The pictures of docs/methods: answers as rows of tokens, what is kept of them, and what the reward says.

python -m scripts.site.diagrams               # writes docs/methods/*.svg
"""

from __future__ import annotations

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
    """A line of a picture: its words, cells as (start, number, kind), and what stands behind them."""

    label: str
    cells: tuple[tuple[int, int, str], ...] = ()
    verdict: str = ""


PROMPT = (0, 4, "prompt")


def _answer(label: str, kind: str, verdict: str, length: int = 14) -> Row:
    return Row(label, (PROMPT, (4, length, kind)), verdict)


PICTURES: dict[str, tuple[str, list[Row]]] = {
    "bon": (
        "Best-of-4: four whole answers, one prompt; the reward keeps the best",
        [
            _answer("answer 1", "dropped", "reward 0.2", 12),
            _answer("answer 2", "kept", "reward 0.9: kept", 15),
            _answer("answer 3", "dropped", "reward 0.4", 10),
            _answer("answer 4", "dropped", "reward 0.6", 14),
        ],
    ),
    "bop": (
        "Best-of-Poisson: chance says how many answers; the reward keeps the best",
        [
            _answer("query A, 2 drawn", "dropped", "reward 0.3", 12),
            _answer("", "kept", "reward 0.7: kept", 14),
            _answer("query B, 1 drawn", "kept", "reward 0.5: kept", 10),
            _answer("query C, 3 drawn", "dropped", "reward 0.1", 13),
            _answer("", "kept", "reward 0.8: kept", 11),
            _answer("", "dropped", "reward 0.6", 15),
        ],
    ),
    "soft_bon": (
        "soft_bon(4, 0.3): the better an answer, the likelier it is kept",
        [
            _answer("answer 1", "dropped", "reward 0.2: chance 0.05", 12),
            _answer("answer 2", "kept", "reward 0.9: chance 0.56, kept this time", 15),
            _answer("answer 3", "dropped", "reward 0.4: chance 0.11", 10),
            _answer("answer 4", "dropped", "reward 0.7: chance 0.28", 14),
        ],
    ),
    "itp": (
        "itp(n, beta): answers that stand out are accepted by chance; the first one is kept",
        [
            _answer("n draws find lam", "dropped", "rewards in [0, 1]", 12),
            _answer("draw 1 of n more", "dropped", "below lam: chance 0", 14),
            _answer("draw 2", "dropped", "a little above: chance 0.2, not accepted", 10),
            _answer("draw 3", "kept", "far above: chance 0.9, accepted", 13),
            _answer("draw 4", "dropped", "comes too late", 15),
        ],
    ),
    "mbr": (
        "mbr(4, weight): a good answer that others resemble",
        [
            _answer("answer 1", "dropped", "reward 0.9, like the others 0.1", 12),
            _answer("answer 2", "kept", "reward 0.8, like the others 0.6: kept", 13),
            _answer("answer 3", "dropped", "reward 0.5, like the others 0.6", 13),
            _answer("answer 4", "dropped", "reward 0.4, like the others 0.5", 14),
        ],
    ),
    "stopping": (
        "bon(5, stop=...): answers are drawn until the best is good enough",
        [
            _answer("draw 1", "dropped", "reward 0.3: go on", 12),
            _answer("draw 2", "dropped", "reward 0.5: go on", 14),
            _answer("draw 3", "kept", "reward 0.9: above the level, stop", 11),
            _answer("draw 4", "absent", "never drawn", 13),
            _answer("draw 5", "absent", "never drawn", 13),
        ],
    ),
    "cards": (
        "CARDS: a segment is proposed again until the reward accepts what stands so far",
        [
            Row("segment 1", (PROMPT, (4, 5, "dropped")), "reward below the threshold: rejected"),
            Row("", (PROMPT, (4, 6, "kept")), "accepted; it ends where the policy is unsure"),
            Row("segment 2", (PROMPT, (4, 6, "kept"), (10, 4, "kept")), "accepted at once"),
            Row("segment 3", (PROMPT, (4, 10, "kept"), (14, 5, "dropped")), "rejected"),
            Row("", (PROMPT, (4, 10, "kept"), (14, 4, "kept")), "accepted; the threshold has risen to the target"),
        ],
    ),
    "args": (
        "ARGS: at every token the likeliest candidates are scored; logit and reward choose",
        [
            Row("token 1", (PROMPT, (4, 1, "dropped")), "logit 2.1 + weight x reward 0.1"),
            Row("", (PROMPT, (4, 1, "kept")), "logit 1.9 + weight x reward 0.6: kept"),
            Row("token 2", (PROMPT, (4, 1, "kept"), (5, 1, "kept")), "logit 3.0 + weight x reward 0.5: kept"),
            Row("", (PROMPT, (4, 1, "kept"), (5, 1, "dropped")), "logit 1.2 + weight x reward 0.7"),
            Row("token 3", (PROMPT, (4, 2, "kept"), (6, 1, "kept")), "and so on, a reward's step for each token"),
        ],
    ),
    "tilted_tokens": (
        "tilted_tokens(lam): every token is drawn from the policy, tilted by what a head foretells",
        [
            Row("token 1", (PROMPT, (4, 1, "dropped")), "policy 0.6, head -0.2: drawn with 0.4"),
            Row("", (PROMPT, (4, 1, "kept")), "policy 0.4, head +0.3: drawn with 0.6, and drawn"),
            Row("token 2", (PROMPT, (4, 1, "kept"), (5, 1, "kept")), "policy 0.9, head 0.0: drawn with 0.9, and drawn"),
            Row("token 3", (PROMPT, (4, 2, "kept"), (6, 1, "kept")), "and so on; the head costs a product, not a pass"),
            Row("answer", (PROMPT, (4, 13, "kept")), "scored once, when it is done"),
        ],
    ),
    "ggro": (
        "GGRO: a segment begins with another token, which the reward's gradient proposes",
        [
            Row("as it decodes", (PROMPT, (4, 6, "dropped")), "reward 0.4; its gradient names a token"),
            Row("first nudge", (PROMPT, (4, 1, "nudge"), (5, 5, "dropped")), "reward 0.5; names the next one"),
            Row("second nudge", (PROMPT, (4, 1, "nudge"), (5, 6, "kept")), "reward 0.7: the best, kept"),
            Row("next segment", (PROMPT, (4, 1, "nudge"), (5, 6, "kept"), (11, 1, "nudge"), (12, 4, "dropped")), "..."),
        ],
    ),
    "blockwise": (
        "blockwise(3): of three continuations to the end of a sentence the best goes on",
        [
            Row("sentence 1", (PROMPT, (4, 6, "dropped")), "reward 0.3"),
            Row("", (PROMPT, (4, 5, "kept")), "reward 0.6: goes on"),
            Row("", (PROMPT, (4, 7, "dropped")), "reward 0.4"),
            Row("sentence 2", (PROMPT, (4, 5, "kept"), (9, 5, "dropped")), "reward 0.5"),
            Row("", (PROMPT, (4, 5, "kept"), (9, 6, "dropped")), "reward 0.7"),
            Row("", (PROMPT, (4, 5, "kept"), (9, 4, "kept")), "reward 0.8: goes on"),
        ],
    ),
    "redraw": (
        "redraw(2, 2, 1): the best answer is drawn anew from a place where it might have gone otherwise",
        [
            _answer("answer 1", "dropped", "reward 0.4", 12),
            _answer("answer 2", "kept", "reward 0.6: the best of the first ones", 14),
            Row("round 1", (PROMPT, (4, 8, "kept"), (12, 1, "nudge"), (13, 4, "dropped")), "reward 0.5: not better"),
            Row("round 2", (PROMPT, (4, 3, "kept"), (7, 1, "nudge"), (8, 8, "new")), "reward 0.8: takes its place"),
        ],
    ),
    "sea": (
        "SEA: all tokens of an answer may change at each step along the gradient",
        [
            _answer("a sample", "kept", "log-probability and reward of the text"),
            Row("step 1", (PROMPT, (4, 5, "kept"), (9, 1, "nudge"), (10, 8, "kept")), "one token has changed"),
            Row(
                "step 2",
                (PROMPT, (4, 2, "kept"), (6, 1, "nudge"), (7, 2, "kept"), (9, 1, "nudge"), (10, 8, "kept")),
                "two have",
            ),
            Row(
                "step 3",
                (PROMPT, (4, 2, "kept"), (6, 2, "nudge"), (8, 1, "kept"), (9, 2, "nudge"), (11, 7, "kept")),
                "each chain's best text is kept",
            ),
        ],
    ),
}


def _pattern(kind: str) -> str:
    """A token: cells of one kind lie side by side as a pattern."""
    dashes = ' stroke-dasharray="3 2"' if kind == "absent" else ""
    cell = f'<rect x="0.5" y="0.5" width="12" height="14" fill="{FILL[kind]}" stroke="#666"{dashes}/>'
    size = f'y="{TOP + 4}" width="{CELL}" height="{ROW}" patternUnits="userSpaceOnUse"'
    return f'<pattern id="{kind}" {size}>{cell}</pattern>'


def draw(title: str, rows: list[Row]) -> str:
    """The picture as SVG, on a white ground so that a dark page can show it."""
    height = TOP + ROW * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="sans-serif" font-size="14">',
        f'<rect width="860" height="{height}" rx="6" fill="#fff"/>',
        *(_pattern(kind) for kind in dict.fromkeys(kind for row in rows for _, _, kind in row.cells)),
        f'<text x="12" y="22" font-weight="bold">{title}</text>',
    ]
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        parts.append(f'<text x="12" y="{y + 16}">{row.label}</text>')
        end = LEFT
        for start, length, kind in row.cells:
            x, width = LEFT + CELL * start, CELL * length
            parts.append(f'<rect x="{x}" y="{y + 4}" width="{width}" height="15" fill="url(#{kind})"/>')
            end = max(end, LEFT + CELL * (start + length))
        parts.append(f'<text x="{end + 10}" y="{y + 16}" fill="#333">{row.verdict}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write all pictures."""
    for name, (title, rows) in PICTURES.items():
        (OUT / f"{name}.svg").write_text(draw(title, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
