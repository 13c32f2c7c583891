"""One unit of the study: a policy of one pair of criteria and one seed, trained, drawn from, judged, written down.

A unit takes at most about an hour on two idle cores, can be killed and started again, and leaves one file of
numbers, docs/results/real/NAME.json. Adapters, pools and models stay under runs/real and are made again where they are
needed. Nothing but files like that one goes into the page, so units may be made on several machines.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.config.specs import PolicySpec, RewardSpec
from iama.files import write_atomically
from iama.progress import progress_bar
from iama.prompts.data import load_prompts, with_system_prompt
from iama.prompts.render import prompt_text
from iama.rewards.load import load_reward
from inference.engine.responses import Pool
from inference.pools.engines import transformers_draw
from inference.pools.fill import fill_pool, pool_header
from inference.pools.score import score_pool
from scripts import launch
from scripts.experiments import frame
from scripts.real import gold, model, proxies

SAME_PROXY = 0.05
"""By how much the scores of one text may differ by two fits of one proxy, on two machines."""
RESULTS = {"full": Path("docs/results/real")}
"""Where files go: those of the full scale are published and committed, others are not."""
CONFIG = "configs/real.yaml"
BUDGET = 4
ROLL_OUTS = 32
"""Of a training step, over all processes."""
NUM_JUDGED = 8
"""Samples a prompt whose log-probabilities are taken."""
NUM_SHOWN = 10
"""Prompts whose answers are kept as texts."""
METHODS, SPEED, ENGINE = "methods", "speed", "engine"
"""In a policy's place (modules of these names): base and IAMA under every method that serves, their seconds, and the
base's by this engine and by another."""
VERSION = 1
"""Of the files; units of another version are made again."""


@dataclass(frozen=True)
class Scale:
    """How much is drawn and trained. `samples` are those of a trained policy, `base_samples` of an untrained one."""

    name: str
    steps: int
    prompts: int
    samples: int
    base_samples: int


SCALES = {
    "tiny": Scale("tiny", 2, 4, 8, 16),
    "small": Scale("small", 12, 16, 32, 64),
    "full": Scale("full", 64, 40, 64, 128),
}


@dataclass(frozen=True)
class Unit:
    """A policy: `base`, `told-CRITERION`, `grpo`, `iama` or `only-CRITERION`; of a pair, with a seed of training.

    Or `METHODS` or `SPEED` in its place.

    The base is also drawn from on the calibration split, where HedgeTune chooses.
    """

    pair: str
    policy: str
    seed: int
    scale: Scale
    split: str = "test"

    @property
    def name(self) -> str:
        """Of its file and its folders."""
        split = "" if self.split == "test" else f"-{self.split}"
        return f"{self.scale.name}-{self.pair}-{self.policy}{split}-{self.seed}"

    @property
    def path(self) -> Path:
        """Of its numbers."""
        own = proxies.FOLDER / "units"
        return (own if self.pair == proxies.DATA else RESULTS.get(self.scale.name, own)) / f"{self.name}.json"

    @property
    def criteria(self) -> tuple[str, ...]:
        """Those of the pair."""
        return proxies.criteria_of(self.pair)

    @property
    def is_trained(self) -> bool:
        """Whether it has an adapter."""
        return self.policy in ("grpo", "iama") or self.policy.startswith("only-")

    @property
    def run(self) -> Path:
        """Folder of its training."""
        return proxies.FOLDER / "runs" / self.name

    @property
    def told(self) -> str | None:
        """Its system prompt."""
        return gold.TOLD[self.policy.removeprefix("told-")] if self.policy.startswith("told-") else None

    @property
    def num_samples(self) -> int:
        """Samples a prompt."""
        return self.scale.base_samples if self.policy == "base" and self.split == "test" else self.scale.samples

    def is_done(self) -> bool:
        """Whether its file is there, of this version."""
        return self.path.is_file() and json.loads(self.path.read_text(encoding="utf-8"))["version"] == VERSION


