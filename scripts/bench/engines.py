"""Samples a second of Best-of-16: our engine, transformers' `generate`, vLLM alone, and our tool on vLLM.

    python -m scripts.bench.engines --model demo --model llama-135m --dtype float32

Each stack has a process of its own (`.venv`, and `.venv-vllm` where `make install-vllm` has made it), which loads the
model once and warms up. Rounds alternate between the processes; only one works at a time. Figures are kept in
runs/bench/engines.json, and docs/results/performance.md has all that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
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
from iama.files import write_atomically

prepare_environment()

import torch  # noqa: E402 - after the environment is set
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from scripts import launch  # noqa: E402
from scripts.bench.engine_side import MARK, Job  # noqa: E402
from scripts.experiments.frame import Claim, claims_table, table  # noqa: E402

OUT, PAGE = Path("runs/bench"), Path("docs/results/performance.md")
WORLD, VLLM_PYTHON = Path("runs/demo/world"), Path(".venv-vllm/bin/python")
BEGIN, END = "<!-- written by python -m scripts.bench.engines -->", "<!-- end of engines -->"
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
    spinning: bool = False  # how threads wait for each other: by spinning, or asleep

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
    out: Annotated[Path, typer.Option(help="Folder of engines.json and of the random model.")] = OUT,
    page: Annotated[Path, typer.Option(help="The page whose section is written.")] = PAGE,
) -> None:
    """Measure engines side by side, and write the section of docs/results/performance.md."""
    console = Console(highlight=False)
    for name in model or list(Model):
        path = policy_path(name, world, out)
        shape = SHAPES[name]
        shape = Shape(shape.num_prompts, new_tokens or shape.new_tokens)
        for precision in dtype or list(Dtype):
            key = f"{name} {precision}{', spinning' * spin}"
            for found in measure(path, precision, shape, rounds, threads, console, spin=spin):
                store(out / "engines.json", key, replace(found, busy=busy, spinning=spin))
                write_section(page, stored(out / "engines.json"))
    console.print(f"wrote {out / 'engines.json'} and {page}", soft_wrap=True)


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


def store(path: Path, key: str, figures: Figures) -> None:
    """Keep figures beside those of other models and precisions."""
    kept = {name: asdict(value) for name, value in stored(path).items()} | {key: asdict(figures)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dict(sorted(kept.items())), indent=2) + "\n")


def stored(path: Path) -> dict[str, Figures]:
    """What is there, by model and precision."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: Figures(Shape(**value.pop("shape")), **value) for key, value in kept.items()}


def write_section(page: Path, all_figures: dict[str, Figures]) -> None:
    """Put the section in its place on the page, or at its end."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    section = f"{BEGIN}\n\n{shown(all_figures)}\n\n{END}"
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    new = marked.sub(lambda _: section, text) if marked.search(text) else f"{text.rstrip()}\n\n{section}\n".lstrip()
    write_atomically(page, new)


def shown(all_figures: dict[str, Figures]) -> str:
    """The section: rates, bars, and how they were measured."""
    rates = [
        [key, *(f"{value.rate(side):.2f}" if side in value.seconds else "not measured" for side in NAMES)]
        for key, value in all_figures.items()
    ]
    claims = []
    for key, value in all_figures.items():
        if "vllm" in value.seconds:
            claims += [claim(f"{key}: our engine over vLLM alone", value.ratio("ours", "vllm"), 0.95)]
            claims += [claim(f"{key}: our tool on vLLM over vLLM alone", value.ratio("on_vllm", "vllm"), 0.9)]
            seeded = value.ratio("on_vllm", "vllm_seeded")
            claims += [claim(f"{key}: our tool on vLLM over vLLM alone with seeds", seeded, 0.9)]
        claims += [claim(f"{key}: our engine over `generate`", value.ratio("ours", "generate"), 1.0)]
    how = "; ".join(
        f"{key}: {value.shape.num_prompts} prompts of {PROMPT_TOKENS} tokens, {value.shape.new_tokens} new tokens, "
        f"{number(len(value.seconds['ours']), 'round')}, {number(value.threads, 'thread')}, {value.machine}"
        f"{', while other work ran there' * value.busy}"
        for key, value in all_figures.items()
    )
    return f"""## Engines side by side

Samples a second of Best-of-{NUM_SAMPLES}'s sampling (temperature 1, no response ends early), medians of the rounds:

{table(["", *NAMES.values()], rates)}

{claims_table(claims)}

Ratios are medians of those of the rounds, with their range. {quicker(all_figures)}

What was sampled: {how}.

`llama-135m` has random weights in SmolLM2-135M's shape. Each stack has a process of its own; start-up and a warm-up
are not counted, and one process works at a time. `generate` runs on the model as our engine has packed it, which
makes it quicker than it is by itself (docs/design/engine.md, "Rows"). vLLM is `vllm-cpu` with `enforce_eager`: what
its compiler would gain was not measured. Threads wait for each other asleep, as our tool has them by itself
(`OMP_WAIT_POLICY=PASSIVE`), or in rows called spinning as OpenMP has them where nobody says otherwise: quicker on an
idle machine, on a shared one many times slower. Our tool gives each request a seed, so that results can be repeated;
vLLM alone needs none, and has a column without and one with them. With seeds vLLM draws the noise of every row twice,
all rows together and then row by row, over the whole vocabulary: that is what our tool on vLLM pays for where the
vocabulary is large. "not measured": there was no `.venv-vllm` (`make install-vllm`)."""


def number(count: int, what: str) -> str:
    """For people."""
    return f"{count} {what}{'s' * (count > 1)}"


def claim(text: str, ratios: list[float], bar: float) -> Claim:
    """A ratio of speeds with its bar."""
    ratio = statistics.median(ratios)
    spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if len(ratios) > 1 else ""
    return Claim(text, f"at least {bar:g}", f"{ratio:.3g}{spread}", ratio >= bar)


def quicker(all_figures: dict[str, Figures]) -> str:
    """Which precision is quicker, where a model has both."""
    told = []
    for name in Model:
        both = [all_figures.get(f"{name} {dtype}") for dtype in Dtype]
        if both[0] is not None and both[1] is not None:
            ratio = both[0].rate("ours") / both[1].rate("ours")
            first, second = ("float32", "bfloat16") if ratio >= 1 else ("bfloat16", "float32")
            told.append(
                f"On {name} our engine is {max(ratio, 1 / ratio):.2g} times as quick in {first} as in {second}."
            )
    return " ".join(told)


if __name__ == "__main__":
    app()
