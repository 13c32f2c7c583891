"""Files that the pages show are files that the commands take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.schema import Strict, validate
from iama.config.serving import ServeConfig
from trainers.control import check_kl
from trainers.run.plan import trainer_fields

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        ("start/your-model.md", TrainingConfig),
        ("guides/evaluate.md", EvaluationConfig),
        ("guides/serve.md", ServeConfig),
    ],
)
def test_the_first_file_of_a_page_is_one(page: str, cls: type[Strict]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    block = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[0]
    config = validate(yaml.safe_load(block), cls, page)
    if isinstance(config, TrainingConfig):
        check_kl(config.kl, trainer_fields(config)["beta"])


def test_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DOCS.rglob("*") if path.suffix in {".svg", ".png"}}
    assert sum(sizes.values()) <= 600_000, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def test_pages_of_the_first_rooms_fit_three_screens() -> None:
    pages = [path for room in ("start", "guides", "methods", "design") for path in (DOCS / room).glob("*.md")]
    assert {path.name: n for path in pages if (n := len(path.read_text(encoding="utf-8").splitlines())) > 155} == {}
