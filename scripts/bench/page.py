"""docs/results/performance.md, summary.json and details.json."""

from __future__ import annotations

import json
import os
import platform
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from iama.files import write_atomically
from inference.samplers.cards import CardsSettings
from inference.samplers.ggro import GgroSettings
from scripts.bench.cards import CardsFigures
from scripts.bench.cluster import BATCH_SIZE, BLOCK_S, BLOCKS_EACH, NUM_SAMPLES, ClusterFigures
from scripts.bench.entries import BARS, Entry, Kind
from scripts.bench.gradient import GradientFigures
from scripts.bench.plain_sampling import PlainFigures, ratios
from scripts.bench.roll_outs import RollOutFigures
from scripts.bench.serving import NUM_CLIENTS, ROWS, ServingFigures
from scripts.bench.setting import Bench, Setting
from scripts.bench.training import TrainingFigures
from scripts.experiments.frame import Claim, claims_table, table

QUICK_NOTE = "**A run with `--quick`: its figures mean nothing.**"


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    bench: Bench
    settings: CardsSettings
    plain: PlainFigures
    cards: CardsFigures
    gradient: GradientFigures
    training: TrainingFigures
    rollouts: RollOutFigures
    cluster: ClusterFigures
    serving: dict[str, ServingFigures]
    quick: bool

    @property
    def entries(self) -> dict[str, Entry]:
        """By name, in the order of the bars."""
        entries = [*self.plain.entries(self.bench), *self.cards.entries(), *self.gradient.entries()]
        entries += [*self.training.entries(), *self.rollouts.entries(), *self.cluster.entries()]
        entries += [entry for figures in self.serving.values() for entry in figures.entries()]
        by_name = {entry.name: entry for entry in entries}
        return {name: by_name[name] for name in BARS}

    @property
    def latencies(self) -> list[dict[str, Any]]:
        """Of single samples and CARDS, alone and together."""
        return [one.as_dict() for one in self.plain.latencies(self.bench) + self.cards.latencies(self.bench)]


def write(report: Report, out: Path, path: Path, command: str) -> None:
    """Write `summary.json` (ratios only) and `details.json` (the rest) into a folder, and the page."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {name: entry.as_dict() for name, entry in report.entries.items()}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    details = {
        "quick": report.quick,
        "machine": machine(report.bench),
        "setting": asdict(report.bench.setting),
        "cards_settings": report.settings.model_dump(),
        "cards": report.cards.summary,
        "counts": report.cards.counts,
        "same_tokens": report.cards.num_same,
        "latency": report.latencies,
        "gradient": asdict(report.gradient),
        "training": asdict(report.training),
        "rollouts": asdict(report.rollouts),
        "cluster": asdict(report.cluster),
        "serving": {name: asdict(figures) for name, figures in report.serving.items()},
        "seconds": {"sampling": asdict(report.plain), "cards": report.cards.ours, "references": report.cards.theirs},
    }
    write_atomically(out / "details.json", json.dumps(details, indent=2) + "\n")
    parts = [part(report) for part in (setting, people, references, gradient, training)]
    parts += [rollouts(report.rollouts, report.bench.setting), cluster(report.cluster)]
    parts += [serving(report.serving, report.bench.setting), latency(report)]
    head = ["# Speed", f"Written by `{command}`; edit the script, not this page.", *([QUICK_NOTE] * report.quick)]
    path.parent.mkdir(parents=True, exist_ok=True)
    filled_parts = [filled(part).strip("\n") for part in parts]
    write_atomically(path, "\n\n".join([*head, *filled_parts, *sections_of_others(path)]) + "\n")


def sections_of_others(path: Path) -> list[str]:
    """Sections of the page that other scripts have written, between their marks."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return re.findall(r"<!-- written by python -m .*?<!-- end[^>]*-->", text, re.DOTALL)


