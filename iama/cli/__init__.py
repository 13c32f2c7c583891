"""Command line: `iama generate | pool | score | merge | tune | evaluate | report | export | standardise | distill |
train | serve | selftest | doctor | recipes`.

One file a command. Read `app` first: the command line itself, and what its commands share. Shared flags are in
`options`. Every command imports what it needs when it runs, so that `iama --help` is instant.
"""

from iama.cli import (
    distill,
    doctor,
    evaluate,
    export,
    generate,
    merge,
    pool,
    recipes,
    score,
    selftest,
    serve,
    standardise,
    train,
    tune,
)
from iama.cli.app import app, main

__all__ = [
    "app",
    "distill",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "main",
    "merge",
    "pool",
    "recipes",
    "score",
    "selftest",
    "serve",
    "standardise",
    "train",
    "tune",
]
