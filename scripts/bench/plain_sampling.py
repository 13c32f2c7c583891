"""Plain sampling: our decoding beside `generate` of transformers, one sample at a time, and a bare loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from iama.config.specs import Sampling
from inference.engine.decode import decode
from inference.engine.policy import Policy
from scripts.bench.entries import Entry, Latency
from scripts.bench.setting import Bench, timed

EVERY = 3  # rounds in which the wide bare loop, which only stands beside a ratio, takes part


@dataclass
class PlainFigures:
    """Seconds of each round: the whole Best-of-N shape, one sample for each prompt, and single requests."""

    ours: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    alone_each: list[float] = field(default_factory=list)  # a sample
    ours_single: list[float] = field(default_factory=list)
    bare_single: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)

    def entries(self, bench: Bench) -> list[Entry]:
        """The ratios."""
        number = bench.setting.num_prompts * bench.setting.num_samples
        return [
            Entry("bon16_generate", ratios(self.generate, self.ours)),
            Entry("bon16_sequential", ratios([number * each for each in self.alone_each], self.ours)),
            Entry("engine_overhead", ratios(self.ours_single, self.bare_single)),
        ]

    @property
    def wide_overhead(self) -> list[float]:
        """Our seconds over the bare loop's in the Best-of-N shape, which is not measured in every round."""
        return ratios(self.ours[::EVERY], self.bare)

    def latencies(self, bench: Bench) -> list[Latency]:
        """Of single samples; requests that are made together are answered together."""
        num = bench.setting.num_prompts
        together = [seconds for seconds in self.ours_single for _ in range(num)]
        return [Latency("single sample", 1, self.requests), Latency("single sample", num, together)]


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Of each pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


def measure(bench: Bench, say: Callable[[str], None]) -> PlainFigures:
    """Rounds of all, interleaved, after a warm-up; who goes first alternates."""
    setting, figures = bench.setting, PlainFigures()
    for new_tokens in (2, 2):
        ours(bench, setting.num_samples, 0, new_tokens)
        generate(bench, setting.num_samples, 0, new_tokens)
        bare_loop(bench, setting.num_samples, 0, new_tokens)
    for i in range(setting.num_rounds):
        shapes: dict[str, tuple[Callable[[Bench, int, int], int], int]] = {
            "ours": (ours, setting.num_samples),
            "generate": (generate, setting.num_samples),
            "bare": (bare_loop, setting.num_samples),
            "ours_single": (ours, 1),
            "bare_single": (bare_loop, 1),
        }
        if i % EVERY:
            del shapes["bare"]
        for name in shapes if i % 2 == 0 else reversed(shapes):
            sample, num_samples = shapes[name]
            getattr(figures, name).append(timed(sample, bench, num_samples, i)[1])
        figures.alone_each.append(timed(alone, bench, setting.num_alone, i)[1] / setting.num_alone)
        say(
            f"round {i + 1} of {setting.num_rounds}: ours {figures.ours[-1]:.2f} s, generate "
            f"{figures.generate[-1]:.2f} s; one sample a prompt: ours {figures.ours_single[-1]:.2f} s, bare loop "
            f"{figures.bare_single[-1]:.2f} s; one sample alone {figures.alone_each[-1]:.2f} s"
        )
    figures.requests = [timed(alone, bench, 1, i)[1] for i in range(setting.num_requests)]
    return figures


def ours(bench: Bench, num_samples: int, seed: int, new_tokens: int | None = None) -> int:
    """Samples of all prompts, decoded together; their number of tokens."""
    num_new = new_tokens or bench.setting.new_tokens
    size = bench.setting.num_prompts * num_samples
    return num_sampled(bench.policy, bench.prompts_ids, num_samples, num_new, seed, size)


def alone(bench: Bench, num_samples: int, seed: int) -> int:
    """Samples of one prompt, one after the other."""
    prompt_ids = bench.prompts_ids[seed % bench.setting.num_prompts]
    return num_sampled(bench.policy, [prompt_ids], num_samples, bench.setting.new_tokens, seed, 1)


def num_sampled(
    policy: Policy, prompts_ids: list[list[int]], num_samples: int, new_tokens: int, seed: int, batch_size: int
) -> int:
    """Number of tokens that the engine samples."""
    sampling = Sampling(max_new_tokens=new_tokens)
    responses, _ = decode(policy, prompts_ids, num_samples, sampling, seed=seed, batch_size=batch_size)
    number = sum(len(response.token_ids) for row in responses for response in row)
    assert number == len(prompts_ids) * num_samples * new_tokens
    return number


@torch.inference_mode()
def generate(bench: Bench, num_samples: int, seed: int, new_tokens: int | None = None) -> int:
    """The same with `model.generate`, in one batch."""
    policy, num_new = bench.policy, new_tokens or bench.setting.new_tokens
    torch.manual_seed(seed)
    inputs = torch.tensor(bench.prompts_ids, device=policy.model.device)
    output = policy.model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_samples,
        max_new_tokens=num_new,
        use_cache=True,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    sampled: list[list[int]] = output[:, inputs.shape[1] :].tolist()
    number = sum(map(len, sampled))
    assert number == len(inputs) * num_samples * num_new
    return number


@torch.inference_mode()
def bare_loop(bench: Bench, num_samples: int, seed: int, new_tokens: int | None = None) -> int:
    """The same with the least that a batched loop must do: cache, softmax, multinomial."""
    model, num_new = bench.policy.model, new_tokens or bench.setting.new_tokens
    torch.manual_seed(seed)
    cache = DynamicCache(config=model.config)
    fed = torch.tensor(bench.prompts_ids, device=model.device)
    tokens = []
    for step in range(num_new):
        logits_RV = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if step == 0 and num_samples > 1:
            cache.batch_repeat_interleave(num_samples)
            logits_RV = logits_RV.repeat_interleave(num_samples, dim=0)
        fed = torch.multinomial(torch.softmax(logits_RV.float(), dim=-1), 1)
        tokens.append(fed)
    sampled: list[list[int]] = torch.cat(tokens, dim=1).tolist()
    return sum(map(len, sampled))
