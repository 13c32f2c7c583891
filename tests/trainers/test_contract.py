"""What the trainer relies on in TRL: an upgrade that moves it fails here, loudly."""

from __future__ import annotations

import inspect

from transformers import Trainer, TrainerState
from trl import GRPOTrainer

from trainers.nonlinear_grpo import NonlinearGRPOTrainer


def test_the_overridden_methods_keep_their_signatures():
    rewards = inspect.signature(GRPOTrainer._calculate_rewards)
    assert list(rewards.parameters) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    score = inspect.signature(GRPOTrainer._generate_and_score_completions)
    assert list(score.parameters) == ["self", "inputs"]
    draw = inspect.signature(GRPOTrainer._generate_single_turn)
    assert list(draw.parameters)[:4] == ["self", "prompt_ids", "images", "multimodal_fields"]


def test_no_other_method_is_overridden():
    own = {name for name, value in vars(NonlinearGRPOTrainer).items() if inspect.isfunction(value)}
    overridden = {name for name in own if hasattr(GRPOTrainer, name)} - {"__init__"}
    rewards = {"_calculate_rewards", "_generate_and_score_completions"}
    assert overridden == rewards | {"_generate_single_turn", "_get_per_token_logps_and_entropies"}


def test_trl_slices_gathered_advantages_by_process_in_group_order():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "self.accelerator.process_index * len(prompts)" in source
    assert 'self._logs["advantages"].extend' in source
    assert "gather(rewards_per_func)" in inspect.getsource(GRPOTrainer._calculate_rewards)


def test_beta_is_read_at_every_step_and_its_kl_is_equal_on_all_processes():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "per_token_loss + self.beta * per_token_kl" in source
    assert 'self._metrics[mode]["kl"].append(global_masked_mean(per_token_kl))' in source
    assert 'reduction="sum"' in source
    epoch = inspect.getsource(Trainer._run_epoch)
    assert "self.current_gradient_accumulation_steps = len(batch_samples)" in epoch
    assert epoch.index("callback_handler.on_step_end") < epoch.index("self._maybe_log_save_evaluate")


def test_the_trainer_state_keeps_our_entry(tmp_path):
    state = TrainerState(stateful_callbacks=[])
    state.stateful_callbacks["iama"] = {"beta": 0.1 + 0.2}
    state.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).stateful_callbacks["iama"] == {"beta": 0.1 + 0.2}
    assert "self.state.stateful_callbacks[cb_name] = cb_state" in inspect.getsource(Trainer._save_checkpoint)


def test_log_probabilities_are_trls():
    logps = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    names = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert list(logps.parameters)[:6] == names
    assert "temperature=self.temperature" in inspect.getsource(GRPOTrainer.__init__)
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'output["ref_per_token_logps"]' in source
    assert 'output["old_per_token_logps"]' in source
