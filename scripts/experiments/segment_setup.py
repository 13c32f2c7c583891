"""A policy with its world's proxies, the samplers that answer prompts from it, and what they answered, on disk."""

from __future__ import annotations

import uuid
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iama.errors import IamaWarning
from iama.models.fingerprint import fingerprint
from iama.objective.operators import RankOperator, parse_operator
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.engine.reward_rows import num_common
from inference.pools.journal import append_line, digest, read_lines
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.best_of import SelectionSampler
from inference.samplers.cards import Cards, CardsSettings, acceptance_summary, rejection_settings
from scripts.experiments import common
from scripts.experiments.common import CRITERIA
from scripts.experiments.pools import Task, policy_spec
from scripts.experiments.segment_samplers_values import Drawn, Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from iama.config.specs import PolicySpec, Sampling
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.engine.responses import Pool
    from scripts.experiments.pools import Scores

    Floats = NDArray[np.float64]
    Settings = CardsSettings | ArgsSettings | str
    Adapters = Mapping[str, Path | None]

U = TypeVar("U")
R = TypeVar("R")
CARDS, REJECTION, ARGS, BON = "cards", "rejection", "args", "bon"
OTHER_SEED = 1000  # proposals begin with the random numbers of a pool of the same seed
RUN = uuid.uuid4().hex


@dataclass(frozen=True)
class Chosen:
    """What the search chooses: nats, and acceptance temperatures as shares of the rewards' standard deviation."""

    entropy_threshold: float
    cards_share: float
    rejection_share: float


# What is served. ----------------------------------------------------------------------------------------


def settings_of(method: Method, rewards: Floats, chosen: Chosen, max_new_tokens: int) -> Settings:
    """A method's settings; targets and temperatures in units of `rewards`, those of unguided samples."""
    if method.kind == BON:
        return f"bon({method.level:g})"
    if method.kind == ARGS:
        return ArgsSettings(weight=method.level)
    target, spread = float(np.quantile(rewards, method.level)), float(rewards.std())
    if method.kind == REJECTION:
        return rejection_settings(target, max_new_tokens, acceptance_temperature=chosen.rejection_share * spread)
    return CardsSettings(
        target=target,
        entropy_threshold=chosen.entropy_threshold,
        acceptance_temperature=chosen.cards_share * spread,
    )


@dataclass(frozen=True)
class Setup:
    """A policy of a world with the proxy rewards, and prompts that samplers answer."""

    name: str
    spec: PolicySpec
    policy: Policy
    proxies: Mapping[str, Reward]
    rows: Sequence[dict[str, Any]]
    sampling: Sampling
    seed: int
    path: Path

    def answers(self, criterion: str, settings: Settings) -> dict[str, Any]:
        """The line of a sampler's answers to all prompts, from disk where it is there."""
        key = digest(
            [
                [fingerprint(common.world(self.seed) / part) for part in ("policy", f"rm-{criterion}")],
                fingerprint(Path(self.spec.adapter)) if self.spec.adapter else None,
                type(settings).__name__,
                settings if isinstance(settings, str) else settings.model_dump(mode="json"),
                self.sampling.model_dump(mode="json"),
                self.seed,
                [row["prompt"] for row in self.rows],
            ]
        )
        found = read_lines(self.path).get(key)
        if found is None:
            found = {"key": key, "run": RUN, **self._serve(criterion, settings)}
            append_line(self.path, found)
        return found

    def _serve(self, criterion: str, settings: Settings) -> dict[str, Any]:
        reward = self.proxies[criterion]
        prompts = [row["prompt"] for row in self.rows]
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0] if name != "prompt"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IamaWarning)  # of forced segments, whose share the page has
            completions = _sampler(settings, self.policy, reward, self.sampling).sample(
                prompts, seed=self.seed + OTHER_SEED, columns=columns
            )
        return {
            "criterion": criterion,
            "settings": settings if isinstance(settings, str) else settings.model_dump(mode="json"),
            "texts": [c.text for c in completions],
            "proxies": [c.reward for c in completions],
            "policy_tokens": [c.cost.policy_tokens for c in completions],
            "reward_tokens": [c.cost.reward_tokens for c in completions],
            "seconds": [c.cost.seconds for c in completions],
            "summary": acceptance_summary(completions) if isinstance(settings, CardsSettings) else {},
        }


