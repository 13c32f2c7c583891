"""The direction test: the toy is what it says, and what is done about an option is what its cosines ask for."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from iama.objective.operators import bon, identity
from scripts.experiments import direction, direction_toy
from scripts.experiments.direction import OPERATORS, REWARDS, Measured, is_right, measure, trained_policy
from scripts.experiments.direction_toy import EIGHTHS, Case, Counted, all_groups, group_counts, law, sampler_logits
from trainers.options import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_the_toy_counts_every_draw_once():
    np.testing.assert_allclose(law(sampler_logits()), np.array(EIGHTHS) / 8, atol=1e-12)
    drawn = [y for y, weight in enumerate(EIGHTHS) for _ in range(weight)]
    ordered = [tuple(sorted(group)) for group in itertools.product(drawn, repeat=4)]
    assert group_counts(4) == [ordered.count(group) for group in all_groups(4)]
    assert sum(group_counts(4)) == 8**4


def test_the_true_gradient_is_that_of_the_value():
    logits, step = trained_policy("sampler"), 1e-5
    gradient = direction_toy.true_gradient(logits, bon(3), REWARDS[0])
    for place in ((0, 1), (1, 2), (3, 1)):
        moved = [logits.clone(), logits.clone()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (bon(3).value(law(x).numpy(), REWARDS[0]) for x in moved)
        assert gradient[place] == pytest.approx((up - down) / (2 * step), abs=1e-8)


def test_trl_as_it_is_takes_the_gradient_itself():
    start = sampler_logits()
    for operator in (identity(), bon(4)):
        found = Counted(Case({}, start), operator, REWARDS[0]).gradient()
        right = direction_toy.true_gradient(start, operator, REWARDS[0]) / direction.MEAN_TOKENS
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-5)


PAGES = Path(__file__).parents[2] / "docs/results"
with (PAGES / "data/direction-options.csv").open(encoding="utf-8") as file:
    ROWS = {(row["groups"], row["option"]): row for row in csv.DictReader(file)}


def shown(option):
    """The published cosines of an option."""
    row = ROWS[direction.GROUPS[option.setting], option.name]
    return [float(row[operator.name]) for operator in OPERATORS]


def test_the_page_counts_what_is_done_about_the_options():
    done = [direction.DONE[option.verdict] for option in OPTIONS]
    assert [row["what is done"] for row in ROWS.values()] == done
    page = " ".join((PAGES / "direction.md").read_text(encoding="utf-8").split())
    assert (
        f"Of {len(OPTIONS)} settings, {done.count('accepted') + done.count(direction.UNUSED)} keep the direction"
        in page
    )


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.setting}-{o.name}")
def test_what_is_done_about_an_option_is_what_its_cosines_ask_for(option):
    assert is_right(option, [Measured(cosine, (1.0, 1.0)) for cosine in shown(option)])


@pytest.mark.parametrize("name", ["same-loss_type: grpo", "same-top_entropy_quantile: 0.5", "sampler-as TRL has them"])
def test_the_page_says_what_is_measured(name):
    (option,) = [o for o in OPTIONS if f"{o.setting}-{o.name}" == name]
    assert [m.cosine for m in measure(option)] == pytest.approx(shown(option), abs=1e-4)


def test_masked_completions_leave_their_group():
    (mask,) = [o for o in OPTIONS if "mask_truncated_completions" in o.example]
    assert [m.cosine > 0.999 for m in measure(mask)] == [True, True, False]  # three are too few for bon(4)
