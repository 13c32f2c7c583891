"""`make docs` is clean: every page is in the menu, every link and anchor is there, nothing comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="pip install 'iama[docs]'")
ROOT = Path(__file__).parents[3]
LOADED = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?https?:|<link[^>]*stylesheet[^>]*href=[\"']?https?:")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "configs/mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*call, "-d", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pages = [path for path in tmp_path.rglob("*.html") if path.name != "404.html"]
    assert {path.relative_to(tmp_path).with_suffix(".md") for path in pages} == {
        path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")
    }
    assert not [path.name for path in pages if LOADED.search(path.read_text(encoding="utf-8"))]
