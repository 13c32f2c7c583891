"""Samples a second of Best-of-16: our engine, transformers' `generate`, vLLM alone, and our tool on vLLM.

    python -m scripts.bench.engines --model demo --model llama-135m --dtype float32

Each stack has a process of its own (`.venv`, and `.venv-vllm` where `make install-vllm` has made it), which loads the
model once and warms up. Rounds alternate between the processes; only one works at a time. Each model and precision
renews its own section of docs/results/data/performance.json, from which docs/results/performance.md is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from iama.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402 - after the environment is set
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from scripts import launch  # noqa: E402
from scripts.bench import page, record  # noqa: E402
from scripts.bench.engine_side import MARK, Job  # noqa: E402
from scripts.bench.entries import Bar, Ratio, ratio_of  # noqa: E402
from scripts.experiments.frame import PAGES, table  # noqa: E402

OUT = Path("runs/bench")
WORLD, VLLM_PYTHON = Path("runs/demo/world"), Path(".venv-vllm/bin/python")
PROMPT_TOKENS, NUM_SAMPLES = 32, 16
NAMES = {
    "ours": "our engine",
    "generate": "`generate` of transformers",
    "vllm": "vLLM alone",
    "vllm_seeded": "vLLM alone, with seeds",
    "on_vllm": "our tool on vLLM",
}
app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Model(StrEnum):
    """What is sampled from."""

    DEMO = "demo"
    LLAMA = "llama-135m"


class Dtype(StrEnum):
    """In which precision."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Shape:
    """How much of a model is sampled in a round."""

    num_prompts: int
    new_tokens: int


SHAPES = {Model.DEMO: Shape(16, 48), Model.LLAMA: Shape(4, 64)}


@dataclass
class Figures:
    """Seconds of each side in each round, on one machine."""

    shape: Shape
    machine: str
    threads: int
    seconds: dict[str, list[float]]
    busy: bool = False  # whether other work ran on the machine

    def rate(self, side: str) -> float:
        """Samples a second, the median of the rounds."""
        return self.shape.num_prompts * NUM_SAMPLES / statistics.median(self.seconds[side])

    def ratio(self, side: str, other: str) -> list[float]:
        """Speed of a side over that of another, in each round."""
        return [theirs / own for own, theirs in zip(self.seconds[side], self.seconds[other], strict=True)]


@app.command(epilog="Example: python -m scripts.bench.engines --model demo --dtype float32 --rounds 3 --threads 2")
def main(
    model: Annotated[list[Model] | None, typer.Option(help="Measure this one (can be repeated); else both.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="In this precision (can be repeated); else both.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which every side samples once.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every side.")] = 2,
    busy: Annotated[bool, typer.Option("--busy", help="Other work runs on this machine; the page says so.")] = False,
    spin: Annotated[bool, typer.Option("--spin", help="Threads wait as OpenMP has it: for an idle machine.")] = False,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="New tokens a sample; else the model's own.")] = None,
    world: Annotated[Path | None, typer.Option(help="A demo world; else runs/demo/world, built if missing.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the random model.")] = OUT,
    results: Annotated[Path, typer.Option(help="Folder of the page and its record.")] = PAGES,
) -> None:
    """Measure engines side by side, renew their sections of the record, and write docs/results/performance.md."""
    console = Console(highlight=False)
    for name in model or list(Model):
        path = policy_path(name, world, out)
        shape = SHAPES[name]
        shape = Shape(shape.num_prompts, new_tokens or shape.new_tokens)
        for precision in dtype or list(Dtype):
            key = f"{name} {precision}{', spinning' * spin}"
            for found in measure(path, precision, shape, rounds, threads, console, spin=spin):
                record.renew(results, f"engines {key}", section(key, replace(found, busy=busy)))
    page.write(results)


def policy_path(name: Model, world: Path | None, out: Path) -> Path:
    """The model's folder; it is made where it is missing."""
    if name == Model.DEMO:
        if world is None:
            world = WORLD
            launch.build_world(0, str(world))
        return world / "policy"
    path = out / name
    if not (path / "tokenizer.json").is_file():
        make_llama(path)
    return path


def make_llama(path: Path) -> None:
    """A Llama of 135 million parameters, of SmolLM2's shape, with random weights; a word for each token id."""
    torch.manual_seed(0)
    size = 49_152
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=size,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)


