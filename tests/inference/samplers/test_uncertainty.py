"""Entropy thresholds that are quantiles of the policy's own tokens: how they are written, measured and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from iama.config.specs import Sampling
from iama.errors import ConfigError
from iama.prompts.conversations import render_prompts
from iama.rewards.load import load_reward
from inference.engine.decode import decode
from inference.samplers.serve import (
    check_served,
    check_vllm_serves,
    entropy_share_of,
    needs_target,
    read_method,
    serve,
    settings_of,
    with_target,
)
from inference.samplers.uncertainty import EntropyQuantile, calibrate_entropy, quantile_of_entropies

SAMPLING = Sampling(max_new_tokens=9)
PROMPTS = ["how to bake bread", "mix water"]


@pytest.fixture(scope="module")
def reward(reward_spec: Any) -> Any:
    return load_reward("proxy", reward_spec)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("quantile(0.9)", EntropyQuantile(0.9)), ("1.5", 1.5), ("2", 2.0), ("null", None), ("0", 0.0)],
)
@pytest.mark.parametrize("name", ["cards", "ggro"])
def test_a_threshold_is_nats_a_quantile_or_null(name: str, written: str, expected: Any) -> None:
    method = read_method(f"{name}(entropy_threshold={written})")
    assert settings_of(method, SAMPLING).entropy_threshold == expected
    assert entropy_share_of(method, SAMPLING) == (expected.share if written.startswith("q") else None)


@pytest.mark.parametrize(
    "written", ["quantile(0)", "quantile(1)", "quantile(x)", "quantile()", "high", "-1", "mean(0.9)"]
)
def test_anything_else_is_refused_with_what_to_write(written: str) -> None:
    with pytest.raises(ConfigError, match=r"entropy_threshold: .*write nats such as 1.5, quantile\(0.9\), or null"):
        check_served(read_method(f"cards(entropy_threshold={written})"), SAMPLING)


def test_measured_is_a_quantile_of_the_laws_of_the_policys_own_tokens(policy: Any) -> None:
    found, cost = calibrate_entropy(policy, PROMPTS, SAMPLING, quantile=0.8, num_samples=5, seed=3, batch_size=4)
    ids = render_prompts(policy.tokenizer, PROMPTS, policy.eos_token_ids, "policy")
    responses, _ = decode(policy, ids, 5, SAMPLING, seed=3, batch_size=4)
    entropies = []
    for prompt, row in zip(ids, responses, strict=True):
        for response in row:
            whole = torch.tensor([[*prompt, *response.token_ids]])
            with torch.inference_mode():
                logits_TV = policy.model(whole).logits[0, len(prompt) - 1 : -1].double()
            entropies += torch.distributions.Categorical(logits=logits_TV).entropy().tolist()
    assert found == pytest.approx(np.quantile(entropies, 0.8), rel=1e-4)
    assert cost.policy_prefill_tokens > sum(map(len, ids)) * 5  # drawn once, and read once again
    assert quantile_of_entropies([[], [1.0, 3.0]], 0.5) == 2.0


@pytest.mark.parametrize(
    "method",
    [
        "cards(entropy_threshold=quantile(0.7))",
        "ggro(entropy_threshold=quantile(0.7))",
        "blockwise(boundary=entropy, entropy_threshold=quantile(0.7))",
    ],
)
def test_what_is_measured_is_served_as_its_nats_are(policy: Any, reward: Any, method: str) -> None:
    asked = read_method(method)
    with pytest.raises(ConfigError, match=r"not measured yet|no target"):
        serve(policy, reward, asked, SAMPLING)
    measured, cost = with_target(policy, reward, asked, PROMPTS, SAMPLING, seed=4)
    nats, _ = calibrate_entropy(policy, PROMPTS, SAMPLING, quantile=0.7, seed=5)
    assert settings_of(measured, SAMPLING).entropy_threshold == pytest.approx(nats, rel=1e-5)
    assert entropy_share_of(measured, SAMPLING) is None
    assert not needs_target(measured, SAMPLING)
    assert cost.policy_tokens > 0
    assert len(serve(policy, reward, measured, SAMPLING).sample(PROMPTS, seed=4)) == 2


def test_vllm_tells_no_entropies() -> None:
    with pytest.raises(
        ConfigError, match=r"vLLM tells no entropies of which quantile\(0.9\) could be taken; write nats"
    ):
        check_vllm_serves(read_method("cards(entropy_threshold=quantile(0.9))"), "--engine vllm")
    check_vllm_serves(read_method("cards(entropy_threshold=2)"), "--engine vllm")
