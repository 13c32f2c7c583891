from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def raw_serving(tiny, gold_file) -> dict[str, Any]:
    """A small server, as it would stand in YAML."""
    return {
        "policies": {"base": {"path": str(tiny.policy)}},
        "criteria": [
            {"name": "good", "proxy": {"model": str(tiny.reward)}},
            {"name": "vowels", "proxy": {"function": f"{gold_file}:vowels"}, "methods": ["bon(2)"]},
        ],
        "methods": ["bon(4)", "soft_bon(4, 0.5)", "cards(quantile=0.5, entropy_threshold=2)"],
        "sampling": {"max_new_tokens": 12},
        "calibration": {"path": str(tiny.prompts), "max_prompts": 2},
        "calibration_samples": 8,
        "limits": {
            "n": 4,
            "max_tokens": 100,
            "body_bytes": 20_000,
            "prompt_characters": 4000,
            "messages": 8,
            "max_budget": 8,
        },
    }
