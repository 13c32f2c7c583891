"""TRL's roll-outs by a real vLLM on a CPU: their law, and the probe that stops a wrong weight sync.

Colocated, one engine serves all tests of this file: every trainer begins by giving it all weights. A server on a CPU
takes no weights, which is what the probe must find.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from scipy import stats
from transformers import GenerationConfig
from trl.generation import vllm_client, vllm_generation

from iama.errors import RunError
from tests.processes import run_python
from tests.trainers import vllm_script
from tests.trainers.vllm_script import later, on_a_cpu, stale
from trainers.probe import METRIC
from trainers.run.build import build_trainer
from trainers.run.engine import leave_process_group
from trainers.run.plan import make_plan

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FP32 = 0.0125
"""The tolerance in force: both programs compute in float32."""
OTHER_END = 20
"""A token that ends an answer besides the tokenizer's own."""
NEVER = 1e-4
"""A p-value below which two samples are not of one law."""
Weights = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def policy(wide: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose answers end at either of two tokens."""
    folder = tmp_path_factory.mktemp("ends") / "policy"
    shutil.copytree(wide.policy, folder)
    ends = GenerationConfig.from_pretrained(folder)
    ends.eos_token_id = [ends.eos_token_id, OTHER_END]
    ends.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_once() -> Iterator[Callable[..., Any]]:
    """vLLM on a CPU (`on_a_cpu`), opened once for a number format and a folder."""
    before, opened = dict(os.environ), {}
    with on_a_cpu():
        open_llm = vllm_generation.LLM

        def open_once(dtype: str, model: str, **settings: Any) -> Any:
            if (model, dtype) not in opened:
                opened[model, dtype] = open_llm(model=model, dtype=dtype, **settings)
            return opened[model, dtype]

        yield open_once
    for llm in opened.values():
        llm.llm_engine.engine_core.shutdown()
    leave_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def build(
    make_config: Any, policy: Path, open_once: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A function from changes of the configuration to a trainer that draws with vLLM, in the policy's format."""

    def make(**changes: Any) -> Any:
        settings = {"trainer__use_vllm": True, "watch__clipped": 1.0, "trainer__learning_rate": 0.02}
        config = make_config(policy__path=str(policy), **{**settings, **changes})
        monkeypatch.setattr(vllm_generation, "LLM", functools.partial(open_once, config.policy.dtype))
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
        {"policy__dtype": "bfloat16", "lora__target_modules": "all-linear"},
    ],
    ids=["plain", "dropout", "nucleus", "min_p", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_a_healthy_run_agrees_to_rounding_at_every_step(build, changes):
    trainer = build(**changes, trainer__max_steps=4)
    is_float32 = "policy__dtype" not in changes
    assert trainer.vllm_tolerance == (FP32 if is_float32 else 0.1)
    trainer.train()
    found = [row[METRIC] for row in lines(trainer)]
    assert len(found) == 4
    assert max(found) < (1e-4 if is_float32 else 0.05)


@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_a_run_that_goes_on_gives_vllm_its_adapter_once(build, tmp_path):
    settings = {"trainer__save_strategy": "steps", "trainer__save_steps": 2}
    build(**settings, trainer__max_steps=2, output_dir=str(tmp_path / "first")).train()
    trainer = build(**settings, trainer__max_steps=4, output_dir=str(tmp_path / "second"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-2"))
    assert [row["step"] for row in lines(trainer)] == [3, 4]
    assert max(row[METRIC] for row in lines(trainer)) < 1e-4
    assert max(row["kl_per_token"] for row in lines(trainer)) > 1e-3  # an adapter that counts


def runner(trainer: Any) -> Any:
    return trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner


def change_later(trainer: Any, patch: pytest.MonkeyPatch, change: Callable[[Weights], Weights]) -> None:
    """All syncs but the first give vLLM other weights."""
    sync, model = trainer.vllm_generation.sync_weights, runner(trainer).model
    load = model.load_weights

    def changed() -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(model, "load_weights", lambda weights: load(change(weights)))
            sync()

    patch.setattr(trainer.vllm_generation, "sync_weights", later(sync, changed))


def one_matrix_missing(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """One of the four matrices with an adapter keeps its first weights."""
    change_later(trainer, patch, lambda rows: [row for row in rows if "layers.1.self_attn.v_proj" not in row[0]])


def no_numbers(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """As a gather that comes too late leaves a matrix."""
    change_later(
        trainer, patch, lambda rows: [(name, w * torch.nan if "layers.1.mlp.up" in name else w) for name, w in rows]
    )


def merged_twice(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """The adapter counts double in what vLLM gets."""
    sync = trainer.vllm_generation.sync_weights

    def doubled() -> None:
        layers = [m for m in trainer.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
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


@pytest.mark.parametrize(
    ("spoil", "step", "figure", "changes"),
    [
        (stale, 2, 0.11, {}),
        (no_numbers, 2, None, {}),
        (one_matrix_missing, 2, 0.022, {}),
        (merged_twice, 2, 0.18, {}),
        (raw_log_probabilities, 1, 0.34, {"sampling__temperature": 0.7}),
        (another_temperature, 1, 0.41, {"sampling__temperature": 0.7}),
        (no_nucleus, 1, 0.49, {"sampling__top_p": 0.6}),
    ],
)
@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_what_is_wrong_stops_the_run_within_a_step(build, monkeypatch, spoil, step, figure, changes):
    """The figures are those of docs/guides/rollouts.md."""
    trainer = build(**changes, trainer__max_steps=4, trainer__save_strategy="steps", trainer__save_steps=1)
    spoil(trainer, monkeypatch)
    with pytest.raises(RunError, match=rf"^step {step}: vLLM's log-probabilities of the roll-outs ") as caught:
        trainer.train()
    told = str(caught.value)
    assert "\n" not in told
    assert "watch.vllm_tolerance is 0.0125" in told
    if figure is None:
        assert "are missing, or the trainer rules the token out, for 48 of 48 tokens" in told
    else:
        (found,) = re.findall(r"differ from the trainer's by (\S+) nats a token", told)
        assert float(found) == pytest.approx(figure, rel=0.3)
    folder = Path(trainer.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{i}" for i in range(1, step)]


@dataclass
class Drawn:
    """What a run drew and learned: rewards `[samples, criteria]`, token ids, and the loss of each step."""

    rewards: torch.Tensor
    ids: list[list[int]]
    losses: list[float]


def trained(trainer: Any) -> Drawn:
    """Train, and keep every roll-out."""
    rewards, ids, calculate = [], [], trainer._calculate_rewards

    def kept(inputs: Any, prompts: Any, completions: Any, completion_ids: list[list[int]]) -> torch.Tensor:
        rewards.append(calculate(inputs, prompts, completions, completion_ids))
        ids.extend(completion_ids)
        return rewards[-1]

    trainer._calculate_rewards = kept
    trainer.train()
    return Drawn(torch.cat(rewards), ids, [row["loss"] for row in trainer.state.log_history if "loss" in row])


@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_at_fixed_weights_the_roll_outs_have_the_law_of_generate(build, tmp_path):
    """With an adapter that is not zero, and a learning rate that nearly is."""
    both = []
    for name in ("vllm", "transformers"):
        trainer = build(
            output_dir=str(tmp_path / name),
            trainer__use_vllm=name == "vllm",
            trainer__learning_rate=1e-12,
            trainer__max_steps=40,
            trainer__per_device_train_batch_size=32,
            trainer__num_generations=8,
            sampling__max_new_tokens=12,
            sampling__temperature=0.9,
        )
        torch.manual_seed(1)
        for parameter in [p for key, p in trainer.model.named_parameters() if "lora_B" in key]:
            parameter.data.normal_(std=0.2)
        both.append(trained(trainer))
        if name == "vllm":
            logged = [row for row in trainer.state.log_history if "loss" in row]
            assert max(row["sampling/sampling_logp_difference/max"] for row in logged) < 1e-3
    by_vllm, by_generate = both
    assert len(by_vllm.ids) == 40 * 32
    values = [stats.ttest_ind(by_vllm.losses, by_generate.losses).pvalue]
    values += [stats.ks_2samp(*pair).pvalue for pair in zip(by_vllm.rewards.T, by_generate.rewards.T, strict=True)]
    for of in (len, lambda ids: ids[0], lambda ids: ids[-1]):
        counts = [Counter(map(of, drawn.ids)) for drawn in both]
        often = [key for key, number in (counts[0] + counts[1]).items() if number >= 16]
        table = np.asarray([[count[key] for key in often] for count in counts])
        rest = len(by_vllm.ids) - table.sum(axis=1, keepdims=True)
        table = np.concatenate([table, rest], axis=1) if rest.all() else table
        values.append(stats.chi2_contingency(table).pvalue)
    assert min(values) > NEVER
    ends = set(trainer.eos_token_ids)
    assert ends == {3, OTHER_END}
    for drawn in both:
        assert not any(ends & set(ids[:-1]) for ids in drawn.ids)
        assert {ids[-1] for ids in drawn.ids if len(ids) < 12} == ends


@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_a_reward_rises_as_it_does_under_generate(build, tmp_path):
    """To the same end, a brevity that a policy can reach in full: half-way, trainings differ threefold by seed."""
    file, rises = tmp_path / "brief.py", []
    file.write_text("def brevity(completions, **_):\n    return [-len(str(c).split()) / 12 for c in completions]\n")
    for name in ("vllm", "transformers"):
        trainer = build(
            output_dir=str(tmp_path / name),
            objective__criteria=[{"name": "brief", "proxy": {"function": f"{file}:brevity"}, "operator": "identity"}],
            trainer__use_vllm=name == "vllm",
            trainer__beta=0.0,
            trainer__lr_scheduler_type="constant",
            trainer__max_steps=60,
            trainer__per_device_train_batch_size=32,
            trainer__num_generations=8,
            sampling__max_new_tokens=12,
        )
        steps = trained(trainer).rewards[:, 0].reshape(60, 32)
        rises.append(float(steps[-10:].mean() - steps[:10].mean()))
        assert rises[-1] > float(steps[:10].std()), rises
    assert 0.6 < rises[0] / rises[1] < 1.7, rises


@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_all_processes_stop_together_where_one_is_wrong(raw_config, policy, tmp_path):
    changes = {"policy": {"path": str(policy)}, "world_size": 2, "output_dir": str(tmp_path / "run")}
    raw_config["trainer"] |= {"use_vllm": True, "learning_rate": 0.02, "max_steps": 4, "per_device_train_batch_size": 4}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**raw_config, **changes}))
    (tmp_path / "run").mkdir()
    done = run_python([vllm_script.__file__, file, "1"], num_ranks=2)
    told = dict(re.findall(r"process (\d) stopped: (.*)", done.stdout))
    assert set(told) == {"0", "1"}, done.stdout[-3000:] + done.stderr[-6000:]
    assert told["0"] == told["1"]
    assert told["0"].startswith("step 2: vLLM's log-probabilities of the roll-outs of process 1 differ")


@pytest.fixture(scope="module")
def server(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a vLLM server of the policy, with TRL's settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    told = ["--dtype", "float32", "--enforce-eager", "--logprobs-mode", "processed_logprobs", "--port", str(port)]
    told += ["--weight-transfer-config", '{"backend": "nccl"}', "--max-model-len", "128", "--max-num-seqs", "64"]
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy), *told],
            env={**os.environ, **own},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 400  # half a minute on two idle cores
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_a_server_that_gets_no_weights_is_found(build, server, monkeypatch, tmp_path):
    settings = {"trainer__vllm_mode": "server", "trainer__vllm_server_base_url": f"http://127.0.0.1:{server}"}
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):  # what `CPU_FAILURES` names
        build(**settings, output_dir=str(tmp_path / "refused"))
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda *_, **__: None)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", lambda _: None)
    trainer = build(**settings, trainer__max_steps=4, sampling__temperature=0.8)
    assert trainer.vllm_tolerance == FP32
    with pytest.raises(RunError, match=r"^step 2: vLLM's log-probabilities of the roll-outs differ"):
        trainer.train()
    (found,) = [row[METRIC] for row in lines(trainer)]
    assert found < 1e-4
