"""The page on savings, from its tables; the evaluation that makes them has tests of its own."""

from __future__ import annotations

from scripts.experiments import savings
from scripts.experiments.frame import Claim, parts_table, table


def test_the_page_says_what_holds_and_draws_bounds(tmp_path):
    stopping = [
        ["helpful", "base: with stopping, without", "1.53x [1.46, 1.59]", "1.45x", "1.53x", "0.38x"],
        ["harmless", "base: with stopping, without", "> 4.25x [2.03, >15.81]", "> 3.94x", "> 4.25x", "> 0.34x"],
    ]
    row = ["helpful", "cards at 0.5", "base", "cards", "> 1.11x [0.81, >1.48]", *["> 1.11x"] * 4, "bound"]
    header = "criterion | method | reference | by | ratio (95 % interval) | tokens | FLOPs | seconds | steps | remarks"
    tables = {
        "parts": parts_table(
            [
                Claim("stopping alone saves", "above 1", "2 of 2", met=True),
                Claim("served by cards, IAMA costs less", "above 1", "0 of 4", met=False),
            ]
        ),
        "stopping": table("criterion | compared | draws saved (95 % interval) | tokens | seconds | steps", stopping),
        "curves": table(header, [row]),
        "points": table(header, [row]),
        "rival": table(["", "summed"], [["IAMA minus another", "+0.152 (+0.113 to +0.200)"]]),
    }
    savings.write_tables(tmp_path, {"num_samples": 256, "num_prompts": 32, "sentences": ["One."]}, tables)
    text = (tmp_path / "savings.md").read_text()
    assert "**Answer.** In part: 1 of 2 parts holds." in text
    assert "for 0 of 1 methods" in text
    assert "- `rejection` and `args` and `ggro` and `blockwise` and `redraw` and `sea` joined the list" in text
    assert "had been looked at: `cards` 0.5, 0.9.\n" in text
    assert "+0.152 (+0.113 to +0.200) above it" in text
    assert "helpful,cards at 0.5,base,cards,> 1.11,0.81,>1.48," in (tmp_path / "data/savings-points.csv").read_text()
    assert (tmp_path / "savings.svg").read_text().startswith("<svg")
