"""TRL's roll-outs by a real vLLM, colocated, on a CPU: their law, and the probe that stops a wrong weight sync.

On a CPU vLLM packs the weights of linear layers and drops what `load_weights` would fill, so that TRL's weight sync
fails; `unpacked` leaves them as they are, which a GPU does by itself. One engine serves all tests of this file: every
trainer begins by giving it all weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats
from transformers import LlamaForCausalLM, TrainerCallback

from iama.errors import RunError
from tests.conftest import make_tokenizer, tiny_config
from trainers.probe import METRIC
from trainers.run import plan as plan_module
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FP32 = 0.0125
"""The tolerance in force: both programs compute in float32."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with heads of 32, the smallest that vLLM takes on a CPU."""
    folder, tokenizer = tmp_path_factory.mktemp("policy"), make_tokenizer()
    torch.manual_seed(0)
    config = tiny_config(tokenizer, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., Any]]:
    """`vllm.LLM` in float32 with weights that can be replaced; opened once for a folder."""
    from vllm import LLM, _custom_ops
    from vllm.model_executor.layers import utils

    before, opened = dict(os.environ), {}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

    def open_once(model: str, **settings: Any) -> Any:
        if model not in opened:
            opened[model] = LLM(model=model, **{**settings, "dtype": "float32", "enforce_eager": True})
        return opened[model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "_supports_onednn", False)
        patch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
        yield open_once
    for llm in opened.values():
        llm.llm_engine.engine_core.shutdown()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def build(make_config: Any, policy: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from changes of the configuration to a trainer that draws with vLLM."""
    from trl.generation import vllm_generation

    monkeypatch.setattr(plan_module, "can_sync_weights", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", engine)

    def make(**changes: Any) -> Any:
        settings = {"trainer__use_vllm": True, "watch__clipped": 1.0, "trainer__learning_rate": 0.02}
        config = make_config(policy__path=str(policy), **{**settings, **changes})
        Path(config.output_dir).mkdir()
        return build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))

    return make


def lines(trainer: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling__temperature": 0.7, "lora__lora_dropout": 0.3},
        {"sampling__top_p": 0.8, "sampling__top_k": 20, "sampling__repetition_penalty": 1.3},
        {"sampling__min_p": 0.05, "trainer__vllm_importance_sampling_correction": False},
    ],
    ids=["plain", "dropout", "nucleus", "min_p"],
)
@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_a_healthy_run_agrees_to_rounding_at_every_step(build, changes):
    trainer = build(**changes, trainer__max_steps=4)
    assert trainer.vllm_tolerance == FP32
    trainer.train()
    found = [row[METRIC] for row in lines(trainer)]
    print(found, [row.get("sampling/sampling_logp_difference/mean") for row in trainer.state.log_history])
    assert len(found) == 4
    assert max(found) < 1e-4


class Skipped:
    """vLLM's model without the weights whose names hold `part`."""

    def __init__(self, model: Any, part: str) -> None:
        self.load, self.part = model.load_weights, part

    def __call__(self, weights: Any) -> Any:
        return self.load([(name, weight) for name, weight in weights if self.part not in name])


def later(first: Callable[[], None], rest: Callable[[], None]) -> Callable[[], None]:
    """The first call is `first`, all others are `rest`."""
    calls = iter([first])
    return lambda: next(calls, rest)()


def stale(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """No sync but the first: the second batch of roll-outs is of weights one step old."""
    patch.setattr(trainer.vllm_generation, "sync_weights", later(trainer.vllm_generation.sync_weights, lambda: None))


def one_layer_missing(trainer: Any, patch: pytest.MonkeyPatch, part: str = "layers.1.self_attn.v_proj") -> None:
    sync, model = trainer.vllm_generation.sync_weights, vllm_model(trainer)

    def without() -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(model, "load_weights", Skipped(model, part), raising=False)
            sync()

    patch.setattr(trainer.vllm_generation, "sync_weights", later(sync, without))


def merged_twice(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """The adapter counts double in what vLLM gets."""
    sync = trainer.vllm_generation.sync_weights

    def doubled() -> None:
        layers = [m for m in trainer.model.modules() if "default" in getattr(m, "scaling", {})]
        assert layers
        for layer in layers:
            layer.scaling["default"] *= 2
        sync()
        for layer in layers:
            layer.scaling["default"] /= 2

    patch.setattr(trainer.vllm_generation, "sync_weights", doubled)


def raw_log_probabilities(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """As a server without `--logprobs-mode processed_logprobs`."""
    sampler = runner(trainer).sampler
    patch.setattr(sampler, "logprobs_mode", "raw_logprobs")
    patch.setattr(sampler.topk_topp_sampler, "logprobs_mode", "raw_logprobs")


def another_temperature(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer.vllm_generation, "temperature", 1.0)


def no_nucleus(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer.vllm_generation, "top_p", 1.0)


def runner(trainer: Any) -> Any:
    return trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner


def vllm_model(trainer: Any) -> Any:
    return runner(trainer).model


@pytest.mark.parametrize(
    ("spoil", "step", "changes"),
    [
        (stale, 2, {}),
        (one_layer_missing, 2, {}),
        (merged_twice, 2, {}),
        (raw_log_probabilities, 1, {"sampling__temperature": 0.7}),
        (another_temperature, 1, {"sampling__temperature": 0.7}),
        (no_nucleus, 1, {"sampling__top_p": 0.6}),
    ],
)
@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_what_is_wrong_stops_the_run_within_a_step(build, monkeypatch, spoil, step, changes):
    trainer = build(**changes, trainer__max_steps=4, trainer__save_strategy="steps", trainer__save_steps=1)
    spoil(trainer, monkeypatch)
    with pytest.raises(RunError, match=rf"^step {step}: vLLM's log-probabilities of the roll-outs differ") as caught:
        trainer.train()
    print(spoil.__name__, str(caught.value)[:200], lines(trainer) if step > 1 else "")
    assert "\n" not in str(caught.value)
    assert "watch.vllm_tolerance is 0.0125" in str(caught.value)
    folder = Path(trainer.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{i}" for i in range(1, step)]
