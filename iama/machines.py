"""Work that other processes and machines may do: `locally`, or spread over the workers of a Ray cluster.

What is loaded once (a policy, a reward) answers for blocks of items. The caller gets every item's result once, in
the order in which they are done, and is the only one who writes files. A worker or node that dies is replaced, and
its block is done again.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from iama import errors
from iama.environment import prepare_environment
from iama.errors import ConfigError, IamaError, IamaWarning, RunError

T = TypeVar("T")
R = TypeVar("R")

Work: TypeAlias = Callable[[Sequence[T]], Iterator[tuple[int, R]]]
"""What can be done once all is loaded: each item's result with the item's place, in whatever order they are done."""

BLOCKS_PER_WORKER = 8
"""How many blocks a worker gets, if the items suffice: more even out, fewer are decoded in fuller batches."""
LARGEST_BLOCK = 64
"""Items that a dead worker can cost at most."""
PACKAGES = ("iama", "torch", "transformers", "peft")
"""Packages whose versions must be the same on every node, as results depend on them."""
MAX_DEATHS = 4
"""Workers that one block may take with it before it is held to be the cause."""
START_TIMEOUT_S = 600.0
"""How long no worker at all may be there before the run gives up."""
CONNECT_TIMEOUT_S = 10.0
STARTED = "start the head with `ray start --head --port PORT`, and see that the port is open to this machine"
EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""A frame of HTTP/2: three bytes of length, its kind, flags, and the stream."""
ENOUGH = BLOCKS_PER_WORKER // 2
"""Blocks a worker from which on one that got none is told; of fewer, others may be done before it has started."""


