"""What the trainer relies on in TRL: an upgrade that moves it fails here, loudly."""

from __future__ import annotations

import inspect

from trl import GRPOTrainer

from trainers.nonlinear_grpo import NonlinearGRPOTrainer


def test_the_two_overridden_methods_keep_their_signatures():
    rewards = inspect.signature(GRPOTrainer._calculate_rewards)
    assert list(rewards.parameters) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    score = inspect.signature(GRPOTrainer._generate_and_score_completions)
    assert list(score.parameters) == ["self", "inputs"]


def test_only_those_two_methods_are_overridden():
    own = {name for name, value in vars(NonlinearGRPOTrainer).items() if inspect.isfunction(value)}
    overridden = {name for name in own if hasattr(GRPOTrainer, name)} - {"__init__"}
    assert overridden == {"_calculate_rewards", "_generate_and_score_completions"}


def test_trl_slices_gathered_advantages_by_process_in_group_order():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "self.accelerator.process_index * len(prompts)" in source
    assert 'self._logs["advantages"].extend' in source
    assert "gather(rewards_per_func)" in inspect.getsource(GRPOTrainer._calculate_rewards)
