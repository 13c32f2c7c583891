"""GGRO against a slow reference; SEA's chains together against one at a time, and a step against bare passes.

Blockwise Best-of-m against Best-of-n; a gradient through the end of a row against bare passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from iama.config.specs import Sampling
from inference.engine.decode import decode
from inference.engine.reward_gradient import GradientRows, around
from inference.engine.reward_rows import reads_in_pieces
from inference.samplers.base import Completion
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Chains, Run, Sea, Search, SeaSettings
from inference.samplers.sea_energy import Energy, Models, Start
from inference.samplers.serve import serve
from scripts.bench.entries import Entry
from scripts.bench.ggro_baseline import Answer, Baseline, respond
from scripts.bench.plain_sampling import ratios
from scripts.bench.setting import Bench, timed


@dataclass
class GradientFigures:
    """Counts of the first round of GGRO, and seconds of each pair.

    `ggro`, `ggro_reference`: all prompts. `together`, `alone`: the steps of all chains of SEA, alone scaled up from
    some. `steps`, `passes`: the steps of all chains, and the forward and backward passes that they must have;
    `passes_alone`: the same passes of one row at a time, scaled up from some. `best_of_n`, `blockwise`, `tilted`:
    microseconds a sampled token. `suffix`, `bare_suffix`: a forward and a backward pass through half an answer each.
    """

    counts: dict[str, int] = field(default_factory=dict)
    num_same: dict[str, int] = field(default_factory=dict)  # GGRO's prompts, SEA's chains: answered alike
    summary: dict[str, float] = field(default_factory=dict)  # of GGRO's segments
    ggro: list[float] = field(default_factory=list)
    ggro_reference: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    passes_alone: list[float] = field(default_factory=list)
    best_of_n: list[float] = field(default_factory=list)
    blockwise: list[float] = field(default_factory=list)
    tilted: list[float] = field(default_factory=list)
    suffix: list[float] = field(default_factory=list)
    bare_suffix: list[float] = field(default_factory=list)

    def entries(self) -> list[Entry]:
        """The ratios."""
        count = self.counts
        return [
            Entry("ggro_policy_tokens", [count["policy_reference"] / count["policy"]]),
            Entry("ggro_reward_tokens", [count["reward_reference"] / count["reward"]]),
            Entry("ggro_wall", ratios(self.ggro_reference, self.ggro)),
            Entry("sea_batched", ratios(self.alone, self.together)),
            Entry("sea_step", ratios(self.steps, self.passes)),
            Entry("blockwise_overhead", ratios(self.blockwise, self.best_of_n)),
            Entry("tilted_overhead", ratios(self.tilted, self.best_of_n)),
            Entry("backward_overhead", ratios(self.suffix, self.bare_suffix)),
        ]


def measure(bench: Bench, say: Callable[[str], None]) -> GradientFigures:
    """All of them; both models' weights are frozen."""
    bench.policy.model.requires_grad_(False)
    bench.classifier.model.requires_grad_(False)
    reads_in_pieces(bench.classifier)  # tries the model once, which belongs to no request
    figures = GradientFigures()
    measure_ggro(bench, figures, say)
    measure_chains(bench, figures, say)
    measure_steps(bench, figures, say)
    measure_blockwise(bench, figures, say)
    measure_suffix(bench, figures, say)
    return figures


def measure_ggro(bench: Bench, figures: GradientFigures, say: Callable[[str], None]) -> None:
    """Rounds of ours and the reference, side by side; the first round's tokens are counted."""
    sampler = ggro(bench)
    for i in range(bench.setting.num_guided_rounds):
        with fed(bench.policy.model) as policy_fed, fed(bench.classifier.model) as reward_fed:
            answers, seconds = timed(ggro_reference, bench, sampler.settings)
        completions, ours = timed(sampler.sample, bench.prompts, seed=i)
        figures.ggro.append(ours)
        figures.ggro_reference.append(seconds)
        say(f"GGRO, round {i + 1} of {bench.setting.num_guided_rounds}: ours {ours:.2f} s, reference {seconds:.2f} s")
        if i == 0:
            figures.counts = count(bench, sampler)
            figures.counts |= {"policy_reference": sum(policy_fed), "reward_reference": sum(reward_fed)}
            pairs = zip(answers, completions, strict=True)
            figures.num_same["ggro"] = sum(tuple(a.token_ids) == completion.token_ids for a, completion in pairs)
            figures.summary = segments(completions, answers)


