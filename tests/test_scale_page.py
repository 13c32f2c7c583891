"""What docs/guides/scale.md shows runs: the sbatch file with SLURM's variables, and Ray takes the cluster's file."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.processes import run_python

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/guides/scale.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_array_job_and_the_command_after_it(tiny, tmp_path):
    """`iama` notes its arguments, with which it is then run: two parts and the whole."""
    (job,) = (block for block in blocks("bash") if block.startswith("#!"))
    assert "#SBATCH --array=1-8" in job
    config = {
        "name": "array",
        "output_dir": "evaluation",
        "policies": {"base": {"path": str(tiny.policy)}},
        "prompts": str(tiny.prompts),
        "criteria": [{"name": "c", "proxy": {"model": str(tiny.reward)}}],
        "methods": ["bon"],
        "budgets": [1],
        "num_samples": 4,
        "trained_budget": 1,
        "trained": "base",
        "references": [],
        "sampling": {"max_new_tokens": 6},
        "num_bootstrap": 100,
    }
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "job.sbatch").write_text(job)
    (tmp_path / "iama").write_text('#!/bin/bash\nprintf "%s\\n" "$OMP_NUM_THREADS" "$@" > arguments\n')
    (tmp_path / "iama").chmod(stat.S_IRWXU)
    for index in (1, 2):
        slurm = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=environment, check=True)
        threads, *arguments = (tmp_path / "arguments").read_text().splitlines()
        assert threads == "1"
        assert arguments[-1] == f"{index}/2"
        done = run_python(["-m", "iama.cli", *arguments], folder=tmp_path)
        assert done.returncode == 0, done.stderr
    (last,) = re.findall(r'--wrap "iama (.*)"', PAGE)
    done = run_python(["-m", "iama.cli", *last.split()], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "evaluation" / "summary.json").read_text())["num_prompts"] == 4
    assert len(list((tmp_path / "evaluation" / "shards").glob("*-of-2"))) == 2


def test_ray_takes_the_clusters_file():
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    (block,) = blocks("yaml")
    config = yaml.safe_load(block)
    validate_config(prepare_config(config))
