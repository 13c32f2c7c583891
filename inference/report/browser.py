"""A page in the reader's browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from iama.errors import RunError


def open_page(path: Path) -> None:
    """Show a page; raises `RunError` where no browser can be started, e.g. on a machine without a screen."""
    try:
        shown = webbrowser.open(path.resolve().as_uri())
    except webbrowser.Error:
        shown = False
    if not shown:
        raise RunError(f"--open found no browser here: open {str(path)!r} yourself, or copy it to where there is one")