def measure(
    path: Path, dtype: str, shape: Shape, rounds: int, threads: int, console: Console, *, spin: bool = False
) -> Iterator[Figures]:
    """Rounds of all sides, in turn; who goes first alternates. The figures are told after each round."""
    size = json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts_ids = torch.randint(5, size, (shape.num_prompts, PROMPT_TOKENS), generator=generator).tolist()
    pythons = {"transformers": Path(sys.executable)}
    if VLLM_PYTHON.is_file():
        pythons["vllm"] = VLLM_PYTHON
    sides: dict[str, subprocess.Popen[str]] = {}
    with contextlib.ExitStack() as stack:
        for engine, python in pythons.items():
            job = Job(engine, str(path), dtype, prompts_ids, NUM_SAMPLES, shape.new_tokens)
            process = stack.enter_context(started(python, threads, spin))
            ask(process, json.dumps(asdict(job)))
            sides |= dict.fromkeys(answered(process), process)
        seconds: dict[str, list[float]] = {side: [] for side in NAMES if side in sides}
        for seed in range(1, rounds + 1):
            for side in seconds if seed % 2 else reversed(seconds):
                ask(sides[side], f"{side} {seed}")
                seconds[side].append(answered(sides[side]))
            shown = ", ".join(f"{NAMES[side]} {values[-1]:.2f} s" for side, values in seconds.items())
            console.print(f"{path.name} {dtype}, round {seed} of {rounds}: {shown}", soft_wrap=True)
            yield Figures(shape, machine(), threads, seconds)


@contextlib.contextmanager
def started(python: Path, threads: int, spin: bool) -> Iterator[subprocess.Popen[str]]:
    """A process of a side, which ends with its input."""
    policies = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # those of `prepare_environment`
    environment = {name: value for name, value in os.environ.items() if name not in policies}
    environment |= {} if spin else policies
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": str(launch.ROOT),
    }
    command = [str(python), "-m", "scripts.bench.engine_side"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=launch.ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def ask(process: subprocess.Popen[str], line: str) -> None:
    """Tell a process what to do."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def answered(process: subprocess.Popen[str]) -> Any:
    """What it answers; exits where it has ended, its reason having been printed."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    sys.exit(f"a process of {process.args!r} has ended; see above")


def machine() -> str:
    """The processor, its cores, and what it has for bfloat16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    widest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "no avx2")
    return f"{name} ({os.cpu_count()} cores, {widest})"


BARS = {
    "ours_over_vllm": ("our engine over vLLM alone", "ours", "vllm", 0.95),
    "tool_over_vllm": ("our tool on vLLM over vLLM alone", "on_vllm", "vllm", 0.9),
    "tool_over_seeded": ("our tool on vLLM over vLLM alone with seeds", "on_vllm", "vllm_seeded", 0.9),
    "ours_over_generate": ("our engine over `generate`", "ours", "generate", 1.0),
}
"""What is promised of speeds, in each setting: words, a side, another, and the least ratio."""
HEADER = ["setting", *NAMES.values(), "prompts", "prompt tokens", "new tokens", "rounds", "threads"]


def section(key: str, figures: Figures) -> record.Section:
    """What a model and precision leaves in the record: ratios with bars, and a row of rates."""
    rates = [f"{figures.rate(side):.2f}" if side in figures.seconds else "not measured" for side in NAMES]
    shape = [figures.shape.num_prompts, PROMPT_TOKENS, figures.shape.new_tokens]
    rows = [[key, *rates, *shape, len(figures.seconds["ours"]), figures.threads]]
    threads = f"{figures.threads} thread{'s' * (figures.threads > 1)}"
    where = f"{figures.machine}, {threads}{', while other work ran there' * figures.busy}"
    return record.Section(where, ratios(key, figures), {"engines": table(HEADER, rows)})


def ratios(key: str, figures: Figures) -> list[Ratio]:
    """Ratios of the sides that were measured, with their bars."""
    return [
        ratio_of(
            f"{key.replace(', ', '_').replace(' ', '_')}_{name}",
            Bar(f"{key}: {text}", least, at_most=False, kind="engines"),
            figures.ratio(side, other),
        )
        for name, (text, side, other, least) in BARS.items()
        if {side, other} <= figures.seconds.keys()
    ]


if __name__ == "__main__":
    app()
