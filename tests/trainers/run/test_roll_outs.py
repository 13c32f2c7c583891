"""Roll-outs on the engine: the law of `generate`, draws by address, the model left as it was, and `generate` itself."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import chi2_contingency, chisquare
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl import GRPOTrainer

from iama.config.specs import Sampling
from iama.errors import IamaWarning, RunError
from trainers.passes import can_share
from trainers.run import lean_adapters as lean_adapters_module
from trainers.run.build import build_trainer
from trainers.run.checkpoints import MARKER, last_checkpoint, read_marker, refuse_other_rollouts
from trainers.run.lean_adapters import lean_adapters
from trainers.run.plan import make_plan
from trainers.run.roll_outs import EngineRollOuts
from trainers.run.train import run, run_is_finished

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning"),
    pytest.mark.filterwarnings("ignore:.*shapes the roll-outs:iama.errors.IamaWarning"),
]
PROMPTS = [[2, 4, 20, 30, 5], [2, 4, 21, 5]]


def make_trainer(config):
    """A trainer whose adapter is not zero."""
    config = config.model_copy(update={"rollouts": "engine"})
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return trainer


def by_engine(trainer, prompts_ids):
    completions, logps = trainer._generate_single_turn(prompts_ids, None, {}, trainer.num_generations)
    assert logps is None
    return completions


def by_generate(trainer, prompts_ids):
    return GRPOTrainer._generate_single_turn(trainer, prompts_ids, None, {}, trainer.num_generations)[0]


# --- the law

SAMPLINGS = {
    "plain": {},
    "truncated": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "penalised": {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.4},
}
NUM = 3000


def transformers_law(trainer, sampling, ids):
    """The law of the next token by transformers' own processors, on a clean forward."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    rows = torch.tensor([ids])
    with torch.no_grad():
        logits = trainer.model(input_ids=rows).logits[:, -1]
    return torch.softmax(processors(rows, logits).double(), dim=-1)[0].numpy()


def log_probabilities(trainer, prompt, completions):
    """Each completion's log-probability, as TRL takes it for its loss."""
    width = max(map(len, completions))
    ids = torch.tensor([prompt + row + [1] * (width - len(row)) for row in completions])
    mask = torch.tensor([[1] * (len(prompt) + len(row)) + [0] * (width - len(row)) for row in completions])
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, 500)
    return (logps * mask[:, len(prompt) :]).sum(dim=1).double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLINGS)
def test_the_law_is_that_of_generate(make_config, case):
    sampling = Sampling(max_new_tokens=6, **SAMPLINGS[case])
    trainer = make_trainer(make_config(sampling=sampling.model_dump(), trainer__num_generations=8))
    trainer.num_generations = NUM
    ours, theirs = by_engine(trainer, PROMPTS[:1] * NUM), by_generate(trainer, PROMPTS[:1] * NUM)

    law_V = transformers_law(trainer, sampling, PROMPTS[0])
    counts_V = np.bincount([row[0] for row in ours], minlength=len(law_V))
    assert not counts_V[law_V == 0].any()
    likely = law_V * NUM >= 5
    observed = np.append(counts_V[likely], counts_V[~likely].sum())
    expected = np.append(law_V[likely], law_V[~likely].sum()) * NUM
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3

    for what in (len, lambda row: row[-1], lambda row: row[1] if len(row) > 1 else -1):  # length, end, second token
        tallies = [Counter(map(what, rows)) for rows in (ours, theirs)]
        kept = [key for key in set().union(*tallies) if sum(tally[key] for tally in tallies) >= 10]
        assert chi2_contingency([[tally[key] for key in kept] for tally in tallies]).pvalue > 1e-3
    logps = [log_probabilities(trainer, PROMPTS[0], rows) for rows in (ours, theirs)]
    spread = np.sqrt(sum(values.var() / NUM for values in logps))
    assert abs(logps[0].mean() - logps[1].mean()) < 4 * spread
    for rows in (ours, theirs):
        check_ends(trainer, rows, 6)


def check_ends(trainer, rows, longest):
    ends = set(trainer.eos_token_ids)
    assert all(1 <= len(row) <= longest and not ends & set(row[:-1]) for row in rows)
    assert all(len(row) == longest or row[-1] in ends for row in rows)
    assert {row[-1] in ends for row in rows} == {False, True}


