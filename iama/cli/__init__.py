"""Command line: `iama generate | pool | score | merge | tune | evaluate | report | export | standardise |
distill | train | recipes`.

A thin leaf: every command imports what it needs when it runs, so that `iama --help` is instant.
"""

from iama.cli import distill, evaluate, export, generate, pools, recipes, train, tune
from iama.cli.app import app, main

__all__ = ["app", "distill", "evaluate", "export", "generate", "main", "pools", "recipes", "train", "tune"]
