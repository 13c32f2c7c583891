"""`iama selftest`: it passes where all is well, in one process and in two, and says what is wrong where it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from iama.models.tiny import save_tiny_policy
from inference.engine import selftest as engine
from tests.processes import ROOT, run_python
from trainers import selftest as training

CHECKS = ["start", "collectives", "shared folder", "two steps", "engine in force", "save and reopen", "engine law"]


def results(table: str) -> list[tuple[str, str]]:
    """Checks with their results, in order."""
    return re.findall(r"^ ?(\w[\w ]*?) {2,}(ok|FAIL) ", table, flags=re.MULTILINE)


@pytest.mark.slow
def test_one_process_passes_and_leaves_nothing(run, tmp_path):
    code, out, err = run("selftest", "--out", tmp_path / "runs")
    assert code == 0, out + err
    assert results(out) == [(name, "ok") for name in CHECKS]
    assert "all checks passed" in out
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_under_zero_have_the_losses_of_one(stage):
    """The command as a launcher starts it; DeepSpeed's adds --local_rank."""
    config = ROOT / "configs" / "deepspeed" / f"{stage}.json"
    done = run_python(["-m", "iama.cli", "--local_rank=0", "selftest", "--deepspeed-config", config], num_ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert results(done.stdout) == [(name, "ok") for name in CHECKS]
    assert f"DeepSpeed ZeRO-{stage[-1]}, 2 processes (gloo)" in done.stdout
    assert "2 processes; all-reduce of 4 MB in" in done.stdout


@pytest.mark.slow
def test_other_losses_fail(run, monkeypatch):
    first, second = training.LOSSES
    monkeypatch.setattr(training, "LOSSES", (first, second * 1.01))
    code, out, _ = run("selftest")
    assert code == 1
    assert results(out)[-1] == ("two steps", "FAIL")
    assert "step 2: the loss is" in out


def test_processes_on_several_machines_need_a_folder(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    code, _, err = run("selftest")
    assert code == 2
    assert "give --out" in err


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_has_the_law_of_transformers(run_with_files):
    code, out, err = run_with_files("selftest", "--engine", "vllm")
    assert code == 0, out + err
    assert results(out) == [(name, "ok") for name in [*CHECKS, "law of vLLM"]]


def test_an_unknown_engine(run):
    assert run("selftest", "--engine", "sglang")[0] == 2


def test_the_law_of_another_model_is_found(tmp_path, monkeypatch):
    """One weight too large by a thousandth in what the reference reads."""
    save_tiny_policy(tmp_path / "policy")
    assert re.search(r"^\d+ tokens as drawn .* within \d\.\de-\d\d nats$", engine.check_law(tmp_path / "policy", None))
    right = engine.whole_logits
    monkeypatch.setattr(engine, "whole_logits", lambda *given: right(*given) * 1.001)
    with pytest.raises(ValueError, match=r"log-probabilities of responses are apart by|token \d+ is"):
        engine.check_law(tmp_path / "policy", None)


def test_the_tiny_model_is_the_same_every_time(tmp_path: Path):
    state = torch.get_rng_state()
    for name in ("a", "b"):
        save_tiny_policy(tmp_path / name)
    assert torch.equal(state, torch.get_rng_state())
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
