"""Work on a Ray cluster of several nodes: every result once, whatever dies."""

from __future__ import annotations

import random
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from iama import machines
from iama.errors import ConfigError, IamaWarning, ModelError, RunError
from iama.machines import RayCluster, Shares, check_cluster, locally, ray_workers, shares
from tests.iama import machines_work as work

ray = pytest.importorskip("ray")


# What is asked for. -------------------------------------------------------------------------------------


def test_locally_nothing_is_loaded_for_nothing():
    assert list(locally(work.refusing, [])) == []
    assert sorted(locally(work.squares, [3, 4])) == [(0, (9, b"")), (1, (16, b""))]


CPU_NODES = [{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}]
GPU_NODES = [{"CPU": 2.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "cluster", "wanted"),
    [
        (CPU_NODES, RayCluster(), Shares(2, 4, 0.0, 3)),
        (CPU_NODES, RayCluster(num_workers=4), Shares(4, 2, 0.0, 6)),
        (CPU_NODES, RayCluster(num_workers=40), Shares(40, 1, 0.0, 12)),
        (GPU_NODES, RayCluster(), Shares(12, 1, 1.0, 12)),
        (GPU_NODES, RayCluster(gpus_per_worker=2), Shares(6, 1, 2.0, 6)),
        (GPU_NODES, RayCluster(gpus_per_worker=3), Shares(3, 1, 3.0, 3)),
        (GPU_NODES, RayCluster(gpus_per_worker=0.5), Shares(24, 1, 0.5, 24)),
        (GPU_NODES, RayCluster(num_workers=3, gpus_per_worker=0), Shares(3, 2, 0.0, 65)),
        ([{"CPU": 2.0}], RayCluster(num_workers=8, gpus_per_worker=1), Shares(8, 1, 1.0, 0)),  # nodes may join
    ],
)
def test_shares_of_a_cluster(nodes, cluster, wanted):
    assert shares(nodes, cluster) == wanted


def test_no_room_at_all():
    with pytest.raises(
        ConfigError, match=r"no worker with 1 GPUs has room in the cluster \(1 nodes, 2 CPUs and 0 GPUs"
    ):
        shares([{"CPU": 2.0}], RayCluster(gpus_per_worker=1))


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (RayCluster("head"), "--ray 'head': write HOST:PORT"),
        (RayCluster("10.0.0.1:port"), "write HOST:PORT"),
        (RayCluster("ray://head:10001"), "client protocol"),
        (RayCluster("127.0.0.1:1"), r"nothing answers there within 10 s \(.*refused"),
        (RayCluster("127.0.0.1:99999"), "nothing answers"),
        (RayCluster(num_workers=0), "--ray-workers 0"),
        (RayCluster(gpus_per_worker=-1), "--ray-gpus-per-worker -1"),
    ],
)
def test_what_cannot_be_meant_is_told_at_once(cluster, told):
    with pytest.raises(ConfigError, match=told):
        check_cluster(cluster)


