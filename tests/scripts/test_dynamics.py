import json

import numpy as np
import pytest

from scripts.experiments import dynamics, dynamics_page
from scripts.experiments.dynamics_tracks import DEFAULT, LAST, LINEAR, OPEN, Track, running, track

STEPS = 40


def ramp(start, final=0.4):
    return np.clip((np.arange(STEPS) - start) / 5, 0, 1) * final


def make(first=5, second=15, final=0.4, value=1.0, kl=0.3):
    return Track({"helpful": ramp(second, final), "harmless": ramp(first)}, value, kl)


def test_running_mean_is_centred_and_shorter_at_the_ends():
    assert running(np.arange(10.0))[5] == pytest.approx(5.0)
    assert running(np.arange(10.0))[0] == pytest.approx(1.0)
    assert running(np.ones(7)) == pytest.approx(np.ones(7))
    assert running(np.asarray([1.0, 3.0])) == pytest.approx([2.0, 2.0])


def test_lag_is_between_the_openings_of_the_two_modes():
    assert dynamics_page.lag(make(5, 15)) == 10
    assert dynamics_page.lag(make(15, 5)) == 10
    assert dynamics_page.lag(make(final=OPEN / 2)) is None
    assert make(final=OPEN / 2).opened("helpful") is None


def test_smaller_mode_is_that_of_the_last_steps():
    assert make(final=0.3).smaller == pytest.approx(0.3)
    assert make(second=STEPS).smaller == 0.0


def test_track_reads_shares_value_and_kl(tmp_path):
    rows = [
        {
            "criteria": {name: {"gold": step / STEPS, "value": step} for name in ("helpful", "harmless")},
            "kl_per_token": 2.0,
        }
        for step in range(STEPS)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = track(tmp_path)
    assert found.shares["helpful"] == pytest.approx(np.arange(STEPS) / STEPS)
    assert found.value == pytest.approx(2 * np.mean(range(STEPS - LAST, STEPS)))
    assert found.kl_per_token == 2.0


def everything():
    variants = {name: make() for name in dynamics.VARIANTS} | {LINEAR: make(final=0.05)}
    return variants, {seed: make() for seed in (10, 11, 12)}


def test_claims_and_consequences_follow_from_the_tracks():
    variants, repeats = everything()
    seeds = {0: variants[DEFAULT], **repeats}
    assert [claim.met for claim in dynamics_page.claims(variants, seeds)] == [True, True, True]
    assert "nothing here speaks against" in dynamics_page.consequences(variants, seeds)
    better = {**variants, "G = 8": make(final=0.5, value=2.0), "beta 0.2": make(final=0.1)}
    text = dynamics_page.consequences({**better, DEFAULT: make(final=0.3)}, seeds)
    assert "A higher value at no more KL than the default: G = 8." in text
    assert "smaller with: beta 0.2" in text
    never = {seed: make(final=0.0) for seed in seeds}
    assert not dynamics_page.claims(variants, never)[0].met
    at_once = {seed: make(5, 5) for seed in seeds}
    assert not dynamics_page.claims(variants, at_once)[0].met


def test_page_is_written_from_the_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics_page, "FOLDER", tmp_path)
    monkeypatch.setattr(dynamics_page, "PAGE", tmp_path / "dynamics.md")
    dynamics_page.write(*everything(), 0)
    text = (tmp_path / "dynamics.md").read_text()
    assert "| default, seed 12 |" in text
    assert f"{STEPS} steps" in text
    assert {p.name for p in tmp_path.iterdir()} == {"dynamics.md", "dynamics.svg", "dynamics-seeds.svg"}


def test_jobs_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics, "risky_prompts", lambda seed: tmp_path / f"{seed}.jsonl")
    jobs = [*map(dynamics.variant, dynamics.VARIANTS), dynamics.linear()]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(jobs)
    assert all(name.replace("-", "").replace(".", "").isalnum() for name in names)
