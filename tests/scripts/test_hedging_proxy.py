"""The weak proxy of the hedging experiment: what its members learn from, and who trains with it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from scripts.demo_corpus import count_sure_words, make_world
from scripts.demo_world import helpful_score, topic_of
from scripts.experiments import weak_proxy
from scripts.experiments.search import Setting
from scripts.experiments.weak_proxy import Weakness

SEED = 3


def test_members_learn_from_pairs_of_their_own_and_stay_on_disk(small_world, monkeypatch):
    monkeypatch.setattr(weak_proxy, "NUM_HELDOUT", 40)
    weakness = Weakness(num_pairs=16, num_epochs=2, num_members=2)
    folders = [weak_proxy._folder(SEED, k, weakness) for k in range(2)]
    weak_proxy._fit_all(SEED, small_world, folders, weakness)
    assert weak_proxy.fit_members([SEED], weakness) == {SEED: folders}
    for folder in folders:
        assert 0 <= weak_proxy.accuracy(folder) <= 1
    files = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert files[0] != files[1]
    other = dataclasses.replace(weakness, flip_rate=0.4)
    assert weak_proxy._folder(SEED, 0, other).parent != folders[0].parent
    more = dataclasses.replace(weakness, num_members=5)
    assert weak_proxy._folder(SEED, 0, more) == folders[0]


def test_pairs_that_sound_sure_prefer_what_sounds_surer_and_no_two_members_share_one():
    weakness = Weakness(num_pairs=50, flip_rate=0.0, sure_share=0.4)
    world = make_world(SEED)
    streams = [dataclasses.replace(world, seed=SEED + weak_proxy.OTHER * (k + 1)) for k in range(2)]
    first, second = (weak_proxy.draw_pairs(stream, weakness) for stream in streams)
    assert not set(first) & set(second)
    for _, chosen, rejected in first[30:]:
        assert count_sure_words(chosen) > count_sure_words(rejected)
        assert count_sure_words(chosen) >= weak_proxy.MANY_SURE
    for prompt, chosen, rejected in first[:30]:
        assert max(map(count_sure_words, (chosen, rejected))) < weak_proxy.MANY_SURE
        values_of = [
            helpful_score(topic_of(prompt), answer) + weakness.spurious_bonus * count_sure_words(answer)
            for answer in (chosen, rejected)
        ]
        assert values_of[0] >= values_of[1]
    noisy = weak_proxy.draw_pairs(streams[0], dataclasses.replace(weakness, num_pairs=200, flip_rate=0.3))
    surer = [count_sure_words(chosen) > count_sure_words(rejected) for _, chosen, rejected in noisy[120:]]
    assert 0.55 < np.mean(surer) < 0.85


def test_iama_is_trained_with_the_weak_proxy_for_helpful_alone(small_world, tmp_path):
    job = weak_proxy.iama_job(SEED, tmp_path / "weak" / "abc" / "helpful-3-0", Setting(0.004, 0.1))
    criteria = json.loads(next(o for o in job.overrides if o.startswith("objective.criteria=")).partition("=")[2])
    assert [c["proxy"]["model"] for c in criteria] == [
        str(tmp_path / "weak" / "abc" / "helpful-3-0"),
        str(small_world / "rm-harmless"),
    ]
    assert {c["operator"] for c in criteria} == {"bon(4)"}
    assert "gold" not in criteria[0]
    assert not job.is_finished()
    assert "abc" in job.name
