"""What is measured on: models that never end a response by themselves, prompts of one length, CARDS' settings."""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from iama.arrays import Floats
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import DataError, RunError
from iama.prompts.data import load_prompts
from iama.prompts.render import Message, render_prompt
from iama.rewards.classifier import Classifier
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.decode import decode
from inference.engine.next_token import entropy
from inference.engine.policy import Policy, load_policy
from inference.engine.vocabulary import special_tokens
from inference.samplers.cards import Cards, CardsSettings, acceptance_summary, calibrate_target

P = ParamSpec("P")
T = TypeVar("T")
CALIBRATION_SEED = 10**6  # not among the measured ones
NEVER = -1e4  # logit of a token that is not drawn


@dataclass(frozen=True)
class Setting:
    """The fixed setting, and how often each thing is measured."""

    num_prompts: int = 32
    prompt_tokens: int = 32
    new_tokens: int = 128
    num_samples: int = 16  # of Best-of-N
    mean_segment: float = 20.0
    tolerance: float = 3.0
    num_rounds: int = 9  # of sampling
    num_alone: int = 4  # samples drawn one at a time in a round
    num_cards_rounds: int = 2
    num_requests: int = 20  # one at a time, for latency
    guided_tokens: int = 64  # new tokens of GGRO and SEA
    num_chains: int = 4  # of SEA, a prompt
    num_moves: int = 5  # steps of SEA
    num_moved_alone: int = 8  # prompts whose chains move one at a time
    num_guided_rounds: int = 2  # of GGRO, and of SEA's chains
    num_step_rounds: int = 5  # of SEA's steps
    num_steps: int = 7  # of training
    num_trainings: int = 3  # pairs of runs whose memory is compared
    num_drawn_trainings: int = 3  # pairs of trainings whose steps are compared
    num_drawn_steps: int = 8  # of the demo, in each
    num_drawn_large_steps: int = 2  # of the 135 M policy
    drawn_is_large: bool = True
    drawn_prompts: int = 2  # a step of the 135 M policy
    drawn_prompt_tokens: int = 32
    drawn_tokens: int = 32
    num_cluster_rounds: int = 3
    sleepers: tuple[int, ...] = (1, 4, 16)  # workers on a Ray cluster that sleep
    samplers: tuple[int, ...] = (1, 2, 4)  # and that sample
    num_served_rounds: int = 3
    num_served: int = 128  # requests to a server in a round
    num_served_alone: int = 16  # and one at a time
    served_tokens: int = 64  # at most; the policy ends its answers itself, at many lengths
    num_served_large_rounds: int = 2  # the same of the 135 M policy
    num_served_large: int = 64
    num_served_large_alone: int = 4
    served_large_tokens: int = 24
    served_large_prompt_tokens: int = 8  # its words are several tokens each to the demo's reward, which reads 256

    @property
    def sampling(self) -> Sampling:
        """Plain sampling at temperature 1."""
        return Sampling(max_new_tokens=self.new_tokens)


QUICK = Setting(
    num_prompts=3,
    prompt_tokens=18,
    new_tokens=24,
    num_samples=2,
    mean_segment=8.0,
    tolerance=4.0,
    num_rounds=2,
    num_alone=1,
    num_cards_rounds=1,
    num_requests=2,
    guided_tokens=20,
    num_chains=2,
    num_moves=2,
    num_moved_alone=2,
    num_guided_rounds=1,
    num_step_rounds=2,
    num_steps=1,
    num_trainings=1,
    num_drawn_trainings=1,
    num_drawn_steps=1,
    num_drawn_large_steps=1,
    drawn_is_large=False,
    drawn_prompts=1,
    drawn_prompt_tokens=8,
    drawn_tokens=8,
    num_cluster_rounds=1,
    sleepers=(1, 2),
    samplers=(1, 2),
    num_served_rounds=1,
    num_served=4,
    num_served_alone=2,
    served_tokens=8,
    num_served_large_rounds=1,
    num_served_large=4,
    num_served_large_alone=2,
    served_large_tokens=8,
)


@dataclass(frozen=True)
class Bench:
    """A setting with its models and prompts (messages, and as the policy's token ids)."""

    setting: Setting
    policy: Policy
    reward: Reward
    prompts: list[list[Message]]
    prompts_ids: list[list[int]]

    @property
    def classifier(self) -> Classifier:
        """The model behind the reward."""
        assert self.reward.classifier is not None
        return self.reward.classifier


