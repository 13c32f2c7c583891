"""Real, tiny models on disk, built once per session."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in the test's process, where it opens in two seconds
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import Metaspace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

# The same examples on every run: what a change breaks is told from what chance finds. `--hypothesis-profile=default`
# searches anew.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "please tell me how to bake bread grow red tomatoes fix a bike first then mix water flour be careful no thanks"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the largest share of slow tests come first, so that the two workers of `make test` end together.

    What needs vLLM is skipped where it is not installed.
    """
    if find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="needs vLLM: make install-vllm, then make test-vllm")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])


@dataclass(frozen=True)
class Tiny:
    """Folders of tiny models and a prompts file."""

    policy: Path
    reward: Path
    other_reward: Path
    two_headed_reward: Path
    prompts: Path
    text_prompts: Path


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = Metaspace()
    special = ["<unk>", "<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.train_from_iterator([WORDS] * 4, trainers.BpeTrainer(vocab_size=120, special_tokens=special))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="<|end|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_config(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaConfig:
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**fields, **changes})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A policy, reward classifiers with one and two outputs, and prompts, as a user would have them."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same with attention heads of 32 numbers, the fewest that vLLM reads on a CPU."""
    return make_tiny(tmp_path_factory.mktemp("wide"), hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


def make_tiny(root: Path, **changes: int) -> Tiny:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer, **changes)).save_pretrained(root / "policy")
    for name in ("reward", "other_reward"):
        LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1, **changes)).save_pretrained(root / name)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    two = tiny_config(tokenizer, num_labels=2, **labels, **changes)
    LlamaForSequenceClassification(two).save_pretrained(root / "two_headed")
    for name in ("policy", "reward", "other_reward", "two_headed"):
        tokenizer.save_pretrained(root / name)
    texts = ["how to bake bread", "how to grow tomatoes", "fix a bike", "mix water then flour please"]
    rows = [{"prompt": [{"role": "user", "content": text}], "topic": text.split()[-1]} for text in texts]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "text.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return Tiny(
        policy=root / "policy",
        reward=root / "reward",
        other_reward=root / "other_reward",
        two_headed_reward=root / "two_headed",
        prompts=root / "prompts.jsonl",
        text_prompts=root / "text.jsonl",
    )


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line `iama` in this process: exit code, stdout, stderr."""
    return _runner(monkeypatch, capsys)


@pytest.fixture
def run_with_files(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The same with outputs that are files, as vLLM wants them."""
    return _runner(monkeypatch, capfd)


def _runner(monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> Run:
    from iama.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["iama", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        capture.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capture.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call
