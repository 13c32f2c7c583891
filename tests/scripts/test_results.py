"""The demo's bookkeeping, and the page that `make results` writes."""

from __future__ import annotations

import pytest

from scripts import demo, launch, results
from scripts.results import readme_table


def savings(criterion, reference, metric, **changes):
    row = {
        "criterion": criterion,
        "method": "bon",
        "metric": metric,
        "reference": reference,
        "samples": 4,
        "ratio": 9.0,
        "ci95": [5.0, 12.0],
        "token_ratio": 8.0,
        "censored": False,
        "num_censored": 0,
        "num_seeds": 1,
        "hacked": False,
        "counts": True,
        "floor": False,
        "ci_censored": 0.0,
    }
    return {**row, **changes}


@pytest.fixture
def run():
    """Results of one seed in the shape of `summary.json`."""
    names = [(c, r, m) for c in ("helpful", "harmless") for m in ("gold", "proxy") for r in ("base", "grpo")]
    differences = [
        {"method": "bon", "metric": metric, "reference": "grpo", "samples": 4, "mean": 0.2, "ci95": [0.1, 0.3]}
        for metric in ("gold", "proxy")
    ]
    curves = [
        {"policy": policy, "criterion": c, "method": "bon", "samples": n, "proxy": 0.1 * n, "gold": 0.01 * n}
        for policy in ("base", "grpo", "iama")
        for c in ("helpful", "harmless")
        for n in (1, 4)
    ]
    quality = {
        policy: {c: {"without": 0.1, "with": 0.4} for c in ("helpful", "harmless")}
        for policy in ("base", "grpo", "iama")
    }
    return {
        "savings": [savings(*name) for name in names],
        "differences": differences,
        "curves": curves,
        "quality": quality,
        "num_samples": 256,
        "num_prompts": 64,
    }


@pytest.fixture
def whole_page(tmp_path):
    """Writes the page of these seeds into a folder; returns it."""

    def write(seeds, combined):
        row = {"learning_rate": 1e-3, "beta": 0.02, "proxy": 1.5, "kl_per_token": 0.1}
        search = {"grpo": [row, {**row, "beta": 0.08, "proxy": 1.0}], "iama": [row]}
        measured = {
            "policy": {"parse_rate": 0.97},
            "rm-helpful": {"pair_accuracy": 0.9},
            "rm-harmless": {"pair_accuracy": 0.8},
        }
        worlds = dict.fromkeys(seeds, measured)
        results.write(tmp_path, search, {"grpo": row, "iama": row}, seeds, combined, worlds)
        return (tmp_path / "demo.md").read_text()

    return write


def test_the_page_says_what_holds_and_its_files_have_every_seed(run, whole_page, tmp_path):
    text = whole_page({10: run, 11: run}, run)
    assert "**Answer.** Yes: all 3 parts hold. Summed gold is +0.200 (+0.100 to +0.300) above" in text
    assert "| helpful | base | 9.00 | 5.00 to 12.00 | 8.00 | 9.00 |" in text
    data = {path.stem: path.read_text() for path in (tmp_path / "data").glob("*.csv")}
    assert "\n10,helpful,base,9.00,5.00,12.00,8.00,9.00,\n" in data["demo-savings"]
    assert "\nall,helpful,base," in data["demo-savings"]
    assert "\niama,helpful,0.010,0.040\n" in data["demo-curves"]
    assert data["demo-search"].count("chosen") == 2
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    "changes",
    [{"ratio": 7.9}, {"ci95": [3.9, 12.0]}, {"counts": False, "hacked": True, "censored": True, "num_censored": 1}],
)
def test_a_claim_that_fails_is_said_to_fail(run, whole_page, changes):
    failing = {**run, "savings": [savings("helpful", "base", "gold", **changes), *run["savings"][1:]]}
    assert "**Answer.** In part: 2 of 3 parts hold" in whole_page({10: run}, failing)
    assert "lower ends above 4, holds on harmless; " in readme_table(failing)


def test_bounds_are_shown_as_bounds(run):
    bound = savings("helpful", "base", "gold", censored=True, num_censored=1, ratio=16.0)
    assert "at least 5.0" in readme_table({**run, "savings": [bound]})


def test_the_search_value_needs_every_criterion_at_the_trained_budget(run):
    assert results.summed_proxy(run["curves"], "iama") == pytest.approx(0.8)
    with pytest.raises(AssertionError):
        results.summed_proxy(run["curves"], "nobody")


def test_the_search_takes_the_best_proxy_within_the_kl_limit():
    limit = results.MAX_KL
    rows = [{"proxy": p, "kl_per_token": kl} for p, kl in ((1.0, limit / 2), (2.0, limit), (9.0, limit + 0.01))]
    assert results.choose(rows)["proxy"] == 2.0
    assert results.choose([rows[2], {"proxy": 99.0, "kl_per_token": 0.5}])["proxy"] == 9.0


def test_the_readme_has_a_place_for_the_table():
    readme = (launch.ROOT / results.README).read_text()
    assert readme.index(results.BEGIN) < readme.index(results.END)


def test_the_demo_deletes_what_another_world_left(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    world, run_folder = tmp_path / demo.WORLD, tmp_path / demo.FOLDER / "iama"
    (tmp_path / "configs").mkdir()
    for name in demo.CONFIGS:
        (tmp_path / "configs" / name).write_text("a: 1\n")
    world.mkdir(parents=True)
    (world / "stamp.json").write_text("one")
    for stamp, survives in (("one", False), ("one", True), ("two", False)):
        run_folder.mkdir(exist_ok=True)
        (world / "stamp.json").write_text(stamp)
        demo._delete_outdated()
        assert run_folder.exists() == survives
