"""What processes know of their machine before torch is imported."""

from __future__ import annotations

import os

import pytest

from iama.environment import cores, local_world_size, started_here, threads_per_process

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
