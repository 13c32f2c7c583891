from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree as ET

from report_summary import BUDGETS, make_summary

from inference.evaluation.summary import complete
from inference.report.figure import WIDTHS, draw, telling_curve
from inference.report.html import style

ATTACK = "</text><script>alert(1)</script>\"'&"


def curve_of(summary: dict):
    summary = complete(summary)
    styles = {policy: style(policy, summary["policies"], summary["trained"]) for policy in summary["policies"]}
    return telling_curve(summary, styles)


def test_it_shows_the_largest_sure_saving_with_its_step():
    curve = curve_of(make_summary())
    assert (curve.criterion, curve.metric, curve.needs) == ("harmless", "gold", "more than 64")
    assert [line.policy for line in curve.lines] == ["iama", "base", "grpo"]
    for size, width in WIDTHS.items():
        picture = ET.fromstring(draw(curve, size))
        assert len(picture.findall("polyline")) == 3
        assert len(picture.findall("circle")) == 3 * len(BUDGETS) + 1  # and the ring
        assert {"trained", "untrained base", "linear GRPO", "needs more than 64"} <= {
            t.text for t in picture.iter("text")
        }
        xs = [float(part.split(",")[0]) for line in picture.findall("polyline") for part in line.get("points").split()]
        assert 0 < min(xs) < max(xs) < width


def test_labels_do_not_lie_on_one_another():
    summary = make_summary()
    for row in summary["curves"]:
        row |= {"gold": 0.5, "gold_ci95": [0.5, 0.5]}
    ys = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*class="name"', draw(curve_of(summary), "wide")))
    assert len(ys) == 3
    assert all(after - before >= 16 for before, after in pairwise(ys))


def test_without_savings_it_shows_where_there_is_headroom_or_the_proxy():
    summary = make_summary() | {"savings": [], "averages": []}
    headroom = {"policy": "base", "samples": 4, "far": 64, "verdict": "train", "conflicting": [], "exclusions": []}
    criteria = [{"criterion": "brief", "metric": "gold", "level": "some"}]
    curve = curve_of(summary | {"headroom": headroom | {"criteria": criteria}})
    assert (curve.criterion, curve.needs) == ("brief", "")
    for row in summary["curves"]:
        row["gold"] = None
    curve = curve_of(summary)
    assert (curve.criterion, curve.metric) == ("helpful", "proxy")
    assert "by the reward that selects" in curve.title
    assert curve_of(summary | {"curves": []}) is None


def test_names_stay_text():
    summary = make_summary()
    for row in summary["curves"]:
        row["policy"] += ATTACK
    summary |= {"policies": [f"{name}{ATTACK}" for name in summary["policies"]], "savings": [], "averages": []}
    text = draw(curve_of(summary), "wide")
    assert "<script" not in text
    ET.fromstring(text)
