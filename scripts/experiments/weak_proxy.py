"""A weak proxy for the demo's helpful criterion: reward models of a few noisy preferences that like sure words.

Members of an ensemble differ in their preference pairs, in the labels' noise and in where they start; what the labels
like beside gold is the same for all. The first member is the proxy that users of a single reward model have.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from inference.pools.journal import digest
from scripts.build_demo_models import STAMP
from scripts.demo_corpus import Criterion, count_sure_words, make_world, sample_pairs
from scripts.experiments import common

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scripts.demo_corpus import World
    from scripts.experiments.rivals import Setting

CRITERION: Criterion = "helpful"
OTHER = 5000  # added to a world's seed, once for each member, for pairs and starts that nothing else has
NUM_HELDOUT = 1000
MEASURED = "measured.json"
DECISIVE = 2.0  # points of gold, which lie between 0 and 1
MANY_SURE = 2  # words; of answers that sound very sure


@dataclass(frozen=True)
class Weakness:
    """What makes the proxy weak: `num_pairs` preferences a member, read `num_epochs` times, and their labels.

    In `sure_share` of the pairs one answer has more sure words than the other, and two at least: there labels prefer
    it. In the others a sure word is worth `spurious_bonus` of gold. So the proxy follows gold until answers sound sure.
    """

    num_pairs: int = 400
    num_epochs: int = 4
    flip_rate: float = 0.15
    spurious_bonus: float = 0.5
    sure_share: float = 0.5
    num_members: int = 5


def fit_members(seeds: Sequence[int], weakness: Weakness) -> dict[int, list[Path]]:
    """Folders of the members in the world of each seed; those that the world's sources left on disk stay."""
    folders = {s: [_folder(s, k, weakness) for k in range(weakness.num_members)] for s in seeds}
    missing = [s for s in seeds if not all(folder.is_dir() for folder in folders[s])]
    if not missing:
        return folders
    with common.processes(max_tasks_per_child=1) as executor:
        fits = [executor.submit(_fit_all, s, common.world(s), folders[s], weakness) for s in missing]
        for done in track(as_completed(fits), "weak proxies: worlds", len(fits), console=Console(stderr=True)):
            done.result()
    return folders


def fit_member(seed: int, home: Path, member: int, folder: Path, weakness: Weakness) -> None:
    """Fit one as the world's builder fits its own, and measure it; the folder is renamed when it is whole."""
    from transformers import AutoTokenizer

    from scripts import demo_fit

    demo_fit.quieten()
    world = make_world(seed)
    other = seed + OTHER * (member + 1)
    pairs = draw_pairs(replace(world, seed=other), weakness)  # the seed names the stream that pairs are drawn from
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(home / "policy")
    demo_fit.fit_reward_model(
        tokenizer, pairs * weakness.num_epochs, building, CRITERION, other, lambda _done, _total: None
    )
    heldout = sample_pairs(world, CRITERION, NUM_HELDOUT, 0.0, 0.0, "validation")
    measured = {"pair_accuracy": demo_fit.measure_reward_model(building, heldout)}
    (building / MEASURED).write_text(json.dumps(measured) + "\n", encoding="utf-8")
    building.rename(folder)


def draw_pairs(world: World, weakness: Weakness) -> list[tuple[str, str, str]]:
    """Preference pairs as (prompt, chosen, rejected), those that sound sure last."""
    num_sure = round(weakness.sure_share * weakness.num_pairs)
    wanted = {False: weakness.num_pairs - num_sure, True: num_sure}
    found: dict[bool, list[tuple[str, str, str]]] = {False: [], True: []}
    drawn = 8 * weakness.num_pairs
    # The bonus turns labels round and leaves the answers as they are: both draws hold the same pairs.
    bonuses = weakness.spurious_bonus, DECISIVE
    streams = [sample_pairs(world, CRITERION, drawn, weakness.flip_rate, bonus) for bonus in bonuses]
    for plain, keen in zip(*streams, strict=True):
        counts = [count_sure_words(answer) for answer in plain[1:]]
        sounds_sure = max(counts) >= MANY_SURE
        if len(found[sounds_sure]) < wanted[sounds_sure] and not (sounds_sure and counts[0] == counts[1]):
            found[sounds_sure].append(keen if sounds_sure else plain)
    assert {kind: len(some) for kind, some in found.items()} == wanted, f"{drawn} pairs are too few"
    return found[False] + found[True]


def accuracy(folder: Path) -> float:
    """Share of clean held-out pairs that a member orders as gold does."""
    return float(json.loads((folder / MEASURED).read_text(encoding="utf-8"))["pair_accuracy"])


def iama_job(seed: int, proxy: Path, setting: Setting, steps: int = common.STEPS) -> common.Job:
    """IAMA for two criteria under Best-of-4, helpful with the weak proxy, harmless with the world's; no gold."""
    models = {"helpful": proxy, "harmless": common.world(seed) / "rm-harmless"}
    criteria = [
        {"name": name, "proxy": {"model": str(models[name])}, "operator": "bon(4)", "weight": 0.5}
        for name in common.CRITERIA
    ]
    overrides = [
        f"objective.criteria={json.dumps(criteria)}",
        f"trainer.learning_rate={setting.learning_rate!r}",
        f"trainer.beta={setting.beta!r}",
    ]
    name = f"iama-weak-{proxy.parent.name}-lr{setting.learning_rate:g}-beta{setting.beta:g}"
    return common.Job(name, seed, overrides, steps=steps)


def _folder(seed: int, member: int, weakness: Weakness) -> Path:
    """Named by all that decides the members, so that what is there is never another's."""
    stamp = json.loads((common.world(seed) / STAMP).read_text(encoding="utf-8"))
    name = digest([stamp, asdict(replace(weakness, num_members=0)), DECISIVE, MANY_SURE])[:8]
    return common.FOLDER / "weak" / name / f"helpful-{seed}-{member}"


def _fit_all(seed: int, home: Path, folders: Sequence[Path], weakness: Weakness) -> None:
    for member, folder in enumerate(folders):
        if not folder.is_dir():
            fit_member(seed, home, member, folder, weakness)
