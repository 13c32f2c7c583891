"""What the tests of the experiments share: tiny models laid out as a demo world is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import frame


@pytest.fixture
def small_world(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models where a demo world has its own; experiments find it for every seed, and write beside it."""
    folder = tmp_path / "world-3"
    folder.mkdir()
    for name, target in (("policy", tiny.policy), ("rm-helpful", tiny.reward), ("rm-harmless", tiny.other_reward)):
        (folder / name).symlink_to(target)
    for split in ("test", "validation"):
        (folder / f"prompts-{split}.jsonl").write_text(tiny.prompts.read_text())
    (folder / "stamp.json").write_text('{"sources_sha256": "0123456789abcdef"}')
    monkeypatch.setattr(frame, "world", lambda seed: folder)
    monkeypatch.setattr(frame, "FOLDER", tmp_path)
    monkeypatch.setattr(frame, "AT_ONCE", 1)
    return folder
