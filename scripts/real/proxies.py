"""The reward models that select: the first layers of the policy's own trunk, fitted to noisy comparisons.

    python -m scripts.real.proxies child

For each criterion that no proxy knows exactly, samples of the base on training prompts are judged by gold with noise,
and `trainers.distill` fits a classifier to the margins. A few hundred comparisons leave errors that a policy can find,
as with real reward models. They read the policy's own tokens, so that the gradients of GGRO and SEA reach them.

People's preferences come in as files (`prepare_data`, `--data NAME=FILE` of the study): lines of JSON with `chosen` and
`rejected`, both whole dialogues as in Anthropic/hh-rlhf, compressed or not.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import DataError, IamaError, RunError
from iama.files import building, write_atomically
from iama.progress import progress_bar
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from inference.engine.responses import Pool
from inference.pools.engines import transformers_draw
from inference.pools.fill import fill_pool, pool_header
from scripts import launch
from scripts.experiments.pools import quieten
from scripts.real import gold, model, prompts
from trainers.distill import Distilled, DistillSettings, distill

FOLDER = Path("runs/real")
POLICY = FOLDER / "policy"
MAX_NEW_TOKENS = 96
SAMPLING = Sampling(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
BATCH_SIZE = 128
LEARNED = ("child", "expert", "encouraging", "critical")
NUM_LAYERS, NUM_PROMPTS, NUM_SAMPLES = 8, 160, 6
NUM_STEPS, PAIRS_A_STEP, LEARNING_RATE = 60, 8, 5e-5
NOISE = 0.7
"""Standard deviation of the noise on a gold score, in those of a prompt's samples: one comparison in five is wrong."""
SEED = 0
MOST_WORDS, FEWEST_PAIRS = 150, 40
"""Of a dialogue, question and both answers together, and of what a reward is fitted to."""
PROBES = (
    "Bread is good to eat. We make it with flour and water. Then we bake it, and it smells nice.",
    "Fermentation is an anaerobic process in which yeast converts sugars into ethanol; gluten retains the gas.",
)
"""Texts whose scores tell whether two machines fitted the same reward."""


Precision = Literal["bfloat16", "float32"]


@functools.cache
def dtype() -> Precision:
    """Of the policy's and the proxies' weights: bfloat16 where this machine multiplies it quicker, else float32.

    It is timed on a layer's matrix, since a CPU that has the instructions may still be slower with them.
    """
    seconds: dict[Precision, float] = {"bfloat16": 0.0, "float32": 0.0}
    for name in seconds:
        rows, weight = (torch.ones(size, 576, dtype=getattr(torch, name)) for size in (64, 1536))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            rows @ weight.T
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    return "bfloat16" if seconds["bfloat16"] < 0.8 * seconds["float32"] else "float32"


def ready() -> None:
    """Every core for this process, and no bars or warnings of the libraries."""
    quieten()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def home() -> dict[str, Path]:
    """The policy's folder and the prompts, made unless they are there; returns the prompts' files by split."""
    model.build(POLICY, "wheel")
    return prompts.write(FOLDER / "prompts")


def once(out: Path, make: Callable[[Path], object]) -> Path:
    """A folder, made unless it is there; whoever comes while another process makes it waits, and takes that one."""
    if not out.is_dir():
        try:
            make(out)
        except RunError:
            if not out.is_dir():
                raise
    return out


def trunk(out: Path = FOLDER / "trunk") -> Path:
    """The policy's first layers as a model of their own."""
    return once(out, _cut)


def _cut(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    whole.model.layers = whole.model.layers[:NUM_LAYERS]
    whole.config.num_hidden_layers = NUM_LAYERS
    with building(out) as folder:
        whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)


def path_of(criterion: str) -> Path:
    """Where a learned proxy lies."""
    return FOLDER / f"rm-{criterion}"


def fit(criterion: str) -> Path:
    """A learned proxy's folder, fitted unless it is there."""
    return once(path_of(criterion), lambda out: _fit(criterion, out))


def _fit(criterion: str, out: Path) -> None:
    ready()
    pool = base_samples(home()["train"])
    judge = getattr(gold, criterion)
    scores_PS = np.asarray([judge(texts) for texts in pool.texts])
    found = _distill(criterion, [p.prompt for p in pool.prompts], pool.texts, noisy(scores_PS, criterion), out)
    print(f"{out}: orders {found.agreement:.0%} of held-out pairs as its noisy teacher, {describe(criterion)}")