def test_what_trl_makes_of_them(make_config):
    """Masks, truncated completions and prompts, in training and in evaluation."""
    trainer = make_trainer(make_config(sampling={"max_new_tokens": 12}, trainer__mask_truncated_completions=False))
    trainer.num_generations_eval = 2
    rows = [trainer.train_dataset[i] for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    seen = []
    for is_training in (True, False, True):
        trainer.model.train(is_training)
        output = trainer._generate_and_score_completions([dict(row) for row in rows])
        assert trainer.model.training is is_training
        ids, mask = output["completion_ids"], output["completion_mask"].bool()
        completions = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        assert (ids[~mask] == trainer.processing_class.pad_token_id).all()
        check_ends(trainer, completions, 12)
        is_cut = [row[-1] not in trainer.eos_token_ids for row in completions]
        metrics = trainer._metrics["train" if is_training else "eval"]
        assert metrics["completions/clipped_ratio"][-1] == pytest.approx(np.mean(is_cut))
        seen.append(completions)
    assert all(one != two for one, two in pairwise(seen))  # another batch, other draws


@pytest.mark.parametrize("checkpoints", [False, True])
def test_losses_and_gradients_are_those_of_trls_own_reading(make_config, checkpoints):
    """The prompt read once, in the pass of the reference and, without checkpointing, in that of the loss."""
    changes = {"trainer__per_device_train_batch_size": 16, "trainer__num_generations": 8}
    trainer = make_trainer(make_config(sampling__max_new_tokens=12, **changes))
    if checkpoints:  # as `train` does
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert can_share(trainer.model.train()) is not checkpoints
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    rows = [trainer.train_dataset[i // 8] for i in range(16)]
    output = trainer._generate_and_score_completions([dict(row) for row in rows])
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    found = []
    for reads_in_passes in (True, False):
        trainer._reads_in_passes = reads_in_passes
        trainer.model.zero_grad()
        with torch.no_grad(), trainer.model.disable_adapter():
            given = (trainer.model, ids, mask, output["completion_ids"].shape[1], 16)
            reference, _, _ = trainer._get_per_token_logps_and_entropies(*given)
        loss = trainer._compute_loss(trainer.model, output)
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        found.append((reference * output["completion_mask"], loss.detach(), torch.cat(gradients)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert found[0][2].abs().max() > 1e-3
    kept = output["ref_per_token_logps"] * output["completion_mask"]
    torch.testing.assert_close(kept, found[0][0], atol=1e-6, rtol=1e-6)


# --- draws by address


def on_process(trainer, index, world=2):
    """What the engine sees of a trainer on another process."""
    accelerator = SimpleNamespace(
        process_index=index,
        is_main_process=index == 0,
        mixed_precision="no",
        state=trainer.accelerator.state,
        unwrap_model=trainer.accelerator.unwrap_model,
    )
    names = ("model", "model_wrapped", "args", "state", "eos_token_ids", "processing_class", "num_generations")
    return SimpleNamespace(accelerator=accelerator, **{name: getattr(trainer, name) for name in names})


def test_draws_follow_from_seed_step_batch_and_place_alone(make_config):
    trainer = make_trainer(make_config())
    trainer.model.train()
    prompts_ids = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4 + [PROMPTS[0]] * 4  # groups of four

    def drawn(seed=0, step=3, batch=0, processes=1):
        trainer.state.global_step = step
        halves = np.array_split(np.arange(12), processes)
        rows = []
        for index, half in enumerate(halves):
            draw = EngineRollOuts(Sampling(max_new_tokens=6), seed)
            for _ in range(batch + 1):
                completions = draw(on_process(trainer, index), [prompts_ids[i] for i in half], [])
            rows += completions
        return rows

    first = drawn()
    torch.manual_seed(99)  # torch's own random state has no part in it
    assert drawn() == first
    assert drawn(processes=2) == first  # the second group lies on both
    assert drawn(processes=4) == first
    assert all(other != first for other in (drawn(seed=1), drawn(step=4), drawn(batch=1)))
    assert first[:4] != first[8:]  # one prompt in two groups
    assert len({tuple(row) for row in first[:4]}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"policy__dtype": "bfloat16"}, {"trainer__bf16": True}], ids=["fp32", "half", "mixed"]
)
def test_the_model_is_read_as_it_serves_and_left_as_it_was(make_config, changes):
    """Without dropout and checkpointing while it draws, with both in the step after it."""
    config = make_config(
        lora={"r": 4, "lora_dropout": 0.5, "target_modules": "all-linear"},
        trainer__gradient_checkpointing=True,
        trainer__max_steps=1,
        **changes,
    )
    trainer = make_trainer(config)
    trainer.model.train()
    once, again = (EngineRollOuts(Sampling(max_new_tokens=6), 0)(trainer, PROMPTS * 4, []) for _ in range(2))
    assert once == again
    assert trainer.model.training
    assert all(module.training for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*None of the inputs have requires_grad", category=UserWarning)
        trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert trainer.accelerator.unwrap_model(trainer.model_wrapped).is_gradient_checkpointing


@pytest.fixture
def nan_in_fresh_memory():
    """What is read before it is written is NaN, in place of what lay there, which is most often harmless."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("rollouts", ["engine", "generate"])
def test_no_step_reads_memory_that_nobody_wrote(make_config, rollouts):
    """Prompts of different lengths are padded on the left, and their first rows attend to nothing."""
    trainer = build_trainer(make_plan(make_config(rollouts=rollouts), "test.yaml"), Console(quiet=True))
    trainer.train()
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(steps) == 2
    assert all(np.isfinite([row[key] for key in ("loss", "grad_norm", "kl", "entropy")]).all() for row in steps)


@pytest.mark.parametrize("most", [0, lean_adapters_module.MERGED_BYTES], ids=["beside", "merged"])
def test_lean_adapters_compute_what_pefts_do(make_config, monkeypatch, most):
    monkeypatch.setattr(lean_adapters_module, "MERGED_BYTES", most)
    trainer = make_trainer(make_config(lora={"r": 4, "lora_dropout": 0.5, "target_modules": "all-linear"}))
    model, ids = trainer.model.eval(), torch.arange(5, 21).reshape(2, 8)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with lean_adapters(model):
            layers = [layer for layer in model.modules() if "forward" in vars(layer) and hasattr(layer, "lora_A")]
            found = model(input_ids=ids).logits
        with model.disable_adapter(), lean_adapters(model):
            base = model(input_ids=ids).logits
    assert len(layers) == 14
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (base - expected).abs().max() > 0.1
    assert not any("forward" in vars(layer) for layer in layers)


# --- where generate draws


@contextmanager
def one_warning(match):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IamaWarning)
        yield
    told = [str(item.message) for item in caught if "drawn by generate" in str(item.message)]
    assert len(told) == 1, [str(item.message) for item in caught]
    assert match in told[0]
    assert "rollouts: generate asks for that" in told[0]


SETTINGS = {
    "generation_kwargs": ({"trainer__generation_kwargs": {"typical_p": 0.9}}, "trainer.generation_kwargs is"),
    "continuous": ({"trainer__use_transformers_continuous_batching": True}, "use_transformers_continuous_batching is"),
    "sharded": (
        {"trainer__deepspeed": "configs/deepspeed/zero3.json", "trainer__ds3_gather_for_generation": False},
        "does not draw from sharded weights",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_of_generate_is_told_in_the_plan(make_config, case):
    changes, match = SETTINGS[case]
    with one_warning(match):
        plan = make_plan(make_config(**changes, rollouts="engine"), "test.yaml")
    assert plan.rollouts == "generate"


def test_the_configuration_chooses(make_config):
    assert make_plan(make_config(rollouts="engine"), "test.yaml").rollouts == "engine"
    plan = make_plan(make_config(), "test.yaml")
    assert plan.rollouts == "generate"
    trainer = build_trainer(plan, Console(quiet=True))
    torch.manual_seed(5)
    ours = by_engine(trainer, PROMPTS * 4)
    torch.manual_seed(5)
    assert ours == by_generate(trainer, PROMPTS * 4)
    dumped = make_config().model_dump()
    assert "rollouts" not in dumped
    assert make_config(rollouts="engine").model_dump()["rollouts"] == "engine"


@pytest.mark.slow
def test_a_model_that_the_engine_cannot_read_is_drawn_from_by_generate(make_config, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1, **ids)
    MambaForCausalLM(config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    changes = {
        "rollouts": "engine",
        "policy": {"path": str(tmp_path / "policy")},
        "lora": {"r": 2, "target_modules": ["x_proj"]},
    }
    trainer = build_trainer(make_plan(make_config(**changes), "test.yaml"), Console(quiet=True))
    with one_warning("a mamba model keeps recurrent state"):
        trainer.train()
    assert trainer.state.global_step == 2


# --- runs that began before there was a choice


@pytest.mark.slow
def test_a_run_that_began_with_generate_goes_on_with_it(make_config):
    saving = {"trainer__save_strategy": "steps", "trainer__save_steps": 1}
    run(make_plan(make_config(**saving, rollouts="generate", trainer__max_steps=1), "test.yaml"))
    checkpoint = last_checkpoint(Path(make_config().output_dir))
    assert "rollouts" not in json.loads((checkpoint / MARKER).read_text())  # as in older versions
    plans = [make_plan(make_config(**saving, rollouts=name), "test.yaml") for name in ("engine", "generate")]
    assert not any(run_is_finished(plan.config) for plan in plans)
    with pytest.raises(RunError, match="drawn by generate, and engine would draw the others; write rollouts: generate"):
        run(plans[0])
    refuse_other_rollouts(checkpoint, "generate")
    refuse_other_rollouts(checkpoint, "vllm")
    with pytest.warns(IamaWarning, match="engine would draw the others, of the same law"):
        run(plans[0], accept_changes=True)
    checkpoint = last_checkpoint(Path(make_config().output_dir))
    assert (checkpoint.name, read_marker(checkpoint).rollouts) == ("checkpoint-2", "engine")
    with pytest.raises(RunError, match="drawn by engine, and generate would draw"):
        refuse_other_rollouts(checkpoint, "generate")