def renew(path: Path, part: str) -> None:
    """Put a section in the place of the page's own of that heading, or before the last; the others stay as they are."""
    text = filled(part)
    head, *sections = path.read_text(encoding="utf-8").rstrip("\n").split("\n\n## ")
    title, others = text.partition("\n")[0].removeprefix("## "), [old.partition("\n")[0] for old in sections]
    place = others.index(title) if title in others else len(sections) - 1
    sections[place : place + (title in others)] = [text.removeprefix("## ")]
    write_atomically(path, "\n\n## ".join([head, *sections]) + "\n")


def filled(part: str) -> str:
    """A part of the page with its paragraphs' lines filled; tables and headings stay."""
    blocks = part.strip("\n").split("\n\n")
    return "\n\n".join(block if block[0] in "|#" else textwrap.fill(block, 120) for block in blocks)


def machine(bench: Bench) -> dict[str, Any]:
    """Where it ran."""
    model = bench.policy.model
    if model.device.type == "cuda":
        where = torch.cuda.get_device_name(model.device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        where = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": where,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def setting(report: Report) -> str:
    """What was measured, on what, and how to read it."""
    bench, at, settings, cards = report.bench, machine(report.bench), report.settings, report.cards
    fixed = bench.setting
    policy_size, reward_size = (model.num_parameters() / 1e6 for model in (bench.policy.model, bench.classifier.model))
    length = cards.summary["segment_length"]
    outside = "" if abs(length - fixed.mean_segment) <= fixed.tolerance else " (**outside of what was set**)"
    return f"""
Every figure is a ratio of two things done side by side in one run: the median of paired, interleaved repeats, with the
range in brackets. Counts have no range. Seconds are those of this machine: {at["device"]}, {at["cores"]} cores
({at["threads"]} threads), {at["dtype"]}, torch {at["torch"]}, transformers {at["transformers"]}.

**Setting.** The demo world's policy ({policy_size:.2f} million parameters) and its reward for helpfulness
({reward_size:.2f} million), {fixed.num_prompts} prompts of {fixed.prompt_tokens} tokens (template included),
{fixed.new_tokens} new tokens each, sampled at temperature 1. A bias on the head keeps special tokens from being drawn,
whoever samples, so every response has its full length. CARDS' target ({settings.target:.3f}) is the 0.9 quantile of
unguided samples. The entropy threshold ({settings.entropy_threshold:.3f} nats) is set for a mean segment of
{fixed.mean_segment:g} ± {fixed.tolerance:g} tokens; the other settings are the defaults, one proposal at a time. In the
measured runs the mean segment has {length:.1f} tokens{outside}, {cards.summary["acceptance_rate"]:.0%} of the judged
proposals are accepted, {cards.summary["forced_share"]:.1%} of the segments are forced, and
{cards.summary["wasted_tokens"]:.0f} drawn tokens a response are thrown away.
"""


def people(report: Report) -> str:
    """Against `model.generate`."""
    fixed, entry = report.bench.setting, report.entries["bon16_generate"]
    return f"""
## Against what people use

{claims(report, "people")}

Sampling alone on both sides: {fixed.num_samples} samples for each of {fixed.num_prompts} prompts, all in one batch.
transformers' side is `model.generate(num_return_sequences={fixed.num_samples}, do_sample=True, use_cache=True)` with
nothing else switched on; {len(entry.ratios)} pairs, who goes first alternates. Median seconds: ours
{median(report.plain.ours)}, `generate` {median(report.plain.generate)}. **Only this section compares with other
people's software, and only its figures may be quoted outside this page.**
"""


def references(report: Report) -> str:
    """Against what must be done, and against slow references of our own."""
    cards, count, fixed = report.cards, report.cards.counts, report.bench.setting
    same_whole, same_cached = cards.num_same["whole"], cards.num_same["cached"]
    rows = [
        [
            kind,
            f"{count[kind]:,}",
            f"{count[kind + '_padded']:,}",
            f"{count[kind + '_necessary']:,}",
            *(f"{count[f'{kind}_{name}']:,} ({count[f'{kind}_{name}'] / count[kind]:.1f})" for name in cards.theirs),
        ]
        for kind in ("policy", "reward")
    ]
    header = ["tokens", "forwarded", "with padding", "necessary", "reference, no cache", "reference, cache in segments"]
    return f"""
## Against our own reference

That caching and batching work, no more: the reference is ours.

{claims(report, "own")}

**Counts**, of {fixed.num_prompts} prompts; in brackets, over ours:

{table(header, rows)}

Forwarded tokens are what the models' inputs hold, and equal the ledger. Necessary are: for the policy, prompts once and
each proposed token once; for the reward, prompts once and, for each proposal, its new text and the template's suffix
(counted from the texts that were scored, in the reward's own tokens). The last token of a response need not be
forwarded, so the policy's ratio can be below 1.

**The reference** (`scripts/bench/cards_baseline.py`, frozen) is stock transformers, one prompt at a time, and draws
with the same random numbers: it gave the same tokens for {same_whole} (no cache) and {same_cached} (cache within
a segment) of {fixed.num_prompts} prompts; others differ by rounding. It keeps the logits at a segment's
end, and reads each proposal's whole text for its reward. Without a cache is how the public implementation works, and
carries the targets on tokens and on time. **With a cache within a segment the reference is quicker: it takes
{cards.wall("cached")} times our seconds.** That one has no target.

**Sampling.** One sample at a time is the same engine with one row ({fixed.num_alone} samples a round, scaled up). The
bare loop is a forward, a softmax and `torch.multinomial` on a `DynamicCache`; the ratio is that of
{fixed.num_prompts} rows, one sample a prompt. With {fixed.num_samples} samples a prompt it is
{median(report.plain.wide_overhead)} ({len(report.plain.wide_overhead)} pairs).
"""


def gradient(report: Report) -> str:
    """Guidance by gradients: against a slow reference, one chain at a time, and bare passes."""
    fixed, count = report.bench.setting, report.gradient.counts
    summary, same = report.gradient.summary, report.gradient.num_same
    at = machine(report.bench)
    num_chains, num_alone = (number * fixed.num_chains for number in (fixed.num_prompts, fixed.num_moved_alone))
    defaults, bare = GgroSettings(), Entry("sea_batched", ratios(report.gradient.passes_alone, report.gradient.passes))
    header = ["tokens", "forwarded", "reference", "as published"]
    rows = [
        ["policy", f"{count['policy']:,}", shown(count, "policy", 1), shown(count, "policy", 1)],
        ["reward", f"{count['reward']:,}", shown(count, "reward", 1), shown(count, "reward", 2)],
    ]
    return f"""
## Guided by gradients

Against references of our own, as above. Seconds are of both sides with torch's threads set to {at["threads"]}, on
{at["cores"]} cores. At 1.5 B and 0.5 B parameters in bf16 on a GPU nothing of this was measured.

{claims(report, "gradient")}

**GGRO**, with its defaults ({defaults.num_candidates} candidates, a threshold of {defaults.entropy_threshold:g} nats,
greedy), {fixed.guided_tokens} new tokens for each of {fixed.num_prompts} prompts. Segments have
{summary["segment_length"]:.1f} tokens on the mean; longer ones leave less to save. For each, ours decodes
{summary["candidates"]:.1f} candidates, the reference {summary["candidates_reference"]:.1f}: it decodes and
scores a repeated one before it stops.

{table(header, rows)}

The reference (`scripts/bench/ggro_baseline.py`, frozen) is the published procedure on stock transformers, one prompt at
a time, without what that computes and throws away, which is its second pass of the reward over soft tokens and the
gradient of a segment's last candidate. The policy's cache lives as long as a candidate; the reward reads and
differentiates whole rows. It gave the same tokens for {same["ggro"]} of {fixed.num_prompts} prompts; others
differ by rounding. As published every candidate is read twice by the reward. Ours counts what the models are fed, and
equals the ledger.

**SEA**, {fixed.num_moves} steps of {fixed.num_chains} chains for each prompt, {fixed.guided_tokens} tokens each, from
the same samples (drawing them is not counted). One chain at a time is the same code with batches of one; it gave the
same answer for {same["sea"]} of {num_alone} chains, and its time is scaled up from theirs. The passes beside
a step are those of {num_chains} rows of its shape: forward and backward to the inputs, weights frozen, of the policy
(what stands before the response being constant) and of the reward, with no loss, no state and no optimiser. Row by row
these passes take {bare.spread} times as long: what batching can win on this machine, where arithmetic and not the calls
takes the time.

**Blockwise** Best-of-{fixed.num_chains} with its defaults takes {median(report.gradient.blockwise)} microseconds a
sampled token, with tilted first tokens {median(report.gradient.tilted)}, and Best-of-{fixed.num_chains}
{median(report.gradient.best_of_n)}. The demo's sentences have five tokens, so after every five tokens all rows are
scored, and begin anew; longer segments cost less. A gradient through the second half of an answer is taken after the
first half was read, and compared with bare passes through the same tokens.
"""


def shown(count: dict[str, int], kind: str, times: int) -> str:
    """Tokens of GGRO's reference, and over ours."""
    number = times * count[f"{kind}_reference"]
    return f"{number:,} ({number / count[kind]:.1f})"


def training(report: Report) -> str:
    """What non-linear GRPO adds to TRL's training."""
    demo = Entry("advantages_overhead", report.training.demo_advantages)
    return f"""
## The objective in training

{claims(report, "training")}

Both trainers run `configs/demo.yaml` in one process, without gold rewards, on the same model, data and batch. The
first ratio is of CPU time in one run of ours, step by step: what `_calculate_rewards` and
`_generate_and_score_completions` take, less what TRL's methods of these names take inside them. The second is of the
peak memory of fresh processes, {len(report.training.memory)} pairs.

The advantages of 64 prompts, groups of 1024 and four criteria, a thousand times the roll-outs of the demo, as a share
of one step of `configs/demo.yaml` (one process). Those of the demo's own rewards take {demo.spread} of the step.
"""


def cluster(figures: ClusterFigures) -> str:
    """What Ray adds, and what workers win."""
    slept = [[name, f"{milliseconds:.1f}"] for name, milliseconds in figures.milliseconds.items()]
    sampled = [[name, median(figures.sampling[name]), median(figures.bare[name])] for name in figures.sampling]
    return f"""
## Workers on a Ray cluster

{claims_of(figures.entries())}

By simulation, since there are two cores: workers sleep for {BLOCK_S:g} seconds a block, {BLOCKS_EACH} blocks each, and
what the wall clock has beyond that is the scheduler's, shown here for a block.

{table(["workers that sleep", "milliseconds a block"], slept)}

And for real, {NUM_SAMPLES} samples for each of {figures.num_prompts} prompts by the demo's policy, in batches of at
most {BATCH_SIZE} rows, each worker with one thread. Beside them are as many processes without Ray, each with its share
of the prompts: they show what two cores allow.

{table(["workers, or processes", "seconds with Ray", "without"], sampled)}
"""


def serving(sides: dict[str, ServingFigures], fixed: Setting) -> str:
    """The server under load."""
    rows = [[name, *row] for name, figures in sides.items() for row in _served(figures)]
    header = ["policy", "method", "clients", "requests a second", "tokens a second", "first text, median", "95 %"]
    header += ["whole, median", "95 %"]
    demo = sides["demo"]
    return f"""
## The server

{claims_of([entry for figures in sides.values() for entry in figures.entries()])}

`iama serve` on the demo's policy and its reward for helpfulness, a process of its own; {fixed.num_served} streamed
requests in a round ({fixed.num_served_alone} by one client), at most {fixed.served_tokens} new tokens each,
{fixed.num_served_rounds} rounds. **135M**: the same reward on random weights in the shape of SmolLM2-135M, prompts of
{fixed.served_large_prompt_tokens} tokens, {fixed.num_served_large} requests ({fixed.num_served_large_alone} by one
client), at most {fixed.served_large_tokens} new tokens, {fixed.num_served_large_rounds} rounds. Every client asks again
as soon as it is answered. Clients share the machine with the server. The engine is the server's own, asked without
HTTP by {NUM_CLIENTS[-1]} at a time; offline is `inference.serve`, given all requests at once, with as many rows as the
clients fill of the server's {ROWS}. Tokens are all that were sampled, rejected ones too; a method that selects
sends its first text when it has chosen. Seconds:

{table(header, rows)}

The demo's policy answers within milliseconds, so that its ratios tell of HTTP above all. It takes
{demo.http_ms("single"):.1f} milliseconds a request (single samples) and {demo.http_ms("bon(4)"):.1f} (Best-of-4),
clients included, which are sockets that read lines.
"""


def _served(figures: ServingFigures) -> list[list[str]]:
    """By method and number of clients: rates, and quantiles of seconds."""
    rates = [
        [method, clients, median(figures.rate(method, clients)), f"{figures.token_rate(method, clients):.0f}"]
        for method, by_clients in figures.served.items()
        for clients in by_clients
    ]
    pairs = zip(figures.latencies(0), figures.latencies(1), strict=True)
    return [
        [*rate, *(f"{one.quantile(share):.3g}" for one in pair for share in (0.5, 0.95))]
        for rate, pair in zip(rates, pairs, strict=True)
    ]


def rollouts(figures: RollOutFigures, fixed: Setting) -> str:
    """Whole training steps, beside TRL's."""
    rows = [
        [
            name,
            *(f"{median(figures.steps[name][side])} ({figures.share(name, side):.0%})" for side in ("trl", "ours")),
            entry.spread,
            f"{figures.drawing_ratio(name):.3g}",
        ]
        for name, entry in zip(figures.steps, figures.entries(), strict=True)
    ]
    header = ["policy", "TRL: seconds a step (drawing)", "ours", "ratio", "ratio of drawing alone"]
    return f"""
## Training steps

{claims_of(figures.entries())}

Roll-outs on our engine in a whole optimiser step, beside TRL's `GRPOTrainer` as it stands, which draws by `generate`
(`scripts/experiments/stock_grpo.py`): the same model, LoRA, rewards, batch and one process. Trainings of a few steps
alternate, {fixed.num_drawn_trainings} pairs; the median step of one over that of the other, first steps left out.

{table(header, rows)}

**demo**: `configs/demo.yaml` without gold rewards, 4 prompts, groups of 16, at most 48 new tokens. **135M**: random
weights in the shape of SmolLM2-135M, a vocabulary of 49,152, {fixed.drawn_prompts} prompts of
{fixed.drawn_prompt_tokens} tokens, groups of 8, at most {fixed.drawn_tokens} new tokens, beta 0.2, a reward that costs
nothing. Random weights hardly ever draw a given end token, so that every 48th token ends a response. The loss is TRL's
on both sides. With the engine a prompt is read once for its group while completions are drawn, and once more for the
log-probabilities of the reference and of the policy; TRL reads it anew for every completion.
"""


def latency(report: Report) -> str:
    """Seconds a request."""
    rows = [
        [one["what"], str(one["batch"]), f"{one['median']:.3f}", f"{one['p95']:.3f}", str(one["num_requests"])]
        for one in report.latencies
    ]
    return f"""
## Latency

Seconds until a request is answered. Requests that are made together are answered together, when the last is done.

{table(["", "requests at once", "median", "95th percentile", "measured on"], rows)}
"""


def claims(report: Report, kind: Kind) -> str:
    """The table of one section's entries."""
    return claims_of([entry for entry in report.entries.values() if entry.bar.kind == kind])


def claims_of(entries: list[Entry]) -> str:
    """The table of some entries."""
    return claims_table(
        Claim(f"{e.bar.text} (`{e.name}`)", e.bar.shown, e.spread, e.bar.holds(e.ratio)) for e in entries
    )


def median(values: list[float]) -> str:
    """For people."""
    return f"{sorted(values)[len(values) // 2]:.3g}"
