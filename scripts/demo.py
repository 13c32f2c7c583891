"""The whole path on the demo world: build, train with DeepSpeed, export, evaluate, report.

    make demo

Every step is a command that a user could type. A step that is finished is not run again, so a killed demo goes on
where it was; when the world or a configuration
has changed, what was made from the old one is deleted first.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import typer
from rich.console import Console

from iama.files import write_atomically
from scripts import launch

FOLDER = Path("runs/demo")
WORLD = FOLDER / "world"
CONFIGS = ("demo.yaml", "demo-grpo.yaml", "demo-evaluate.yaml")
DERIVED = ("grpo", "iama", "export", "evaluation")


def main() -> None:
    """Run the demo; ends with the path of the report and one sentence on what was saved.

    Example: make demo
    """
    console = Console(highlight=False, soft_wrap=True)
    console.rule("1/5  build the demo world: a language, a base policy, two proxy reward models")
    launch.build_world(0, str(WORLD))
    _delete_outdated()
    console.rule("2/5  train linear GRPO, the baseline")
    launch.train("configs/demo-grpo.yaml")
    console.rule("3/5  train IAMA: the same steps and roll-outs, for Best-of-4 afterwards")
    launch.train("configs/demo.yaml")
    console.rule("4/5  export the adapter")
    if not (FOLDER / "export").is_dir():
        launch.iama("export", str(FOLDER / "iama"), "--out", str(FOLDER / "export"))
    console.print(f"adapter, model card and iama.json: {FOLDER / 'export'}")
    console.rule("5/5  evaluate on held-out prompts and write the report")
    launch.iama("evaluate", "--config", "configs/demo-evaluate.yaml", "--devices", "2")


def _delete_outdated() -> None:
    """Delete what was made from another world or other configurations; note what the rest is made from."""
    sources = [FOLDER / "world" / "stamp.json", *(Path("configs") / name for name in CONFIGS)]
    now = "\n".join((launch.ROOT / source).read_text(encoding="utf-8") for source in sources)
    note = launch.ROOT / FOLDER / "sources.txt"
    if launch.same_sources(note, now):
        return
    for name in DERIVED:
        if (launch.ROOT / FOLDER / name).exists():
            print(f"made from another world or configuration, deleted: {FOLDER / name}")
            shutil.rmtree(launch.ROOT / FOLDER / name)
    write_atomically(note, now)


if __name__ == "__main__":
    typer.run(main)