@contextmanager
def listening(says: bytes | None) -> Iterator[str]:
    """Address of something that answers with this and hangs up, or says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool, ExitStack() as held:

        def answer() -> None:
            connection = held.enter_context(server.accept()[0])
            if says is not None:
                connection.recv(100)
                connection.sendall(says)
                connection.close()

        answered = pool.submit(answer)
        yield f"127.0.0.1:{server.getsockname()[1]}"
        answered.result()


@pytest.mark.parametrize("says", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"", None])
@pytest.mark.parametrize("is_named", [True, False])
def test_an_address_of_something_else_is_told_within_seconds(says, is_named, monkeypatch):
    monkeypatch.setattr(machines, "CONNECT_TIMEOUT_S", 0.3)
    with listening(says) as address:
        if not is_named:
            monkeypatch.setenv("RAY_ADDRESS", address)
        source = f"--ray '{address}'" if is_named else f"RAY_ADDRESS '{address}'"
        with pytest.raises(ConfigError, match=f"^{source}: what listens there is no head of a Ray cluster"):
            check_cluster(RayCluster(address) if is_named else RayCluster())


def test_a_head_that_was_killed_is_told(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray._private.services, "canonicalize_bootstrap_address", lambda _: "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"--ray: the cluster that ran here at '127.0.0.1:1': nothing answers .*stop"):
        check_cluster(RayCluster())


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray: Ray cannot be imported \(.*\); pip install 'iama\[ray\]'"):
        check_cluster(RayCluster())


# A cluster. ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that has no core for workers, and three nodes with one each."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(num_cpus=1, wait=False)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def at(cluster: Any) -> RayCluster:
    return RayCluster(cluster.address)


def square_of(items: list[int], size: int = 0) -> list[tuple[int, tuple[int, bytes]]]:
    return [(place, (item * item, bytes(size))) for place, item in enumerate(items)]


@pytest.mark.slow
def test_every_result_once_on_every_node(cluster, at, tmp_path):
    items = list(range(100))
    with ray_workers(at) as workers:
        assert workers.describe() == "ray: 3 workers with 1 CPUs each, 4 nodes"
        assert sorted(workers(partial(work.squares, 0.005), items)) == square_of(items)
        assert list(workers(work.refusing, [])) == []
        folder = tmp_path / "loads"
        folder.mkdir()
        for _ in range(2):  # what is loaded stays for the next items
            assert sorted(workers(partial(work.counted_loads, str(folder)), items)) == [(i, i) for i in items]
        assert len(list(folder.iterdir())) == 3
        report = workers.report()
    assert len(report) == 3
    assert len({line.split("(node ")[1].split(")")[0] for line in report}) == 3
    assert all(int(line.split(": ")[2].split()[0]) >= 3 for line in report)


@pytest.mark.slow
def test_what_a_worker_says_is_said_here(at):
    with ray_workers(at) as workers:
        with pytest.warns(IamaWarning) as warned:
            assert len(list(workers(partial(work.each, work.warning_of), [1, 2, 3]))) == 3
        assert {str(w.message) for w in warned} == {"0 is odd", "1 is odd"}
        with pytest.raises(ModelError, match=r"policy 'p': no such thing \(on .* \(node \w+\)\)"):
            list(workers(work.refusing, [1]))
        with pytest.raises(ZeroDivisionError):
            list(workers(work.mistaken, [1]))
        assert sorted(workers(work.squares, [7])) == square_of([7])


@pytest.mark.slow
def test_what_kills_its_worker_is_done_again_and_then_given_up(at, tmp_path):
    items = list(range(12))
    with ray_workers(at) as workers:
        assert sorted(workers(partial(work.deadly_once, str(tmp_path)), items)) == [(i, i) for i in items]
        assert workers.num_replaced == 1
        assert workers.report()[-1] == "ray: workers that died and were replaced: 1"
        with pytest.raises(RunError, match=r"4 workers died over the same 1 items, the last at .*memory"):
            list(workers(partial(work.each, work.deadly), items))
        assert sorted(workers(work.squares, items)) == square_of(items)


@pytest.mark.slow
def test_a_node_that_dies_at_any_time_loses_nothing(cluster, at):
    """At moments spread over a round; results are large enough to lie on their node until they are fetched."""
    rng, items, size, num_rounds = random.Random(5), list(range(24)), 200_000, 8
    num_killed = 0
    with ray_workers(at) as workers:
        for moment in range(num_rounds):
            victim = rng.choice([node for node in cluster.list_all_nodes() if node is not cluster.head_node])
            killer = threading.Timer(0.4 * moment / num_rounds, cluster.remove_node, [victim, False])
            killer.start()
            assert sorted(workers(partial(work.squares, 0.02, size), items)) == square_of(items, size)
            killer.join()
            num_killed += victim not in cluster.list_all_nodes()
            cluster.add_node(num_cpus=1, wait=False)
    assert num_killed == num_rounds
    cluster.wait_for_nodes()


def four_workers(at: RayCluster) -> None:
    with ray_workers(RayCluster(at.address, num_workers=4)) as workers:
        assert "4 workers (3 have room now)" in workers.describe()
        assert len(list(workers(partial(work.squares, 0.01), list(range(100))))) == 100


@pytest.mark.slow
def test_a_worker_without_work_is_told(cluster, at):
    # One has no room. Another may start when all is done, on a machine that is busy.
    wanted = r"[123] of 4 workers did no work \([123] waited for 1 CPUs and 0 GPUs\); nothing is missing"
    with pytest.warns(IamaWarning, match=wanted):
        four_workers(at)
    with ray_workers(RayCluster(at.address, num_workers=3)) as workers:  # too little for all of them
        assert len(list(workers(work.squares, [1, 2]))) == 2


@pytest.mark.slow
def test_nothing_of_ours_and_no_secret_in_the_logs(cluster, at, monkeypatch):
    """The environment of the command stays with it."""
    monkeypatch.setenv("HF_TOKEN", "hf_planted_hub")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-openai")
    with ray_workers(at) as workers:
        assert dict(workers(partial(work.environment, "HF_TOKEN"), [1])) == {0: None}
        list(workers(partial(work.to_stderr, "x"), [1]))
    logs = Path(cluster.head_node.get_session_dir_path(), "logs")
    texts = [path.read_bytes() for path in logs.rglob("*") if path.is_file()]
    assert any(b"a worker was here" in text for text in texts)
    assert not any(b"planted" in text for text in texts)