SEEDS = {"tiny": (0,), "small": (0,), "full": (0, 1)}
"""Of training. Specialists and untrained policies have the first alone."""


def all_units(scale: Scale) -> list[Unit]:
    """All units of a scale, in the order in which they are worth most."""
    small = scale.name != "full"
    first, *more = SEEDS[scale.name]
    found = []
    for pair in ("length",) if small else gold.PAIRS:
        found += [Unit(pair, "base", first, scale)]
        found += [Unit(pair, ENGINE, first, scale)] if pair == "length" and not small else []
        found += [Unit(pair, policy, first, scale) for policy in ("iama", "grpo")]
        found += [Unit(pair, SPEED, first, scale)]
        found += [Unit(pair, f"told-{name}", first, scale) for name in gold.PAIRS[pair]]
    if not small:
        found += [Unit(pair, METHODS, first, scale) for pair in gold.PAIRS if pair != "length"]
        found += [Unit(pair, "base", first, scale, "calibration") for pair in gold.PAIRS if pair != "length"]
        found += [
            Unit(pair, policy, seed, scale) for seed in more for pair in gold.PAIRS for policy in ("iama", "grpo")
        ]
        found += [Unit(pair, f"only-{name}", first, scale) for pair in gold.PAIRS for name in gold.PAIRS[pair]]
    return found


def data_units(scale: Scale) -> list[Unit]:
    """Units of the criteria that people's preferences tell; with a single one, IAMA is trained for it alone."""
    return [Unit(proxies.DATA, policy, SEEDS[scale.name][0], scale) for policy in ("base", "iama", "grpo")]


def run(unit: Unit, how: Callable[[Unit, Path], dict[str, Any]] | None = None, processes: int = 2) -> Path:
    """Do what the unit lacks, and write its file; `how` measures it, by default `measure`.

    A training has the same roll-outs a step in one process as in two.
    """
    if unit.is_done():
        return unit.path
    proxies.ready()
    files = proxies.home() if unit.pair != proxies.DATA else proxies.data_prompts()
    for criterion in set(unit.criteria).intersection(proxies.LEARNED):
        proxies.fit(criterion)
    start = time.monotonic()
    training = _train(unit, processes) if unit.is_trained else None
    trained_s = time.monotonic() - start
    if unit.policy in (METHODS, SPEED) and not adapter_of(unit).is_dir():  # another machine's, or deleted
        _train(trained_by(unit), processes)
    measured = (how or measure)(unit, files[unit.split])
    record = {
        "version": VERSION,
        "unit": {"pair": unit.pair, "policy": unit.policy, "seed": unit.seed, "split": unit.split},
        "scale": asdict(unit.scale),
        "dtype": proxies.dtype(),
        "weights_sha256": model.build(proxies.POLICY)["weights_sha256"],
        "proxies": {c: proxies.probe(c) for c in unit.criteria if proxies.is_learned(c)},
        "training": training and training | {"seconds": round(trained_s), "processes": processes},
        **measured,
    }
    unit.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(unit.path, dumped(record))
    return unit.path


def trained_by(unit: Unit) -> Unit:
    """The unit whose training makes the adapter that units of methods and of speed serve."""
    return Unit(unit.pair, "iama", unit.seed, unit.scale)


def adapter_of(unit: Unit) -> Path:
    """That adapter."""
    return trained_by(unit).run / "adapter"


# Training. ----------------------------------------------------------------------------------------------


def overrides(unit: Unit, processes: int) -> list[str]:
    """What makes configs/real.yaml this unit's training."""
    only = unit.policy.removeprefix("only-") if unit.policy.startswith("only-") else None
    criteria = [
        {
            "name": name,
            "proxy": proxies.proxy_of(name).model_dump(mode="json", exclude_unset=True) | {"scale": scale},
            "gold": proxies.gold_of(name).model_dump(mode="json", exclude_unset=True),
            "operator": f"bon({BUDGET})" if unit.policy == "iama" else "identity",
        }
        for name, scale in proxies.scales((only,) if only else unit.criteria).items()
    ]
    return [
        f"name=real-{unit.name}",
        f"output_dir={unit.run}",
        f"seed={unit.seed}",
        f"objective.criteria={json.dumps(criteria)}",
        *([f"prompts={proxies.data_prompts()['train']}"] if unit.pair == proxies.DATA else []),
        f"trainer.max_steps={unit.scale.steps}",
        f"world_size={processes}",
        f"trainer.bf16={str(proxies.dtype() == 'bfloat16').lower()}",
        f"trainer.per_device_train_batch_size={ROLL_OUTS // processes}",
    ]


