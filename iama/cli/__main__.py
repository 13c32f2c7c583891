"""`python -m iama.cli`: the command line."""

from iama.cli import main

main()
