"""What a plan says of roll-outs by vLLM; `test_vllm_roll_outs.py` draws them."""

from __future__ import annotations

import importlib.util

import pytest

from iama.errors import ConfigError, IamaWarning
from trainers.run.plan import make_plan


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_install(make_config):
    with pytest.raises(ConfigError, match=r"trainer\.use_vllm is set, but vLLM is not installed: pip install"):
        make_plan(make_config(trainer__use_vllm=True), "config.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling__temperature": 2.5}, r"trainer.use_vllm: sampling.temperature 2.5 is outside 0.01 to 2"),
        (
            {"sampling__top_p": 0.9, "sampling__min_p": 0.1},
            r"min_p 0.1 beside .* 0.9: .*; drop .* or leave use_vllm out",
        ),
        ({"trainer__generation_kwargs": {"seed": 3}}, r"generation_kwargs.seed = 3: .* the same random numbers"),
    ],
)
def test_what_vllm_would_draw_from_another_law_is_refused(make_config, changes, told):
    with pytest.raises(ConfigError, match=told) as caught:
        make_plan(make_config(trainer__use_vllm=True, **changes), "config.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("mode", "call"), [("colocate", "model.load_weights fails"), ("server", "VLLMClient.init_communicator raises")]
)
def test_without_a_gpu_one_line_names_the_call_that_would_fail(make_config, mode, call):
    with pytest.raises(ConfigError, match=rf"use_vllm needs a GPU: on a CPU .* \({call}.*\); leave it out"):
        make_plan(make_config(trainer__use_vllm=True, trainer__vllm_mode=mode), "config.yaml")


def test_a_tolerance_without_vllm_is_told(make_config):
    with pytest.warns(IamaWarning, match=r"watch.vllm_tolerance is not used: trainer.use_vllm is not set"):
        make_plan(make_config(watch__vllm_tolerance=0.05), "config.yaml")
    assert "vllm_tolerance" not in make_config().model_dump()["watch"]