class Spread(Protocol):
    """Where work is done. `load` and all items and results are pickled where it is done elsewhere."""

    def __call__(self, load: Callable[[], Work[T, R]], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Every item's result with its place, each once. What `load` gives is kept for all items."""
        ...


def locally(load: Callable[[], Work[T, R]], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    """All of it in this process; nothing is loaded where there is nothing to do."""
    return load()(items) if items else iter(())


# Ray: what is asked for. --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RayCluster:
    """A cluster, and the workers that are asked for; None is what `shares` makes of it.

    `address`: host:port of the head, `local` for this machine alone, `auto` for what Ray finds (`RAY_ADDRESS`, a
    cluster that runs here, else this machine alone).
    """

    address: str = "auto"
    num_workers: int | None = None
    gpus_per_worker: float | None = None


@dataclass(frozen=True)
class Shares:
    """How many workers there are, and what each of them holds of its node."""

    num_workers: int
    cpus: int
    gpus: float
    room: int
    """Workers that have room now; the others wait until nodes join."""


def shares(nodes: Sequence[Mapping[str, float]], cluster: RayCluster) -> Shares:
    """Workers for nodes with these resources (`CPU`, `GPU`); raises `ConfigError` where none has room.

    With GPUs one worker for each, else one a node, which gets the node's cores.
    """
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    cpus_N = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if gpus:
        rooms = [min(int(node.get("GPU", 0) / gpus + 1e-9), int(node.get("CPU", 0))) for node in nodes]
        cpus, room = 1, sum(rooms)
        num = cluster.num_workers or room
    else:
        num = cluster.num_workers or len(cpus_N)
        cpus = max(1, min(cpus_N, default=1) // max(1, -(-num // max(1, len(cpus_N)))))
        room = sum(number // cpus for number in cpus_N)
    if num == 0:
        held = f"{len(nodes)} nodes, {sum(cpus_N)} CPUs and {sum(n.get('GPU', 0) for n in nodes):g} GPUs"
        raise ConfigError(
            f"--ray: no worker with {gpus:g} GPUs has room in the cluster ({held}); lower --ray-gpus-per-worker, or "
            "say with --ray-workers how many to wait for"
        )
    return Shares(num, cpus, gpus, room)


def check_cluster(cluster: RayCluster) -> Any:
    """The package `ray`, once the address is one and answers; raises `ConfigError`."""
    if cluster.num_workers is not None and cluster.num_workers < 1:
        raise ConfigError(f"--ray-workers {cluster.num_workers}: write a number of workers, e.g. 4")
    if cluster.gpus_per_worker is not None and not 0 <= cluster.gpus_per_worker < 1000:
        raise ConfigError(f"--ray-gpus-per-worker {cluster.gpus_per_worker:g}: write a number such as 1, 0.5 or 0")
    # Before the import: Ray reports home unless told not to, and warns of what we do not do.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"--ray: Ray cannot be imported ({error}); pip install 'iama[ray]'") from error
    if cluster.address == "auto":
        _check_found(ray)
    elif cluster.address != "local":
        _check_answers(cluster.address, f"--ray {cluster.address!r}", STARTED)
    return ray


def _check_found(ray: Any) -> None:
    """Check the cluster that Ray would find by itself; a head that was killed leaves its address behind."""
    if ray.is_initialized():
        return
    if named := os.environ.get("RAY_ADDRESS"):
        if named not in ("auto", "local"):
            _check_answers(named, f"RAY_ADDRESS {named!r}", STARTED)
        return
    if found := ray._private.services.canonicalize_bootstrap_address(None):
        stopped = "clear it with `ray stop`, start it again, or write --ray local for this machine alone"
        _check_answers(found, f"--ray: the cluster that ran here at {found!r}", stopped)


def _check_answers(address: str, source: str, otherwise: str) -> None:
    """Raise `ConfigError` unless a gRPC server answers: Ray itself tries for a quarter of an hour, and says nothing."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"{source} is Ray's client protocol, over which results would go twice; run the command on a node "
            "of the cluster (ray job submit -- iama ...) and write --ray HOST:PORT of the head"
        )
    found = re.fullmatch(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if found is None:
        raise ConfigError(f"{source}: write HOST:PORT of the cluster's head, auto, or local")
    place = found["host"].strip("[]"), int(found["port"])
    try:
        connection = socket.create_connection(place, CONNECT_TIMEOUT_S)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{source}: nothing answers there within {CONNECT_TIMEOUT_S:g} s ({error}); {otherwise}"
        ) from error
    with connection:
        may_be_head = os.environ.get("RAY_USE_TLS", "0") not in ("0", "") or _speaks_http2(connection)
    if not may_be_head:
        raise ConfigError(
            f"{source}: what listens there is no head of a Ray cluster; write the HOST:PORT that `ray start --head` "
            "told (the dashboard has another)"
        )


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other end begins as every gRPC server must, with a frame of settings (RFC 9113, 3.4)."""
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EMPTY_SETTINGS)
        head = connection.recv(len(EMPTY_SETTINGS), socket.MSG_WAITALL)
    except OSError:
        return False
    return len(head) == len(EMPTY_SETTINGS) and head[3] == EMPTY_SETTINGS[3]


@contextmanager
def ray_workers(cluster: RayCluster) -> Iterator[Workers]:
    """Workers on a Ray cluster, which end with the block; raises `ConfigError` before any is started.

    A cluster that this process is connected to already is used as it is. Workers that did nothing are told in an
    `IamaWarning` at the end.
    """
    ray = check_cluster(cluster)
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, cluster.address)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        workers = Workers(ray, shares([node["Resources"] for node in nodes], cluster), len(nodes))
        try:
            yield workers
            workers.warn_of_idle()
        finally:
            workers.close()
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Connect, without a line of Ray's own on the terminal."""
    # Deaths of workers are printed on stdout whatever `log_to_driver` says; here they are met, and counted.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    given = {} if address == "auto" else {"address": address}
    try:
        with _silent_stderr():  # on which Ray's core says which level of logs it was told
            ray.init(**given, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--ray {address!r}: Ray cannot connect ({said}); the head must run there with this version of Ray "
            f"({ray.__version__}) and of Python"
        ) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Let nothing through to the terminal, from whatever language."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# Ray: the workers. --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a worker did with a block: results with their places, and what it had to say."""

    results: list[tuple[int, Any]] = field(default_factory=list)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    error: tuple[str, str] | None = None
    """Kind and message of an `IamaError`."""


class Worker:
    """The process that works, somewhere on the cluster; it holds what was loaded last."""

    def __init__(self, folder: str, versions: dict[str, str], *, is_offline: bool) -> None:
        for name, version in _versions().items():
            if version != versions[name]:
                raise RunError(f"{socket.gethostname()} has {name} {version}, and the driver {versions[name]}")
        prepare_environment(() if is_offline else ["a name on the hub"])
        if Path(folder).is_dir():
            os.chdir(folder)
        self._held: tuple[str, Work[Any, Any]] | None = None

    def where(self) -> str:
        """Node and process, for reports."""
        ray = importlib.import_module("ray")
        return f"{ray.util.get_node_ip_address()} (node {ray.get_runtime_context().get_node_id()[:8]})"

    def run(self, key: str, load_ref: list[Any], items: list[Any]) -> Outcome:
        """Do a block of the work that `key` names, loading it where it is not yet."""
        outcome, start = Outcome(), time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", IamaWarning)
            try:
                outcome.results = list(self._work(key, load_ref)(items))
            except IamaError as error:
                outcome.error = type(error).__name__, str(error)
        outcome.warnings = list(dict.fromkeys(str(w.message) for w in caught if isinstance(w.message, IamaWarning)))
        outcome.seconds = time.perf_counter() - start
        return outcome

    def _work(self, key: str, load_ref: list[Any]) -> Work[Any, Any]:
        if self._held is None or self._held[0] != key:
            self._held = None
            _free_memory()
            ray = importlib.import_module("ray")
            self._held = key, ray.cloudpickle.loads(ray.get(load_ref[0]))()
        return self._held[1]


def _versions() -> dict[str, str]:
    """Of what decides the results."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "nowhere"
    return found


def _free_memory() -> None:
    """Give back what the former work held, on the GPU too."""
    gc.collect()
    if "torch" in sys.modules:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    place: str | None = None
    """Where it runs, once it does."""
    num_blocks: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class _Block:
    """Items to be done together: their places, and how many workers died over them."""

    first: int
    items: list[Any]
    deaths: int = 0


class Workers:
    """Workers of a cluster; calling them is a `Spread`."""

    def __init__(self, ray: Any, share: Shares, num_nodes: int) -> None:
        self.share, self.num_nodes = share, num_nodes
        self._ray = ray
        self._last: tuple[str, list[Any]] | None = None
        self._start = partial(
            ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0)(Worker).remote,
            str(Path.cwd()),
            _versions(),
            is_offline=os.environ.get("HF_HUB_OFFLINE") == "1",
        )
        self._hands: list[_Hand] = []
        self._starting: dict[Any, _Hand] = {}
        self._past: list[_Hand] = []
        self._num_offered = 0
        self._last_seen = time.monotonic()
        self.num_replaced = self.num_died = 0
        for _ in range(share.num_workers):
            self._begin()

    def __call__(self, load: Callable[[], Work[T, R]], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """A `Spread`. Raises what the work raises, and `RunError` where no worker comes or a block ends all of them."""
        if not items:
            return
        key, load_ref = self._sent(load)
        blocks = _blocks(items, self.share.num_workers)
        self._num_offered = max(self._num_offered, len(blocks))
        busy: dict[Any, tuple[_Hand, _Block]] = {}
        try:
            while blocks or busy:
                for hand in self._idle(busy):
                    if blocks:
                        block = blocks.popleft()
                        busy[hand.actor.run.remote(key, load_ref, block.items)] = hand, block
                for ref in self._ready(busy):
                    hand, block = busy.pop(ref)
                    outcome = self._outcome(ref, hand, block)
                    if outcome is None:
                        blocks.appendleft(block)
                        continue
                    for place, result in outcome.results:
                        yield block.first + place, result
        finally:
            for hand, _ in busy.values():  # nobody waits for what they do
                self._replace(hand)

    def _idle(self, busy: Mapping[Any, tuple[_Hand, _Block]]) -> list[_Hand]:
        working = {hand for hand, _ in busy.values()}
        return [hand for hand in self._hands if hand not in working]

    def _ready(self, busy: Mapping[Any, tuple[_Hand, _Block]]) -> list[Any]:
        """Blocks that have come to an end, after some waiting; workers that have come up are noted."""
        ready, _ = self._ray.wait([*busy, *self._starting], num_returns=1, timeout=5.0)
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
        if self._hands:
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > START_TIMEOUT_S:
            raise RunError(
                f"--ray: not one worker ({self.share.cpus} CPUs and {self.share.gpus:g} GPUs each) was started "
                f"within {START_TIMEOUT_S:g} s; look at `ray status` for what is in use, and run it again"
            )
        return [ref for ref in ready if ref in busy]

    def _sent(self, load: Callable[[], Any]) -> tuple[str, list[Any]]:
        """A load's name, by what is in it, and where workers find it; the last one is not sent twice."""
        data = self._ray.cloudpickle.dumps(load)
        key = hashlib.blake2b(data, digest_size=16).hexdigest()
        if self._last is None or self._last[0] != key:
            self._last = key, [self._ray.put(data)]
        return self._last

    def describe(self) -> str:
        """What there is, in a line."""
        share = self.share
        each = f"{share.gpus:g} GPUs" if share.gpus else f"{share.cpus} CPUs"
        waiting = f" ({share.room} have room now)" if share.room < share.num_workers else ""
        return f"ray: {share.num_workers} workers{waiting} with {each} each, {self.num_nodes} nodes"

    def report(self) -> list[str]:
        """What every worker did, one line each, and how many died."""
        lines = [
            f"ray: worker at {hand.place or 'no node'}: {hand.num_blocks} blocks, {hand.seconds:.1f} s"
            for hand in [*self._past, *self._hands, *self._starting.values()]
        ]
        return lines + ([f"ray: workers that died and were replaced: {self.num_died}"] if self.num_died else [])

    def warn_of_idle(self) -> None:
        """An `IamaWarning` for workers that did no work although there was enough for all of them."""
        hands = [*self._hands, *self._starting.values()]
        idle = [hand for hand in hands if not hand.num_blocks]
        if not idle or self.num_replaced >= len(idle) or self._num_offered < ENOUGH * self.share.num_workers:
            return
        unplaced = sum(hand.place is None for hand in idle)
        where = [hand.place for hand in idle if hand.place is not None]
        waited = [f"{unplaced} waited for {self.share.cpus} CPUs and {self.share.gpus:g} GPUs"] if unplaced else []
        warnings.warn(
            f"--ray: {len(idle)} of {self.share.num_workers} workers did no work ({', '.join([*where, *waited])}); "
            "nothing is missing, but these machines were idle: see `ray status`",
            IamaWarning,
            stacklevel=3,
        )

    def close(self) -> None:
        """End all workers."""
        for hand in [*self._hands, *self._starting.values()]:
            self._ray.kill(hand.actor)

    def _begin(self) -> None:
        hand = _Hand(self._start())
        self._starting[hand.actor.where.remote()] = hand

    def _started(self, ref: Any) -> None:
        """Note where a worker runs; one that could not start is replaced, unless it will never start."""
        hand = self._starting.pop(ref)
        try:
            hand.place = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            said = re.search(r"(?:RunError|ModuleNotFoundError|ImportError): .*", str(error))
            if said is not None:
                raise RunError(
                    f"--ray: a worker cannot start ({said[0]}); install the same packages on every node"
                ) from None
            self.num_replaced += 1
            self.num_died += 1
            self._begin()
            return
        self._hands.append(hand)

    def _outcome(self, ref: Any, hand: _Hand, block: _Block) -> Outcome | None:
        """What became of a block; None where its worker, or the node with its result, has died.

        What the worker had to say is said here.
        """
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            block.deaths += 1
            self.num_died += 1
            self._replace(hand)
            if block.deaths >= MAX_DEATHS:
                said = " ".join(str(error).split())[:300]
                raise RunError(
                    f"--ray: {block.deaths} workers died over the same {len(block.items)} items, the last at "
                    f"{hand.place} ({said}); if memory ran out, lower the batch size or give a worker more of a node"
                ) from error
            return None
        hand.num_blocks += 1
        hand.seconds += outcome.seconds
        for message in outcome.warnings:
            warnings.warn(message, IamaWarning, stacklevel=4)
        if outcome.error is not None:
            kind, message = outcome.error
            raise getattr(errors, kind, RunError)(f"{message} (on {hand.place})")
        return outcome

    def _replace(self, hand: _Hand) -> None:
        if hand not in self._hands:
            return
        self._hands.remove(hand)
        self._past.append(hand)
        self._ray.kill(hand.actor)
        self.num_replaced += 1
        self._begin()


def _blocks(items: Sequence[Any], num_workers: int) -> deque[_Block]:
    size = max(1, min(LARGEST_BLOCK, len(items) // (num_workers * BLOCKS_PER_WORKER)))
    return deque(_Block(first, list(items[first : first + size])) for first in range(0, len(items), size))
