"""What a run reads of its models before training, it reads once and passes on."""

from __future__ import annotations

from collections import Counter

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from trainers.run.build import build_trainer
from trainers.run.plan import make_plan
from trainers.run.preflight import preflight


@pytest.mark.slow
def test_configurations_and_tokenizers_are_read_once(make_config, tiny, monkeypatch):
    read: Counter[tuple[str, str]] = Counter()

    def counted(cls):
        original = cls.from_pretrained

        def from_pretrained(path, *args, **kwargs):
            read[cls.__name__, str(path)] += 1
            return original(path, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    counted(AutoConfig)
    counted(AutoTokenizer)
    plan = make_plan(make_config(), "test.yaml")
    preflight(plan)
    build_trainer(plan, Console(quiet=True))
    for folder in (tiny.reward, tiny.other_reward, tiny.two_headed_reward):
        assert read["AutoTokenizer", str(folder)] == 1, folder
        assert read["AutoConfig", str(folder)] <= 3, folder  # transformers reads it with a tokenizer and with tensors
    assert read["AutoTokenizer", str(tiny.policy)] == 1
    assert read["AutoConfig", str(tiny.policy)] <= 4  # and with the weights
