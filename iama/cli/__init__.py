"""Command line: `iama generate | pool | score | merge | evaluate | report | export | standardise`.

A thin leaf: every command imports what it needs when it runs, so that `iama --help` is instant.
"""

from iama.cli import evaluate, export, generate, pools
from iama.cli.app import app, main

__all__ = ["app", "evaluate", "export", "generate", "main", "pools"]
