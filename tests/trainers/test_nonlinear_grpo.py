"""The trainer in one process, on real TRL."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from iama.errors import ConfigError, IamaWarning, RewardError
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon, identity
from iama.prompts.data import load_prompts
from iama.prompts.render import render_prompt
from trainers.nonlinear_grpo import NonlinearGRPOTrainer
from trainers.run.build import build_trainer, save_final
from trainers.run.plan import make_plan
from trainers.run.train import manifest

# A random tiny policy rarely ends its answers.
pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def length(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]


def vowels(completions, **kwargs):
    return [float(sum(letter in "aeiou" for letter in c[0]["content"])) for c in completions]


def test_all_processes_gather_ratios_or_none_does():
    """Where a process holds completions of one token only, ratios of tokens look like those of completions."""
    mode, gathered = SimpleNamespace(vllm_importance_sampling_mode="token_mask"), []
    mode.accelerator = SimpleNamespace(gather=lambda ratio: gathered.append(1) or ratio)
    output = {"importance_sampling_ratio": torch.tensor([[0.5], [1.0], [2.0], [1.0]])}
    assert NonlinearGRPOTrainer._ratios(mode, output, 2) is None
    assert not gathered
    mode.vllm_importance_sampling_mode = "sequence_truncate"
    assert NonlinearGRPOTrainer._ratios(mode, output, 2).tolist() == [[0.5, 1.0], [2.0, 1.0]]
    assert NonlinearGRPOTrainer._ratios(mode, {}, 2) is None


def grpo_args(folder, **changes):
    fields = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
    }
    return GRPOConfig(**{**fields, **changes})


def script(trainer_class, tiny, folder, args=None, rewards=(length, vowels), **extra):
    """A TRL training script; `trainer_class` and one argument are all that differs for IAMA."""
    return trainer_class(
        model=str(tiny.policy),
        reward_funcs=list(rewards),
        args=args or grpo_args(folder),
        train_dataset=Dataset.from_list(load_prompts(tiny.prompts)),
        peft_config=LoraConfig(r=4),
        **extra,
    )


def objective(**operators):
    operators = operators or {"length": bon(2), "vowels": bon(2)}
    return Objective([Criterion(name, operator) for name, operator in operators.items()])


@pytest.mark.slow
def test_replaces_grpo_trainer_in_a_script(tiny, tmp_path):
    script(GRPOTrainer, tiny, tmp_path).train()
    trainer = script(NonlinearGRPOTrainer, tiny, tmp_path, objective=objective())
    trainer.train()
    assert trainer.state.global_step == 2


def test_advantages_are_the_objectives(tiny, tmp_path):
    trainer = script(NonlinearGRPOTrainer, tiny, tmp_path, objective=objective())
    inputs = [row for row in load_prompts(tiny.prompts)[:2] for _ in range(4)]
    trainer.model.train()
    output = trainer._generate_and_score_completions(inputs)
    completions = [
        [{"content": text}]
        for text in trainer.processing_class.batch_decode(
            [ids[mask.bool()] for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)],
            skip_special_tokens=True,
        )
    ]
    rewards = np.stack([length(completions), vowels(completions)], axis=-1).reshape(2, 4, 2)
    np.testing.assert_allclose(output["advantages"], objective().advantages(rewards).reshape(-1), atol=1e-5)
    assert list(trainer._logs["advantages"]) == output["advantages"].tolist()


@pytest.mark.slow
def test_identity_equals_trl_without_scaling_up_to_the_leave_one_out_factor(tiny, tmp_path):
    args = grpo_args(tmp_path, scale_rewards="none", max_steps=1)
    advantages = []
    for extra in ({}, {"objective": objective(length=identity())}):
        trainer = script(NonlinearGRPOTrainer if extra else GRPOTrainer, tiny, tmp_path, args, [length], **extra)
        trainer.train()
        advantages.append(torch.tensor(list(trainer._logs["advantages"])))
    assert advantages[0].abs().max() > 0
    torch.testing.assert_close(advantages[1], advantages[0] * 4 / 3)


def test_an_evaluation_in_smaller_groups_logs_no_signal_that_it_did_not_measure(tiny, tmp_path):
    args = grpo_args(tmp_path, num_generations_eval=2, per_device_eval_batch_size=2)
    trainer = script(NonlinearGRPOTrainer, tiny, tmp_path, args, objective=objective())
    trainer.model.eval()
    row = load_prompts(tiny.prompts)[0]
    output = trainer._generate_and_score_completions([row, row])
    assert not output["advantages"].any()
    assert not {"silent_groups", "covariance/length"} & set(trainer._metrics["eval"])


def test_one_renderer(tiny, tmp_path):
    trainer = script(NonlinearGRPOTrainer, tiny, tmp_path, objective=objective())
    for path in (tiny.prompts, tiny.text_prompts):
        prompts = [row["prompt"] for row in load_prompts(path)]
        ids, _, _ = trainer._tokenize_prompts(prompts)
        assert ids == [render_prompt(trainer.processing_class, prompt) for prompt in prompts]


def test_criteria_must_name_reward_functions(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"'len'.*\['length', 'vowels'\]"):
        script(NonlinearGRPOTrainer, tiny, tmp_path, objective=objective(len=bon(2)))


def test_ignored_arguments_warn(tiny, tmp_path):
    args = grpo_args(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.warns(IamaWarning, match="reward_weights"):
        script(NonlinearGRPOTrainer, tiny, tmp_path, args, objective=objective())


@pytest.mark.slow
def test_a_missing_reward_names_reward_and_prompt(tiny, tmp_path):
    def holes(completions, **kwargs):
        return [None if i == 1 else 0.0 for i, _ in enumerate(completions)]

    trainer = script(NonlinearGRPOTrainer, tiny, tmp_path, rewards=[holes], objective=objective(holes=bon(2)))
    with pytest.raises(RewardError, match="'holes' returned None or NaN for the prompt"):
        trainer.train()


@pytest.fixture
def trained(make_config):
    """A configured run of two steps, saved."""
    config = make_config()
    plan = make_plan(config, "test.yaml")
    trainer = build_trainer(plan, Console(quiet=True))
    trainer.train()
    save_final(trainer, Path(config.output_dir) / "adapter", manifest(plan))
    return trainer, Path(config.output_dir)


@pytest.mark.slow
def test_a_run_writes_metrics_and_an_adapter(trained, tiny):
    trainer, folder = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl_per_token"] == 0.0  # the policy starts as the reference
    assert rows[1]["kl_per_token"] > 0.0
    assert rows[0]["criteria"]["helpful"].keys() == {"mean", "value", "gold", "lift", "covariance"}
    assert 0.5 <= rows[0]["effective_prompts"] <= 1.0  # of two prompts
    linear = [key for key in trainer.state.log_history[0] if "linear_sum" in key or key.startswith(("reward", "frac"))]
    assert sorted(key for key in linear if not key.startswith("rewards/")) == [
        "linear_sum/groups_without_spread",
        "linear_sum/mean",
        "linear_sum/std",
    ]
    assert rows[0]["criteria"]["helpful"]["gold"] is None
    assert np.isfinite(rows[0]["criteria"]["harmless"]["gold"])
    assert rows[0]["tokens_per_second"] > 0
    base = AutoModelForCausalLM.from_pretrained(tiny.policy)
    ids = torch.arange(5, 15)[None]
    reloaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.inference_mode():
        live = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(reloaded(input_ids=ids).logits, live, atol=1e-5, rtol=1e-5)
        with reloaded.disable_adapter():
            assert not torch.allclose(reloaded(input_ids=ids).logits, live, atol=1e-4)


@pytest.mark.slow
def test_gold_is_logged_and_never_trains(make_config):
    with_gold = make_config()
    criteria = [c.model_dump(exclude={"gold"}) for c in with_gold.objective.criteria]
    losses = []
    for config in (with_gold, make_config(objective__criteria=criteria)):
        trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]
