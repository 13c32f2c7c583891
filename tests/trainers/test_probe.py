"""The probe's figures and tolerances; `run/test_vllm_roll_outs.py` shows it what it is for."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from iama.errors import IamaWarning
from trainers.probe import TOLERANCES, _figure, can_probe, tolerance_of


def test_a_processs_figure():
    assert _figure(3.0, 30, 30) == 0.1
    assert _figure(3.0, 30, 33) == 0.1  # rounding moves the edge of a nucleus
    assert _figure(3.0, 30, 40) == math.inf
    assert _figure(0.0, 0, 8) == math.inf
    assert math.isnan(_figure(0.0, 0, 0))  # every completion is masked


@pytest.mark.parametrize(
    ("policy", "bf16", "sampler", "tolerance"),
    [
        ("float32", False, "float32", 0.0125),
        ("bfloat16", True, "bfloat16", 0.1),
        ("float32", True, "bfloat16", 0.1),
        ("float32", False, "float16", 0.0125),
        ("bfloat16", False, "float32", 0.1),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_format(tiny, policy, bf16, sampler, tolerance):
    model = AutoModelForCausalLM.from_pretrained(tiny.policy, dtype=policy)
    assert tolerance_of(trainer(model, bf16, sampler)) == tolerance
    assert max(TOLERANCES.values()) == 0.1


def test_a_format_that_is_coarser_than_the_policys_is_told(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.policy, dtype="float32")
    with pytest.warns(IamaWarning, match="vLLM draws in bfloat16, where the policy is trained in float32"):
        assert tolerance_of(trainer(model, False, "bfloat16")) == 0.1


def trainer(model, bf16, sampler):
    """What the tolerance is read off."""
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(dtype=getattr(torch, sampler))))
    args = SimpleNamespace(bf16=bf16)
    return SimpleNamespace(model=model, args=args, vllm_generation=SimpleNamespace(mode="colocate", llm=llm))


def test_a_law_of_its_own_is_not_compared():
    known = {"generation_kwargs": None, "vllm_structured_outputs_regex": None}
    assert can_probe(SimpleNamespace(**known))
    assert not can_probe(SimpleNamespace(**known | {"vllm_structured_outputs_regex": "[ab]"}))
    assert not can_probe(SimpleNamespace(**known | {"generation_kwargs": {"presence_penalty": 1.0}}))


def test_a_tolerance_is_a_number_above_zero(make_config):
    assert make_config(watch__vllm_tolerance=0.05).watch.vllm_tolerance == 0.05