def segments(completions: list[Completion], answers: list[Answer]) -> dict[str, float]:
    """Means of a segment: tokens, candidates of ours, and those that the reference decodes, repetitions included."""
    trace = [segment for completion in completions for segment in completion.trace]
    return {
        "segment_length": statistics.fmean(segment.num_tokens for segment in trace),
        "candidates": statistics.fmean(segment.num_proposals for segment in trace),
        "candidates_reference": statistics.fmean(number for answer in answers for number in answer.num_decoded),
    }


def ggro(bench: Bench) -> Ggro:
    """The sampler under test: its defaults, which are what is published."""
    return Ggro(bench.policy, bench.reward, GgroSettings(), sampling(bench), bench.setting.num_prompts)


def sampling(bench: Bench) -> Sampling:
    """Plain, of the setting's length."""
    return Sampling(max_new_tokens=bench.setting.guided_tokens)


def count(bench: Bench, sampler: Ggro) -> dict[str, int]:
    """Tokens that ours forwards, from what the models are fed; the ledger must agree.

    The reward is also tried on a few rows before any prompt, as it is to be read from embeddings; they are left out.
    """
    with fed(bench.classifier.model) as tried:
        sampler.scores()
    with fed(bench.policy.model) as policy_fed, fed(bench.classifier.model) as reward_fed:
        completions = sampler.sample(bench.prompts, seed=0)
    counts = {"policy": sum(policy_fed), "reward": sum(reward_fed) - sum(tried)}
    costs = [completion.cost for completion in completions]
    ledger = sum(cost.policy_tokens for cost in costs), sum(cost.reward_tokens for cost in costs)
    assert (counts["policy"], counts["reward"]) == ledger, (counts, ledger)
    return counts


