from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from iama.errors import RunError
from iama.models.flops import forward_flops, size_of
from inference.evaluation.training_cost import (
    TRL_DEFAULTS,
    Training,
    mean_prompt_tokens,
    num_seen,
    own_reward_sizes,
    read_run,
    run_flops,
    run_prompts,
)
from inference.statistics.break_even import break_even


@pytest.fixture
def make_run(tmp_path):
    def make(trainer=None, kl=None, lengths=(10.0, 20.0), steps=None, world_size=1):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        shapes = {"a": (3, 4), "b": (5, 3)}
        tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        config = {"policy": {"path": "x"}, "prompts": "p.jsonl", "world_size": world_size, "trainer": trainer or {}}
        (tmp_path / "config.json").write_text(json.dumps(config | ({"kl": kl} if kl else {})))
        rows = zip(steps or range(1, len(lengths) + 1), lengths, strict=True)
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "mean_length": n}) + "\n" for s, n in rows)
        )
        return tmp_path

    return make


def test_defaults_are_those_of_trl():
    from trl import GRPOConfig

    fields = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert {name: fields[name] for name in TRL_DEFAULTS} == TRL_DEFAULTS


def test_flops_by_hand(make_run):
    """2 steps of 4 rows, 15 response and 5 prompt tokens, 100 FLOPs a token, 27 adapter weights."""
    plain = {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
    run = read_run(make_run(plain))
    assert (run.num_rollouts, run.num_rows, run.mean_response_tokens, run.adapter_parameters) == (8, 8, 15, 27)
    tokens = 8 * (5 + 15)
    drawn, learnt = 100 + 54, 2 * 100 + 6 * 27
    assert run.flops(100, 5) == tokens * (drawn + learnt)
    assert run.flops(100, 5, 7) == tokens * (drawn + learnt + 7)
    with_reference = read_run(make_run(plain | {"beta": 0.1}))
    assert with_reference.flops(100, 5) == tokens * (drawn + learnt + 100)
    with_chi2 = read_run(make_run(plain | {"beta": 0.1}, kl={"chi2": 0.1}))
    assert with_chi2.flops(100, 5) == tokens * (2 * drawn + learnt + 100)
    checkpointed = read_run(make_run({"per_device_train_batch_size": 4}))
    assert checkpointed.flops(100, 5) == tokens * (drawn + learnt + 154)


def test_batches_and_iterations(make_run):
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_iterations": 2}
    run = read_run(make_run(fields, world_size=2))
    assert (run.num_rows, run.num_rollouts) == (2 * 4 * 3 * 2, 4 * 3 * 2)
    assert run.passes == 1  # roll-outs are used again after a step, so their old log-probabilities are needed
    for fields, passes in (
        ({"gradient_accumulation_steps": 4}, 0),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 0),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 1),
        ({"gradient_accumulation_steps": 2, "generation_batch_size": 32}, 1),
        ({"use_vllm": True}, 1),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, 0),
    ):
        assert read_run(make_run(fields)).passes == passes, fields


def test_a_line_may_stand_for_several_steps(make_run):
    run = read_run(make_run({"per_device_train_batch_size": 1}, lengths=(10.0, 40.0), steps=(1, 3)))
    assert (run.num_rows, run.mean_response_tokens) == (3, 30)


def test_prompt_tokens(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    tokenizer.save_pretrained(tmp_path / "adapter")
    for prompts in (str(tiny.text_prompts), {"path": str(tiny.text_prompts)}):
        (tmp_path / "config.json").write_text(json.dumps({"policy": {}, "prompts": prompts}))
        texts = [json.loads(line)["prompt"] for line in tiny.text_prompts.read_text().splitlines()]
        assert mean_prompt_tokens(tmp_path, run_prompts(tmp_path)) == np.mean(
            [len(tokenizer(text)["input_ids"]) for text in texts]
        )


def test_prompts_of_the_training_run_are_counted_whatever_system_message_stands_before_them(tmp_path):
    run = Training(tmp_path, None, 1.0, frozenset({"hi", "ho\nhe\nwhy"}))
    talk = [{"role": "user", "content": "ho"}, {"role": "assistant", "content": "he"}]
    asking = [*talk, {"role": "user", "content": "why"}]
    rows = [
        {"prompt": "hi"},
        {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
        {"prompt": asking},
        {"prompt": "other"},
    ]
    assert num_seen(rows, [run]) == 3
    assert num_seen(rows, []) is None


def test_what_a_folder_lacks_is_named(make_run, tmp_path):
    with pytest.raises(RunError, match="nowhere' does not exist"):
        read_run(tmp_path / "nowhere")
    folder = make_run(lengths=())
    with pytest.raises(RunError, match="do not rise"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: no step and mean_length"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"holds no metrics\.jsonl"):
        read_run(folder)
    (make_run() / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match="damaged"):
        read_run(folder)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="finish the training run"):
        read_run(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(RunError, match="no training run's configuration"):
        read_run(folder)


def test_rewards_are_those_of_the_runs_own_objective(make_run, tiny):
    from transformers import AutoModelForSequenceClassification

    folder = make_run()
    config = json.loads((folder / "config.json").read_text())
    size = size_of(AutoModelForSequenceClassification.from_pretrained(tiny.reward))
    criteria = [{"proxy": {"model": str(tiny.reward)}}, {"proxy": {"model": None, "function": "f.py:f"}}]
    run, tokens = read_run(folder), 20
    each = forward_flops(size, 0, tokens) / tokens
    for objective, own, rewards in (
        ({"criteria": criteria}, [size], 1),
        ({"criteria": criteria[1:]}, [], 0),
        ({"criteria": [*criteria, {"proxy": {"model": "gone"}}]}, None, 3),
        (None, None, 3),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"objective": objective}))
        assert own_reward_sizes(folder) == own
        expected = run.flops(each, 5, rewards * each)
        assert run_flops(folder, run, 5, size, [size] * 3) == pytest.approx(expected)


def test_the_references_training_is_subtracted():
    found = break_even(1000.0, 30.0, 10.0, censored=False, reference_training_flops=400.0)
    assert (found.queries, found.training_flops, found.reference_training_flops) == (30.0, 1000.0, 400.0)
    for theirs in (1000.0, 2000.0):
        for censored in (False, True):
            at_once = break_even(1000.0, 30.0, 10.0, censored=censored, reference_training_flops=theirs)
            assert (at_once.queries, at_once.bound) == (0.0, False)
            assert "took no less" in at_once.note
    dearer = break_even(1000.0, 5.0, 10.0, censored=False, reference_training_flops=2000.0)
    assert (dearer.queries, dearer.note) == (None, "nothing is saved")


def test_break_even():
    found = break_even(1000.0, 30.0, 10.0, censored=False)
    assert (found.queries, found.bound, found.note) == (50.0, False, "")
    bound = break_even(1000.0, 30.0, 10.0, censored=True)
    assert (bound.queries, bound.bound) == (50.0, True)
    assert "at most" in bound.note
    for censored, floor, reference in ((False, False, 10.0), (True, False, 5.0), (False, True, 30.0)):
        never = break_even(1000.0, reference, 10.0, censored=censored, floor=floor)
        assert (never.queries, never.bound) == (None, False)
        assert never.note