def noisy(scores_PS: np.ndarray[Any, Any], criterion: str) -> list[list[float]]:
    """Gold with noise in units of its spread within a prompt: the same for the same criterion."""
    spread = float(np.sqrt(scores_PS.var(axis=1).mean()))
    rng = np.random.default_rng([SEED, *criterion.encode()])
    rows: list[list[float]] = (scores_PS + NOISE * spread * rng.standard_normal(scores_PS.shape)).tolist()
    return rows


def base_samples(file: Path) -> Pool:
    """Samples of the base on the first prompts of a file; what is on disk is not drawn again."""
    rows = load_prompts(file, NUM_PROMPTS)
    spec = PolicySpec(path=str(POLICY), dtype=dtype())
    header = pool_header("base", spec, None, "transformers", SAMPLING, NUM_SAMPLES, SEED)
    draw = transformers_draw("base", spec, None, NUM_SAMPLES, SAMPLING, SEED, BATCH_SIZE)
    with progress_bar("the base's samples that are compared", "prompts", len(rows)) as advance:
        return fill_pool(FOLDER / "pools" / f"compared-{NUM_SAMPLES}.jsonl", header, rows, draw, advance)


def validation_samples() -> Pool:
    """Samples of the base on validation prompts; what is on disk is not drawn again."""
    rows = load_prompts(home()["validation"], 24)
    spec = PolicySpec(path=str(POLICY), dtype=dtype())
    header = pool_header("base", spec, None, "transformers", SAMPLING, 8, SEED + 1)
    draw = transformers_draw("base", spec, None, 8, SAMPLING, SEED + 1, BATCH_SIZE)
    return fill_pool(FOLDER / "pools" / "validation-8.jsonl", header, rows, draw, lambda _: None)


def scales(criteria: Sequence[str]) -> dict[str, dict[str, float]]:
    """What standardises the proxies of a training: mean of the base's samples, and their spread within a prompt.

    Rewards on unlike scales would else be served unlike: of the lengths, an answer of 72 words is 2.3 from one target
    and 0.3 from the other.
    """
    pool = validation_samples()
    found = {}
    for name in criteria:
        reward = load_reward(name, proxy_of(name))
        scores_PS = np.asarray([reward.score([p.prompt] * len(p.texts), p.texts, {})[0] for p in pool.prompts])
        spread = float(np.sqrt(np.var(scores_PS, axis=1).mean()))
        found[name] = {"mean": round(float(scores_PS.mean()), 3), "std": round(spread, 3)}
    return found


def agreement(criterion: str) -> float:
    """Share of pairs of the base's samples on validation prompts that the proxy orders as gold does, without noise."""
    reward = load_reward(criterion, proxy_of(criterion))
    agreed = []
    for prompt in validation_samples().prompts:
        proxy_S, _ = reward.score([prompt.prompt] * len(prompt.texts), prompt.texts, {})
        gold_S = np.asarray(getattr(gold, criterion)(prompt.texts))
        i, j = np.triu_indices(len(gold_S), k=1)
        differs = gold_S[i] != gold_S[j]
        agreed.append((np.sign(np.subtract.outer(proxy_S, proxy_S)[i, j]) == np.sign(gold_S[i] - gold_S[j]))[differs])
    return float(np.concatenate(agreed).mean())


def describe(criterion: str) -> str:
    """How often the proxy is right, in words."""
    return f"and {agreement(criterion):.0%} of the base's pairs on validation prompts as gold"


def probe(criterion: str) -> list[float]:
    """Scores of the probes: what a unit notes, so that units of two fits are not mixed."""
    reward = load_reward(criterion, proxy_of(criterion))
    question = [{"role": "user", "content": "How is bread made?"}]
    scores, _ = reward.score([question] * len(PROBES), list(PROBES), {})
    return [round(score, 3) for score in scores]


def _distill(
    criterion: str,
    asked: Sequence[Any],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    out: Path,
) -> Distilled:
    settings = DistillSettings(
        base=str(trunk()),
        label=criterion,
        max_steps=NUM_STEPS,
        batch_size=PAIRS_A_STEP,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        device="cpu",
    )
    with progress_bar(f"the proxy of {criterion}", "steps", NUM_STEPS) as advance:
        return distill(asked, texts, scores, settings, out, advance)