@contextmanager
def fed(model: Any) -> Iterator[list[int]]:
    """Tokens of every forward of a model, padding excluded; no text of the bench holds the padding token."""
    numbers: list[int] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None:
            numbers.append(kwargs["inputs_embeds"].shape[:2].numel())
        else:
            numbers.append(int((ids != model.config.pad_token_id).sum()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield numbers
    finally:
        handle.remove()


def ggro_reference(bench: Bench, settings: GgroSettings) -> list[Answer]:
    """The reference's responses to all prompts, one after the other."""
    classifier, length = bench.classifier, bench.setting.guided_tokens
    assert (classifier.head, classifier.sign) == (0, 1)
    assert (settings.score, settings.parallel, settings.greedy, settings.first_nudge) == ("gradient", False, True, True)
    assert settings.max_segment >= length
    assert isinstance(settings.entropy_threshold, float)
    setup = Baseline(
        policy=bench.policy.model,
        reward=classifier.model,
        num_candidates=settings.num_candidates,
        entropy_threshold=settings.entropy_threshold,
        min_segment=settings.min_segment,
        top_k=settings.num_options(bench.policy.model.config.vocab_size),
        max_new_tokens=length,
    )
    return [
        respond(setup, ids, around(bench.reward, prompt))
        for ids, prompt in zip(bench.prompts_ids, bench.prompts, strict=True)
    ]


def measure_chains(bench: Bench, figures: GradientFigures, say: Callable[[str], None]) -> None:
    """Rounds of all chains together and some of them one at a time (scaled up); who goes first alternates."""
    setting, searches, answers = bench.setting, drawn(bench), dict[str, list[list[int]]]()
    sides = {
        "together": (searches, len(searches) * setting.num_chains),
        "alone": (searches[: setting.num_moved_alone], 1),
    }
    for i in range(setting.num_guided_rounds):
        for name in sides if i % 2 == 0 else reversed(sides):
            moved, batch_size = sides[name]
            answers[name], seconds = timed(move, bench, moved, batch_size)
            getattr(figures, name).append(seconds * len(searches) / len(moved))
        say(
            f"SEA, round {i + 1} of {setting.num_guided_rounds}: {setting.num_moves} steps, together "
            f"{figures.together[-1]:.2f} s, one chain at a time {figures.alone[-1]:.2f} s"
        )
    figures.num_same["sea"] = sum(a == b for a, b in zip(answers["together"], answers["alone"], strict=False))


def drawn(bench: Bench) -> list[Search]:
    """Prompts with the samples that their chains start from."""
    setting, policy = bench.setting, bench.policy
    size = setting.num_prompts * setting.num_chains
    responses, _ = decode(policy, bench.prompts_ids, setting.num_chains, sampling(bench), seed=0, batch_size=size)
    searches = []
    for i, (ids, prompt, row) in enumerate(zip(bench.prompts_ids, bench.prompts, responses, strict=True)):
        before, after = around(bench.reward, prompt)
        starts = [Start(ids, response.token_ids, before, after, size * i + c) for c, response in enumerate(row)]
        searches.append(Search(i, ids, prompt, before, after, i, starts))
    return searches


def move(bench: Bench, searches: list[Search], batch_size: int) -> list[list[int]]:
    """Token ids of every chain's answer; `batch_size` chains move together."""
    sampler = Sea(bench.policy, bench.reward, sea_settings(bench), sampling(bench), batch_size)
    finished = list(Run(sampler, models(bench), batch_size).run(searches))
    return [chain.answer for search in finished for chain in search.chains]


def sea_settings(bench: Bench) -> SeaSettings:
    """The defaults, with few steps."""
    return SeaSettings(num_chains=bench.setting.num_chains, num_steps=bench.setting.num_moves)


def models(bench: Bench) -> Models:
    """What the chains read."""
    return Models.of(bench.policy, bench.reward, sampling(bench))


def measure_steps(bench: Bench, figures: GradientFigures, say: Callable[[str], None]) -> None:
    """Rounds of the steps of all chains and of bare passes of the same shape; who goes first alternates.

    The prompts are read beforehand on both sides.
    """
    setting = bench.setting
    starts = [start for search in drawn(bench) for start in search.starts]
    settings = sea_settings(bench)
    passes = Passes(bench, starts)
    single = [Passes(bench, [start]) for start in starts[: setting.num_moved_alone]]
    sides: dict[str, Callable[[Energy], object]] = {
        "steps": lambda energy: Chains(energy, settings).run(),
        "passes": lambda _energy: passes.run(settings.num_steps),
        "passes_alone": lambda _energy: run_each(single, settings.num_steps),
    }
    for i in range(setting.num_step_rounds + 1):
        for name in sides if i % 2 == 0 else reversed(sides):
            energy = Energy(models(bench), starts, settings.alpha)
            _, seconds = timed(sides[name], energy)
            if i > 0:  # the first is a warm-up
                getattr(figures, name).append(seconds)
    figures.passes_alone = [seconds * len(starts) / len(single) for seconds in figures.passes_alone]
    say(
        f"SEA, {setting.num_moves} steps of {len(starts)} chains: {statistics.median(figures.steps):.2f} s, bare "
        f"passes {statistics.median(figures.passes):.2f} s, row by row {statistics.median(figures.passes_alone):.2f} s"
    )


def measure_blockwise(bench: Bench, figures: GradientFigures, say: Callable[[str], None]) -> None:
    """Rounds of Best-of-n and of blockwise Best-of-n; a sampled token costs each what it took over what it sampled."""
    number = bench.setting.num_chains
    methods = {
        "best_of_n": f"bon({number})",
        "blockwise": f"blockwise({number})",
        "tilted": f"blockwise({number}, first=tilted)",
    }
    size = bench.setting.num_prompts * number
    samplers = {
        name: serve(bench.policy, bench.reward, method, sampling(bench), size) for name, method in methods.items()
    }
    for i in range(bench.setting.num_step_rounds + 1):
        for name in samplers if i % 2 == 0 else reversed(samplers):
            completions, seconds = timed(samplers[name].sample, bench.prompts, seed=i)
            if i > 0:  # the first is a warm-up
                getattr(figures, name).append(1e6 * seconds / sum(map(num_drawn, completions)))
    shown = (f"{methods[name]} {statistics.median(getattr(figures, name)):.0f}" for name in methods)
    say(f"microseconds a sampled token: {', '.join(shown)}")


def num_drawn(completion: Completion) -> int:
    """Tokens that were sampled for an answer."""
    wasted = sum(segment.wasted_tokens for segment in completion.trace)
    return wasted + sum(len(candidate.token_ids) for candidate in completion.candidates)


def measure_suffix(bench: Bench, figures: GradientFigures, say: Callable[[str], None]) -> None:
    """Rounds of a gradient through the second half of all answers, as guidance takes it, and of bare passes."""
    starts = [start for search in drawn(bench) for start in search.starts]
    half = bench.setting.guided_tokens // 2
    ahead = [[*start.before, *start.token_ids[:half]] for start in starts]
    rest = [[*start.token_ids[half:], *start.after] for start in starts]
    rows = GradientRows(bench.classifier.model, bench.classifier.source)
    slots = rows.allocate(len(starts))
    rows.extend(slots, ahead)
    bare = SuffixPasses(bench, ahead, rest)

    def ours() -> None:
        for slot, row in zip(slots, ahead, strict=True):
            rows.roll_back(slot, len(row))
        rows.extend_with_gradient(slots, rest, [0] * len(rest), bench.classifier.head)

    sides: dict[str, Callable[[], None]] = {"suffix": ours, "bare_suffix": bare.run}
    for i in range(bench.setting.num_step_rounds + 1):
        for name in sides if i % 2 == 0 else reversed(sides):
            _, seconds = timed(sides[name])
            if i > 0:
                getattr(figures, name).append(seconds)
    ours_s, bare_s = statistics.median(figures.suffix), statistics.median(figures.bare_suffix)
    say(f"a gradient through {len(rest[0])} tokens of {len(rest)} rows: {ours_s:.3f} s, bare passes {bare_s:.3f} s")


class SuffixPasses:
    """A bare forward and backward pass of the reward through the ends of rows of one shape."""

    def __init__(self, bench: Bench, ahead: list[list[int]], rest: list[list[int]]) -> None:
        self._reward: Any = bench.classifier.model
        device = self._reward.device
        with torch.no_grad():
            cache = DynamicCache()
            self._reward(input_ids=torch.tensor(ahead, device=device), past_key_values=cache, use_cache=True)
            self._held = [(layer.keys, layer.values) for layer in cache.layers]
            self._inputs_RTD = self._reward.get_input_embeddings()(torch.tensor(rest, device=device)).detach()

    def run(self) -> None:
        """Both passes."""
        inputs_RTD = self._inputs_RTD.clone().requires_grad_()
        cache = _begun(self._held)
        rewards_R = self._reward(inputs_embeds=inputs_RTD, past_key_values=cache, use_cache=True).logits[:, 0]
        torch.autograd.grad(rewards_R.sum(), inputs_RTD)


def run_each(passes: list[Passes], number: int) -> None:
    """The same passes of several batches, one after the other."""
    for one in passes:
        one.run(number)


class Passes:
    """Bare passes of policy and reward over rows of one shape: what steps read and differentiate, nothing else.

    As in `inference.samplers.sea_energy` the policy reads from the prompt's last token on, and the reward from the
    answer's first; what is before them is constant.
    """

    def __init__(self, bench: Bench, starts: list[Start]) -> None:
        self._policy: Any = bench.policy.model
        self._reward: Any = bench.classifier.model
        device = self._policy.device
        prompts_RP = torch.tensor([start.prompt_ids for start in starts], device=device)
        answers_RT = torch.tensor([start.token_ids for start in starts], device=device)
        ahead_RP = torch.tensor([start.before[: start.num_ahead] for start in starts], device=device)
        rows_RT = torch.tensor(
            [[*start.before[start.num_ahead :], *start.token_ids, *start.after] for start in starts], device=device
        )
        with torch.no_grad():
            cache = DynamicCache()
            self._policy(input_ids=prompts_RP[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._held = [(layer.keys, layer.values) for layer in cache.layers]
            cache = DynamicCache()
            self._reward(input_ids=ahead_RP, past_key_values=cache, use_cache=True)
            self._held_by_reward = [(layer.keys, layer.values) for layer in cache.layers]
            read_RT = torch.cat([prompts_RP[:, -1:], answers_RT[:, :-1]], dim=1)
            self._inputs_RTD = self._policy.get_input_embeddings()(read_RT).detach()
            self._rows_RTD = self._reward.get_input_embeddings()(rows_RT).detach()
            self._pull_RTV = torch.ones_like(self.policy(self._inputs_RTD))

    def run(self, number: int) -> None:
        """So many forward and backward passes of each, and one forward more, as that many steps have."""
        for i in range(number + 1):
            with torch.set_grad_enabled(i < number):
                inputs_RTD = self._inputs_RTD.clone().requires_grad_(i < number)
                rows_RTD = self._rows_RTD.clone().requires_grad_(i < number)
                logits_RTV = self.policy(inputs_RTD)
                if i < number:
                    torch.autograd.grad(logits_RTV, inputs_RTD, self._pull_RTV)
                cache = _begun(self._held_by_reward)
                rewards_R = self._reward(inputs_embeds=rows_RTD, past_key_values=cache, use_cache=True).logits[:, 0]
                if i < number:
                    torch.autograd.grad(rewards_R.sum(), rows_RTD)

    def policy(self, inputs_RTD: torch.Tensor) -> torch.Tensor:
        """Logits `[R, T, V]` of embeddings that follow the prompts."""
        cache = _begun(self._held)
        logits_RTV: torch.Tensor = self._policy(inputs_embeds=inputs_RTD, past_key_values=cache, use_cache=True).logits
        return logits_RTV


def _begun(held: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache with the keys and values of what was read beforehand."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(held):
        cache.update(keys, values, layer)
    return cache