def prepare(world: Path, setting: Setting, device: str) -> Bench:
    """Load a world's policy and its first reward, and cut prompts from its test prompts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only the end tokens are used")  # its length is set here
        policy = load_policy("base", PolicySpec(path=str(world / "policy"), device=device))
    reward = load_reward("helpful", RewardSpec(model=str(world / "rm-helpful"), device=device))
    forbid_special_tokens(policy)
    policy = dataclasses.replace(policy, eos_token_ids=frozenset({policy.model.config.vocab_size}))
    texts = [row["prompt"][-1]["content"] for row in load_prompts(world / "prompts-test.jsonl")]
    prompts = cut_prompts(policy, texts, setting)
    return Bench(setting, policy, reward, prompts, [render_prompt(policy.tokenizer, prompt) for prompt in prompts])


def forbid_special_tokens(policy: Policy) -> None:
    """Give the head a bias under which no special token is ever drawn, whoever samples."""
    model: Any = policy.model
    old = model.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features, device=model.device, dtype=model.dtype)
    head.requires_grad_(requires_grad=False)
    head.weight = old.weight
    head.bias.zero_()
    head.bias[list(special_tokens(policy.tokenizer).values())] = NEVER
    model.set_output_embeddings(head)
    model.generation_config.eos_token_id = None


def cut_prompts(policy: Policy, texts: list[str], setting: Setting) -> list[list[Message]]:
    """Different prompts of exactly as many tokens as the setting says, template included, from the texts' words.

    Raises `DataError` if the words do not give them.
    """
    prompts: list[list[Message]] = []
    for first in range(len(texts)):
        text, messages = "", list[dict[str, str]]()
        for word in itertools.chain.from_iterable(text.split() for text in texts[first:] + texts[:first]):
            candidate = [{"role": "user", "content": f"{text} {word}".strip()}]
            length = len(render_prompt(policy.tokenizer, candidate))
            if length <= setting.prompt_tokens:
                text, messages = candidate[0]["content"], candidate
            if length == setting.prompt_tokens:
                break
        if len(render_prompt(policy.tokenizer, messages)) == setting.prompt_tokens and messages not in prompts:
            prompts.append(messages)
        if len(prompts) == setting.num_prompts:
            return prompts
    raise DataError(f"{len(texts)} test prompts give {len(prompts)} of {setting.prompt_tokens} tokens; give more")


def cards(bench: Bench, settings: CardsSettings, batch_size: int | None = None) -> Cards:
    """The sampler under test."""
    size = bench.setting.num_prompts if batch_size is None else batch_size
    return Cards(bench.policy, bench.reward, settings, bench.setting.sampling, batch_size=size)


def calibrate(bench: Bench, say: Callable[[str], None]) -> CardsSettings:
    """CARDS' settings: its defaults, a target that one unguided sample in ten reaches, segments of the wanted length.

    The threshold that would cut unguided samples so is tried first; guided ones are cut more often, and the threshold
    is moved accordingly. Raises `RunError` if no threshold does.
    """
    setting, tries = bench.setting, list[str]()
    target, _ = calibrate_target(
        bench.policy,
        bench.reward,
        bench.prompts,
        setting.sampling,
        num_samples=4,
        seed=CALIBRATION_SEED,
        batch_size=4 * setting.num_prompts,
    )
    say(f"target reward {target:.3f}, the 0.9 quantile of unguided samples")
    entropies_ST, wanted = unguided_entropies(bench), setting.mean_segment
    for _ in range(8):
        settings = CardsSettings(target=target, max_segment=min(64, setting.new_tokens // 2))
        settings = settings.model_copy(update={"entropy_threshold": threshold_for(wanted, entropies_ST, settings)})
        completions = cards(bench, settings).sample(bench.prompts, seed=CALIBRATION_SEED)
        mean_length = acceptance_summary(completions)["segment_length"]
        tries.append(f"entropy threshold {settings.entropy_threshold:.4f}: mean segment {mean_length:.1f}")
        say(tries[-1])
        if abs(mean_length - setting.mean_segment) <= setting.tolerance / 2:
            return settings
        wanted = float(np.clip(wanted * setting.mean_segment / mean_length, settings.min_segment, settings.max_segment))
    raise RunError(f"no segments of {setting.mean_segment:g} tokens on the mean ({'; '.join(tries)})")


@torch.inference_mode()
def unguided_entropies(bench: Bench) -> Floats:
    """Entropy before every token of plain samples, `[S, T]`."""
    policy, setting = bench.policy, bench.setting
    responses, _ = decode(
        policy,
        bench.prompts_ids,
        2,
        setting.sampling,
        seed=CALIBRATION_SEED,
        batch_size=2 * setting.num_prompts,
    )
    ids = [
        [*prompt_ids, *response.token_ids]
        for prompt_ids, row in zip(bench.prompts_ids, responses, strict=True)
        for response in row
    ]
    logits_STV = policy.model(input_ids=torch.tensor(ids, device=policy.model.device)).logits
    logits_STV = logits_STV[:, setting.prompt_tokens - 1 : -1]
    entropies_ST: Floats = entropy(logits_STV.flatten(0, 1)).view(logits_STV.shape[:2]).cpu().numpy().astype(np.float64)
    return entropies_ST


def threshold_for(mean: float, entropies_ST: Floats, settings: CardsSettings) -> float:
    """The entropy at which segments of these samples have a mean length, by bisection."""
    low, high = 0.0, float(entropies_ST.max()) + 1e-6
    for _ in range(40):
        middle = (low + high) / 2
        num_segments = sum(
            num_cuts(row, middle, settings.min_segment, settings.max_segment) for row in entropies_ST.tolist()
        )
        low, high = (middle, high) if entropies_ST.size / num_segments < mean else (low, middle)
    return (low + high) / 2


def num_cuts(entropies_T: list[float], threshold: float, min_segment: int, max_segment: int) -> int:
    """How many segments a sample falls into."""
    number, length = 1, 0
    for value in entropies_T:
        if length == max_segment or (length >= min_segment and value >= threshold):
            number, length = number + 1, 0
        length += 1
    return number


def timed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, float]:
    """What a call gives, and its seconds."""
    synchronise()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    synchronise()
    return result, time.perf_counter() - start


def synchronise() -> None:
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