# Preferences of a user's own. ---------------------------------------------------------------------------

DATA = "data"
"""The pair of criteria that people's preferences tell, one or two."""


def criteria_of(pair: str) -> tuple[str, ...]:
    """Names of a pair's criteria; of `DATA` those that `prepare_data` has noted."""
    if pair != DATA:
        return gold.PAIRS[pair]
    note = FOLDER / DATA / "criteria.json"
    return tuple(json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else ()


def is_learned(criterion: str) -> bool:
    """Whether what selects is a reward model."""
    return not hasattr(gold, criterion) or criterion in LEARNED


def proxy_of(criterion: str) -> RewardSpec:
    """What selects."""
    if is_learned(criterion):
        return RewardSpec(model=str(path_of(criterion)), dtype=dtype())
    return RewardSpec(function=f"scripts/real/gold.py:{criterion}")


def gold_of(criterion: str) -> RewardSpec:
    """What judges: a function, or for preferences a model of the same kind that learned from other pairs."""
    if hasattr(gold, criterion):
        return RewardSpec(function=f"scripts/real/gold.py:{criterion}")
    return RewardSpec(model=str(path_of(f"{criterion}-gold")), dtype=dtype())


def prepare_data(files: dict[str, Path]) -> None:
    """Proxies, golds and prompts of preferences, made unless they are there.

    Two fifths of a file's pairs make the proxy, two fifths the gold, and the prompts of the rest are asked. Raises
    `DataError` for a file that holds something else, or too little.
    """
    ready()
    home()
    asked: list[dict[str, Any]] = []
    for criterion, file in files.items():
        rows = [row for row in read_pairs(file) if _num_words(row) <= MOST_WORDS]
        np.random.default_rng(SEED).shuffle(rows)
        end = 2 * len(rows) // 5
        if end < FEWEST_PAIRS:
            raise DataError(f"{file}: {len(rows)} pairs of at most {MOST_WORDS} words are too few; give more")
        for name, part in ((criterion, rows[:end]), (f"{criterion}-gold", rows[end : 2 * end])):
            fit_pairs(name, part)
        asked += [{"prompt": row["prompt"]} for row in rows[2 * end :]]
    num_test = len(asked) // 4
    for split, some in (("test", asked[:num_test]), ("train", asked[num_test:])):
        path = data_prompts()[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in some))
    write_atomically(FOLDER / DATA / "criteria.json", json.dumps(list(files)))


def data_prompts() -> dict[str, Path]:
    """Files of the prompts that `prepare_data` writes."""
    return {split: FOLDER / DATA / f"{split}.jsonl" for split in ("train", "test")}


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Rows with `prompt`, `chosen` and `rejected` as messages; raises `DataError` with the line that is no such row."""
    preference = runpy.run_path(str(launch.ROOT / "configs/recipes/hh_prompts.py"))["preference"]
    if not file.is_file():
        raise DataError(f"--data {file}: no such file; it has a line of JSON a pair, with `chosen` and `rejected`")
    rows = []
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
                found = preference({name: row[name] for name in ("chosen", "rejected")})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{file}, line {number}: no JSON object with `chosen` and `rejected`: {error}"
                ) from error
            rows += [found] if found is not None else []
    if not rows:
        raise DataError(f"{file}: no pair of dialogues that differ in the last answer alone")
    return rows


def fit_pairs(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """A reward of preferences, fitted unless it is there."""
    out = path_of(name)
    if not out.is_dir():
        texts = [[row["chosen"][0]["content"], row["rejected"][0]["content"]] for row in rows]
        found = _distill(name, [row["prompt"] for row in rows], texts, [[1.0, 0.0]] * len(rows), out)
        print(f"{out}: {len(rows)} pairs; orders {found.agreement:.0%} of those held out as people did")
    return out


def _num_words(row: dict[str, Any]) -> int:
    return sum(len(turn["content"].split()) for part in row.values() for turn in part)


def main(criteria: Annotated[list[str], typer.Argument(help=f"Of {', '.join(LEARNED)}.")]) -> None:
    """Fit proxies, unless they are there.

    Example: python -m scripts.real.proxies child expert
    """
    try:
        for criterion in criteria:
            if criterion not in LEARNED:
                sys.exit(f"error: {criterion!r} has no learned proxy; write {', '.join(LEARNED)}")
            fit(criterion)
    except IamaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
