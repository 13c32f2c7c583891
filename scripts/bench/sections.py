"""What each part leaves in the record: ratios, tables, and the facts that the pages' words need."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

import torch
import transformers

from inference.samplers.cards import CardsSettings
from inference.samplers.ggro import GgroSettings
from scripts.bench.cards import CardsFigures
from scripts.bench.cluster import BATCH_SIZE, BLOCK_S, BLOCKS_EACH, NUM_SAMPLES, ClusterFigures
from scripts.bench.entries import Entry, Latency, Ratio
from scripts.bench.gradient import GradientFigures
from scripts.bench.plain_sampling import PlainFigures, ratios
from scripts.bench.record import Section
from scripts.bench.roll_outs import RollOutFigures
from scripts.bench.serving import NUM_CLIENTS, ROWS, ServingFigures
from scripts.bench.setting import Bench, Setting
from scripts.bench.training import TrainingFigures
from scripts.experiments.frame import Table, table


def machine(bench: Bench) -> str:
    """Where it ran, and on what."""
    model = bench.policy.model
    if model.device.type == "cuda":
        where = torch.cuda.get_device_name(model.device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        where = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    dtype = str(model.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return (
        f"{where}, {cores} cores ({threads} thread{'s' * (threads > 1)}), {dtype}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def sampling(figures: PlainFigures, bench: Bench) -> Section:
    """Against `model.generate`, a bare loop, and one sample at a time."""
    fixed = bench.setting
    facts = {
        "num_prompts": fixed.num_prompts,
        "prompt_tokens": fixed.prompt_tokens,
        "new_tokens": fixed.new_tokens,
        "num_samples": fixed.num_samples,
        "num_pairs": len(figures.ours),
        "num_alone": fixed.num_alone,
        "ours_s": statistics.median(figures.ours),
        "generate_s": statistics.median(figures.generate),
        "wide_overhead": statistics.median(figures.wide_overhead),
        "policy_millions": bench.policy.model.num_parameters() / 1e6,
        "reward_millions": bench.classifier.model.num_parameters() / 1e6,
    }
    tables = {"latency": _latency(figures.latencies(bench))}
    return Section(machine(bench), _found(figures.entries(bench)), tables, facts)


def cards(figures: CardsFigures, settings: CardsSettings, bench: Bench) -> Section:
    """Against what must be done, and against slow references of our own."""
    count, fixed, summary = figures.counts, bench.setting, figures.summary
    rows = [
        [
            kind,
            count[kind],
            count[f"{kind}_padded"],
            count[f"{kind}_necessary"],
            *(count[f"{kind}_{name}"] for name in figures.theirs),
        ]
        for kind in ("policy", "reward")
    ]
    header = ["tokens", "forwarded", "with padding", "necessary", "reference, no cache", "reference, cache in segments"]
    facts = {
        "num_prompts": fixed.num_prompts,
        "target": settings.target,
        "entropy_threshold": settings.entropy_threshold,
        "mean_segment": fixed.mean_segment,
        "tolerance": fixed.tolerance,
        "segment_length": summary["segment_length"],
        "acceptance_rate": summary["acceptance_rate"],
        "forced_share": summary["forced_share"],
        "wasted_tokens": summary["wasted_tokens"],
        "num_same": figures.num_same,
        "cached": figures.wall("cached"),
    }
    tables = {"counts": table(header, rows), "latency": _latency(figures.latencies(bench))}
    return Section(machine(bench), _found(figures.entries()), tables, facts)


def gradient(figures: GradientFigures, bench: Bench) -> Section:
    """Guidance by gradients: against a slow reference, one chain at a time, and bare passes."""
    fixed, count, defaults = bench.setting, figures.counts, GgroSettings()
    bare = Entry("sea_batched", ratios(figures.passes_alone, figures.passes))
    header = ["tokens", "forwarded", "reference", "as published"]
    rows = [
        [kind, count[kind], *(times * count[f"{kind}_reference"] for times in (1, published))]
        for kind, published in (("policy", 1), ("reward", 2))  # as published a candidate is read twice by the reward
    ]
    micros = {
        f"Best-of-{fixed.num_chains}": figures.best_of_n,
        "blockwise": figures.blockwise,
        "blockwise, first tokens tilted": figures.tilted,
    }
    facts = {
        "num_prompts": fixed.num_prompts,
        "num_candidates": defaults.num_candidates,
        "entropy_threshold": defaults.entropy_threshold,
        "guided_tokens": fixed.guided_tokens,
        "segment_length": figures.summary["segment_length"],
        "candidates": figures.summary["candidates"],
        "candidates_reference": figures.summary["candidates_reference"],
        "num_same": figures.num_same,
        "num_moves": fixed.num_moves,
        "num_chains": fixed.num_chains,
        "num_moved_alone": fixed.num_moved_alone * fixed.num_chains,
        "passes_alone": bare.found.spread,
    }
    tables = {
        "ggro": table(header, rows),
        "blockwise": table(
            ["method", "microseconds a sampled token"], [[name, _median(values)] for name, values in micros.items()]
        ),
    }
    return Section(machine(bench), _found(figures.entries()), tables, facts)


def training(figures: TrainingFigures, bench: Bench) -> Section:
    """What non-linear GRPO adds to TRL's training."""
    demo = Entry("advantages_overhead", figures.demo_advantages).found
    return Section(machine(bench), _found(figures.entries()), {}, {"demo_advantages": demo.spread})


