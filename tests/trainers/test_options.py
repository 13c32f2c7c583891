"""Options of TRL: each that the installed TRL has is known; what bends the objective is told before anything runs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from iama.errors import ConfigError, IamaWarning
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon, entropic, lstat, soft_bon, tilt
from trainers import options
from trainers.options import OPTIONS, TOUCHING, check_engine, check_options
from trainers.run.plan import make_plan
from trainers.run.preflight import preflight

ELSEWHERE = {
    *("model_init_kwargs", "trust_remote_code", "disable_dropout", "cast_lm_head_to_fp32"),
    *("num_generations", "num_generations_eval", "max_completion_length", "ds3_gather_for_generation"),
    *("shuffle_dataset", "pad_to_multiple_of", "temperature", "top_p", "top_k", "min_p", "generation_kwargs"),
    *("chat_template_kwargs", "repetition_penalty", "cache_implementation", "use_vllm", "vllm_mode", "vllm_model_impl"),
    *("vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host"),
    *("vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization"),
    *("vllm_max_model_length", "vllm_tensor_parallel_size", "max_tool_calling_iterations", "log_completions"),
    *("log_multimodal", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"),
}
"""Fields of GRPOConfig that say how roll-outs are drawn, shown or computed, of which the loss is a function."""


def args(**changes):
    fields = {"per_device_train_batch_size": 8, "num_generations": 4, "use_cpu": True, "bf16": False, **changes}
    return GRPOConfig(output_dir="unused", report_to="none", **fields)


def compared_with(name, function):
    """All texts that a function of TRL compares `self.NAME` with."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == f"self.{name}":
            found |= {constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)}
    return found


def test_every_value_that_trl_knows_is_known_here():
    assert compared_with("loss_type", GRPOTrainer._compute_loss) == set(options.LOSS_TYPES)
    assert compared_with("importance_sampling_level", GRPOTrainer._compute_loss) == set(options.LEVELS)
    score = GRPOTrainer._generate_and_score_completions
    assert compared_with("multi_objective_aggregation", score) == set(options.AGGREGATIONS)
    assert compared_with("vllm_importance_sampling_mode", score) == set(options.VLLM_MODES)


def test_every_field_of_grpoconfig_is_sorted():
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = {f.name for f in dataclasses.fields(GRPOConfig)} - inherited
    assert own == TOUCHING | ELSEWHERE
    assert not TOUCHING & ELSEWHERE


def test_every_loss_type_was_measured_alone():
    alone = {o.example["loss_type"] for o in OPTIONS if o.setting == "same" and o.example.keys() == {"loss_type"}}
    assert alone == set(options.LOSS_TYPES)
    assert {key for o in OPTIONS for key in o.example} < TOUCHING


IN_FORCE = {"later": {"num_iterations": 2}, "sampler": {"use_vllm": True}, "same": {}}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.setting}-{o.name}")
def test_each_option_meets_its_verdict(option):
    few = {} if option.rows == "all" else {"per_device_train_batch_size": 4 if option.rows == "group" else 1}
    settings = args(**{**IN_FORCE[option.setting], **option.example, **few, "gradient_accumulation_steps": 4})
    if option.verdict == "refused":
        with pytest.raises(ConfigError, match=r" = .*; (write|leave it out)"):
            check_options(settings)
    else:
        messages = check_options(settings)
        assert bool(messages) == (option.verdict != "keeps"), messages
        assert all("\n" not in message and len(message) < 330 for message in messages)


def test_messages_name_field_value_and_remedy():
    (message,) = check_options(args(steps_per_generation=2), "run.yaml: trainer.")
    named = "trainer.num_iterations = 1 with trainer.steps_per_generation = 2, trainer.generation_batch_size = 16 lets"
    assert message.startswith(f"run.yaml: {named}")
    with pytest.raises(ConfigError, match=r"^loss_type = 'sapo' divides .*write loss_type: dapo or dr_grpo"):
        check_options(args(loss_type="sapo"))
    with pytest.raises(
        ConfigError, match=r"'new' is not known; write one of bnpo, dr_grpo, dapo, luspo, cispo, vespo$"
    ):
        check_options(args(loss_type="new"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"loss_type": "cispo", "epsilon_high": -0.2},
            "epsilon_high = -0.2 is not above 0, .* or descends; leave it out",
        ),
        ({"epsilon_high": -0.5}, "epsilon_high = -0.5 is not above 0"),
        ({"epsilon": -1.0}, "epsilon = -1.0 is not above 0, .*; write e.g. epsilon: 0.2"),
        ({"loss_type": "cispo", "epsilon": 0.0}, "epsilon = 0.0 is not above 0"),
        ({"epsilon": math.nan}, "epsilon = nan is not above 0"),
        ({"delta": math.nan}, "delta = nan is no number; leave it out"),
        ({"use_vllm": True, "vllm_importance_sampling_clip_max": 0.0}, "clip_max = 0.0 is not above 0"),
    ],
)
def test_values_that_reverse_or_end_the_gradient_are_refused(changes, told):
    with pytest.raises(ConfigError, match=f"^t: trainer.*{told}"):
        check_options(args(**changes), "t: trainer.")


@pytest.mark.parametrize("operator", [lstat(0, 1, 0), entropic(-2), tilt(0.1), soft_bon(2, 0.1)])
def test_operators_without_a_place_for_another_engines_ratios_are_told(operator):
    objective = Objective([Criterion("a", bon(2)), Criterion("b", operator)])
    (message,) = check_engine(args(use_vllm=True), objective)
    assert message.startswith(f"criterion 'b': {operator.name} under estimator 'auto' has no place for the ratios")
    assert not check_engine(args(), objective)
    assert not check_engine(args(use_vllm=True), Objective([Criterion("a", lstat(0, 0, 1))]))  # it is bon(3)
    plugin = check_engine(args(use_vllm=True), Objective([Criterion("a", bon(2))], estimator="plugin"))
    assert plugin[0].endswith("; write estimator: auto")


def test_a_bent_objective_is_refused_before_models_are_loaded(make_config):
    told = r"^test.yaml: trainer\.top_entropy_quantile = 0.5 leaves tokens out .*; leave it out$"
    with pytest.raises(ConfigError, match=told):
        make_plan(make_config(trainer__top_entropy_quantile=0.5), "test.yaml")


def test_the_checklist_warns(make_config):
    with pytest.warns(
        IamaWarning, match=r"'harmless': advantages of bop\(1\) under estimator 'loo' do not sum to zero"
    ):
        plan = make_plan(make_config(trainer__mask_truncated_completions=True), "test.yaml")
    assert "here loo" in plan.objective.describe()
    (check,) = [check for check in preflight(plan) if check.what == "options"]
    assert (check.status, check.remedy.startswith("leave it out, or let num_generations")) == ("warn", True)
    assert check.detail.startswith("trainer.mask_truncated_completions = True trains the value of the completions")
