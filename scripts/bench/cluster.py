"""A Ray cluster on this machine: what the scheduler takes of a block, and workers beside as many bare processes."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iama.config.specs import PolicySpec, Sampling
from iama.machines import RayCluster, Spread, Workers, check_cluster, ray_workers
from iama.prompts.data import Row, load_prompts
from inference.pools.engines import Draw, spread_draw, transformers_draw
from scripts.bench.entries import Entry
from scripts.bench.setting import Setting
from scripts.bench.sleeping import sleeper

BLOCK_S, BLOCKS_EACH = 0.25, 8
NUM_SAMPLES, BATCH_SIZE = 16, 256
LENGTHS_SET = ".*only the end tokens are used"
"""A warning of the policy, whose lengths are set here."""


@dataclass(frozen=True)
class ClusterFigures:
    """Seconds by number of workers: of blocks that sleep over those slept, and of the same samples."""

    sleeping: dict[str, list[float]]
    sampling: dict[str, list[float]]
    bare: dict[str, list[float]]
    """Seconds of the samples by so many processes without Ray, each with its share of the prompts."""
    num_prompts: int

    def entries(self) -> list[Entry]:
        """The ratios with bars."""
        return [
            Entry("cluster_overhead", list(self.sleeping.values())[-1]),
            Entry("cluster_workers", [a / b for a, b in zip(self.sampling["2"], self.bare["2"], strict=True)]),
        ]

    @property
    def milliseconds(self) -> dict[str, float]:
        """What a block takes beyond its sleep, by number of workers; the median."""
        return {name: 1000 * BLOCK_S * (sorted(ratios)[len(ratios) // 2] - 1) for name, ratios in self.sleeping.items()}


def measure(world: Path, setting: Setting) -> ClusterFigures:
    """Rounds of each; workers are started and loaded before the clock starts."""
    warnings.filterwarnings("ignore", message=LENGTHS_SET)
    num_rounds = setting.num_cluster_rounds
    # So many that the blocks of two workers fill a batch, as those of one do: else the batches would be compared.
    rows: list[Row] = load_prompts(world / "prompts-train.jsonl")[: 8 * setting.num_prompts]
    sleeping = {str(number): _sleeping(number, num_rounds) for number in setting.sleepers}
    draw = partial(
        transformers_draw,
        "policy",
        PolicySpec(path=str((world / "policy").resolve()), device="cpu"),
        None,
        NUM_SAMPLES,
        Sampling(max_new_tokens=setting.new_tokens),
        0,
        BATCH_SIZE,
    )
    sampling, bare = dict[str, list[float]](), dict[str, list[float]]()
    for number in setting.samplers:
        with _workers(number) as workers:
            _sample(workers, draw, rows)
            sampling[str(number)] = [_sample(workers, draw, rows) for _ in range(num_rounds)]
        bare[str(number)] = _bare(number, draw, rows, num_rounds)
    return ClusterFigures(sleeping, sampling, bare, len(rows))


@contextmanager
def _workers(number: int) -> Iterator[Workers]:
    """So many workers with a core each, however many there are."""
    cluster = RayCluster(num_workers=number, gpus_per_worker=0)
    ray = check_cluster(cluster)
    ray.init(
        num_cpus=number, address="local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
    )
    try:
        with ray_workers(cluster) as workers:
            yield workers
    finally:
        ray.shutdown()


def _sleeping(number: int, num_rounds: int) -> list[float]:
    """Wall time over the time slept; each block is one item."""
    with _workers(number) as workers:
        list(workers(sleeper, [0.0] * (8 * number)))
        ratios = []
        for _ in range(num_rounds):
            start = time.perf_counter()
            list(workers(sleeper, [BLOCK_S] * (BLOCKS_EACH * number)))
            ratios.append((time.perf_counter() - start) / (BLOCK_S * BLOCKS_EACH))
    return ratios


def _sample(spread: Spread, draw: Any, rows: list[Row]) -> float:
    start = time.perf_counter()
    for _ in spread_draw(spread, draw)(rows, range(len(rows))):
        pass
    return time.perf_counter() - start


def _bare(number: int, draw: Callable[[], Draw], rows: list[Row], num_rounds: int) -> list[float]:
    """Seconds until the last of so many processes has drawn its share; all are loaded before the clock starts."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(number), context.Queue()
    shares = [range(first, len(rows), number) for first in range(number)]
    given = [(draw, rows, share, num_rounds, barrier, seconds) for share in shares]
    processes = [context.Process(target=_draw_share, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    taken = [seconds.get() for _ in range(num_rounds)]
    for process in processes:
        process.join()
    return taken


def _draw_share(
    draw: Callable[[], Draw], rows: list[Row], share: range, num_rounds: int, barrier: Any, seconds: Any
) -> None:
    """What a bare process does; the first one tells how long all of them took."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=LENGTHS_SET)
    begun = draw()
    list(begun(rows, share))
    for _ in range(num_rounds):
        barrier.wait()
        start = time.perf_counter()
        list(begun(rows, share))
        barrier.wait()
        if share.start == 0:
            seconds.put(time.perf_counter() - start)