def _train(unit: Unit, processes: int) -> dict[str, Any]:
    """Train, or go on; what the run tells of itself, step by step."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # a core a process
    launch.train(CONFIG, *overrides(unit, processes), processes=processes)
    rows = frame.metrics(unit.run)
    steps = {name: [round(row["criteria"][name]["value"], 4) for row in rows] for name in rows[0]["criteria"]}
    config = json.loads((unit.run / "config.json").read_text(encoding="utf-8"))
    return {
        "aggregate": config["objective"]["aggregate"],
        "scales": {c["name"]: c["proxy"]["scale"] for c in config["objective"]["criteria"] if c["proxy"]["scale"]},
        "weights": {c["name"]: c["weight"] for c in config["objective"]["criteria"]},
        "kl_per_token": round(frame.final_kl(unit.run, 5), 4),
        "beta": rows[-1]["beta"],
        "value_by_step": steps,
        "kl_by_step": [round(row["kl_per_token"], 4) for row in rows],
        "alarms": sorted({alarm for row in rows for alarm in row.get("alarms", [])}),
    }


# Drawing and judging. -----------------------------------------------------------------------------------


def measure(unit: Unit, file: Path) -> dict[str, Any]:
    """Draw the unit's pool and judge it; lists are by prompt, then by sample."""
    rows = load_prompts(file, unit.scale.prompts)
    adapter = str(unit.run / "adapter") if unit.is_trained else None
    pool = _pool(unit, rows, adapter)
    scores = {}
    for name in unit.criteria:
        scores[name] = _scores(unit, pool, name, proxies.proxy_of(name))
        if proxies.is_learned(name):
            scores[f"{name}/gold"] = _scores(unit, pool, f"{name}/gold", proxies.gold_of(name))
    fluency, ratio = _likelihoods(unit, pool, adapter)
    responses = [prompt.samples for prompt in pool.prompts]
    return {
        "prompts": [prompt_text(prompt.prompt) for prompt in pool.prompts],
        "prefill_tokens": [prompt.cost.policy_prefill_tokens for prompt in pool.prompts],
        "prefill_flops": _prefill_flops(pool),
        "flops": [prompt.cost.flops for prompt in pool.prompts],
        "tokens": [[sample.num_tokens for sample in row] for row in responses],
        "cut": [[int(sample.finish_reason == "length") for sample in row] for row in responses],
        "words": [[gold.num_words(sample.text) for sample in row] for row in responses],
        "scores": {name: _rounded(values, 3) for name, values in scores.items()},
        "repetition": [[round(gold.repetition(sample.text), 2) for sample in row] for row in responses],
        "degenerate": [[int(gold.is_degenerate(sample.text)) for sample in row] for row in responses],
        "fluency": _rounded(fluency, 2),
        "log_ratio": _rounded(ratio, 2),
        "answers": {name: _answers(pool, scores[name]) for name in unit.criteria},
    }


def _pool(unit: Unit, rows: list[dict[str, Any]], adapter: str | None) -> Pool:
    """Samples; the base's on a split are drawn once for all pairs."""
    name = unit.policy if unit.policy != "base" else f"base-{unit.split}"
    spec = PolicySpec(path=str(proxies.POLICY), adapter=adapter, dtype=proxies.dtype())
    given = (unit.told, "transformers", proxies.SAMPLING, unit.num_samples, unit.seed)
    header = pool_header(name, spec, *given)
    draw = transformers_draw(name, spec, unit.told, unit.num_samples, proxies.SAMPLING, unit.seed, proxies.BATCH_SIZE)
    pair = "" if unit.policy == "base" else f"-{unit.pair}"
    file = proxies.FOLDER / "pools" / f"{unit.scale.name}{pair}-{name}-{unit.seed}.jsonl"
    with progress_bar(f"{unit.name}: {unit.num_samples} samples a prompt", "prompts", len(rows)) as advance:
        return fill_pool(file, header, rows, draw, advance)


