"""What mkdocs calls while it builds the site: the menu of folders, and the public names of the packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.site import reference

MARKER = "<!-- generated: python -->"
"""Where the page of public names has them."""


def on_config(config: Any) -> Any:
    """Put a folder's pages where the menu names the folder, and pages that the menu forgets behind their neighbours."""
    docs = Path(config["docs_dir"])
    for entry in config["nav"]:
        ((title, value),) = entry.items()
        if isinstance(value, str) and value.endswith("/"):
            entry[title] = _pages(docs, value)
        elif isinstance(value, list):
            named = [page for item in value for page in item.values()]
            value += [page for page in _pages(docs, named[0].rpartition("/")[0]) if page not in named]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the public names where a page wants them, for mkdocstrings to look up."""
    return markdown.replace(MARKER, reference.python()) if MARKER in markdown else markdown


def _pages(docs: Path, folder: str) -> list[str]:
    """Pages of a folder, its index first; each has its own first heading as title."""
    pages = sorted(path.relative_to(docs).as_posix() for path in (docs / folder).rglob("*.md"))
    return sorted(pages, key=lambda page: not page.endswith("/index.md"))
