"""One training run, from its file to an adapter on disk, which the same command continues after a kill.

Read `train` first: parse, plan, check, train, save. `plan` makes every cheap check, with `blocks` (what is written),
`fields` (what follows from it) and `arguments` (what the libraries say of it); `preflight` is the checklist, with
`memory` and `tokens`; `build` makes the trainer, with `engine` and `adapter`. While it runs, `callbacks`, `samples`,
`watch` and `watchdog` write and look; `checkpoints` says which checkpoint counts, `changes` what differs from the run
that began, and `run_folder` holds the folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

if TYPE_CHECKING:
    from trainers.run.build import build_trainer
    from trainers.run.plan import Plan, make_plan
    from trainers.run.train import main

__all__ = ["Plan", "build_trainer", "main", "make_plan"]

# A run's environment is set before torch and TRL are imported.
__getattr__ = lazy_names(
    __name__,
    {
        "build": ["build_trainer"],
        "plan": ["Plan", "make_plan"],
        "train": ["main"],
    },
)
