"""Training on several nodes, of which each is a launcher of its own on this host."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from tests.processes import begin_python, run_python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def write(tiny, tmp_path_factory):
    """A function that writes a run of two processes and returns its configuration."""

    def write(name, output_dir=None, deepspeed=None, **trainer):
        folder = tmp_path_factory.mktemp(name)
        fields = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.1}
        fields |= {"learning_rate": 1e-3, "gradient_checkpointing": False, "save_steps": 1, **trainer}
        if deepspeed is not None:
            fields["deepspeed"] = f"configs/deepspeed/{deepspeed}.json"
        criterion = {"name": "helpful", "proxy": {"model": str(tiny.reward)}, "operator": "bon(2)"}
        config = {
            "name": "nodes",
            "output_dir": output_dir or str(folder / "run"),
            "world_size": 2,
            "policy": {"path": str(tiny.policy)},
            "prompts": str(tiny.prompts),
            "objective": {"criteria": [criterion]},
            "sampling": {"max_new_tokens": 6},
            "trainer": fields,
            "lora": {"r": 4},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder / "config.yaml"

    return write


def launch_nodes(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Both nodes' launchers, side by side, to their ends."""
    inherited = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}}
    environment = inherited | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    nodes = [subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) for command in commands]
    ended = [node.communicate(timeout=500) for node in nodes]
    return [subprocess.CompletedProcess(n.args, n.returncode, *texts) for n, texts in zip(nodes, ended, strict=True)]


def losses(run: Path) -> list[float]:
    """Losses, which are next to nothing where all completions are equally long, and gradient norms."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    return [row[name] for row in rows for name in ("loss", "grad_norm")]


def test_torchrun_on_two_nodes_trains_as_one_node_does(write):
    alone, nodes = write("alone"), write("torchrun")
    assert run_python(["train_iama.py", "--config", alone], num_ranks=2).returncode == 0
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "nodes"]
    command = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", *rendezvous]
    done = launch_nodes([[*command, "train_iama.py", "--config", str(nodes)]] * 2)
    assert [node.returncode for node in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert losses(nodes.parent / "run") == pytest.approx(losses(alone.parent / "run"), rel=1e-4, abs=1e-6)
    assert (nodes.parent / "run" / "adapter" / "iama.json").is_file()


def test_deepspeeds_hostfile_without_ssh_on_two_nodes(write, tmp_path):
    alone, nodes = write("alone", deepspeed="zero2"), write("deepspeed", deepspeed="zero2")
    assert run_python(["train_iama.py", "--config", alone], num_ranks=2).returncode == 0
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    command = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1"]
    command += ["--master_port", free_port()]
    done = launch_nodes(
        [[*command, "--node_rank", str(rank), "train_iama.py", "--config", str(nodes)] for rank in (0, 1)]
    )
    assert [node.returncode for node in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert "DeepSpeed ZeRO-2, 2 processes (gloo)" in done[0].stdout
    assert losses(nodes.parent / "run") == pytest.approx(losses(alone.parent / "run"), rel=1e-4, abs=1e-6)


def on_folders_of_their_own(config: Path, folders: list[Path]) -> list[tuple[int, str]]:
    """Exit code and stderr of two processes, each in a folder that stands for its machine's own disk."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    with TemporaryDirectory() as streams:
        processes = []
        for rank, folder in enumerate(folders):
            ranks = {**shared, "RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
            arguments = [ROOT / "train_iama.py", "--config", config]
            processes.append(begin_python(arguments, folder=folder, streams=Path(streams, str(rank)), **ranks))
        for process in processes:
            process.join(300)
        return [(p.exitcode, Path(streams, f"{rank}.err").read_text()) for rank, p in enumerate(processes)]


def test_checkpoints_on_disks_that_are_not_shared_are_refused_before_training(write, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for code, err in on_folders_of_their_own(write("apart", output_dir="run"), folders):
        assert code == 2
        assert "Traceback" not in err
        assert "error: output_dir 'run' is not shared: what the first process writes there, those on " in err
    assert not list(tmp_path.rglob("metrics.jsonl"))
    done = on_folders_of_their_own(write("apart", output_dir="run", save_strategy="no"), folders)
    assert [code for code, _ in done] == [0, 0], done
    assert len(losses(folders[0] / "run")) == 2 * 2
    assert (folders[0] / "run" / "adapter").is_dir()
    assert not (folders[1] / "run" / "adapter").exists()
