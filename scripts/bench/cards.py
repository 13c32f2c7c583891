"""CARDS: tokens forwarded against those that must be, and against references on stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.reward_rows import reads_in_pieces
from inference.samplers.base import Completion
from inference.samplers.cards import CardsSettings, acceptance_summary
from scripts.bench import setting as settings_of
from scripts.bench.cards_baseline import Baseline, respond
from scripts.bench.counting import policy_necessary, recorded, reward_necessary, watched
from scripts.bench.entries import Entry, Latency
from scripts.bench.plain_sampling import ratios
from scripts.bench.setting import Bench, timed

READERS = {"whole": False, "cached": True}


@dataclass
class CardsFigures:
    """Counts of the first round, and seconds: of each reference, and of ours right before it."""

    summary: dict[str, float] = field(default_factory=dict)  # of all rounds: acceptance, segments, waste
    counts: dict[str, int] = field(default_factory=dict)
    num_same: dict[str, int] = field(default_factory=dict)  # prompts that a reference answers with the same tokens
    ours: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in READERS})
    theirs: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in READERS})
    requests: list[float] = field(default_factory=list)

    def wall(self, reference: str) -> str:
        """Seconds of a reference over ours, for people."""
        return Entry("cards_wall", ratios(self.theirs[reference], self.ours[reference])).found.spread

    def entries(self) -> list[Entry]:
        """The ratios."""
        count = self.counts
        return [
            Entry("cards_necessary", [count["policy"] / count["policy_necessary"]]),
            Entry("cards_reward_necessary", [count["reward"] / count["reward_necessary"]]),
            Entry("cards_policy_tokens", [count["policy_whole"] / count["policy"]]),
            Entry("cards_reward_tokens", [count["reward_whole"] / count["reward"]]),
            Entry("cards_wall", ratios(self.theirs["whole"], self.ours["whole"])),
        ]

    def latencies(self, bench: Bench) -> list[Latency]:
        """A call answers all its requests when the last is done."""
        num = bench.setting.num_prompts
        together = [seconds for name in READERS for seconds in self.ours[name] for _ in range(num)]
        return [Latency("CARDS", 1, self.requests), Latency("CARDS", num, together)]


def measure(bench: Bench, settings: CardsSettings, say: Callable[[str], None]) -> CardsFigures:
    """Rounds of ours and each reference, side by side; the first round's tokens are counted."""
    reads_in_pieces(bench.classifier)  # tries the model once, which belongs to no request
    sampler = settings_of.cards(bench, settings)
    figures, answered = CardsFigures(), list["Completion"]()
    for i in range(bench.setting.num_cards_rounds):
        for name in READERS:
            completions, seconds = timed(sampler.sample, bench.prompts, seed=i)
            with watched(bench.policy.model) as policy_fed, watched(bench.classifier.model) as reward_fed:
                answers, reference = timed(baseline, bench, settings, i, cached=READERS[name])
            figures.ours[name].append(seconds)
            figures.theirs[name].append(reference)
            say(
                f"round {i + 1} of {bench.setting.num_cards_rounds}: ours {seconds:.2f} s, reference ({name}) "
                f"{reference:.2f} s"
            )
            if i == 0:
                figures.counts |= {f"policy_{name}": policy_fed.num_tokens, f"reward_{name}": reward_fed.num_tokens}
                pairs = zip(answers, completions, strict=True)
                figures.num_same[name] = sum(tuple(a) == completion.token_ids for a, completion in pairs)
        answered += completions
    figures.counts |= count(bench, settings)
    figures.summary = acceptance_summary(answered)
    figures.requests = requests(bench, settings)
    return figures


def count(bench: Bench, settings: CardsSettings) -> dict[str, int]:
    """Tokens that the first round forwards, and those that it must, beside the ledger (which must agree)."""
    model, classifier = bench.policy.model, bench.classifier
    with watched(model) as policy_fed, watched(classifier.model) as reward_fed, recorded(bench.reward) as scored:
        completions = settings_of.cards(bench, settings).sample(bench.prompts, seed=0)
    counts = {
        "policy": policy_fed.num_tokens,
        "policy_padded": policy_fed.num_places,
        "policy_necessary": policy_necessary(bench.policy.tokenizer, bench.prompts, completions),
        "reward": reward_fed.num_tokens,
        "reward_padded": reward_fed.num_places,
        "reward_necessary": reward_necessary(classifier.tokenizer, bench.prompts, completions, scored),
        **ledger(completions),
    }
    assert (counts["policy"], counts["reward"]) == (counts["policy_ledger"], counts["reward_ledger"]), counts
    return counts


def ledger(completions: list[Completion]) -> dict[str, int]:
    """What the completions say they cost."""
    costs = [completion.cost for completion in completions]
    return {
        "policy_ledger": sum(cost.policy_tokens for cost in costs),
        "reward_ledger": sum(cost.reward_tokens for cost in costs),
    }


def requests(bench: Bench, settings: CardsSettings) -> list[float]:
    """Seconds of requests made one at a time."""
    sampler = settings_of.cards(bench, settings, batch_size=1)
    prompts = [bench.prompts[i % len(bench.prompts)] for i in range(bench.setting.num_requests)]
    return [timed(sampler.sample, [prompt], seed=i)[1] for i, prompt in enumerate(prompts)]


def baseline(bench: Bench, settings: CardsSettings, seed: int, *, cached: bool) -> list[list[int]]:
    """The reference's responses to all prompts, one after the other, from the random numbers that ours draws with."""
    classifier = bench.classifier
    assert (classifier.head, classifier.sign, settings.acceptance) == (0, 1, "soft")
    assert settings.target is not None
    assert isinstance(settings.entropy_threshold, float)
    setup = Baseline(
        policy=bench.policy.model,
        policy_tokenizer=bench.policy.tokenizer,
        reward=classifier.model,
        reward_tokenizer=classifier.tokenizer,
        target=settings.target,
        entropy_threshold=settings.entropy_threshold,
        start_weight=settings.start_weight,
        acceptance_temperature=settings.acceptance_temperature,
        min_segment=settings.min_segment,
        max_segment=settings.max_segment,
        max_proposals=settings.max_proposals,
        max_new_tokens=bench.setting.new_tokens,
    )
    answers = []
    for prompt, key in zip(bench.prompts, prompt_keys(bench.prompts_ids), strict=True):

        def uniform(segment: int, proposal: int, step: int, key: int = key) -> float:
            stream = stream_keys(seed, [key], [segment * settings.max_proposals + proposal])
            return float(uniforms(stream, step)[0])

        answers.append(respond(setup, prompt, uniform, cached=cached))
    return answers
