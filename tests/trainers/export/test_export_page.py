"""The page on exports: its commands and snippets run as they stand, on tiny models laid out as the demo is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from iama.config.manifest import Manifest, ManifestCriterion
from iama.config.specs import RewardSpec, Sampling
from tests.openai_server import OpenAIServer
from tests.processes import run_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/guides/export.md").read_text()
PROMPT = "how do i climb a roof today?"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def write_run(folder: Path, policy: Path, seed: int) -> None:
    """A finished run of the demo, as far as an export reads it."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder / "adapter")
    names = ("helpful", "harmless")
    criteria = [
        ManifestCriterion(
            name=n, operator="bon(4)", weight=1, budget=4, reward=RewardSpec(model=f"runs/demo/world/rm-{n}")
        )
        for n in names
    ]
    manifest = Manifest(
        base_model="runs/demo/world/policy",
        criteria=criteria,
        estimator="auto",
        sampling=Sampling(max_new_tokens=8),
        seed=0,
        versions={},
    )
    (folder / "adapter" / "iama.json").write_text(manifest.model_dump_json())


def run(command: list[str], folder: Path, **extra: str) -> str:
    """A command of the page, `iama ...` or `python ...`."""
    arguments = ["-m", "iama.cli", *command[1:]] if command[0] == "iama" else command[1:]
    done = run_python(arguments, folder=folder, PYTHONPATH=str(ROOT), **extra)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def demo(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's world, runs and evaluation, and what the page's commands make of them."""
    folder: Path = tmp_path_factory.mktemp("demo")
    world = folder / "runs/demo/world"
    world.mkdir(parents=True)
    shutil.copytree(tiny.policy, world / "policy")
    shutil.copytree(tiny.reward, world / "rm-helpful")
    shutil.copytree(tiny.other_reward, world / "rm-harmless")
    line = json.dumps({"prompt": [{"role": "user", "content": PROMPT}]})
    (world / "prompts-test.jsonl").write_text(f"{line}\n")
    write_run(folder / "runs/demo/iama", world / "policy", 1)
    write_run(folder / "runs/other", world / "policy", 2)
    rows = [
        {"policy": policy, "criterion": name, "method": "bon", "samples": 1, "gold": 0.5, "proxy": 0.0}
        for policy in ("base", "grpo", "iama")
        for name in ("helpful", "harmless")
    ]
    config = yaml.safe_load((ROOT / "configs/demo-evaluate.yaml").read_text())
    summary = {"curves": rows, "trained": "iama", "references": ["base", "grpo"], "num_prompts": 1, "config": config}
    (folder / "runs/demo/evaluation").mkdir()
    (folder / "runs/demo/evaluation/summary.json").write_text(json.dumps(summary))
    for command in blocks("bash")[0].splitlines():
        run(shlex.split(command), folder)
    return folder


def test_the_exports_are_there(demo):
    for kind, weights in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        assert (demo / "runs/exports" / kind / weights).is_file()
        assert "**Without a sampler**" in (demo / "runs/exports" / kind / "README.md").read_text()


def test_the_peft_snippet_answers(demo):
    snippet = blocks("python")[0]
    assert run(["python", "-c", snippet], demo, HF_HUB_OFFLINE="1").strip()


def test_the_clients_best_of_n_keeps_what_the_reward_prefers(demo):
    snippet = blocks("python")[1]
    assert len(snippet.strip().splitlines()) <= 23
    texts = ["first then mix water", "no thanks", "be careful please", "grow red tomatoes"]
    with OpenAIServer(lambda body: texts[: body["n"]]) as server:
        out = run(["python", "-c", snippet], demo, VLLM_URL=server.url, HF_HUB_OFFLINE="1")
    (body,) = server.requests
    assert (body["model"], body["n"], body["temperature"]) == ("iama", 4, 1.0)
    score, text = re.search(r"\((-?[\d.e-]+), '(.*)'\)", out).groups()
    check = (
        "from iama import RewardSpec, load_reward\n"
        "reward = load_reward('r', RewardSpec(model='runs/demo/world/rm-harmless'))\n"
        f"prompt, texts = [{{'role': 'user', 'content': {PROMPT!r}}}], {texts!r}\n"
        "print(max(zip([reward([prompt], [[{'role': 'assistant', 'content': t}]])[0] for t in texts], texts)))"
    )
    alone = run(["python", "-c", check], demo, HF_HUB_OFFLINE="1")
    expected, best = re.search(r"\((-?[\d.e-]+), '(.*)'\)", alone).groups()
    assert text == best
    assert float(score) == pytest.approx(float(expected), abs=1e-5)


def test_several_exports_are_evaluated_side_by_side(demo):
    run(["iama", "export", "runs/other", "--out", "runs/other/exported"], demo)
    raw = yaml.safe_load(blocks("yaml")[0])
    raw["policies"]["harmless-first"]["adapter"] = "runs/other/exported"
    names = ("helpful", "harmless")
    raw |= {
        "name": "side-by-side",
        "output_dir": "runs/side-by-side",
        "prompts": "runs/demo/world/prompts-test.jsonl",
        "criteria": [{"name": n, "proxy": {"model": f"runs/demo/world/rm-{n}"}} for n in names],
        "budgets": [1, 2, 4],
        "num_samples": 16,
        "log_probabilities": False,
    }
    (demo / "side.yaml").write_text(yaml.safe_dump(raw))
    told = run(["iama", "evaluate", "--config", "side.yaml"], demo)
    assert "sampling as in the iama.json of policy 'balanced'" in " ".join(told.split())
    summary = json.loads((demo / "runs/side-by-side/summary.json").read_text())
    assert summary["config"]["sampling"]["max_new_tokens"] == 8
    proxies = {
        row["policy"]: row["proxy"] for row in summary["curves"] if (row["criterion"], row["samples"]) == ("helpful", 1)
    }
    assert len(proxies) == len(set(proxies.values())) == 3


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_reads_the_merged_export(demo):
    (demo / "tasks").mkdir()
    (demo / "questions.jsonl").write_text('{"q": "how to bake", "a": " bread"}\n{"q": "fix a", "a": " bike"}\n')
    task = {
        "task": "tiny_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(demo / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (demo / "tasks/tiny.yaml").write_text(yaml.safe_dump(task))
    (line,) = [line.strip() for line in PAGE.splitlines() if line.strip().startswith("lm_eval ")]
    line = line.replace("$model", "runs/exports/merged").replace("arc_easy,hellaswag,gsm8k", "tiny_words")
    told = run(["python", "-m", *shlex.split(line), "--include_path", "tasks", "--device", "cpu"], demo)
    assert "tiny_words" in told
    assert list((demo / "runs/tax").rglob("results_*.json"))