def _sampler(settings: Settings, policy: Policy, reward: Reward, sampling: Sampling) -> Any:
    if isinstance(settings, str):
        operator = parse_operator(settings)
        assert isinstance(operator, RankOperator)
        return SelectionSampler(policy, reward, operator, sampling)
    if isinstance(settings, ArgsSettings):
        return Args(policy, reward, settings, sampling)
    return Cards(policy, reward, settings, sampling)


def setup(seed: int, name: str, adapter: Path | None, split: str, rows: Sequence[Any], sampling: Sampling) -> Setup:
    """Load a policy and its world's proxies."""
    spec = policy_spec(seed, adapter)
    proxies = {c.name: load_reward(c.name, c.proxy) for c in common.criteria(seed, gold=False)}
    path = common.FOLDER / "segment_samplers" / f"{split}-{seed}" / f"{name}.jsonl"
    return Setup(name, spec, load_policy(name, spec, sampling), proxies, rows, sampling, seed, path)


# Unguided samples: Best-of-N, and what targets are calibrated on. ---------------------------------------


def prompts(seed: int, split: str, max_prompts: int | None) -> list[dict[str, Any]]:
    """Prompts of a split of a world."""
    return load_prompts(common.world(seed) / f"prompts-{split}.jsonl", max_prompts)


def drawn(ready: Setup, split: str, num_samples: int, scores: Mapping[str, Scores], rows: Sequence[Any]) -> Drawn:
    """A pool that `common.pools` has made, with its samples' lengths."""
    criteria = common.criteria(ready.seed, gold=False)
    plain = list(rows)
    pool = Task(
        ready.name, ready.spec, plain, plain, criteria, num_samples, ready.sampling, ready.seed, split
    ).sampled()
    lengths_PS = np.asarray([[sample.num_tokens for sample in prompt.samples] for prompt in pool.prompts], dtype=float)
    read = [_reward_tokens(ready.proxies[name], rows, pool) for name in CRITERIA]
    return Drawn(
        proxies=[scores[name].proxy_PS for name in CRITERIA],
        golds=[scores[name].gold_PS for name in CRITERIA],
        prefill_P=np.asarray([float(prompt.cost.policy_prefill_tokens) for prompt in pool.prompts]),
        decode_P=(lengths_PS - 1).mean(axis=1),
        reward_tokens=[found[0] for found in read],
        shared_tokens=[found[1] for found in read],
        weight=weight_of(ready),
    )


def _reward_tokens(reward: Reward, rows: Sequence[Any], pool: Pool) -> tuple[Floats, Floats]:
    """Tokens that a reward reads to score one sample, mean over each prompt's, and those that all share: `[P]`."""
    classifier = reward.classifier
    assert classifier is not None
    lengths, shared = [], []
    for row, texts in zip(rows, pool.texts, strict=True):
        empty, *ids = classifier.render([row["prompt"]] * (len(texts) + 1), ["", *texts])
        lengths.append(np.mean([len(some) for some in ids]))
        shared.append(min(num_common(empty, some) for some in ids))
    return np.asarray(lengths), np.asarray(shared, dtype=np.float64)


def weight_of(ready: Setup) -> float:
    """What a token of the reward costs in tokens of the policy, by parameters that a forward multiplies with."""
    classifier = ready.proxies[CRITERIA[0]].classifier
    assert classifier is not None
    return _num_multiplied(classifier.model) / _num_multiplied(ready.policy.model)


def _num_multiplied(model: Any) -> int:
    """Parameters but for input embeddings that are only looked up."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return sum(int(p.numel()) for p in model.parameters()) - (0 if tied else int(embedding.numel()))


def each(function: Callable[[U], R], units: Sequence[U], description: str, at_once: int) -> Iterator[tuple[U, R]]:
    """Units with what a function makes of each, in their order, `at_once` processes behind a bar."""
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        run: Any = stack.enter_context(common.processes(at_once)).map if at_once > 1 else map
        yield from progress.track(zip(units, run(function, units), strict=True), len(units), description=description)


def progress_bar() -> Progress:
    """A bar that counts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
