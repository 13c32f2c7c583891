"""Roll-outs through vLLM: our trainer hands TRL's settings through and trains on what comes back.

vLLM needs a GPU. In its place stands the policy itself behind TRL's own `VLLMGeneration`, whose constructor, weight
sync and `generate` keep their signatures; what vLLM would do inside them is not tested here.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from iama.errors import ConfigError
from trainers.run import plan as plan_module
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan


class InProcess(VLLMGeneration):
    """Everything of TRL's class but the server or engine behind it."""

    made: list[Any] = []  # noqa: RUF012 - read by the tests

    def _init_vllm(self) -> None:
        self.synced: list[float] = []
        told = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: told)
        self.made.append(self)

    def sync_weights(self) -> None:
        lora = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        self.synced.append(float(sum(p.abs().sum() for p in lora)))

    @torch.no_grad()
    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any = None) -> Any:
        end, completions, logprobs = self.processing_class.eos_token_id, [], []
        for ids in prompts:
            row, own = list(ids), []
            while len(row) - len(ids) < self.max_completion_length and (len(row) == len(ids) or row[-1] != end):
                logits = self.model(input_ids=torch.tensor([row])).logits[0, -1].float() / self.temperature
                law = logits.log_softmax(-1)
                token = int(torch.multinomial(law.exp(), 1))
                row.append(token)
                own.append([law[token].item()])
            completions.append(row[len(ids) :])
            logprobs.append(own)
        return prompts, completions, logprobs, None


def test_without_vllm_one_line_says_what_to_install(make_config):
    with pytest.raises(ConfigError, match=r"trainer\.use_vllm is set, but vLLM is not installed"):
        make_plan(make_config(trainer__use_vllm=True), "config.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_settings_pass_through_and_what_comes_back_trains(make_config, monkeypatch, mode):
    monkeypatch.setattr(plan_module, "_check_vllm", lambda *_: None)
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", InProcess)
    settings = {"use_vllm": True, "vllm_mode": mode, "vllm_gpu_memory_utilization": 0.25, "vllm_server_port": 8123}
    changes = {f"trainer__{key}": value for key, value in settings.items()}
    config = make_config(**changes, trainer__log_completions=True, sampling__temperature=0.7, watch__clipped=1.0)
    Path(config.output_dir).mkdir()
    trainer = build_trainer(make_plan(config, "config.yaml"), Console(quiet=True))
    trainer.train()
    engine = InProcess.made.pop()
    assert (engine.mode, engine.gpu_memory_utilization, engine.server_port) == (mode, 0.25, 8123)
    assert (engine.temperature, engine.max_completion_length) == (0.7, 6)
    assert len(engine.synced) == 2
    assert engine.synced[0] == 0.0 < engine.synced[1]  # the second roll-out is of the trained weights
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    logged = trainer.state.log_history[0]
    # The same weights sampled and are trained, so that both give the same log-probabilities.
    assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(0.0, abs=1e-5)


def test_the_stand_in_keeps_trls_signatures():
    for name in ("sync_weights", "generate"):
        ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (InProcess, VLLMGeneration))
        assert list(ours) == list(theirs)