def _scores(unit: Unit, pool: Pool, column: str, spec: RewardSpec) -> Floats:
    """Scores of what selects or judges, `[P, S]`."""
    journal = proxies.FOLDER / "scores" / f"{unit.name}-{column.replace('/', '-')}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(f"{unit.name}: {column}", "prompts", len(pool.prompts)) as advance:
        return score_pool(pool, load_reward(column, spec), spec, journal, None, advance).values_PS


def _likelihoods(unit: Unit, pool: Pool, adapter: str | None) -> tuple[Floats, Floats]:
    """Of the first `NUM_JUDGED` samples of each prompt: log-probability a token under the base, told nothing, and
    `log pi - log base` of the whole sample (nats), which is 0 for the base."""
    base = _log_probabilities(unit, pool, None, None)
    tokens_PS = np.asarray([[max(1, s.num_tokens or 0) for s in p.samples[:NUM_JUDGED]] for p in pool.prompts])
    own = base if adapter is None and unit.told is None else _log_probabilities(unit, pool, adapter, unit.told)
    return base / tokens_PS, own - base


def _log_probabilities(unit: Unit, pool: Pool, adapter: str | None, told: str | None) -> Floats:
    from iama.prompts.conversations import render_prompts
    from inference.engine.likelihood import sequence_log_probabilities
    from inference.engine.policy import load_policy

    spec = PolicySpec(path=str(proxies.POLICY), adapter=adapter, dtype=proxies.dtype())
    policy = load_policy("judge", spec)
    asked = [with_system_prompt(prompt.prompt, told) for prompt in pool.prompts]
    ids = render_prompts(policy.tokenizer, asked, policy.eos_token_ids, "the base")
    sums = []
    with progress_bar(f"{unit.name}: log-probabilities", "prompts", len(ids)) as advance:
        for prompt_ids, prompt in zip(ids, pool.prompts, strict=True):
            samples = [list(sample.token_ids) for sample in prompt.samples[:NUM_JUDGED]]
            found = sequence_log_probabilities(policy, [prompt_ids] * len(samples), samples, NUM_JUDGED)
            sums.append([total for total, _ in found])
            advance(1)
    return np.asarray(sums)


def _prefill_flops(pool: Pool) -> list[float]:
    """Operations of reading each prompt once, at the mean cost of a token of its pool."""
    return [p.cost.flops * p.cost.policy_prefill_tokens / max(1, p.cost.policy_tokens) for p in pool.prompts]


def _answers(pool: Pool, proxy_PS: Floats) -> list[str]:
    """What Best-of-4 of each prompt's first four samples keeps, of the first prompts, unedited."""
    shown = pool.prompts[:NUM_SHOWN]
    return [
        prompt.samples[int(np.argmax(proxy_S[:BUDGET]))].text
        for prompt, proxy_S in zip(shown, proxy_PS[:NUM_SHOWN], strict=True)
    ]


# Files. -------------------------------------------------------------------------------------------------


def _rounded(values_PS: Floats, digits: int) -> list[list[float]]:
    rows: list[list[float]] = np.round(values_PS.astype(np.float64), digits).tolist()
    return rows


def dumped(record: Mapping[str, Any]) -> str:
    """JSON with a line a key, and a line a prompt in what is by prompt: small, and readable in a diff."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}\n]")
        elif key == "scores":
            lines.append(f'"scores": {dumped(value).rstrip()}')
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(unit: Unit) -> dict[str, Any]:
    """A unit's file."""
    record: dict[str, Any] = json.loads(unit.path.read_text(encoding="utf-8"))
    return record
