"""Command line: `iama generate | evaluate | report | export | standardise`.

A thin leaf: every command imports what it needs when it runs, so that `iama --help` is instant.
"""

from iama.cli import evaluate, export, generate
from iama.cli.app import app, main

__all__ = ["app", "evaluate", "export", "generate", "main"]
