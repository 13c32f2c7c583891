"""What processes know of their machine before torch is imported."""

from __future__ import annotations

import os

import pytest

from iama.config.specs import RewardSpec
from iama.environment import cores, local_world_size, prepare_environment, started_here, threads_per_process

NAMES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.mark.parametrize(
    ("given", "started", "local"),
    [
        ({}, None, 1),
        ({"WORLD_SIZE": "4"}, None, 4),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2, 2),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "3"}, 3, 3),
    ],
)
def test_processes_of_this_machine_share_its_cores(monkeypatch, given, started, local):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert (started_here(), local_world_size(), cores(), threads_per_process()) == (started, local, 12, 12 // local)
    monkeypatch.delattr(os, "sched_getaffinity")  # a system that does not say which cores are a process's
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (cores(), threads_per_process()) == (8, 8 // local)


@pytest.mark.parametrize(
    ("reward", "is_offline"),
    [
        ({"model": "."}, True),
        ({"model": "org/name"}, False),
        ({"verifier": "math"}, True),
        ({"function": "rewards.py:brief"}, False),
        ({"kind": "mine.py:Mine"}, False),
        ({"ensemble": {"members": [{"model": "."}, {"function": "f.py:g"}], "same_scale": True}}, False),
    ],
)
def test_code_of_the_user_s_own_may_download(monkeypatch, reward, is_offline):
    monkeypatch.setattr(os, "environ", {})
    prepare_environment([".", *(part.looked_up for part in RewardSpec(**reward).parts)])
    assert ("HF_HUB_OFFLINE" in os.environ) == is_offline
