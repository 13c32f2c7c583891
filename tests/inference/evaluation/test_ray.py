"""Evaluations and pools on a Ray cluster: what one process gives, whatever dies."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iama.config.files import EvaluationConfig
from iama.errors import ModelError
from iama.machines import RayCluster, ray_workers
from inference import evaluation
from inference.pools.fill import draw_alike
from inference.pools.score import reward_key, scoring
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed
from tests.inference.evaluation.test_shards import config, is_close, numbers, raw, work  # noqa: F401

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*none of which was accepted")]
CLOCKS = ("seconds", "peak_memory", "seconds_per_sample")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores for workers, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def lines_of(folder: Path) -> dict[str, list[str]]:
    """The lines of all pools and journals without what clocks tell, in an order of their own."""
    found = {}
    for path in sorted(folder.rglob("*.jsonl")):
        rows = [without_clocks(json.loads(line)) for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return found


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def test_an_evaluation_on_a_cluster_whose_node_dies_is_that_of_one_process(cluster, config, tmp_path):  # noqa: F811
    guided = changed(config, methods=["bon", "bop", "cards(target=0.5, max_proposals=2)"])
    alone = changed(guided, output_dir=str(tmp_path / "alone"))
    wanted = numbers(evaluate(alone))
    folder, rng = Path(guided.output_dir), random.Random(2)
    victim = rng.choice([node for node in cluster.list_all_nodes() if node is not cluster.head_node])

    def kill() -> None:
        while not any(
            path.read_bytes().count(b"\n") > 1 for path in folder.glob("pools/*.jsonl")
        ):  # nothing is done yet
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    with ray_workers(RayCluster(cluster.address)) as workers:
        found = numbers(evaluation.evaluate(evaluation.make_plan(guided), spread=workers))
        assert workers.num_replaced >= 1
    killer.join()
    cluster.add_node(num_cpus=1)
    assert [key for key in wanted if not is_close(found[key], wanted[key])] == []
    plain = [key for key in wanted if "cards" not in str(wanted[key])]
    assert len(plain) > 100
    here, there = lines_of(Path(alone.output_dir)), lines_of(folder)
    assert here.keys() == there.keys()
    for name, lines in here.items():
        if not name.startswith(
            "answers"
        ):  # guided answers are read in batches, so that rewards are equal up to rounding
            assert there[name] == lines, name
    assert set(work(folder).values()) == {1}


def test_a_pool_on_a_cluster(cluster, tiny, run, tmp_path):
    command = ["--prompts", tiny.prompts, "--policy", tiny.policy, "--n", 5, "--max-new-tokens", 8]
    code, _, err = run("pool", tmp_path / "alone.jsonl", *command)
    assert code == 0, err
    code, out, err = run("pool", tmp_path / "ray" / "pool.jsonl", *command, "--ray", cluster.address)
    assert code == 0, err
    assert "4 prompts x 5 samples" in out
    assert "ray: 2 workers with 1 CPUs each, 3 nodes" in err
    assert err.count("ray: worker at") == 2
    assert "Traceback" not in err
    assert "INFO" not in err
    (tmp_path / "one").mkdir()
    (tmp_path / "alone.jsonl").rename(tmp_path / "one" / "pool.jsonl")
    assert lines_of(tmp_path / "ray") == lines_of(tmp_path / "one")


def test_other_files_on_a_node_are_refused(tiny, config, raw):  # noqa: F811
    spec = EvaluationConfig.model_validate(raw | {"output_dir": "x"}).criteria[0].proxy
    with pytest.raises(ValueError, match="holds other files here than where the run was started"):
        scoring("c", spec, "0" * 32)
    assert callable(scoring("c", spec, reward_key(spec)))
    policy = config.policies["base"].variant("c")[0]
    header = {"policy": {"name": "base", "fingerprint": "0" * 32}}
    with pytest.raises(ModelError, match=r"policy 'base': .* holds other files here"):
        draw_alike(header, policy, lambda: None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ray", "10.0.0.1"], "--ray '10.0.0.1': write HOST:PORT"),
        (["--ray", "127.0.0.1:1"], "nothing answers there"),
        (["--ray", "--shard", "1/2"], "--shard 1/2 by hand"),
        (["--ray-workers", "2"], "--ray-workers 2 has no use without --ray"),
        (["--ray", "--ray-gpus-per-worker", "-1"], "--ray-gpus-per-worker -1"),
        (["--ray", "--engine", "openai", "--url", "http://x/v1", "--model", "m"], "with --engine openai"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tiny, run, tmp_path, arguments, told):
    policy = [] if "openai" in arguments else ["--policy", tiny.policy]
    code, _, err = run("pool", tmp_path / "p.jsonl", "--prompts", tiny.prompts, "--n", 2, *policy, *arguments)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "p.jsonl").exists()
