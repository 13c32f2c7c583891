"""Build one world with sums: prompts, a base policy with two early checkpoints of its fit, three proxy reward models.

    python -m scripts.build_sums_models --seed 0 --out runs/demo/sums

Like scripts/build_demo_models.py, but one model after the other in this process; a build that was killed goes on after
the last model that was whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Before torch is imported: one thread, no call to any hub, no search for accelerators.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from scripts.build_demo_models import SOURCES as DEMO_SOURCES
from scripts.build_demo_models import STAMP
from scripts.demo_corpus import CRITERIA as JOB_CRITERIA
from scripts.demo_corpus import Criterion, sample_pairs
from scripts.sums_world import (
    SumsWorld,
    correct,
    is_grammatical,
    make_sums_world,
    sample_all_exchanges,
    sample_sum_pairs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Report = Callable[[int, int], None]
    Part = Callable[[Path, Report], dict[str, Any]]

CRITERIA = (*JOB_CRITERIA, "correct")
SHARES = {"policy-10": 0.1, "policy-30": 0.3}
"""Checkpoints of the base policy, by the share of its fit that is done."""
SPLITS = ("train", "validation", "test", "phrasing", "topic")
ROOT = Path(__file__).resolve().parent
SOURCES = (*DEMO_SOURCES, "sums_world.py", "build_sums_models.py")


@dataclass(frozen=True)
class Parameters:
    """What makes one world differ from another, besides the code."""

    seed: int = 0
    flip_rate: float = 0.1  # share of preference labels turned round
    spurious_bonus: float = 0.04  # gold points that a sure word is worth to the labels about jobs
    num_job_exchanges: int = 13000  # (prompt, answer) pairs for the policy
    num_sum_exchanges: int = 10000
    num_pairs: int = 7000  # preference pairs of a reward model about jobs
    num_sum_pairs: int = 24000
    num_heldout_pairs: int = 500
    num_measured: int = 16  # samples a prompt of the validation split, for the policies' figures


def stamp_of(parameters: Parameters) -> dict[str, Any]:
    """Stamp of a world that the present code builds: parameters and a hash of the sources."""
    sources = b"".join((ROOT / name).read_bytes() for name in SOURCES)
    return {"parameters": asdict(parameters), "sources_sha256": hashlib.sha256(sources).hexdigest()}


def _is_stamped(folder: Path, parameters: Parameters) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == stamp_of(parameters)


def build(parameters: Parameters, out: Path, console: Console) -> bool:
    """Build a world into `out` unless the same one is there; returns whether it was built.

    Raises `FileExistsError` where `out` holds something that is no world.
    """
    if _is_stamped(out, parameters):
        return False
    if out.exists() and not (out / STAMP).is_file():
        raise FileExistsError(f"--out {out}: holds something that is no demo world; name another folder")
    folder = out.parent / f".{out.name}.building"
    if not _is_stamped(folder, parameters):  # of a build of other code or parameters
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / STAMP).write_text(json.dumps(stamp_of(parameters)) + "\n", encoding="utf-8")
    write_prompts(make_sums_world(parameters.seed), folder, out)
    measured = _run_parts(_parts(parameters), folder, console)
    shown = {"parameters": asdict(parameters), "measurements": measured}
    (folder / "world.json").write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    folder.rename(out)
    return True


def write_prompts(world: SumsWorld, folder: Path, home: Path) -> None:
    """Prompts of every split, and of `train` those of sums alone; `home` is where the world will be."""
    for split in SPLITS:
        rows = [
            {"prompt": [{"role": "user", "content": prompt}], "kind": kind, "home": str(home)}
            for kind, prompt in world.rows(split)
        ]
        files = {split: rows}
        if split == "train":
            files["train-sums"] = [row for row in rows if row["kind"] == "sum"]
        for name, some in files.items():
            text = "".join(json.dumps(row) + "\n" for row in some)
            (folder / f"prompts-{name}.jsonl").write_text(text, encoding="utf-8")


def _run_parts(parts: dict[str, Part], folder: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Make what is not there, one part after the other; returns what each measured."""
    columns = (TextColumn("{task.description:12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    found = {}
    with Progress(*columns, console=console) as progress:
        for name, part in parts.items():
            note = folder / f"{name}.json"  # written last: says that the part is whole
            if not note.is_file():
                bar = progress.add_task(name, total=None)
                measured = part(folder, lambda done, total, bar=bar: progress.update(bar, completed=done, total=total))  # type: ignore[misc]
                note.write_text(json.dumps(measured), encoding="utf-8")
            found[name] = json.loads(note.read_text(encoding="utf-8"))
    return found


def _parts(parameters: Parameters) -> dict[str, Part]:
    parts: dict[str, Part] = {"policy": partial(_make_policy, parameters)}
    for criterion in CRITERIA:
        parts[f"rm-{criterion}"] = partial(_make_reward_model, parameters, criterion)
    return parts


# The parts. ---------------------------------------------------------------------------------------------


def _exchanges(parameters: Parameters) -> list[tuple[str, str]]:
    world = make_sums_world(parameters.seed)
    return sample_all_exchanges(world, parameters.num_job_exchanges, parameters.num_sum_exchanges)


def _tokenizer(parameters: Parameters) -> Any:
    from scripts import demo_fit

    return demo_fit.train_tokenizer([text for exchange in _exchanges(parameters)[:6000] for text in exchange])


def _make_policy(parameters: Parameters, folder: Path, report: Report) -> dict[str, Any]:
    from scripts import demo_fit

    demo_fit.quieten()
    fit_policy(_tokenizer(parameters), _exchanges(parameters), folder, parameters.seed, report)
    rows = make_sums_world(parameters.seed).rows("validation")
    return {
        name: measure_policy(folder / name, rows, parameters.num_measured, parameters.seed)
        for name in ("policy", *SHARES)
    }


def fit_policy(tokenizer: Any, exchanges: Sequence[tuple[str, str]], folder: Path, seed: int, report: Report) -> None:
    """Fit the base policy as `demo_fit.fit_policy` does and save it, and on the way its checkpoints, in `folder`."""
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from scripts import demo_fit

    set_seed(seed)
    model = LlamaForCausalLM(demo_fit._llama_config(tokenizer, demo_fit.POLICY_SHAPE))
    torch.nn.init.constant_(model.model.norm.weight, demo_fit.LAST_NORM)

    class Checkpoints(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            report(state.global_step, state.max_steps)
            for name, share in SHARES.items():
                if state.global_step == max(1, round(share * state.max_steps)):
                    _save(model, tokenizer, folder / name)

    ordered = demo_fit.bucketed(exchanges, lambda row: len(row[1].split()), demo_fit.BATCH_SIZE, seed)
    rows = [{"prompt": demo_fit.question(prompt), "completion": demo_fit.reply(answer)} for prompt, answer in ordered]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**demo_fit._trainer_options(folder / "policy", seed, demo_fit.POLICY_RATE)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Checkpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    _save(model, tokenizer, folder / "policy")


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    """Save a policy with what `generate` reads of it."""
    from transformers import GenerationConfig

    from scripts.demo_world import MAX_ANSWER_TOKENS

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure_policy(policy: Path, rows: Sequence[tuple[str, str]], num: int, seed: int) -> dict[str, float]:
    """Share of grammatical answers to jobs and to sums, and of right ones, from samples of a saved policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from scripts import demo_fit

    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    set_seed(seed)
    found = {}
    for kind in ("job", "sum"):
        prompts = [prompt for own, prompt in rows if own == kind]
        answers = demo_fit.sample_policy(model, tokenizer, prompts, num)
        flat = [(prompt, answer) for prompt, some in zip(prompts, answers, strict=True) for answer in some]
        found[f"grammatical_{kind}"] = sum(is_grammatical(answer) for _, answer in flat) / len(flat)
    found["correct"] = sum(correct(*zip(*flat, strict=True))) / len(flat)
    return found


def _make_reward_model(parameters: Parameters, criterion: str, folder: Path, report: Report) -> dict[str, Any]:
    from scripts import demo_fit

    demo_fit.quieten()
    world = make_sums_world(parameters.seed)
    number, heldout = parameters.num_pairs, parameters.num_heldout_pairs
    if criterion == "correct":
        pairs = sample_sum_pairs(world, parameters.num_sum_pairs, parameters.flip_rate)
        judged = sample_sum_pairs(world, heldout, 0.0, "validation")
    else:
        name: Criterion = "helpful" if criterion == "helpful" else "harmless"
        pairs = sample_pairs(world.jobs, name, number, parameters.flip_rate, parameters.spurious_bonus)
        judged = sample_pairs(world.jobs, name, heldout, 0.0, 0.0, "validation")
    out = folder / f"rm-{criterion}"
    demo_fit.fit_reward_model(_tokenizer(parameters), pairs, out, criterion, parameters.seed, report)
    return {"pair_accuracy": demo_fit.measure_reward_model(out, judged)}


def main(
    out: Annotated[Path, typer.Option(help="The folder to build the world in.")],
    seed: Annotated[int, typer.Option(min=0, help="The world seed.")] = Parameters.seed,
) -> None:
    """Build one world with sums, or leave it if this code built it before."""
    console = Console()
    try:
        built = build(Parameters(seed=seed), out, console)
    except FileExistsError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"world with sums {seed}: {'built' if built else 'up to date'} in {out}")


if __name__ == "__main__":
    typer.run(main)