def rollouts(figures: RollOutFigures, bench: Bench) -> Section:
    """Whole training steps, beside TRL's."""
    fixed = bench.setting
    rows = [
        [
            name,
            *(text for side in ("trl", "ours") for text in (_median(steps[side]), f"{figures.share(name, side):.0%}")),
            f"{figures.drawing_ratio(name):.3g}",
        ]
        for name, steps in figures.steps.items()
    ]
    header = ["policy", "TRL: seconds a step", "share of drawing", "ours: seconds a step", "share of drawing, ours"]
    facts = {
        "num_pairs": fixed.num_drawn_trainings,
        "prompts": fixed.drawn_prompts,
        "prompt_tokens": fixed.drawn_prompt_tokens,
        "new_tokens": fixed.drawn_tokens,
    }
    steps = table([*header, "drawing alone, TRL over ours"], rows)
    return Section(machine(bench), _found(figures.entries()), {"steps": steps}, facts)


def cluster(figures: ClusterFigures, bench: Bench) -> Section:
    """What Ray adds, and what workers win."""
    slept = [[name, f"{milliseconds:.1f}"] for name, milliseconds in figures.milliseconds.items()]
    sampled = [[name, _median(figures.sampling[name]), _median(figures.bare[name])] for name in figures.sampling]
    tables = {
        "sleeping": table(["workers that sleep", "milliseconds a block"], slept),
        "workers": table(["workers, or processes", "seconds with Ray", "without"], sampled),
    }
    facts = {
        "block_s": BLOCK_S,
        "blocks": BLOCKS_EACH,
        "num_samples": NUM_SAMPLES,
        "num_prompts": figures.num_prompts,
        "batch_size": BATCH_SIZE,
    }
    return Section(machine(bench), _found(figures.entries()), tables, facts)


def serving(sides: dict[str, ServingFigures], bench: Bench) -> Section:
    """The server under load."""
    rows = [[name, *row] for name, figures in sides.items() for row in _served(figures)]
    header = ["policy", "method", "clients", "requests a second", "tokens a second", "first text, median", "95 %"]
    facts = {
        "rows": ROWS,
        "num_clients": NUM_CLIENTS[-1],
        "sides": served_sides(bench.setting),
        "http_ms": {method: sides["demo"].http_ms(method) for method in ("single", "bon(4)")},
    }
    served = table([*header, "whole, median", "whole, 95 %"], rows)
    entries = [entry for figures in sides.values() for entry in figures.entries()]
    return Section(machine(bench), _found(entries), {"served": served}, facts)


def served_sides(fixed: Setting) -> list[dict[str, object]]:
    """How much is asked for of each policy."""
    demo = [fixed.num_served, fixed.num_served_alone, fixed.served_tokens, fixed.num_served_rounds]
    large = [fixed.num_served_large, fixed.num_served_large_alone, fixed.served_large_tokens]
    names = ("requests", "alone", "new_tokens", "rounds")
    return [
        {"policy": "demo", **dict(zip(names, demo, strict=True))},
        {"policy": "135M", **dict(zip(names, [*large, fixed.num_served_large_rounds], strict=True))},
    ]


def _served(figures: ServingFigures) -> list[list[str]]:
    """By method and number of clients: rates, and quantiles of seconds."""
    rates = [
        [method, clients, _median(figures.rate(method, clients)), f"{figures.token_rate(method, clients):.0f}"]
        for method, by_clients in figures.served.items()
        for clients in by_clients
    ]
    pairs = zip(figures.latencies(0), figures.latencies(1), strict=True)
    return [
        [*rate, *(f"{one.quantile(share):.3g}" for one in pair for share in (0.5, 0.95))]
        for rate, pair in zip(rates, pairs, strict=True)
    ]


def _found(entries: list[Entry]) -> list[Ratio]:
    return [entry.found for entry in entries]


def _latency(latencies: list[Latency]) -> Table:
    header = ["asked for", "requests at once", "median seconds", "95th percentile", "requests"]
    return table(header, [latency.row for latency in latencies])


def _median(values: list[float]) -> str:
    """For people."""
    return f"{sorted(values)[len(values) // 2]:.3g}"
